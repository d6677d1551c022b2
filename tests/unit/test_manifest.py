"""Manifests: lines are checked, clips are decoded where they should be, and what cannot be used is skipped."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from refalign_ext.backbone import WAN_CONFIGS, WanVAE
from refalign_ext.data import video
from refalign_ext.data.manifest import ManifestSource, Row, read_manifest
from refalign_ext.data.video import read_clip

SIZE = (64, 48)


def render(path: Path, frames: int, size: tuple[int, int] = SIZE, codec: str = "libx264") -> Path:
    """A clip whose frame n shows the eight bits of n as black and white bars."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            stream.options = {"g": "12", "bf": "2", "crf": "10"}
        for index in range(frames):
            bits = np.unpackbits(np.array([index], np.uint8)) * 255
            pixels = np.broadcast_to(bits.repeat(size[0] // 8)[None, :, None], (size[1], size[0], 3))
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"))
            )
        container.mux(stream.encode())
    return path


def frame_numbers(clip: torch.Tensor) -> list[int]:
    """Which frames of a rendered clip these are."""
    bars = clip.mean(dim=(0, 2)).unflatten(-1, (8, -1)).mean(-1) > 0  # [T, 8]
    return np.packbits(bars.numpy(), axis=1)[:, 0].tolist()


def line(**changes: object) -> str:
    row = {"id": "a", "video": "a.mp4", "prompt": "a dog", "references": ["a.png"], **changes}
    return json.dumps({key: value for key, value in row.items() if value is not None})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (20, 30), "red").save(tmp_path / "a.png")
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "b.png")
    return tmp_path


def rows_of(folder: Path, *lines: str) -> list[Row]:
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return read_manifest(folder / "manifest.jsonl")


def source_of(rows: list[Row], seed: int = 0) -> ManifestSource:
    def encode(videos: list[torch.Tensor]) -> list[torch.Tensor]:
        return [video.mean(dim=(2, 3), keepdim=True) for video in videos]

    return ManifestSource(rows, (32, 32), 5, encode, lambda images: images.flatten(2)[:, :, :4], seed)


def test_rows_are_read_with_byte_order_mark_blank_lines_and_separators_in_text(folder: Path) -> None:
    lines = [line(prompt="one\u2028two", extra=1), "", line(id="b", references=["a.png", "b.png"])]
    escaped = "\ufeff" + "\n".join(lines) + "\r\n"
    for text in (escaped, escaped.replace("\\u2028", "\u2028")):
        (folder / "m.jsonl").write_text(text, encoding="utf-8")
        first, second = read_manifest(folder / "m.jsonl")
        assert first == Row("a", folder / "a.mp4", "one\u2028two", (folder / "a.png",))
        assert second.references == (folder / "a.png", folder / "b.png")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object"),
        (line(id=None), "'id' is missing"),
        (line(id=3), "'id' is missing, empty or not a string"),
        (line(prompt="  "), "'prompt' is missing"),
        (line(video=""), "'video' is missing"),
        (line(references="a.png"), "'references' is missing or not a list"),
        (line(references=[1]), "'references' is missing or not a list"),
        (line(references=[]), "0 references; 1 to 8"),
        (line(references=["a.png"] * 9), "9 references; 1 to 8"),
        (line(video="../a.mp4"), "'../a.mp4' lies outside"),
        (line(references=["/etc/passwd"]), "'/etc/passwd' lies outside"),
        (line(references=["link/a.png"]), "'link/a.png' lies outside"),
        (line(video="a\0.mp4"), "is not a file name"),
        (line(id="first"), "'first' is already used in line 1"),
    ],
)
def test_a_bad_line_is_named(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, bad: str, message: str
) -> None:
    (folder / "link").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(ValueError, match=r"manifest\.jsonl, line 3: ") as error:
        rows_of(folder, line(id="first"), "", bad)
    assert message in str(error.value)


def test_a_missing_empty_or_binary_manifest_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="no such manifest"):
        read_manifest(folder / "none.jsonl")
    with pytest.raises(ValueError, match="has no rows"):
        rows_of(folder, "", " ")
    (folder / "manifest.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_manifest(folder / "manifest.jsonl")


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_consecutive_frames_from_anywhere(folder: Path, name: str) -> None:
    path = render(folder / name, 60, codec="mpeg4" if name.endswith("avi") else "libx264")
    for share, first in ((0.0, 0), (0.2, 10), (0.5, 25), (0.999, 50), (1.0, 51)):
        clip = read_clip(path, 9, SIZE, share)
        assert clip.shape == (3, 9, 48, 64)
        assert clip.dtype == torch.float32
        assert clip.abs().max() <= 1
        assert frame_numbers(clip) == list(range(first, first + 9))


def test_only_what_is_needed_is_scaled_and_files_without_times_are_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = render(folder / "a.mp4", 240)
    fitted, original = [], video._fitted
    monkeypatch.setattr(video, "_fitted", lambda *given: fitted.append(1) or original(*given))
    by_seeking = read_clip(path, 9, SIZE, 0.8)
    assert len(fitted) == 9
    monkeypatch.setattr(video, "_decode_from", lambda *given: None)
    by_counting = read_clip(path, 9, SIZE, 0.8)
    assert len(fitted) == 18
    assert torch.equal(by_seeking, by_counting)
    assert frame_numbers(by_seeking) == list(range(184, 193))


def test_scaled_and_cropped_around_the_centre(folder: Path) -> None:
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 255  # only the centre is white
    path = folder / "wide.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 120, 40, "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    assert read_clip(path, 5, (16, 16)).min() > 0.5
    wide = read_clip(path, 5, (48, 16))
    assert wide[..., :12].max() < -0.8 and wide[..., 20:28].min() > 0.8


def test_what_cannot_be_decoded_is_an_error_that_names_the_file(folder: Path) -> None:
    path = render(folder / "a.mp4", 12)
    with pytest.raises(ValueError, match=r"a\.mp4: 12 frames, 13 are needed"):
        read_clip(path, 13, (32, 32))
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with av.open(str(folder / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    for name in ("text.mp4", "empty.mp4", "cut.mp4", "sound.wav", "none.mp4"):
        with pytest.raises(ValueError, match=f"{name}: cannot be decoded"):
            read_clip(folder / name, 5, (32, 32))


def test_every_row_comes_once_per_epoch_and_positions_decide(folder: Path) -> None:
    for name in "abcd":
        render(folder / f"{name}.mp4", 20)
    rows = rows_of(folder, *(line(id=name, video=f"{name}.mp4") for name in "abcd"))
    source = source_of(rows)
    names = [sample.name for sample in source.samples(0, range(12))]
    assert [sorted(names[start : start + 4]) for start in (0, 4, 8)] == [list("abcd")] * 3
    assert names[:4] != names[4:8] or names[4:8] != names[8:]
    again = source_of(rows)
    later = again.samples(5, range(6, 8))
    first = source.samples(0, range(6, 8))
    for one, other in zip(first, later, strict=True):
        assert one.name == other.name
        assert torch.equal(one.latents, other.latents)
    assert [s.name for s in source_of(rows, seed=1).samples(0, range(12))] != names


def test_bad_clips_are_skipped_counted_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    render(folder / "good.mp4", 20)
    render(folder / "short.mp4", 4)
    (folder / "text.mp4").write_text("not a video")
    (folder / "bad.png").write_text("not a picture")
    rows = rows_of(
        folder,
        line(id="good", video="good.mp4"),
        line(id="short", video="short.mp4"),
        line(id="text", video="text.mp4"),
        line(id="absent", video="absent.mp4"),
        line(id="picture", video="good.mp4", references=["a.png", "bad.png"]),
    )
    with caplog.at_level(logging.WARNING):
        source = source_of(rows)
        assert set(source.bad) == {"absent"}
        samples = source.samples(0, range(10))
        source.samples(1, range(10))
    assert {sample.name for sample in samples} == {"good"}
    assert set(source.bad) == {"short", "text", "absent", "picture"}
    assert len(caplog.records) == 4  # once per clip
    assert "skipping clip" in caplog.text and "(4 skipped so far)" in caplog.text
    assert "4 frames, 5 are needed" in source.bad["short"]
    assert "bad.png" in source.bad["picture"]


def test_nothing_usable_is_an_error(folder: Path) -> None:
    (folder / "text.mp4").write_text("not a video")
    rows = rows_of(folder, line(id="a", video="text.mp4"), line(id="b", video="none.mp4"))
    with pytest.raises(
        ValueError, match="none of the 2 clips can be used; the last: .*cannot be decoded|none.mp4"
    ):
        source_of(rows).samples(0, range(1))
    rows = rows_of(folder, line(id="a"), line(id="b", references=["none.png"]))
    with pytest.raises(
        ValueError, match=r"no clip of the manifest has all its files: 3 are missing: .*a\.mp4.*none"
    ):
        source_of(rows)


def test_a_real_size_goes_through_a_vae(folder: Path) -> None:
    render(folder / "a.mp4", 12, size=(256, 144))
    task = WAN_CONFIGS["r2v-tiny"]
    vae = WanVAE(config={**task.vae, "dim": 4})
    source = ManifestSource(
        rows_of(folder, line(references=["a.png", "b.png"])), (160, 96), 9, vae.encode, None, 0
    )
    (sample,) = source.samples(0, range(1))
    assert sample.latents.shape == (16, 3, 24, 40)
    assert sample.references.shape == (16, 2, 24, 40)
    assert sample.features is None
    assert not sample.latents.requires_grad
    assert torch.isfinite(sample.latents).all() and sample.references.std() > 0
