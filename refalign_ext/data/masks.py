"""Masks as COCO run lengths, through pycocotools.

A mask [h, w] is read column by column; `counts` alternates the lengths of runs outside and inside of the mask, outside
first. The compressed form (public format of cocodataset/cocoapi, `maskApi.c`) writes each length, from the fourth on as
its difference to the length two before, in groups of five bits with the lowest first: character 48 + bits, plus 32 if
another group follows; bit 16 of the last group is the sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from pycocotools import mask as coco

from refalign_ext.errors import shortened
from refalign_ext.references import MAX_PIXELS

_FIRST_CHARACTER = 48
_MOST_GROUPS = 7  # 35 bits; lengths are at most MAX_PIXELS, so longer numbers are damage


@dataclass(frozen=True)
class RunLengthMask:
    """One mask as run lengths; an instance that exists is well formed.

    Runs of length 0 are accepted wherever they stand; `encode` writes one at most, in front.

    Attributes:
        size: (height, width) in pixels, in this order.
        counts: the compressed string or the plain lengths, kept as given.
    """

    size: tuple[int, int]
    counts: str | tuple[Annotated[int, Meta(ge=0, le=MAX_PIXELS)], ...]

    def __post_init__(self) -> None:
        height, width = self.size
        if min(height, width) < 1 or height * width > MAX_PIXELS:
            raise ValueError(
                f"the size of a mask is [height, width], both above 0, of {MAX_PIXELS // 1_000_000} megapixels at most, "
                f"got {shortened(self.size)}"
            )
        runs, total = self.runs, height * width
        is_wrong = (runs < 0) | (runs > total)
        if is_wrong.any():
            number = int(np.argmax(is_wrong))
            raise ValueError(f"run {number} of the mask has {runs[number]} of {total} pixels")
        # pycocotools does not look: fewer pixels than the size says would decode to memory that nobody wrote.
        if runs.sum() != total:
            raise ValueError(f"the runs of the mask add up to {runs.sum()} of {height}x{width} pixels")

    @property
    def runs(self) -> np.ndarray:
        """Lengths [n] int64, the first one outside of the mask."""
        return _lengths(self.counts) if isinstance(self.counts, str) else np.array(self.counts, np.int64)


def parse_mask(entry: object) -> RunLengthMask:
    """The mask of a COCO entry `{"size": [h, w], "counts": ...}`; other keys, such as `score`, are not looked at."""
    try:
        return msgspec.convert(entry, RunLengthMask)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise ValueError(f"not a mask: {error}") from None


def decode(mask: RunLengthMask) -> np.ndarray:
    """The mask as booleans [h, w]."""
    # pycocotools' own warns with numpy 2, and copies once more.
    height, width = mask.size
    return np.repeat(np.arange(mask.runs.size) % 2 == 1, mask.runs).reshape(width, height).T


def encode(pixels: np.ndarray) -> RunLengthMask:
    """Compressed run lengths of a mask [h, w] (boolean, or integers that are 0 outside)."""
    assert pixels.ndim == 2 and pixels.dtype.kind in "bui"
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
    """Intersection over union of masks of one size, 0 to 1; 0 if both are empty."""
    assert first.size == second.size
    if not area(first) or not area(second):
        return 0.0
    return float(coco.iou([_coco(first)], [_coco(second)], [0])[0, 0])


def _coco(mask: RunLengthMask) -> dict[str, Any]:
    """A mask as pycocotools takes it: compressed, and without runs of length 0, which its boxes do not understand."""
    height, width = mask.size
    if not mask.runs[1:].all():
        return coco.encode(np.asfortranarray(decode(mask), np.uint8))
    if isinstance(mask.counts, str):
        return {"size": [height, width], "counts": mask.counts.encode("ascii")}
    return coco.frPyObjects({"size": [height, width], "counts": list(mask.counts)}, height, width)


@lru_cache(maxsize=64)  # a converter meets each mask when it reads, joins and writes its clip
def _lengths(text: str) -> np.ndarray:
    """Run lengths [n] int64 of a compressed string; they may be negative if the string is damaged."""
    codes = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - _FIRST_CHARACTER
    if not codes.size or codes.min() < 0 or codes.max() > 63:
        raise ValueError(f"the counts of the mask are not characters '0' to 'o': {shortened(text)}")
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
    values.setflags(write=False)  # they are kept
    return values
