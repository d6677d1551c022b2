"""Damaged input of every kind: it is refused with a ValueError, or skipped, and nothing else ever happens."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from refalign_ext.data.masks import decode, encode, parse_mask
from refalign_ext.data.rows import ManifestReader
from refalign_ext.data.video import probe, read_clip
from refalign_ext.references import load_image
from tests.mutations import damage, distort

FRAMES, SIZE = 10, (32, 24)


def video_bytes(tmp_path: Path, name: str, codec: str, pixel_format: str = "yuv420p") -> bytes:
    path, rng = tmp_path / name, np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"g": "4"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, pixel_format
        for _ in range(FRAMES):
            pixels = rng.integers(256, size=(SIZE[1], SIZE[0], 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def picture_bytes(format_name: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, format_name)
    return stream.getvalue()


def full_row(number: int) -> dict:
    mask = encode(np.pad(np.ones((4, 5), bool), 3))
    return {
        "id": f"clip-{number}",
        "source": "opens2v",
        "group_id": "group",
        "video": {
            "path": "clips/a.mp4",
            "start_frame": 0,
            "end_frame": 9,
            "fps": 8.0,
            "width": 32,
            "height": 24,
            "crop_xyxy": [2, 2, 30, 22],
        },
        "prompt": "A dog runs.",
        "prompt_alt": ["A brown dog runs."],
        "scores": {"aesthetic": 5.0},
        "subjects": [
            {
                "subject_id": "1",
                "phrase": "a dog",
                "cls": "dog",
                "kind": "object",
                "target": {"frame": 0, "bbox_xyxy": [3, 3, 8, 7], "box_space": "cropped_frame"},
                "refs": [
                    {
                        "pair": "regular",
                        "video": {"path": "clips/a.mp4", "end_frame": 9},
                        "frame": 0,
                        "box_space": "frame",
                        "bbox_xyxy": [3, 3, 8, 7],
                        "mask_rle": {"size": list(mask.size), "counts": mask.counts},
                        "bg": "white",
                        "scores": {"gme": 0.7},
                    },
                    {"pair": "cross", "image": "refs/a.png", "source_id": "clip-7"},
                ],
            }
        ],
        "meta": {"from": "a test"},
    }


def refused(work: Callable[[], object]) -> bool:
    """Whether it ended in a ValueError that says something; anything else but success fails the test."""
    try:
        work()
    except ValueError as error:
        assert str(error).strip()
        return True
    return False


def test_rows_of_damaged_manifests(tmp_path: Path) -> None:
    rng, path = random.Random(1), tmp_path / "data.jsonl"
    whole = b"".join(json.dumps(full_row(number)).encode() + b"\n" for number in range(4))
    outcomes = []
    for _ in range(150):
        path.write_bytes(damage(whole, rng))
        with ManifestReader(path) as rows:
            outcomes += [refused(lambda row=row: rows[row]) for row in range(len(rows))]
    assert True in outcomes and False in outcomes


def test_distorted_rows(tmp_path: Path) -> None:
    rng, path = random.Random(2), tmp_path / "data.jsonl"
    outcomes = []
    for number in range(400):
        path.write_text(json.dumps(distort(full_row(number), rng)) + "\n")
        with ManifestReader(path) as rows:
            outcomes.append(refused(lambda: rows[0]))
    assert True in outcomes and False in outcomes


def test_distorted_masks() -> None:
    rng, mask = random.Random(3), encode(np.random.default_rng(0).random((12, 9)) < 0.5)
    whole = {"size": list(mask.size), "counts": mask.counts}
    outcomes = [refused(lambda: decode(parse_mask(distort(whole, rng)))) for _ in range(200)]
    for _ in range(200):
        counts = damage(mask.counts.encode(), rng).decode("latin-1")
        outcomes.append(refused(lambda counts=counts: decode(parse_mask({**whole, "counts": counts}))))
    assert True in outcomes


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "ffv1"), ("a.webm", "libvpx-vp9"), ("a.avi", "mjpeg")]
)
def test_damaged_videos(tmp_path: Path, name: str, codec: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    rng, path = random.Random(4), tmp_path / f"damaged-{name}"
    whole = video_bytes(tmp_path, name, codec, "yuvj420p" if codec == "mjpeg" else "yuv420p")
    outcomes = []
    for _ in range(40):
        path.write_bytes(damage(whole, rng))
        outcomes.append(refused(lambda: probe(path)))

        def read() -> None:
            clip = read_clip(path, 5, (16, 16), 0.5)
            assert clip.shape == (3, 5, 16, 16) and torch.isfinite(clip).all()

        outcomes.append(refused(read))
    assert True in outcomes


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("JPEG", "RGB"),
        ("WEBP", "RGB"),
        ("TIFF", "L"),
        ("GIF", "P"),
        ("BMP", "RGB"),
    ],
)
def test_damaged_pictures(tmp_path: Path, name: str, mode: str) -> None:
    rng, path, whole = random.Random(5), tmp_path / "picture", picture_bytes(name, mode)
    outcomes = []
    for _ in range(40):
        path.write_bytes(damage(whole, rng))
        outcomes.append(refused(lambda: load_image(path)))
    assert True in outcomes
