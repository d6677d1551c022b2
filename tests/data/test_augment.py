"""Augmentation: on white, nothing of the subject lost, varied in every way listed, the same for the same draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refalign_ext.data.clip_set import open_clip_set
from refalign_ext.data.hashing import keyed_generator
from refalign_ext.data.manifest_file import write_manifest
from refalign_ext.data.pixels import from_uint8, load_reference, to_uint8
from refalign_ext.data.sampling.augment import augment
from refalign_ext.data.sampling.sample_spec import Bucket, ReferenceSpec, Sampling
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan
from refalign_ext.references import letterbox, reference_to_tensor

BUCKET = Bucket(64, 48, 9)


def subject(size: tuple[int, int] = (60, 40)) -> Image.Image:
    """Red on the left, blue on the right, right up to the edges."""
    image = Image.new("RGB", size, (200, 40, 40))
    image.paste((40, 40, 200), (size[0] // 2, 0, *size))
    return image


def variants(image: Image.Image, count: int = 100) -> list[Image.Image]:
    return [augment(image, keyed_generator(0, "augment", number)) for number in range(count)]


@pytest.fixture(scope="module")
def varied() -> list[Image.Image]:
    return variants(subject((120, 80)), 200)


def kinds(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Where it is red and where it is blue."""
    pixels = np.asarray(image).astype(int)
    return pixels[..., 0] > pixels[..., 2] + 40, pixels[..., 2] > pixels[..., 0] + 40


def test_the_same_draws_give_the_same_picture_and_others_another() -> None:
    first, again = ([image.tobytes() for image in variants(subject(), 20)] for _ in range(2))
    assert first == again and len(set(first)) == 20


def test_nothing_of_the_subject_is_lost_and_all_around_is_white(varied: list[Image.Image]) -> None:
    for image in varied:
        red, blue = kinds(image)
        # Shears and rotations keep areas to within tan(10 degrees) squared; a crop would take more.
        assert red.sum() + blue.sum() == pytest.approx(120 * 80, rel=0.09)
        assert red.sum() == pytest.approx(blue.sum(), rel=0.09)
        pixels = np.asarray(image).min(-1)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert edge.min() > 130  # no edge runs through it
        assert pixels[[0, 0, -1, -1], [0, -1, 0, -1]].min() >= 240  # a blur may reach a corner
        assert 0.25 < (pixels < 250).mean() < 1


def test_half_are_mirrored_and_all_are_turned_scaled_and_moved(varied: list[Image.Image]) -> None:
    mirrored, angles, scales, places = [], [], [], []
    for image in varied:
        red, blue = kinds(image)
        centres = [np.array([points.mean() for points in np.nonzero(mask)]) for mask in (red, blue)]
        difference = centres[1] - centres[0]
        mirrored.append(difference[1] < 0)
        angles.append(np.degrees(np.arctan2(difference[0], abs(difference[1]))))
        rows, columns = np.nonzero(red | blue)
        scales.append(max(np.ptp(rows) / image.height, np.ptp(columns) / image.width))
        places.append((rows.min() / image.height, columns.min() / image.width))
    assert 0.38 < np.mean(mirrored) < 0.62
    assert np.std(angles) > 5 and np.abs(angles).max() < 30
    assert min(scales) < 0.75 and max(scales) > 0.93 and max(scales) <= 1
    assert np.std(places, axis=0).min() > 0.03


def test_colours_change_but_white_and_black_hardly() -> None:
    def mean(color: tuple[int, int, int]) -> np.ndarray:
        """Of the middle of each variant."""
        pictures = variants(Image.new("RGB", (60, 40), color))
        boxes = [(x // 2 - 4, y // 2 - 4, x // 2 + 4, y // 2 + 4) for x, y in (p.size for p in pictures)]
        return np.array([np.asarray(p.crop(box)).mean((0, 1)) for p, box in zip(pictures, boxes)])

    assert mean((255, 255, 255)).min() == 255
    assert mean((0, 0, 0)).max() < 60
    colours = mean((200, 100, 60))
    assert colours.std(0).min() > 8
    # Neither brightness alone nor one channel alone: ratios of channels vary too.
    assert (colours[:, 1] / colours[:, 0]).std() > 0.02


def test_some_are_blurred() -> None:
    row = np.tile(np.array([0, 255], np.uint8).repeat(8), 20)
    stripes = Image.fromarray(np.broadcast_to(row, (200, len(row)))).convert("RGB")
    contrast = []
    for varied in variants(stripes, 60):
        grey = np.asarray(varied.convert("L")).astype(float)
        contrast.append(np.abs(np.diff(grey, axis=1)).max())
    assert 0.15 < np.mean(np.array(contrast) < 120) < 0.45


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    subject((300, 200)).save(tmp_path / "a.png")
    refs = (Reference("regular", image="a.png"), Reference("cross", image="a.png"))
    clips = [
        Clip(name, "custom", VideoSpan("a.mp4"), "p", (Subject("1", refs=refs), Subject("2", refs=refs)))
        for name in ("one", "two")
    ]
    write_manifest(tmp_path / "m.jsonl", clips)
    return tmp_path / "m.jsonl"


def test_a_reference_follows_from_its_clip_and_its_number(folder: Path) -> None:
    clips, sampling = open_clip_set(folder), Sampling((BUCKET,))

    def load(row: int, *choice: int | None, settings: Sampling = sampling) -> bytes:
        pixels = load_reference(clips, row, clips[row], ReferenceSpec(*choice), BUCKET, settings)
        assert pixels.shape == (3, 48, 64) and pixels.dtype == torch.float32
        assert torch.equal(from_uint8(to_uint8(pixels)), pixels)
        return pixels.numpy().tobytes()

    assert load(0, 0, 0, 5) == load(0, 0, 0, 5)
    different = [(0, 0, 0, 5), (0, 0, 0, 6), (1, 0, 0, 5), (0, 1, 0, 5), (0, 0, 1, 5), (0, 0, 0, None)]
    assert len({load(*choice) for choice in different}) == 6
    assert load(0, 0, 0, 5) != load(0, 0, 0, 5, settings=Sampling((BUCKET,), seed=1))
    # Other settings that do not concern it change nothing.
    assert load(0, 0, 0, 5) == load(
        0, 0, 0, 5, settings=Sampling((BUCKET,), cross_pairs=0.9, clip_variants=3)
    )


def test_a_reference_as_it_is_is_letterboxed_and_no_more(folder: Path) -> None:
    clips = open_clip_set(folder)
    found = load_reference(clips, 0, clips[0], ReferenceSpec(0, 1, None), BUCKET, Sampling((BUCKET,)))
    expected = reference_to_tensor(letterbox(Image.open(folder.parent / "a.png"), BUCKET.size))
    assert torch.equal(found, expected)
    assert (found[:, 0] == 1).all() and (found[:, -1] == 1).all()


def test_levels_are_kept_exactly() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert to_uint8(torch.tensor([[-1.5, -1.0], [1.0, 1.5]])).tolist() == [[0, 0], [255, 255]]
