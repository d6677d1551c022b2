"""Boxes in the coordinate systems that data sets use, mapped to the frame once and only once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

BOX_SPACES = ("frame", "cropped_frame", "long768")
LONG_SIDE = 768  # of the frames that Phantom-Data's boxes refer to; smaller frames were not enlarged
BOX_TOLERANCE = 1.0  # pixels that a box may protrude by rounding; it is clamped

Box = tuple[float, float, float, float]  # x0, y0, x1, y1


class BoxProblem(str, Enum):
    """Why a box cannot be used; a converter counts the rows it drops under these names."""

    NOT_FINITE = "box_not_finite"
    EMPTY = "box_empty"
    NEGATIVE = "box_negative"
    BEYOND_WIDTH = "box_beyond_width"
    BEYOND_HEIGHT = "box_beyond_height"
    CROP_BEYOND_FRAME = "crop_beyond_frame"


def lies_in_frame(box: Sequence[float], frame_size: tuple[int, int]) -> bool:
    """Whether (x0, y0, x1, y1) is not empty and lies in a frame of (width, height)."""
    return 0 <= box[0] < box[2] <= frame_size[0] and 0 <= box[1] < box[3] <= frame_size[1]


def box_in_frame(
    box: Sequence[float],
    space: str,
    frame_size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    declared_size: tuple[int, int] | None = None,
) -> Box | BoxProblem:
    """Maps a box to pixels of the whole, uncropped frame, or says what is wrong with it.

    Up to `BOX_TOLERANCE` pixels of `space` beyond an edge are rounding and are clamped. Boxes that protrude further
    cannot be recovered and are refused.

    Args:
        box: (x0, y0, x1, y1) in pixels of `space`.
        space: "frame"; "cropped_frame", whose origin is the corner of `crop`; or "long768", the whole frame scaled
            down, never up, to a long side of 768 pixels (Phantom-Data).
        frame_size: (width, height) of the whole frame in pixels.
        crop: (x0, y0, x1, y1) in pixels of the whole frame; only "cropped_frame" uses it.
        declared_size: (width, height) that the data set gives for the video, where its boxes come from; only "long768"
            uses it: copies of a video often have another size. None: `frame_size`.
    """
    assert space in BOX_SPACES and min(frame_size) > 0 and len(box) == 4
    size = frame_size
    left, top, scale = 0.0, 0.0, 1.0
    if space == "cropped_frame":
        if not lies_in_frame(crop, frame_size):
            return BoxProblem.CROP_BEYOND_FRAME
        left, top, size = crop[0], crop[1], (crop[2] - crop[0], crop[3] - crop[1])
    elif space == "long768":
        size = declared_size or frame_size
        scale = max(1.0, max(size) / LONG_SIDE)
    width, height = size
    x0, y0, x1, y1 = box
    if not all(math.isfinite(value) for value in box):
        return BoxProblem.NOT_FINITE
    if x0 >= x1 or y0 >= y1:
        return BoxProblem.EMPTY
    if min(x0, y0) < -BOX_TOLERANCE:
        return BoxProblem.NEGATIVE
    if x1 > width / scale + BOX_TOLERANCE:
        return BoxProblem.BEYOND_WIDTH
    if y1 > height / scale + BOX_TOLERANCE:
        return BoxProblem.BEYOND_HEIGHT
    x0, x1 = (left + min(max(value * scale, 0.0), width) for value in (x0, x1))
    y0, y1 = (top + min(max(value * scale, 0.0), height) for value in (y0, y1))
    if x0 >= x1 or y0 >= y1:  # what lay within the tolerance beyond an edge is nothing once it is clamped
        return BoxProblem.EMPTY
    if space == "long768":
        across, down = frame_size[0] / width, frame_size[1] / height
        return x0 * across, y0 * down, x1 * across, y1 * down
    return x0, y0, x1, y1
