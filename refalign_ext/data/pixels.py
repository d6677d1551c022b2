"""Pixels of a sample: the frames of a clip variant and the picture of a reference.

Pixels lie on the 256 levels that files store: a loader can pass them between processes as bytes, and what is computed
from them before training equals what training would have computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refalign_ext.data.crop import read_reference
from refalign_ext.data.decoding import read_clip
from refalign_ext.data.hashing import keyed_generator
from refalign_ext.data.sampling.augment import augment
from refalign_ext.data.sampling.sample_spec import Bucket, ReferenceSpec, Sampling
from refalign_ext.data.schema import Clip
from refalign_ext.references import letterbox, reference_to_tensor

if TYPE_CHECKING:
    from refalign_ext.data.clip_set import ClipSet

_CLIPS, _AUGMENTATIONS = 2, 3  # set random numbers apart from all others


def video_uint8(
    clip_set: ClipSet, row: int, clip: Clip, bucket: Bucket, clip_variant: int, sampling: Sampling
) -> Tensor:
    """The frames of one variant of a clip: [3, T, H, W] uint8.

    Where it starts follows from the seed, the clip's id and the number of the variant.
    """
    return to_uint8(
        read_clip(
            clip_set.media(row, clip.video.path),
            bucket.frames,
            bucket.size,
            float(keyed_generator(sampling.seed, _CLIPS, clip.id, clip_variant).random()),
            fps=sampling.fps,
            stride=sampling.stride if sampling.fps is None else None,
            span=clip.video,
        )
    )


def load_reference(
    clip_set: ClipSet, row: int, clip: Clip, spec: ReferenceSpec, bucket: Bucket, sampling: Sampling
) -> Tensor:
    """One reference, augmented if the spec says so, letterboxed on white: [3, H, W] float32 in [-1, 1].

    How it is augmented follows from the seed, the clip's id and the spec.
    """
    reference = clip.subjects[spec.subject].refs[spec.reference]
    image = read_reference(clip_set, row, reference)
    if spec.augmentation is not None:
        # What follows costs time by the pixel, and more of them than the model sees are not needed.
        image.thumbnail(bucket.size, reducing_gap=3.0)
        key = (clip.id, spec.subject, spec.reference, spec.augmentation)
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


def from_uint8(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]; `to_uint8` gives them back."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def _planes(pixels: Tensor) -> Tensor:
    return pixels.reshape(-1, *pixels.shape[-2:])
