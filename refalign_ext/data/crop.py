"""A reference's picture: cut out of an image file or a frame of a video, as its manifest row says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from refalign_ext.data.boxes import Box, BoxProblem, box_in_frame, lies_in_frame
from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.masks import decode
from refalign_ext.data.media_source import Media
from refalign_ext.data.schema import Reference, Target
from refalign_ext.references import load_image


class CropError(ValueError):
    """Why a reference cannot be cut.

    Attributes:
        reason: one of a few words to count it under, such as "file_missing", "unreadable" or "box_beyond_width".
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return CropError, (str(self), self.reason)


class FrameMemory:
    """Keeps the frame decoded last: references of one clip mostly come from the same one."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._frame: np.ndarray | None = None

    def read(self, media: Media, reference: Reference) -> np.ndarray:
        """The whole frame [H, W, 3] uint8 that a reference of the video `media` is in; it may not be changed."""
        from refalign_ext.data.decoding import read_frame

        frame, share, span = reference.frame, reference.frame_frac, reference.video
        key = (str(media), frame, share, span)
        if key != self._key:
            self._frame = read_frame(media, frame=frame, frame_share=share, span=span)
            self._key = key
        return self._frame


def read_reference(
    clip_set: ClipSet, row: int, reference: Reference, frames: FrameMemory | None = None
) -> Image.Image:
    """The picture of a reference of row `row`: RGB, upright, not yet scaled.

    Of a video one frame is decoded, with those back to its key frame. The span's crop applies first, then the box,
    mapped to the frame once, then what lies outside of the mask becomes white unless `bg` is "raw".

    Args:
        frames: give the same one for all references of a row, and none of its frames is decoded twice in a row.

    Raises:
        CropError: (a ValueError) naming the row and what is wrong.
    """
    place = clip_set.place(row)
    name = reference.image if reference.video is None else reference.video.path
    try:
        media = clip_set.media(row, name)
    except ValueError as error:
        raise CropError(str(error), "file_missing") from None
    try:
        if reference.video is not None:
            frame = (frames or FrameMemory()).read(media, reference)
        else:
            frame = np.asarray(load_image(media))
    except ValueError as error:
        raise CropError(f"{place}: {error}", "unreadable") from error
    try:
        return Image.fromarray(_cut(frame, reference))
    except CropError as error:
        raise CropError(f"{place}: {name}: {error}", error.reason) from None


def _cut(frame: np.ndarray, reference: Reference) -> np.ndarray:
    """Cuts a picture out of a whole frame [H, W, 3]: the box widened to whole pixels, then white outside of the mask."""
    height, width = frame.shape[:2]
    crop = None if reference.video is None else reference.video.crop_xyxy
    if crop is not None and not lies_in_frame(crop, (width, height)):
        message = f"crop {list(crop)} does not lie in the frame of {width}x{height} pixels"
        raise CropError(message, BoxProblem.CROP_BEYOND_FRAME.value)
    x0, y0, x1, y1 = _box(reference, (width, height), crop)
    inside = (slice(math.floor(y0), math.ceil(y1)), slice(math.floor(x0), math.ceil(x1)))
    if reference.mask_rle is None or reference.bg == "raw":
        return np.ascontiguousarray(frame[inside])
    mask = mask_in_frame(reference, (width, height), crop)[inside]
    if not mask.any():
        raise CropError("the mask is empty inside of the box: the reference would be all white", "mask_empty")
    return np.where(mask[..., None], frame[inside], np.uint8(255))


def _box(reference: Reference, size: tuple[int, int], crop: tuple[int, int, int, int] | None) -> Box:
    """The part of the whole frame that shows the reference."""
    left, top, right, bottom = crop or (0, 0, *size)
    if reference.bbox_xyxy is None:
        return left, top, right, bottom
    declared = None if reference.video is None else reference.video.size
    box = box_in_frame(reference.bbox_xyxy, reference.box_space, size, crop, declared)
    what = f"box {list(reference.bbox_xyxy)} ({reference.box_space})"
    if isinstance(box, BoxProblem):
        raise CropError(
            f"{what} cannot be used in a frame of {size[0]}x{size[1]} pixels: {box.value}", box.value
        )
    box = (max(box[0], left), max(box[1], top), min(box[2], right), min(box[3], bottom))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise CropError(f"{what} lies outside of the crop {list(crop)}", "box_outside_crop")
    return box


def mask_in_frame(
    region: Reference | Target, size: tuple[int, int], crop: tuple[int, int, int, int] | None
) -> np.ndarray:
    """The mask of a region as booleans [H, W] of the whole frame.

    Args:
        size: (width, height) of the whole frame in pixels; crop: the part of it that is used, which lies in it.

    Raises:
        CropError: (a ValueError) if the mask does not belong to this frame.
    """
    if region.box_space == "long768":
        raise CropError("a mask cannot be given in long768: use frame or cropped_frame", "mask_space")
    left, top, right, bottom = crop if region.box_space == "cropped_frame" else (0, 0, *size)
    expected = (bottom - top, right - left)
    if region.mask_rle.size != expected:
        raise CropError(
            f"the mask is {list(region.mask_rle.size)} (height, width), its {region.box_space} {list(expected)}",
            "mask_size",
        )
    pixels = np.zeros((size[1], size[0]), bool)
    pixels[top:bottom, left:right] = decode(region.mask_rle)
    return pixels
