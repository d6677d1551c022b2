"""How long a clip must be to be trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Length:
    """A training clip: `frames`, taken at `fps` frames per second, or every `stride`-th one if that is None.

    Raises:
        ValueError: naming the flag that is out of range.
    """

    frames: int
    fps: float | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"--frames {self.frames}: a clip has at least one frame")
        if self.stride < 1:
            raise ValueError(f"--stride {self.stride}: it has to be at least 1")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"--fps {self.fps}: it has to be above 0")
        if self.fps is not None and self.stride > 1:
            raise ValueError(
                f"--fps {self.fps} and --stride {self.stride} exclude each other: give one of them"
            )

    def __str__(self) -> str:
        if self.fps is not None:
            return f"{self.frames} frames at {self.fps:g} fps"
        return f"{self.frames} frames" + (f" at stride {self.stride}" if self.stride > 1 else "")

    def possible(self, frames: int, fps: float) -> int:
        """How many frames a video of `frames` at `fps` gives; the last one stands for half a step after its time."""
        return int(possible_frames(frames, fps, self.fps, self.stride))

    def fits(self, frames: int, fps: float) -> bool:
        """Whether a video of `frames` at `fps` is long enough."""
        return self.possible(frames, fps) >= self.frames


def possible_frames(frames: ArrayLike, rates: ArrayLike, fps: float | None, stride: int) -> np.ndarray:
    """How many frames videos [n] of a steady rate give at `fps`, or every `stride`-th one: [n] int64, as `read_clip` counts."""
    frames, rates = np.asarray(frames, np.int64), np.asarray(rates, np.float64)
    if fps is None:
        return (frames - 1) // stride + 1
    with np.errstate(divide="ignore", invalid="ignore"):
        possible = np.floor((frames - 0.5) * (fps / rates) + 1e-6) + 1
    # Nothing tells for how long a single frame stands.
    return np.where(frames == 1, 1, np.where((rates > 0) & (frames > 0), possible, 0)).astype(np.int64)
