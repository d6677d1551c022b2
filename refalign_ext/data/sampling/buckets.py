"""Buckets: the few shapes that clips of all sizes and lengths are brought to, and which clip goes to which."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from refalign_ext.data.length import possible_frames
from refalign_ext.data.sampling.sample_spec import Bucket, Sampling


def make_buckets(
    size: tuple[int, int],
    frames: Sequence[int],
    stride: tuple[int, int, int],
    aspect_ratios: Sequence[float] = (),
) -> tuple[Bucket, ...]:
    """Every aspect ratio with every number of frames, all of about the area of the task's own size.

    Args:
        size: the task's (width, height) in pixels, which is always one of them.
        stride: (frames, rows, columns) of pixels that become one token: sizes are multiples of the last two, and
            frames are multiples of the first plus 1.
        aspect_ratios: widths over heights.

    Raises:
        ValueError: for a number of frames, a size or a ratio that is not possible.
    """
    if any(count < 1 or (count - 1) % stride[0] for count in frames):
        raise ValueError(
            f"bucket_frames is {tuple(frames)}: give numbers that are a multiple of {stride[0]} plus 1, such as 81,49"
        )
    if size[0] % stride[2] or size[1] % stride[1]:
        raise ValueError(f"size {size[0]}x{size[1]}: it must divide by {stride[2]}x{stride[1]} pixels")
    sizes = [size]
    for ratio in aspect_ratios:
        if not 0.1 <= ratio <= 10:
            raise ValueError(f"bucket_ratios has {ratio}: a width over a height, from 0.1 to 10")
        width = math.sqrt(size[0] * size[1] * ratio)
        columns, rows = round(width / stride[2]), round(width / ratio / stride[1])
        sizes.append((max(columns, 1) * stride[2], max(rows, 1) * stride[1]))
    counts = sorted(set(frames), reverse=True)
    return tuple(Bucket(*size, count) for size in dict.fromkeys(sizes) for count in counts)


def assign(
    widths: np.ndarray, heights: np.ndarray, frames: np.ndarray, rates: np.ndarray, sampling: Sampling
) -> np.ndarray:
    """Which bucket each clip [n] goes to: the longest that it fills, of the nearest aspect ratio; -1: it fills none."""
    lengths = possible_frames(frames, rates, sampling.fps, sampling.stride)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.log(widths.astype(np.float64) / heights)
    best = np.full(len(lengths), -1, np.int64)
    best_length = np.zeros(len(lengths), np.int64)
    best_distance = np.full(len(lengths), np.inf)
    for number, bucket in enumerate(sampling.buckets):
        distance = np.abs(ratios - math.log(bucket.width / bucket.height))
        is_better = (bucket.frames > best_length) | (
            (bucket.frames == best_length) & (distance < best_distance)
        )
        take = (lengths >= bucket.frames) & is_better
        best[take], best_length[take], best_distance[take] = number, bucket.frames, distance[take]
    return best
