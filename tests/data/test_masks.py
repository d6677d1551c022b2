"""Run-length masks against slow loops, strings made by hand and one that pycocotools wrote; references cut with them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from refalign_ext.data.masks import (
    RunLengthMask,
    area,
    bounding_box,
    decode,
    encode,
    iou,
    parse_mask,
)


def slow_lengths(text: str) -> list[int]:
    """The format read one character at a time."""
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    return lengths


def slow_string(lengths: list[int]) -> str:
    text = ""
    for index, length in enumerate(lengths):
        value = length - lengths[index - 2] if index > 2 else length
        while True:
            bits, value = value & 31, value >> 5
            if value == (-1 if bits & 16 else 0):
                text += chr(48 + bits)
                break
            text += chr(48 + 32 + bits)
    return text


def slow_pixels(size: tuple[int, int], lengths: list[int]) -> np.ndarray:
    pixels = np.zeros(size, bool)
    position = 0
    for index, length in enumerate(lengths):
        for _ in range(length):
            pixels[position % size[0], position // size[0]] = index % 2 == 1
            position += 1
    assert position == pixels.size
    return pixels


def with_plain_lengths(mask: RunLengthMask) -> RunLengthMask:
    return RunLengthMask(mask.size, tuple(mask.runs.tolist()))


def disc(height: int, width: int, y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def random_mask(rng: np.random.Generator, size: tuple[int, int] | None = None) -> np.ndarray:
    height, width = size or tuple(int(side) for side in rng.integers(1, 40, 2))
    kind = rng.integers(5)
    if kind == 0:
        return rng.random((height, width)) < rng.random()
    if kind == 1:
        return np.full((height, width), bool(rng.integers(2)))
    if kind == 2:
        return disc(height, width, rng.random() * height, rng.random() * width, rng.random() * 20)
    pixels = np.zeros((height, width), bool)
    y, x = rng.integers(height), rng.integers(width)
    pixels[y : y + 1 + rng.integers(height), x : x + 1 + rng.integers(width)] = True
    return pixels


@pytest.mark.parametrize(
    ("rows", "counts", "text"),
    [
        # One column: 2 outside, 3 inside, 1 outside.
        (["0", "0", "1", "1", "1", "0"], (2, 3, 1), "231"),
        # Starts inside: a first run of length 0.
        (["1"], (0, 1), "01"),
        # Column by column: 0 1 | 1 1, so 1 outside and 3 inside.
        (["01", "11"], (1, 3), "13"),
        # A run of length 0 in between is legal: 2 outside, 1 inside, 0 outside, 1 (written as 1 - 1) inside.
        (["01", "01"], (2, 1, 0, 1), "2100"),
        # 15 is the largest in one character; 16 has the bit of the sign and needs a second one.
        (["0" * 15], (15,), "?"),
        (["0" * 16], (16,), "`0"),
        # 40 = 8 + 32 * 1: 48 + 8 + 32 is 'X', then 48 + 1 is '1'.
        (["0" * 40], (40,), "X1"),
        # The fourth run is written as a difference: 1 - 3 = -2, in five bits 30, which has the bit of the sign: 48 + 30 is 'N'.
        (["0111001"], (1, 3, 2, 1), "132N"),
    ],
)
def test_strings_made_by_hand(rows: list[str], counts: tuple[int, ...], text: str) -> None:
    pixels = np.array([[character == "1" for character in row] for row in rows])
    for form in (counts, text):
        mask = RunLengthMask(pixels.shape, form)
        assert np.array_equal(decode(mask), pixels)
        assert area(mask) == pixels.sum()
    if 0 not in counts[1:]:
        assert encode(pixels).counts == text
        assert tuple(encode(pixels).runs.tolist()) == counts


def test_string_of_pycocotools() -> None:
    text = "_h0;S14M2M4M2O0O2N2O0O2O00000000000000000001N101N2N101N3L3N3LSl0"
    mask = parse_mask({"size": [48, 64], "counts": text, "score": [0.5]})
    pixels = disc(48, 64, 20, 30, 15)
    assert np.array_equal(decode(mask), pixels)
    assert encode(pixels).counts == text
    assert bounding_box(mask) == (16, 6, 45, 35)


def test_random_masks_agree_with_slow_loops() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        pixels = random_mask(rng)
        packed = encode(pixels)
        plain = with_plain_lengths(packed)
        assert np.array_equal(slow_pixels(pixels.shape, list(plain.counts)), pixels)
        assert packed.counts == slow_string(list(plain.counts))
        assert tuple(slow_lengths(packed.counts)) == plain.counts == tuple(packed.runs.tolist())
        for mask in (plain, packed):
            decoded = decode(mask)
            assert decoded.dtype == bool and np.array_equal(decoded, pixels)
            assert area(mask) == pixels.sum()
            rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if rows.size else None
            assert bounding_box(mask) == box


def test_large_masks_need_several_characters() -> None:
    pixels = np.zeros((3000, 4000), bool)
    pixels[:, 1999:2001] = True
    mask = encode(pixels)
    assert mask.runs.tolist() == [5_997_000, 6000, 5_997_000]
    assert mask.counts == slow_string(mask.runs.tolist())
    assert np.array_equal(decode(mask), pixels)


def test_iou_agrees_with_pixels() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        size = tuple(int(side) for side in rng.integers(1, 30, 2))
        first, second = random_mask(rng, size), random_mask(rng, size)
        union = (first | second).sum()
        expected = (first & second).sum() / union if union else 0.0
        assert iou(encode(first), with_plain_lengths(encode(second))) == pytest.approx(expected, abs=1e-12)
    # Runs of length 0 change nothing.
    assert bounding_box(RunLengthMask((1, 4), (0, 0, 1, 2, 1))) == (1, 0, 3, 1)
    assert iou(RunLengthMask((1, 4), (1, 1, 0, 1, 1)), RunLengthMask((1, 4), (0, 0, 1, 2, 1))) == 1.0


@pytest.mark.parametrize(
    ("size", "counts", "message"),
    [
        ([2, 2], "5", "has 5 of 4 pixels"),
        ([2, 2], [1, 2], "add up to 3 of 2x2 pixels"),
        ([2, 2], "", "characters '0' to 'o'"),
        ([2, 2], "2 2", "characters '0' to 'o'"),
        ([2, 2], "2é", "characters '0' to 'o'"),
        ([2, 2], "\ud800", "characters '0' to 'o'"),
        ([2, 2], "2`", "cut off"),
        ([2, 2], "4" + "`" * 9 + "0", "more than 7 characters"),
        ([2, 2], "`" * 6 + "1", "of 4 pixels"),
        ([2, 2], "5O", "run 0 of the mask has 5 of 4 pixels"),
        ([2, 2], [5, -1], "counts"),
        ([2, 2], [10**30], "counts"),
        ([2, 2], [True, 3], "counts"),
        ([2, 2], {"a": 1}, "counts"),
        ([2, 0], "0", "above 0"),
        ([2.0, 2], "4", "size"),
        ("22", "4", "size"),
        ([10**6, 10**6], "4", "megapixels"),
    ],
)
def test_malformed_masks_are_refused(size: object, counts: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mask({"size": size, "counts": counts})


@pytest.mark.parametrize("entry", [None, [], "4", {"size": [2, 2]}, {"counts": "4"}])
def test_other_objects_are_no_masks(entry: object) -> None:
    with pytest.raises(ValueError, match="not a mask"):
        parse_mask(entry)


def test_damaged_strings_give_masks_or_value_errors() -> None:
    rng = np.random.default_rng(2)
    good = encode(disc(48, 64, 20, 30, 15)).counts
    refused = 0
    for _ in range(500):
        text = list(good)
        for _ in range(rng.integers(1, 4)):
            position = int(rng.integers(len(text)))
            text[position : position + int(rng.integers(3))] = [chr(int(rng.integers(33, 127)))]
        try:
            mask = parse_mask({"size": [48, 64], "counts": "".join(text)})
        except ValueError:
            refused += 1
            continue
        assert slow_lengths(mask.counts) == mask.runs.tolist()
        assert decode(mask).shape == (48, 64)
    assert refused > 400


def test_masks_compare_by_what_they_say_and_travel_to_workers() -> None:
    mask = encode(disc(20, 20, 9, 9, 5))
    copy = pickle.loads(pickle.dumps(mask))
    assert copy == mask and hash(copy) == hash(mask) and np.array_equal(decode(copy), decode(mask))
