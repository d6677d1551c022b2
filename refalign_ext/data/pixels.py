"""Pixels of a choice: the frames of a cut and the picture of a reference, the same for whoever asks for the same.

Pixels lie on the 256 levels that files store: a loader can pass them between processes as bytes, and what is computed
from them before training equals what training would have computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refalign_ext.data.decoding import read_clip
from refalign_ext.data.hashing import keyed_generator
from refalign_ext.data.materialise.reference import read_reference
from refalign_ext.data.sampling.augment import augment
from refalign_ext.data.sampling.choice import Bucket, ReferenceChoice, Sampling
from refalign_ext.data.schema import Clip
from refalign_ext.data.spans import span_arguments
from refalign_ext.references import letterbox, reference_to_tensor

if TYPE_CHECKING:
    from refalign_ext.data.clip_set import ClipSet

_CUTS, _AUGMENTATIONS = 2, 3  # set random numbers apart from all others


def video_uint8(
    clip_set: ClipSet, row: int, clip: Clip, bucket: Bucket, cut: int, sampling: Sampling
) -> Tensor:
    """The frames of one temporal cut: [3, T, H, W] uint8.

    Where it starts follows from the seed, the clip's id and the number of the cut.

    Raises:
        ValueError: if the file is missing, cannot be decoded or is too short.
    """
    return to_uint8(
        read_clip(
            clip_set.media(row, clip.video.path),
            bucket.frames,
            bucket.size,
            float(keyed_generator(sampling.seed, _CUTS, clip.id, cut).random()),
            fps=sampling.fps,
            stride=sampling.stride if sampling.fps is None else None,
            crop_xyxy=clip.video.crop_xyxy,
            **span_arguments(clip.video),
        )
    )


def load_reference(
    clip_set: ClipSet, row: int, clip: Clip, choice: ReferenceChoice, bucket: Bucket, sampling: Sampling
) -> Tensor:
    """One reference, augmented if the choice says so, letterboxed on white: [3, H, W] float32 in [-1, 1].

    How it is augmented follows from the seed, the clip's id and the choice.

    Raises:
        ValueError: if it cannot be read or cut out.
    """
    reference = clip.subjects[choice.subject].refs[choice.reference]
    image = read_reference(clip_set, row, reference)
    if choice.augmentation is not None:
        # What follows costs time by the pixel, and more of them than the model sees are not needed.
        image.thumbnail(bucket.size, reducing_gap=3.0)
        key = (clip.id, choice.subject, choice.reference, choice.augmentation)
        image = augment(image, keyed_generator(sampling.seed, _AUGMENTATIONS, *key))
    # One layout in memory: sums over pixels of another one differ in their last bits.
    return reference_to_tensor(letterbox(image, bucket.size)).contiguous()


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], [..., H, W], as the nearest of 256 levels, uint8."""
    levels = torch.empty(pixels.shape, dtype=torch.uint8)
    # Plane by plane it stays in the processor's cache: four times as fast.
    for plane, target in zip(_planes(pixels), _planes(levels), strict=True):
        target.copy_(plane.add(1).mul_(127.5).round_().clamp_(0, 255))
    return levels


def from_levels(levels: Tensor) -> Tensor:
    """Levels, uint8, as float32 pixels in [-1, 1]; `to_uint8` gives them back."""
    return levels.to(torch.float32).div_(127.5).sub_(1.0)


def _planes(pixels: Tensor) -> Tensor:
    return pixels.reshape(-1, *pixels.shape[-2:])
