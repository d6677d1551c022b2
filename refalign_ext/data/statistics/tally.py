"""Counting millions of rows in bounded memory: names exactly up to a cap, numbers exactly up to a number of values."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

MAX_NAMES = 20_000
MAX_VALUES = 4_096
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_EXACT = 17  # digits that tell any two floats apart


class Tally:
    """How often each name came; once `MAX_NAMES` different ones are known, new ones are counted together."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.others = 0

    def add(self, name: str, times: int = 1) -> None:
        """Counts `name`."""
        if name in self.counts or len(self.counts) < MAX_NAMES:
            self.counts[name] += times
        else:
            self.others += times

    def merge(self, other: Tally) -> None:
        """Adds what another one counted later in the same stream."""
        for name, times in other.counts.items():
            self.add(name, times)
        self.others += other.others

    @property
    def total(self) -> int:
        """Everything counted."""
        return sum(self.counts.values()) + self.others

    def most(self, number: int | None = None) -> list[tuple[str, int]]:
        """The most frequent names with their counts; equal ones by name."""
        ranked = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return ranked if number is None else ranked[:number]

    def to_dict(self, number: int | None = None) -> dict[str, int]:
        """The most frequent names and, if there are more, what is left under "others"."""
        shown = dict(self.most(number))
        rest = self.total - sum(shown.values())
        return shown | ({"others": rest} if rest else {})


class Distribution:
    """Numbers, kept as counts of values: exact up to `MAX_VALUES` different ones, then rounded to fewer digits.

    With three digits left, which is what millions of different durations come to, quantiles are right to 0.5%. Count,
    mean, smallest and largest stay exact.
    """

    def __init__(self) -> None:
        self.values: Counter[float] = Counter()
        self.digits = _EXACT
        self.count, self.sum = 0, 0.0
        self.smallest, self.largest = math.inf, -math.inf

    def add(self, value: float) -> None:
        """Counts one finite number."""
        self.count += 1
        self.sum += value
        self.smallest, self.largest = min(self.smallest, value), max(self.largest, value)
        self.values[self._rounded(value)] += 1
        self._shrink()

    def merge(self, other: Distribution) -> None:
        """Adds what another one counted."""
        self.count += other.count
        self.sum += other.sum
        self.smallest, self.largest = min(self.smallest, other.smallest), max(self.largest, other.largest)
        self.values.update(other.values)
        if other.digits != self.digits:
            self.digits = min(self.digits, other.digits)
            self._round_all()
        self._shrink()

    @property
    def mean(self) -> float:
        """Arithmetic mean; NaN of nothing."""
        return self.sum / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The value below which `share` (0 to 1) of all lie, between two of them interpolated; NaN of nothing."""
        if not self.count:
            return math.nan
        values, counts = self.points()
        position = share * (self.count - 1)
        ends = np.cumsum(counts)
        below, above = (values[np.searchsorted(ends, index, side="right")] for index in _neighbours(position))
        value = below + (above - below) * (position - math.floor(position))
        return float(min(max(value, self.smallest), self.largest))

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Values ascending [n] float64 and how often each came [n] int64."""
        ranked = sorted(self.values.items())
        values = np.array([value for value, _ in ranked], np.float64)
        return values, np.array([times for _, times in ranked], np.int64)

    def to_dict(self) -> dict[str, Any]:
        """Count, mean and quantiles, ready for JSON."""
        if not self.count:
            return {"count": 0}
        quantiles = {f"{share:g}": round(self.quantile(share), 6) for share in QUANTILES}
        return {"count": self.count, "mean": round(self.mean, 6), "quantiles": quantiles}

    def _rounded(self, value: float) -> float:
        return value if self.digits >= _EXACT else float(f"{value:.{self.digits - 1}e}")

    def _shrink(self) -> None:
        while len(self.values) > MAX_VALUES and self.digits > 1:
            self.digits = 4 if self.digits == _EXACT else self.digits - 1
            self._round_all()

    def _round_all(self) -> None:
        values, self.values = self.values, Counter()
        for value, times in values.items():
            self.values[self._rounded(value)] += times


def _neighbours(position: float) -> tuple[int, int]:
    return math.floor(position), math.ceil(position)
