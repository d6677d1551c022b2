"""Decoding: the right frames of any codec, container and clock, upright and in true colours, or an error naming the file."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from refalign_ext.data import decoding as video
from refalign_ext.data import video_file
from refalign_ext.data.schema import VideoSpan
from refalign_ext.data.video_file import probe

SIZE = (64, 48)
RATE = 8
ONE = 1 << 16  # 1.0 in a display matrix
X264 = {"g": "12", "bf": "3", "crf": "10", "preset": "veryfast"}
X265 = {"crf": "12", "preset": "ultrafast", "x265-params": "log-level=none:keyint=12:bframes=3"}
VP9 = {"g": "12", "crf": "20", "deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1"}


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """[H, W] uint8: above the eight bits of `number` as bars, below white on the left and black on the right."""
    width, height = size
    pixels = np.zeros((height, width), np.uint8)
    bits = np.unpackbits(np.array([number], np.uint8)) * 255
    pixels[: height // 2] = np.resize(bits.repeat(-(-width // 8)), width)
    pixels[height // 2 :, : width // 2] = 255
    return pixels


def numbers(clip: torch.Tensor) -> list[int]:
    """Which frames these are; they have to be upright."""
    height, width = clip.shape[2:]
    grey = clip.mean(0)  # [T, H, W]
    assert grey[:, height // 2 + 2 :, : width // 2 - 2].min() > 0.6
    assert grey[:, height // 2 + 2 :, width // 2 + 2 :].max() < -0.6
    bar = -(-width // 8)
    bars = [grey[:, 4 : height // 2 - 4, i * bar + 2 : (i + 1) * bar - 2].mean((1, 2)) > 0 for i in range(8)]
    return np.packbits(torch.stack(bars, 1).numpy(), axis=1)[:, 0].tolist()


def stored(grey: np.ndarray, pix_fmt: str) -> av.VideoFrame:
    """A frame of colourless pixels in limited range, 16 to 235, except full range for grey and yuvj formats."""
    is_full = pix_fmt.startswith(("gray", "yuvj"))
    bits = 10 if "10" in pix_fmt else 8
    levels = grey.astype(np.float64) if is_full else 16 + grey * (219 / 255)
    frame = av.VideoFrame(grey.shape[1], grey.shape[0], pix_fmt)
    for index, plane in enumerate(frame.planes):
        rows = np.full((plane.height, plane.width), 128.0) if index else levels
        values = np.rint(rows * 2 ** (bits - 8)).astype(np.uint16 if bits > 8 else np.uint8)
        line = np.zeros((plane.height, plane.line_size), np.uint8)
        line[:, : values.shape[1] * values.itemsize] = np.ascontiguousarray(values).view(np.uint8)
        plane.update(line.tobytes())
    return frame


def render(
    path: Path,
    pictures: Sequence[np.ndarray] | int,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    color_range: int | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """A clip of these pictures (a number: that many numbered ones), at `times` in milliseconds or 8 per second."""
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    pictures = [picture(number) for number in range(pictures)] if isinstance(pictures, int) else pictures
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=RATE, options=dict(X264 if options is None else options))
        stream.height, stream.width = pictures[0].shape
        stream.pix_fmt = pix_fmt
        if color_range is not None:
            stream.codec_context.color_range = color_range
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, grey in enumerate(pictures):
            frame = stored(grey, pix_fmt)
            if color_range is not None:
                frame.color_range = color_range
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read_clip(path: Path, frames: int, size: tuple[int, int], *share: float, **options: Any) -> torch.Tensor:
    """`decoding.read_clip` of a part of the file."""
    taken = {name: options.pop(name) for name in ("fps", "stride") if name in options}
    return video.read_clip(path, frames, size, *share, **taken, span=VideoSpan(path.name, **options))


def turn(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Writes a display matrix (a, b, c, d) into the track header of an mp4."""
    data = bytearray(path.read_bytes())
    a, b, c, d = matrix
    start = data.index(b"tkhd") + 44
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files that had to be decoded from the start."""
    names: list[str] = []
    original = video._decode_counting
    monkeypatch.setattr(
        video, "_decode_counting", lambda path, *rest: names.append(path.name) or original(path, *rest)
    )
    return names


FORMATS = [
    ("h264.mp4", "libx264", "yuv420p", X264),
    ("open.mkv", "libx264", "yuv420p", X264 | {"x264-params": "open-gop=1"}),
    ("refresh.mkv", "libx264", "yuv420p", X264 | {"x264-params": "intra-refresh=1", "bf": "0"}),
    ("h264.ts", "libx264", "yuv420p", X264),
    ("deep.mp4", "libx264", "yuv420p10le", X264),
    ("hevc.mp4", "libx265", "yuv420p10le", X265),
    ("vp9.webm", "libvpx-vp9", "yuv420p", VP9),
    ("mpeg4.avi", "mpeg4", "yuv420p", {"g": "12"}),
    ("reordered.avi", "mpeg4", "yuv420p", {"g": "12", "bf": "2"}),
    ("motion.avi", "mjpeg", "yuvj420p", {}),
    ("grey.mkv", "ffv1", "gray", {}),
]


@pytest.mark.parametrize(("name", "codec", "pix_fmt", "options"), FORMATS, ids=[row[0] for row in FORMATS])
def test_any_frames_equal_those_of_a_full_decode(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, options: dict[str, str], counted: list[str]
) -> None:
    path = render(tmp_path / name, 50, codec, pix_fmt, options)
    everything = read_clip(path, 50, SIZE)
    assert numbers(everything) == list(range(50))
    info = probe(path)
    assert (info.width, info.height, info.frames) == (*SIZE, 50)
    assert info.fps == pytest.approx(RATE, rel=0.02)
    assert info.duration_s == pytest.approx(50 / RATE, rel=0.03)
    with av.open(str(path)) as container:
        pixels = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    naive = torch.from_numpy(np.stack(pixels)).permute(3, 0, 1, 2) / 127.5 - 1
    assert (everything - naive).abs().max() < 0.04  # deep formats are rounded differently
    for first in (0, 1, 10, 11, 12, 13, 23, 24, 37, 45):
        clip = read_clip(path, 5, SIZE, start_frame=first, end_frame=first + 5)
        assert torch.equal(clip, everything[:, first : first + 5])
    strided = read_clip(path, 7, SIZE, fps=1)
    assert torch.equal(strided, everything[:, ::8][:, :7])
    if name != "refresh.mkv":  # whose later frames cannot be decoded from any key frame but the first
        assert not counted


def test_only_from_the_key_frame_on_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[str]
) -> None:
    path = render(tmp_path / "a.mp4", 240, options=X264 | {"sc_threshold": "0"})
    sent: list[int] = []
    original = video._decode_run

    def spied(source: Iterator[av.Packet], *rest: object) -> object:
        return original((sent.append(packet.pts) or packet for packet in source), *rest)

    monkeypatch.setattr(video, "_decode_run", spied)
    delay = 6  # packets that the decoder holds back to put B-frames in order
    for first in (0, 11, 12, 100, 230):
        sent.clear()
        clip = read_clip(path, 9, SIZE, start_frame=first, end_frame=first + 9)
        assert numbers(clip) == list(range(first, first + 9))
        assert len(sent) <= first % 12 + 9 + delay
    sent.clear()
    assert numbers(read_clip(path, 8, SIZE, fps=RATE / 24)) == list(range(0, 169, 24))
    assert len(sent) <= 8 * (1 + delay)  # key frames alone, not the 168 frames between the first and the last
    assert not counted


def test_start_share_and_range_together(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", 60)
    for share, first in ((0.0, 20), (0.5, 25), (0.999, 30), (1.0, 31)):
        clip = read_clip(path, 9, SIZE, share, start_frame=20, end_frame=40)
        assert numbers(clip) == list(range(first, first + 9))
    assert numbers(read_clip(path, 5, SIZE, 1.0, fps=4, start_frame=20, end_frame=40)) == [31, 33, 35, 37, 39]
    assert numbers(read_clip(path, 60, SIZE, 1.0, fps=RATE)) == list(range(60))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_frames_at_equal_times_of_a_variable_rate(tmp_path: Path, name: str, counted: list[str]) -> None:
    times = [0, 40, 80, 120, 500, 900, 1000, 1020, 1040, 1060, 1500, 2000, 2040]
    path = render(tmp_path / name, len(times), times=times)
    info = probe(path)
    assert info.frames == len(times)
    assert info.fps == pytest.approx(12 / 2.04, rel=0.01)
    # at 0, 250, 500, ... ms; 250 is nearest to 120, 750 to 900, 1250 to 1060 and so on
    assert numbers(read_clip(path, 9, SIZE, fps=4)) == [0, 3, 4, 5, 6, 9, 10, 10, 11]
    assert numbers(read_clip(path, 5, SIZE, fps=10, start_frame=6, end_frame=12)) == [6, 9, 9, 10, 10]
    assert numbers(read_clip(path, 3, SIZE, 1.0, fps=1)) == [1, 8, 12]
    assert numbers(read_clip(path, 13, SIZE)) == list(range(13))
    with pytest.raises(ValueError, match=rf"{name}: 13 frames over 2\.06 s are 9 at 4 fps, 10 are needed"):
        read_clip(path, 10, SIZE, fps=4)
    assert not counted


def test_a_higher_rate_repeats_frames_and_an_odd_one_stays_even(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", 20)
    assert numbers(read_clip(path, 6, SIZE, fps=16)) == [0, 0, 1, 1, 2, 2]
    # at 0, 1.33, 2.67, 4, ... frames
    assert numbers(read_clip(path, 7, SIZE, fps=6)) == [0, 1, 3, 4, 5, 7, 8]


@pytest.mark.parametrize(
    ("matrix", "degrees", "undo"),
    [
        ((0, ONE, -ONE, 0), 90, lambda pixels: np.rot90(pixels, 1)),
        ((-ONE, 0, 0, -ONE), 180, lambda pixels: np.rot90(pixels, 2)),
        ((0, -ONE, ONE, 0), 270, lambda pixels: np.rot90(pixels, 3)),
        ((ONE, 0, 0, -ONE), 0, lambda pixels: pixels[::-1]),
    ],
)
def test_clips_are_turned_upright(
    tmp_path: Path, matrix: tuple[int, int, int, int], degrees: int, undo: object
) -> None:
    path = turn(render(tmp_path / "a.mp4", [undo(picture(n)) for n in range(20)]), matrix)
    with av.open(str(path)) as container:  # what FFmpeg says, counter-clockwise
        assert -next(container.decode(video=0)).rotation % 360 == degrees
    clip = read_clip(path, 5, SIZE, start_frame=7)
    assert numbers(clip) == list(range(7, 12))
    info = probe(path)
    assert (info.width, info.height) == SIZE
    lower_left = read_clip(path, 5, (32, 16), crop_xyxy=(0, 28, 32, 44))  # as it is shown
    assert lower_left[..., :29].min() > 0.9 and lower_left[..., 30:].shape[-1] == 2


@pytest.mark.parametrize("codec", ["ffv1", "mpeg4", "libvpx-vp9"])
@pytest.mark.parametrize("size", [(67, 51), (71, 48), (64, 49)])
def test_odd_sizes(tmp_path: Path, codec: str, size: tuple[int, int]) -> None:
    options = VP9 if codec == "libvpx-vp9" else {}
    path = render(tmp_path / "a.mkv", [picture(n, size) for n in range(12)], codec, options=options)
    assert (probe(path).width, probe(path).height) == size
    clip = read_clip(path, 4, size, start_frame=5)
    assert clip.shape == (3, 4, size[1], size[0])
    assert numbers(clip) == [5, 6, 7, 8]
    assert clip[:, :, -1, -1].max() < -0.7 and clip[:, :, -1, 0].min() > 0.7  # to the last row and column


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "name", "color_range", "options"),
    [
        ("libx264", "yuv420p", "a.mp4", None, X264),
        ("libx264", "yuv420p", "a.mp4", 1, X264),
        ("libx264", "yuvj420p", "a.mp4", 2, X264),
        ("libx264", "yuv420p10le", "a.mp4", None, X264),
        ("libx265", "yuv420p10le", "a.mp4", 1, X265),
        ("ffv1", "yuv444p10le", "a.mkv", 1, {}),
        ("ffv1", "gray", "a.mkv", None, {}),
        ("ffv1", "gray10le", "a.mkv", 2, {}),
    ],
)
def test_levels_of_grey_are_true(
    tmp_path: Path, codec: str, pix_fmt: str, name: str, color_range: int | None, options: dict[str, str]
) -> None:
    levels = (0, 64, 128, 191, 255)
    pictures = [np.full((48, 64), level, np.uint8) for level in levels]
    path = render(tmp_path / name, pictures, codec, pix_fmt, options, color_range=color_range)
    clip = read_clip(path, 5, SIZE)
    seen = clip.add(1).mul(127.5).mean((2, 3))  # [3, T]
    assert (seen - torch.tensor(levels)).abs().max() < 1.6
    assert seen[:, 0].max() < 0.5 and seen[:, -1].min() > 254.5


def test_grey_of_limited_range_is_stretched(tmp_path: Path) -> None:
    limited = [np.full((48, 64), level, np.uint8) for level in (16, 126, 235)]
    path = render(tmp_path / "a.mkv", limited, "ffv1", "gray", {}, color_range=1)
    seen = read_clip(path, 3, SIZE).add(1).mul(127.5).mean((0, 2, 3))
    assert (seen - torch.tensor([0.0, 128.0, 255.0])).abs().max() < 1


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le"])
def test_colours_follow_the_matrix_that_the_file_names(tmp_path: Path, pix_fmt: str) -> None:
    red = (63, 102, 240)  # BT.709, limited range
    for matrix, expected in ((1, (255, 0, 0)), (5, (233, 0, 2))):
        path = tmp_path / f"{matrix}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=RATE, options=X264)
            stream.width, stream.height, stream.pix_fmt = *SIZE, pix_fmt
            stream.codec_context.colorspace = matrix
            frame = av.VideoFrame(*SIZE, pix_fmt)
            for plane, level in zip(frame.planes, red, strict=True):
                sample = bytes([level]) if pix_fmt == "yuv420p" else (4 * level).to_bytes(2, "little")
                plane.update(sample * (plane.buffer_size // len(sample)))
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        seen = read_clip(path, 1, SIZE).add(1).mul(127.5).mean((1, 2, 3))
        assert (seen - torch.tensor(expected)).abs().max() < 4, matrix


def test_crop_is_checked_and_comes_before_scaling(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", 6)
    whole = read_clip(path, 3, SIZE)
    assert torch.equal(read_clip(path, 3, (21, 13), crop_xyxy=(7, 5, 28, 18)), whole[..., 5:18, 7:28])
    enlarged = read_clip(path, 3, (32, 32), crop_xyxy=(0, 26, 30, 48))
    assert enlarged.min() > 0.6  # the white part alone
    for crop in ((0, 0, 65, 48), (-1, 0, 5, 5), (5, 0, 5, 5), (0, 9, 5, 8), (0, 0, 64, 49)):
        with pytest.raises(ValueError, match=r"a\.mp4: crop .* does not lie in the frame of 64x48 pixels"):
            read_clip(path, 3, SIZE, crop_xyxy=crop)


def test_too_short_says_how_many_there_are(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", 12)
    for asked, message in (
        ({}, "12 frames, 13 are needed"),
        ({"start_frame": 4}, "8 frames from 4 to 12, 13 are needed"),
        ({"end_frame": 14}, "frames 0 to 14 are asked for, the file has 12"),
        ({"start_frame": 5, "end_frame": 5}, "frames 5 to 5 are asked for"),
        ({"start_frame": -1}, "frames -1 to 12 are asked for"),
        ({"fps": 4.0}, r"12 frames over 1\.44 s are 6 at 4 fps, 13 are needed"),
    ):
        with pytest.raises(ValueError, match=rf"a\.mp4: {message}"):
            read_clip(path, 13, SIZE, **asked)


def test_what_is_no_video_is_an_error_with_the_files_name(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", 30)
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    reads = (probe, lambda path: read_clip(path, 5, SIZE), lambda path: read_clip(path, 5, SIZE, fps=2))
    for name in ("text", "empty", "folder", "cut", "sound", "none"):
        for read in reads:
            with pytest.raises(ValueError, match=rf"{name}\.mp4: cannot be decoded") as error:
                read(tmp_path / f"{name}.mp4")
            assert "\n" not in str(error.value)


def test_of_a_broken_off_file_the_whole_frames_can_be_used(tmp_path: Path) -> None:
    whole = render(tmp_path / "a.mp4", 50, container_options={"movflags": "faststart"})
    data = whole.read_bytes()
    start = data.index(b"mdat")
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: start + (len(data) - start) * 2 // 3])
    there = probe(path).frames
    assert 10 < there < 45
    assert torch.equal(read_clip(path, 9, SIZE, end_frame=9), read_clip(whole, 9, SIZE, end_frame=9))
    with pytest.raises(ValueError, match=rf"cut\.mp4: {there} frames, 50 are needed"):
        read_clip(path, 50, SIZE)


def test_a_first_part_cut_away_by_an_edit_list_does_not_count(tmp_path: Path, counted: list[str]) -> None:
    path = render(tmp_path / "a.mp4", 50, options=X264 | {"bf": "0"})
    data = bytearray(path.read_bytes())
    start = data.index(b"elst") + 8  # number of entries, then length, start and speed of the only one
    entries, length, first = struct.unpack(">Iii", data[start : start + 12])
    assert entries == 1
    with av.open(str(path)) as container:
        tick = container.streams.video[0].time_base
    data[start + 4 : start + 12] = struct.pack(">ii", length * 45 // 50, first + int(5 / RATE / tick))
    path.write_bytes(data)
    assert probe(path).frames == 45
    assert numbers(read_clip(path, 45, SIZE)) == list(range(5, 50))
    assert numbers(read_clip(path, 3, SIZE, start_frame=20)) == [25, 26, 27]
    assert not counted


def test_bounds_on_what_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = render(tmp_path / "a.mp4", 6)
    monkeypatch.setattr(video_file, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(ValueError, match=r"a\.mp4: frames of 64x48 pixels; 3071 are the most"):
        read_clip(path, 3, SIZE)


def test_only_what_is_needed_is_scaled_and_files_without_times_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = render(tmp_path / "a.mp4", 240)
    fitted, original = [], video.resize_and_crop
    monkeypatch.setattr(video, "resize_and_crop", lambda *given: fitted.append(1) or original(*given))
    by_seeking = read_clip(path, 9, SIZE, 0.8)
    assert len(fitted) == 9
    monkeypatch.setattr(video, "_decode_from", lambda *given: None)
    by_counting = read_clip(path, 9, SIZE, 0.8)
    assert len(fitted) == 18
    assert torch.equal(by_seeking, by_counting)
    assert numbers(by_seeking) == list(range(184, 193))


def test_scaled_and_cropped_around_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((40, 120), np.uint8)
    pixels[:, 40:80] = 255  # only the centre is white
    path = render(tmp_path / "wide.mp4", [pixels] * 5)
    assert read_clip(path, 5, (16, 16)).min() > 0.5
    wide = read_clip(path, 5, (48, 16))
    assert wide[..., :12].max() < -0.8 and wide[..., 20:28].min() > 0.8


def test_a_cover_picture_is_not_the_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        stream = container.add_stream("libx264", rate=RATE, options=X264)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        container.mux(cover.encode(stored(np.zeros((32, 32), np.uint8), "yuvj420p")))
        container.mux(cover.encode())
        for number in range(6):
            container.mux(stream.encode(stored(picture(number), "yuv420p")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    assert probe(path).frames == 6
    assert numbers(read_clip(path, 6, SIZE)) == list(range(6))
