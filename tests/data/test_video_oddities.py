"""Videos that would be shown wrongly: refused where the colours need tone mapping, named by `data check` otherwise."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from refalign_ext.data.check.row import check_row
from refalign_ext.data.clip_set import open_clip_set
from refalign_ext.data.decoding import read_clip
from refalign_ext.data.video_file import probe

SIZE, FRAMES = (64, 48), 9


def write(
    path: Path,
    *,
    transfer: int = 1,
    aspect: Fraction | None = None,
    interlaced: bool = False,
    videos: int = 1,
) -> Path:
    options = {"preset": "ultrafast"} | ({"x264-params": "tff=1"} if interlaced else {})
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=8, options=options) for _ in range(videos)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
            stream.codec_context.color_trc = transfer
            if aspect is not None:
                stream.codec_context.sample_aspect_ratio = aspect
        for number in range(FRAMES):
            pixels = np.full((SIZE[1], SIZE[0], 3), 20 * number, np.uint8)
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
                frame.pts = number
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    return path


def findings(folder: Path, name: str) -> list[tuple[str, str, str]]:
    subject = {
        "subject_id": "1",
        "kind": "object",
        "refs": [{"pair": "regular", "video": {"path": name}, "frame_frac": 0.5}],
    }
    row = {"id": "1", "source": "custom", "video": {"path": name}, "prompt": "a", "subjects": [subject]}
    (folder / "m.jsonl").write_text(json.dumps(row) + "\n")
    return [
        (found.level, found.reason, found.message)
        for found in check_row(open_clip_set(folder / "m.jsonl"), 0)[0]
    ]


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_refused(tmp_path: Path, transfer: int, name: str) -> None:
    path = write(tmp_path / "clip.mp4", transfer=transfer)
    for read in (probe, lambda path: read_clip(path, 5, SIZE)):
        with pytest.raises(ValueError, match=rf"clip\.mp4: HDR video \({name}\).*BT\.709"):
            read(path)
    assert any(
        level == "error" and f"HDR video ({name})" in text for level, _, text in findings(tmp_path, path.name)
    )


@pytest.mark.parametrize(
    "options, told",
    [
        ({"aspect": Fraction(4, 3)}, "its pixels are not square (4:3)"),
        ({"interlaced": True}, "it is interlaced"),
        ({"videos": 2}, "it has 2 videos"),
    ],
    ids=["pixels", "interlaced", "videos"],
)
def test_what_is_shown_wrongly_is_named(tmp_path: Path, options: dict[str, object], told: str) -> None:
    path = write(tmp_path / "clip.mp4", **options)
    (oddity,) = probe(path).oddities
    assert oddity.startswith(told)
    found = [(level, reason) for level, reason, text in findings(tmp_path, path.name) if told in text]
    assert found == [("warning", "video_odd")]


def test_an_ordinary_video_has_nothing_odd(tmp_path: Path) -> None:
    for name, aspect in (("plain.mp4", None), ("square.mkv", Fraction(1))):
        assert probe(write(tmp_path / name, aspect=aspect)).oddities == ()
