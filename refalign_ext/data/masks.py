"""Masks as COCO run lengths, without pycocotools, and the references that are cut out with them.

A mask [h, w] is read column by column; `counts` alternates the lengths of runs outside and inside of the mask, outside
first. The compressed form (public format of cocodataset/cocoapi, `maskApi.c`) writes each length, from the fourth on as
its difference to the length two before, in groups of five bits with the lowest first: character 48 + bits, plus 32 if
another group follows; bit 16 of the last group is the sign.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from PIL import Image

from refalign_ext.references import MAX_PIXELS

BACKGROUNDS = ("raw", "white")

_FIRST_CHARACTER = 48
_MOST_GROUPS = 7  # 35 bits; lengths are at most MAX_PIXELS, so longer numbers are damage
_SHIFTS = 5 * np.arange(_MOST_GROUPS)


@dataclass(frozen=True)
class RunLengthMask:
    """One mask as run lengths; an instance that exists is well formed.

    Runs of length 0 are accepted wherever they stand, as pycocotools does; `encode` writes one at most, in front.

    Attributes:
        size: (height, width) in pixels, in this order.
        counts: the compressed string or the plain lengths, kept as given.

    Raises:
        ValueError: for a size that is not positive or exceeds `MAX_PIXELS`, characters outside the format, negative
            lengths, or lengths that do not add up to height x width.
    """

    size: tuple[int, int]
    counts: str | tuple[int, ...]

    def __post_init__(self) -> None:
        height, width = _checked_size(self.size)
        runs = self.runs
        if runs.size and runs.min() < 0:
            raise ValueError(f"run {int(np.argmax(runs < 0))} of the mask has a negative length")
        total = int(runs.sum())
        if total != height * width:
            raise ValueError(
                f"the runs of the mask add up to {total} pixels, its size {height}x{width} to {height * width}"
            )

    @cached_property
    def runs(self) -> np.ndarray:
        """Lengths [n] int64, the first one outside of the mask."""
        if isinstance(self.counts, str):
            return _lengths(self.counts)
        if not isinstance(self.counts, tuple) or not all(_is_length(count) for count in self.counts):
            raise ValueError(
                f"the counts of a mask are a string or integers from 0 to {MAX_PIXELS}, got {shortened(self.counts)}"
            )
        return np.array(self.counts, np.int64)

    @cached_property
    def ends(self) -> np.ndarray:
        """Where each run ends, as a position in the column-by-column order [n] int64."""
        return np.cumsum(self.runs)


def parse_mask(entry: object) -> RunLengthMask:
    """The mask of a COCO entry `{"size": [h, w], "counts": ...}`; other keys, such as `score`, are not looked at.

    Raises:
        ValueError: for anything that is not a well-formed mask.
    """
    if not isinstance(entry, Mapping) or "size" not in entry or "counts" not in entry:
        raise ValueError(f'a mask is an object {{"size": [h, w], "counts": ...}}, got {shortened(entry)}')
    size, counts = entry["size"], entry["counts"]
    size = tuple(size) if isinstance(size, (list, tuple)) else size
    if isinstance(counts, str) and isinstance(size, tuple) and all(type(side) is int for side in size):
        return _checked_mask(size, counts)
    return RunLengthMask(size, tuple(counts) if isinstance(counts, list) else counts)


@lru_cache(maxsize=64)
def _checked_mask(size: tuple[int, int], counts: str) -> RunLengthMask:
    """A converter meets each mask when it reads, joins and writes its clip; checking one takes a while."""
    return RunLengthMask(size, counts)


def decode(mask: RunLengthMask) -> np.ndarray:
    """The mask as booleans [h, w]."""
    height, width = mask.size
    inside = np.arange(mask.runs.size) % 2 == 1
    return np.repeat(inside, mask.runs).reshape(width, height).T


def encode(pixels: np.ndarray, *, compressed: bool = True) -> RunLengthMask:
    """Run lengths of a mask [h, w] (boolean, or integers that are 0 outside).

    Raises:
        ValueError: for another shape or type, or more than `MAX_PIXELS` pixels.
    """
    if pixels.ndim != 2 or pixels.dtype.kind not in "bui":
        raise ValueError(f"a mask is [h, w] of booleans or integers, got {pixels.dtype} {list(pixels.shape)}")
    height, width = _checked_size(pixels.shape)
    flat = pixels.T.reshape(-1) != 0
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]]))
    if flat[0]:
        runs = np.concatenate([[0], runs])
    return RunLengthMask((height, width), _compressed(runs) if compressed else tuple(runs.tolist()))


def area(mask: RunLengthMask) -> int:
    """Pixels inside of the mask."""
    return int(mask.runs[1::2].sum())


def bounding_box(mask: RunLengthMask) -> tuple[int, int, int, int] | None:
    """(x0, y0, x1, y1) in pixels, the ends exclusive; None for an empty mask."""
    height = mask.size[0]
    is_run = mask.runs[1::2] > 0
    first = (mask.ends - mask.runs)[1::2][is_run]
    last = mask.ends[1::2][is_run] - 1
    if not first.size:
        return None
    left, right = int(first[0] // height), int(last[-1] // height) + 1
    if (first // height != last // height).any():
        # A run that goes on in the next column holds the lowest pixel of one and the highest of the other.
        return left, 0, right, height
    return left, int((first % height).min()), right, int((last % height).max()) + 1


def iou(first: RunLengthMask, second: RunLengthMask) -> float:
    """Intersection over union, 0 to 1, computed on the runs; 0 if both masks are empty.

    Raises:
        ValueError: if the sizes differ.
    """
    if first.size != second.size:
        raise ValueError(
            f"masks of {first.size[0]}x{first.size[1]} and {second.size[0]}x{second.size[1]} pixels (height x width) "
            "cannot be compared"
        )
    stops = np.union1d(first.ends, second.ends)
    starts = np.concatenate([[0], stops[:-1]])
    # The number of runs that end at or before a position is the index of the run there; odd runs are inside.
    both = np.ones(starts.size, bool)
    for mask in (first, second):
        both &= np.searchsorted(mask.ends, starts, side="right") % 2 == 1
    intersection = int((stops - starts)[both].sum())
    union = area(first) + area(second) - intersection
    return intersection / union if union else 0.0


def cut_reference(
    frame: np.ndarray,
    box: Sequence[float] | None,
    mask: np.ndarray | None,
    background: str = "white",
) -> Image.Image:
    """Cuts a reference out of a frame: the box first, then everything outside of the mask becomes white.

    Args:
        frame: [H, W, 3] uint8.
        box: (x0, y0, x1, y1) in pixels of this frame; widened to whole pixels and clamped to the frame. None: all.
        mask: [H, W] booleans, True on the subject; may be None if `background` is "raw", which does not use it.
        background: "white" or "raw" (what the frame shows).

    Raises:
        ValueError: if shapes or types are wrong, the box has nothing in common with the frame, "white" comes
            without a mask, or the mask is empty inside of the box.
    """
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise ValueError(f"a frame is [H, W, 3] uint8, got {frame.dtype} {list(frame.shape)}")
    if background not in BACKGROUNDS:
        raise ValueError(f"unknown background {background!r}: choose one of {', '.join(BACKGROUNDS)}")
    height, width = frame.shape[:2]
    columns, rows = slice(0, width), slice(0, height)
    if box is not None:
        if len(box) != 4 or not all(math.isfinite(value) for value in box):
            raise ValueError(f"a box is four finite numbers (x0, y0, x1, y1), got {shortened(box)}")
        columns = slice(max(0, math.floor(box[0])), min(width, math.ceil(box[2])))
        rows = slice(max(0, math.floor(box[1])), min(height, math.ceil(box[3])))
    if columns.start >= columns.stop or rows.start >= rows.stop:
        raise ValueError(
            f"the box {shortened(box)} has no pixel in common with the frame of {width}x{height} pixels"
        )
    cut = frame[rows, columns]
    if background == "white":
        if mask is None:
            raise ValueError('a white background needs a mask: give one, or use background "raw"')
        if mask.dtype != bool or mask.shape != (height, width):
            raise ValueError(
                f"the mask is {mask.dtype} {list(mask.shape)}, the frame needs bool {[height, width]}"
            )
        inside = mask[rows, columns]
        if not inside.any():
            raise ValueError("the mask is empty inside of the box: the reference would be all white")
        cut = np.where(inside[..., None], cut, np.uint8(255))
    return Image.fromarray(np.ascontiguousarray(cut))


def _checked_size(size: object) -> tuple[int, int]:
    if (
        not isinstance(size, tuple)
        or len(size) != 2
        or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size)
    ):
        raise ValueError(
            f"the size of a mask is [height, width] in pixels, both above 0, got {shortened(size)}"
        )
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"a mask of {shortened(size)} has more than {MAX_PIXELS // 1_000_000} megapixels, the limit for pictures"
        )
    return size


def _is_length(count: object) -> bool:
    # Negative integers pass here and are named with their place where the mask is checked.
    return isinstance(count, int) and not isinstance(count, bool) and abs(count) <= MAX_PIXELS


def _lengths(text: str) -> np.ndarray:
    """Run lengths [n] int64 of a compressed string; they may be negative if the string is damaged."""
    try:
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - _FIRST_CHARACTER
    except UnicodeEncodeError:
        codes = np.array([-1], np.int64)
    if not codes.size:
        raise ValueError("the counts of the mask are an empty string")
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError(
            f"the counts of the mask hold characters outside of '0' (48) to 'o' (111): {shortened(text)}"
        )
    goes_on = (codes & 32) != 0
    if goes_on[-1]:
        raise ValueError("the counts of the mask end within a number: the string is cut off")
    last = np.flatnonzero(~goes_on)
    first = np.concatenate([[0], last[:-1] + 1])
    groups = last - first + 1
    if groups.max() > _MOST_GROUPS:
        raise ValueError(f"the counts of the mask hold a number of more than {_MOST_GROUPS} characters")
    places = np.arange(codes.size) - np.repeat(first, groups)
    values = np.add.reduceat((codes & 31) << (5 * places), first)
    values -= np.where(codes[last] & 16, np.int64(1) << (5 * groups), 0)
    # Differences to the length two before: the second length starts the odd sum, the third the even one.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    if np.abs(values).max() > MAX_PIXELS:
        raise ValueError(f"the counts of the mask hold a run of more than {MAX_PIXELS} pixels")
    return values


def _compressed(runs: np.ndarray) -> str:
    values = runs.astype(np.int64)
    values[3:] -= runs[1:-2]
    groups = (values[:, None] >> _SHIFTS) & 31  # [n, groups]
    rest = values[:, None] >> (_SHIFTS + 5)
    # Another group follows unless all that is left is the sign that bit 16 of this one already says.
    goes_on = np.where(groups & 16, rest != -1, rest != 0)
    used = np.concatenate([np.ones((len(values), 1), bool), goes_on[:, :-1]], 1)
    used = np.logical_and.accumulate(used, 1)
    codes = groups + _FIRST_CHARACTER + 32 * goes_on
    return codes[used].astype(np.uint8).tobytes().decode("ascii")


def shortened(value: Any) -> str:
    """A value as an error shows it: at most 60 characters."""
    with suppress(ValueError, RecursionError):  # integers too long, objects too deep
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return "a value that is too large to print"
