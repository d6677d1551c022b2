"""What is measured of a run: loss by timestep, loss spikes, speed and memory, and numbers that are not finite.

Nothing here knows other ranks: sums are handed out to be added up.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refalign_ext.atomic_io import write_json
from refalign_ext.backbone import PeakMemory

logger = logging.getLogger(__name__)


class TimestepBins:
    """Flow loss by timestep, summed up in equal bins of [0, 1000] between two log entries.

    `sums` [bins, 2] holds losses and numbers of samples, on the losses' device so that nothing waits for it.
    """

    def __init__(self, bins: int = 10, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(bins, 2, device=device)

    def add(self, timesteps: Tensor, errors: Tensor) -> None:
        """Count samples: timesteps [B] in [0, 1000] and their losses [B]."""
        bins = len(self.sums)
        index = (timesteps.detach().float() * (bins / 1000)).long().clamp(0, bins - 1)  # [B]
        errors = errors.detach().float()
        rows = torch.stack([errors, torch.ones_like(errors)], dim=1)  # [B, 2]
        self.sums.index_add_(0, index.to(self.sums.device), rows.to(self.sums.device))

    @staticmethod
    def values(sums: Tensor) -> dict[str, float]:
        """Mean loss per bin as `loss_by_timestep/0-100`, ...; empty bins are left out."""
        width = 1000 / len(sums)
        return {
            f"loss_by_timestep/{round(index * width)}-{round((index + 1) * width)}": total / count
            for index, (total, count) in enumerate(sums.tolist())
            if count
        }


class LossSpikeDetector:
    """Tells losses more than `factor` standard deviations above the mean of the last `window`; 0 turns it off.

    Spikes stay out of the statistics, so one does not hide the next; `new_level` in a row become the statistics.
    """

    def __init__(self, factor: float, window: int = 200, *, least: int = 50, new_level: int = 10) -> None:
        self.factor, self.least, self.new_level = factor, least, new_level
        self._values: deque[float] = deque(maxlen=window)
        self._spikes: list[float] = []

    def is_spike(self, loss: float) -> bool:
        """Whether this loss stands out; counts it. A loss that is not finite is neither (`NonFiniteGuard` sees to those)."""
        if not self.factor or not math.isfinite(loss):
            return False
        if len(self._values) < self.least or loss <= self._limit():
            self._spikes.clear()
            self._values.append(loss)
            return False
        self._spikes.append(loss)
        if len(self._spikes) >= self.new_level:
            self._values.clear()
            self._values.extend(self._spikes)
            self._spikes.clear()
        return True

    def _limit(self) -> float:
        mean = statistics.fmean(self._values)
        # Of equal losses the deviation is 0, and rounding would be a spike.
        return mean + self.factor * max(statistics.pstdev(self._values, mean), 1e-6 * abs(mean))


class Throughput:
    """Speed between two log entries, and peak memory. For the speed of a whole run, counts are sums over ranks.

    Without `peak_flops`, operations a second that all devices together could do, MFU is left out.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory, self._peak_flops, self._clock = PeakMemory(device), peak_flops, clock
        self._start()

    def _start(self) -> None:
        self._began, self._waited = self._clock(), 0.0
        self._steps = self._clips = self._tokens = 0
        self._flops = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block (a validation, a preview) does not count."""
        began = self._clock()
        yield
        self._began += self._clock() - began

    def step(self, clips: int, tokens: int, flops: float, *, data_wait: float = 0.0) -> None:
        """Count one optimizer step: samples, tokens without padding, FLOPs without recomputation, seconds of waiting."""
        self._steps += 1
        self._waited += data_wait
        self._clips += clips
        self._tokens += tokens
        self._flops += flops

    def values(self) -> dict[str, float]:
        """Speeds since the last call, and the peak memory so far; starts the next interval.

        `speed/data_wait` is a share of the time; `speed/mfu` a share of `peak_flops`; `memory/peak_gib` what was
        allocated on a CUDA device, elsewhere the resident set of the process.
        """
        seconds = max(self._clock() - self._began, 1e-9)
        values: dict[str, float] = {}
        if self._steps:
            values |= {
                "speed/seconds_per_step": seconds / self._steps,
                "speed/clips_per_second": self._clips / seconds,
                "speed/tokens_per_second": self._tokens / seconds,
                "speed/data_wait": min(1.0, self._waited / seconds),
            }
            if self._peak_flops:
                values["speed/mfu"] = self._flops / seconds / self._peak_flops
        if (peak := self._memory.bytes()) is not None:
            values["memory/peak_gib"] = peak / 2**30
        self._start()
        return values


def json_values(value: Any) -> Any:
    """`value` as every reader of JSON takes it: numbers that are not finite as the strings `nan`, `inf` and `-inf`."""
    if isinstance(value, Mapping):
        return {name: json_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class NonFiniteGuard:
    """Writes down steps that were skipped in the run's folder, and ends a run after `limit` in a row."""

    def __init__(self, limit: int, out: Path) -> None:
        self.limit, self.folder, self.count = limit, out / "skipped", 0

    def skipped(self, step: int, report: Mapping[str, Any], *, writes: bool) -> None:
        """Count a skipped step, which one rank writes down; FloatingPointError if it is one too many."""
        if writes:
            path = self.folder / f"step-{step:08d}.json"
            write_json(path, {"step": step, **json_values(report)}, indent=2)
            logger.warning("step %d skipped, it is not finite: %s tells its samples and losses", step, path)
        self.count += 1
        if self.count >= self.limit:
            raise FloatingPointError(
                f"{self.count} step{'s' if self.count > 1 else ''} in a row gave a loss or gradient that is not finite: "
                f"see the samples in {self.folder}, lower --learning_rate or leave them out; the last checkpoint is "
                "untouched"
            )

    def reset(self) -> None:
        """Note that a step went through."""
        self.count = 0
