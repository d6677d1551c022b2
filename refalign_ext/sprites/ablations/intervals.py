"""Means over seeds, and the paired differences between arms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, mean, stdev

# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom.
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def student_t(freedom: int) -> float:
    """The 97.5% quantile of Student's t; beyond ten degrees of freedom by Fisher's expansion, right to 0.001."""
    if freedom <= len(_STUDENT_T):
        return _STUDENT_T[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None for the error of a single value."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return mean(values), error


def paired_interval(
    first: Sequence[float], second: Sequence[float]
) -> tuple[float, float | None, float | None]:
    """Mean of `first` minus `second`, pair by pair, with its 95% interval; None for the bounds of a single pair."""
    differences = [one - other for one, other in zip(first, second, strict=True)]
    center, error = mean_and_error(differences)
    if error is None:
        return center, None, None
    half = student_t(len(differences) - 1) * error
    return center, center - half, center + half
