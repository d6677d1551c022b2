"""How long a clip must be to be trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
        if self.fps is None or frames == 1:  # nothing tells for how long a single frame stands
            return (frames - 1) // self.stride + 1
        return math.floor((frames - 0.5) * self.fps / fps + 1e-9) + 1 if frames and fps else 0

    def fits(self, frames: int, fps: float) -> bool:
        """Whether a video of `frames` at `fps` is long enough."""
        return self.possible(frames, fps) >= self.frames
