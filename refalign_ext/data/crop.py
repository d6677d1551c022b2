"""A reference's picture: cut out of an image file or a frame of a video, as its manifest row says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from refalign_ext.data.boxes import Box, BoxProblem, box_in_frame
from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.masks import cut_reference, decode
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
        """The whole frame [H, W, 3] uint8 that a reference of the video `media` is in; it may not be changed.

        Raises:
            ValueError: if it cannot be read.
        """
        from refalign_ext.data.decoding import read_frame

        key = (str(media), reference.frame, reference.frame_frac, reference.video)
        if key != self._key:
            self._key = None
            self._frame = read_frame(
                media, frame=reference.frame, frame_share=reference.frame_frac, span=reference.video
            )
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
    crop = None
    try:
        if reference.video is None:
            image = load_image(media)
            if reference.bbox_xyxy is None and reference.mask_rle is None:
                return image
            frame = np.asarray(image)
        else:
            crop = reference.video.crop_xyxy
            frame = (frames or FrameMemory()).read(media, reference)
    except ValueError as error:
        raise CropError(f"{place}: {error}", "unreadable") from error
    try:
        return _cut(frame, reference, crop)
    except CropError as error:
        raise CropError(f"{place}: {name}: {error}", error.reason) from None
    except ValueError as error:
        raise CropError(f"{place}: {name}: {error}", "not_cut") from error


def _cut(frame: np.ndarray, reference: Reference, crop: tuple[int, int, int, int] | None) -> Image.Image:
    """Cuts a picture out of a whole frame [H, W, 3]."""
    height, width = frame.shape[:2]
    if crop is not None and not (0 <= crop[0] < crop[2] <= width and 0 <= crop[1] < crop[3] <= height):
        raise CropError(
            f"crop {list(crop)} does not lie in the frame of {width}x{height} pixels",
            BoxProblem.CROP_BEYOND_FRAME.value,
        )
    box = _box(reference, (width, height), crop)
    mask = None if reference.mask_rle is None else mask_in_frame(reference, (width, height), crop)
    background = reference.bg or ("raw" if mask is None else "white")
    if mask is None:
        background = "raw"  # a picture whose background is already white
    elif background == "white" and not _inside(mask, box).any():
        raise CropError("the mask is empty inside of the box: the reference would be all white", "mask_empty")
    return cut_reference(frame, box, mask, background)


def _box(reference: Reference, size: tuple[int, int], crop: tuple[int, int, int, int] | None) -> Box | None:
    """The part of the whole frame that shows the reference; None for all of it."""
    if reference.bbox_xyxy is None:
        return crop
    declared = None if reference.video is None else reference.video.size
    box = box_in_frame(reference.bbox_xyxy, reference.box_space, size, crop, declared)
    if isinstance(box, BoxProblem):
        raise CropError(
            f"box {list(reference.bbox_xyxy)} ({reference.box_space}) cannot be used in a frame of "
            f"{size[0]}x{size[1]} pixels: {box.value}",
            box.value,
        )
    if crop is not None:
        box = (max(box[0], crop[0]), max(box[1], crop[1]), min(box[2], crop[2]), min(box[3], crop[3]))
        if box[0] >= box[2] or box[1] >= box[3]:
            raise CropError(
                f"box {list(reference.bbox_xyxy)} lies outside of the crop {list(crop)}", "box_outside_crop"
            )
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
    mask = region.mask_rle
    left, top, right, bottom = (0, 0, *size)
    if region.box_space == "cropped_frame":
        left, top, right, bottom = crop  # the schema sees to it that there is one
    if region.box_space == "long768":
        raise CropError("a mask cannot be given in long768: use frame or cropped_frame", "mask_space")
    expected = (bottom - top, right - left)
    if mask.size != expected:
        raise CropError(
            f"the mask has {mask.size[1]}x{mask.size[0]} pixels, its {region.box_space} has "
            f"{expected[1]}x{expected[0]}",
            "mask_size",
        )
    pixels = np.zeros((size[1], size[0]), bool)
    pixels[top:bottom, left:right] = decode(mask)
    return pixels


def _inside(mask: np.ndarray, box: Box | None) -> np.ndarray:
    if box is None:
        return mask
    return mask[math.floor(box[1]) : math.ceil(box[3]), math.floor(box[0]) : math.ceil(box[2])]
