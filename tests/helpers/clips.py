"""Clips with a subject whose place in every frame is known, in any codec, and the manifest rows that name it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

RATE = 8
SUBJECT, BEHIND = 120, 40  # levels of grey
BOX = (16, 12)  # width and height of the subject
ONE = 1 << 16  # 1.0 in a display matrix

_OPTIONS = {
    "libx264": {"g": "12", "bf": "3", "crf": "4", "preset": "veryfast"},
    "libx265": {"crf": "4", "preset": "ultrafast", "x265-params": "log-level=none:keyint=12"},
    "libvpx-vp9": {"g": "12", "crf": "4", "deadline": "realtime", "cpu-used": "8"},
}


def box_of(number: int) -> tuple[int, int, int, int]:
    """Where the subject is in frame `number`: x0, y0, x1, y1."""
    left, top = 8 + 2 * (number % 12), 10 + number % 5
    return left, top, left + BOX[0], top + BOX[1]


def frame(number: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """[H, W] uint8: frame `number` as it is shown."""
    pixels = np.full((size[1], size[0]), BEHIND, np.uint8)
    x0, y0, x1, y1 = box_of(number)
    pixels[y0:y1, x0:x1] = SUBJECT
    return pixels


def render(
    path: Path,
    frames: int = 40,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (64, 48),
    quarter_turns: int = 0,
    rate: int = RATE,
) -> Path:
    """A clip of the first frames; stored turned by quarters and marked to be turned back if asked for (mp4 only)."""
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=dict(_OPTIONS.get(codec, {})))
        stream.width, stream.height = size if quarter_turns % 2 == 0 else size[::-1]
        stream.pix_fmt = pix_fmt
        for number in range(frames):
            grey = np.rot90(frame(number, size), quarter_turns)
            rgb = np.ascontiguousarray(np.repeat(grey[..., None], 3, 2))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    if quarter_turns:
        matrix = {1: (0, ONE, -ONE, 0), 2: (-ONE, 0, 0, -ONE), 3: (0, -ONE, ONE, 0)}[quarter_turns]
        data = bytearray(path.read_bytes())
        start = data.index(b"tkhd") + 44
        data[start : start + 36] = struct.pack(">9i", *matrix[:2], 0, *matrix[2:], 0, 0, 0, 1 << 30)
        path.write_bytes(data)
    return path


def entry(identity: str, video: dict[str, Any], refs: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A line of a manifest with one subject."""
    subject = {"subject_id": "1", "phrase": "a box", "kind": "object", "refs": refs}
    return {
        "id": identity,
        "source": "opens2v",
        "video": video,
        "prompt": f"A grey box, {identity}.",
        "subjects": [subject],
    } | more
