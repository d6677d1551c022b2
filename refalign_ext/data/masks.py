"""Masks as COCO run lengths, through pycocotools, and the references that are cut out with them.

A mask [h, w] is read column by column; `counts` alternates the lengths of runs outside and inside of the mask, outside
first. The compressed form (public format of cocodataset/cocoapi, `maskApi.c`) writes each length, from the fourth on as
its difference to the length two before, in groups of five bits with the lowest first: character 48 + bits, plus 32 if
another group follows; bit 16 of the last group is the sign.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from PIL import Image
from pycocotools import mask as coco

from refalign_ext.errors import shortened
from refalign_ext.references import MAX_PIXELS

BACKGROUNDS = ("raw", "white")

_FIRST_CHARACTER = 48
_MOST_GROUPS = 7  # 35 bits; lengths are at most MAX_PIXELS, so longer numbers are damage


@dataclass(frozen=True)
class RunLengthMask:
    """One mask as run lengths; an instance that exists is well formed.

    Runs of length 0 are accepted wherever they stand; `encode` writes one at most, in front.

    Attributes:
        size: (height, width) in pixels, in this order.
        counts: the compressed string or the plain lengths, kept as given.

    Raises:
        ValueError: for a size that is not positive or exceeds `MAX_PIXELS`, characters outside the format, negative
            lengths, or lengths that do not add up to height x width.
    """

    size: tuple[int, int]
    counts: str | tuple[Annotated[int, Meta(ge=-MAX_PIXELS, le=MAX_PIXELS)], ...]

    def __post_init__(self) -> None:
        height, width = self.size
        if min(height, width) < 1:
            raise ValueError(
                f"the size of a mask is [height, width] in pixels, both above 0, got {self.size}"
            )
        if height * width > MAX_PIXELS:
            raise ValueError(
                f"a mask of {height}x{width} pixels exceeds the limit of {MAX_PIXELS // 1_000_000} megapixels"
            )
        runs = self.runs
        if runs.size and runs.min() < 0:
            raise ValueError(f"run {int(np.argmax(runs < 0))} of the mask has a negative length")
        # pycocotools does not look: fewer pixels than the size says would decode to memory that nobody wrote.
        if (total := int(runs.sum())) != height * width:
            raise ValueError(
                f"the runs of the mask add up to {total} pixels, its size {height}x{width} to {height * width}"
            )

    @property
    def runs(self) -> np.ndarray:
        """Lengths [n] int64, the first one outside of the mask."""
        return _lengths(self.counts) if isinstance(self.counts, str) else np.array(self.counts, np.int64)


def parse_mask(entry: object) -> RunLengthMask:
    """The mask of a COCO entry `{"size": [h, w], "counts": ...}`; other keys, such as `score`, are not looked at.

    Raises:
        ValueError: for anything that is not a well-formed mask.
    """
    if not isinstance(entry, Mapping) or "size" not in entry or "counts" not in entry:
        raise ValueError(f'a mask is an object {{"size": [h, w], "counts": ...}}, got {shortened(entry)}')
    try:
        return msgspec.convert({"size": entry["size"], "counts": entry["counts"]}, RunLengthMask)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise ValueError(f"not a mask: {error}") from None


def decode(mask: RunLengthMask) -> np.ndarray:
    """The mask as booleans [h, w]."""
    # pycocotools' own warns with numpy 2, and copies once more.
    height, width = mask.size
    return np.repeat(np.arange(mask.runs.size) % 2 == 1, mask.runs).reshape(width, height).T


def encode(pixels: np.ndarray) -> RunLengthMask:
    """Compressed run lengths of a mask [h, w] (boolean, or integers that are 0 outside).

    Raises:
        ValueError: for another shape or type, or more than `MAX_PIXELS` pixels.
    """
    if pixels.ndim != 2 or pixels.dtype.kind not in "bui":
        raise ValueError(f"a mask is [h, w] of booleans or integers, got {pixels.dtype} {list(pixels.shape)}")
    counts = coco.encode(np.asfortranarray(pixels != 0, np.uint8))["counts"] if pixels.size else b""
    return RunLengthMask(pixels.shape, counts.decode("ascii"))


def area(mask: RunLengthMask) -> int:
    """Pixels inside of the mask."""
    return int(mask.runs[1::2].sum())


def bounding_box(mask: RunLengthMask) -> tuple[int, int, int, int] | None:
    """(x0, y0, x1, y1) in pixels, the ends exclusive; None for an empty mask."""
    x, y, width, height = (int(value) for value in coco.toBbox(_coco(mask)))
    return (x, y, x + width, y + height) if area(mask) else None


def iou(first: RunLengthMask, second: RunLengthMask) -> float:
    """Intersection over union, 0 to 1; 0 if both masks are empty.

    Raises:
        ValueError: if the sizes differ.
    """
    if first.size != second.size:
        raise ValueError(
            f"masks of {first.size[0]}x{first.size[1]} and {second.size[0]}x{second.size[1]} pixels (height x width) "
            "cannot be compared"
        )
    if not area(first) or not area(second):
        return 0.0
    return float(coco.iou([_coco(first)], [_coco(second)], [0])[0, 0])


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


def _coco(mask: RunLengthMask) -> dict[str, Any]:
    """A mask as pycocotools takes it: compressed, and without runs of length 0, which its boxes do not understand."""
    height, width = mask.size
    runs = mask.runs
    if runs[1:].all():
        if isinstance(mask.counts, str):
            return {"size": [height, width], "counts": mask.counts.encode("ascii")}
        return coco.frPyObjects({"size": [height, width], "counts": list(mask.counts)}, height, width)
    return coco.encode(np.asfortranarray(decode(mask), np.uint8))


@lru_cache(maxsize=64)  # a converter meets each mask when it reads, joins and writes its clip
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
    values.setflags(write=False)  # they are kept
    return values
