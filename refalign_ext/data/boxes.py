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


def box_in_frame(
    box: Sequence[float],
    space: str,
    frame_size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    declared_size: tuple[int, int] | None = None,
) -> Box | BoxProblem:
    """Maps a box to pixels of the whole, uncropped frame.

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

    Returns:
        The box, or what is wrong with it.

    Raises:
        ValueError: for an unknown space, a frame without pixels or "cropped_frame" without a crop: errors of the
            caller, which no row causes once it is parsed.
    """
    width, height = frame_size
    if space not in BOX_SPACES:
        raise ValueError(f"unknown box space {space!r}: choose one of {', '.join(BOX_SPACES)}")
    if width < 1 or height < 1:
        raise ValueError(f"a frame of {width}x{height} pixels has no place for a box")
    if len(box) != 4:
        raise ValueError(f"a box is four numbers (x0, y0, x1, y1), got {len(box)}")
    if space == "long768" and declared_size is not None and declared_size != frame_size:
        mapped = box_in_frame(box, space, declared_size)
        if isinstance(mapped, BoxProblem):
            return mapped
        across, down = width / declared_size[0], height / declared_size[1]
        return mapped[0] * across, mapped[1] * down, mapped[2] * across, mapped[3] * down
    left, top, scale = 0.0, 0.0, 1.0
    if space == "cropped_frame":
        if crop is None:
            raise ValueError("a box in a cropped frame needs the crop")
        if not (0 <= crop[0] < crop[2] <= width and 0 <= crop[1] < crop[3] <= height):
            return BoxProblem.CROP_BEYOND_FRAME
        left, top = crop[0], crop[1]
        width, height = crop[2] - crop[0], crop[3] - crop[1]
    elif space == "long768":
        scale = max(1.0, max(width, height) / LONG_SIDE)
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
    # What lay within the tolerance beyond an edge is nothing once it is clamped.
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else BoxProblem.EMPTY
