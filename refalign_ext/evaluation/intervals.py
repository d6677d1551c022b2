"""Means over seeds or samples with their errors, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev


def student_t(freedom: int) -> float:
    """The 97.5% quantile of Student's t, to the three digits of printed tables."""
    from scipy.special import stdtrit

    return round(float(stdtrit(freedom, 0.975)), 3)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None for the error of a single value."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return mean(values), error


def paired_interval(
    first: Sequence[float], second: Sequence[float]
) -> tuple[float, float | None, float | None]:
    """Mean of `first` minus `second`, pair by pair, with its 95% interval; None for the bounds of a single pair."""
    center, error = mean_and_error([one - other for one, other in zip(first, second, strict=True)])
    if error is None:
        return center, None, None
    half = student_t(len(first) - 1) * error
    return center, center - half, center + half
