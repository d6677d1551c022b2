"""How well the tokens of different references can be told apart: numbers that go with the feature plots.

All numbers are about directions, that is, about tokens scaled to unit length: reference alignment compares by cosine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

METRICS = {
    "variance_ratio": "variance between / within references",
    "neighbor_accuracy": "nearest token is of the same reference",
    "subject_accuracy": "nearest token in other views is of the same subject",
}

Place = tuple[float, int]  # noise level and block
Numbers = dict[str, dict[str, float | None] | None]  # by the names of METRICS


@dataclass(frozen=True)
class SampleTokens:
    """One sample's tokens that count, after one block, on the CPU.

    Attributes:
        tokens: [S, D] float16 of unit length: everything here is about directions, and half the memory is enough for them.
        references, views: [S], the reference that each token belongs to and the view that shows it.
    """

    tokens: Tensor
    references: Tensor
    views: Tensor


def variance_ratio(tokens: Tensor, labels: Tensor) -> float:
    """Variance between the references' means over the variance within references: 0 for none, no upper end.

    Labels that mean nothing give about (references - 1) / (tokens - references).

    Args:
        tokens: [S, D].
        labels: [S] integers, the reference that each token belongs to.

    Raises:
        ValueError: for fewer than two references or a reference of fewer than two tokens.
    """
    unit, counts = _unit(tokens, labels)
    members = F.one_hot(labels.unique(return_inverse=True)[1], len(counts)).to(unit)  # [S, M]
    means = members.T @ unit / counts[:, None]  # [M, D]
    between = ((means - unit.mean(0)).square().sum(1) * counts).sum()
    within = (unit - members @ means).square().sum()
    return float(between / within.clamp_min(1e-12))


def neighbor_accuracy(tokens: Tensor, labels: Tensor, views: Tensor | None = None) -> tuple[float, float]:
    """How often a token's nearest other token (by cosine) has its label, and how often a random one would.

    Args:
        tokens: [S, D].
        labels: [S] integers, such as references or subjects.
        views: [S] integers; given them, only tokens of other views are looked at, so that a token cannot find its own
            picture again.

    Raises:
        ValueError: as in `variance_ratio`, or if a token has nothing to be compared with.
    """
    unit, _ = _unit(tokens, labels)
    same_label = labels[:, None] == labels
    if views is None:
        allowed = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    else:
        allowed = views[:, None] != views
    if not bool(allowed.any(1).all()):
        raise ValueError("tokens of one view only: nearest neighbours in other views need two views or more")
    nearest = (unit @ unit.T).masked_fill(~allowed, -2.0).argmax(1)
    chance = ((same_label & allowed).sum(1) / allowed.sum(1)).mean()
    return float((labels[nearest] == labels).float().mean()), float(chance)


def sample_numbers(sample: SampleTokens) -> dict[str, tuple[float, float] | None]:
    """A sample's figures, each with its chance level; views are averaged, None needs more views.

    The chance level of `variance_ratio` is (references - 1) / (tokens - references).
    """
    several = len(sample.views.unique()) > 1
    ratios, accuracies = [], []
    for view in sample.views.unique():
        tokens, labels = sample.tokens[sample.views == view], sample.references[sample.views == view]
        count = len(labels.unique())
        ratios.append((variance_ratio(tokens, labels), (count - 1) / max(len(labels) - count, 1)))
        accuracies.append(neighbor_accuracy(tokens, labels))
    return {
        "variance_ratio": _mean_pair(ratios),
        "neighbor_accuracy": _mean_pair(accuracies),
        "subject_accuracy": (
            neighbor_accuracy(sample.tokens, sample.references, sample.views) if several else None
        ),
    }


def summary(samples: Sequence[SampleTokens]) -> Numbers:
    """Mean over samples of every figure with its standard error (None for one sample) and chance level."""
    rows = [sample_numbers(sample) for sample in samples]
    found: Numbers = {}
    for name in METRICS:
        values = [row[name] for row in rows if row[name] is not None]
        if not values:
            found[name] = None
            continue
        mean, error = _mean_and_error([value for value, _ in values])
        chance = float(np.mean([level for _, level in values]))
        found[name] = {"mean": mean, "standard_error": error, "chance": chance, "samples": len(values)}
    return found


def difference(first: Sequence[SampleTokens], second: Sequence[SampleTokens]) -> Numbers:
    """First minus second checkpoint, paired by sample: mean and standard error of every figure."""
    pairs = list(zip(map(sample_numbers, first), map(sample_numbers, second), strict=True))
    found: Numbers = {}
    for name in METRICS:
        gaps = [a[name][0] - b[name][0] for a, b in pairs if a[name] is not None and b[name] is not None]
        mean, error = _mean_and_error(gaps) if gaps else (None, None)
        found[name] = {"mean": mean, "standard_error": error} if gaps else None
    return found


def _unit(tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of unit length in float32 and the number of tokens of each label."""
    if tokens.ndim != 2 or labels.shape != tokens.shape[:1]:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} and labels {tuple(labels.shape)} must be [S, D] and [S]"
        )
    counts = labels.unique(return_counts=True)[1]
    if len(counts) < 2 or int(counts.min()) < 2:
        raise ValueError(
            "tokens can be told apart between two references or more with two tokens or more each: give more pictures"
        )
    return F.normalize(tokens.float(), dim=1), counts


def _mean_pair(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return float(np.mean([value for value, _ in values])), float(np.mean([level for _, level in values]))


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    if len(values) < 2:
        return float(np.mean(values)), None
    return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
