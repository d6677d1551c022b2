"""How well the tokens of different references can be told apart: numbers that go with the feature plots.

All numbers are about directions, that is, about tokens scaled to unit length: reference alignment compares by cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

from refalign_ext.evaluation.intervals import mean_and_error

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

    def by_view(self) -> list[tuple[Tensor, Tensor]]:
        """Tokens and references of each view."""
        chosen = [self.views == view for view in self.views.unique()]
        return [(self.tokens[own], self.references[own]) for own in chosen]


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


def _unit(tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of unit length in float32 and the number of tokens of each label."""
    counts = labels.unique(return_counts=True)[1]
    if len(counts) < 2 or int(counts.min()) < 2:
        raise ValueError(
            "tokens can be told apart between two references or more with two tokens or more each: give more pictures"
        )
    return F.normalize(tokens.float(), dim=1), counts


def _variance(sample: SampleTokens) -> tuple[float, float]:
    rows = []
    for tokens, labels in sample.by_view():
        count = len(labels.unique())
        rows.append((variance_ratio(tokens, labels), (count - 1) / max(len(labels) - count, 1)))
    return _mean_pair(rows)


def _neighbors(sample: SampleTokens) -> tuple[float, float]:
    return _mean_pair([neighbor_accuracy(tokens, labels) for tokens, labels in sample.by_view()])


def _subjects(sample: SampleTokens) -> tuple[float, float] | None:
    if len(sample.views.unique()) < 2:
        return None
    return neighbor_accuracy(sample.tokens, sample.references, sample.views)


def _mean_pair(rows: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return mean(value for value, _ in rows), mean(chance for _, chance in rows)


Metric = Callable[[SampleTokens], tuple[float, float] | None]
# Name -> title in plots, and a sample's figure with its chance level (averaged over views; None needs more views).
METRICS: dict[str, tuple[str, Metric]] = {
    "variance_ratio": ("variance between / within references", _variance),
    "neighbor_accuracy": ("nearest token is of the same reference", _neighbors),
    "subject_accuracy": ("nearest token in other views is of the same subject", _subjects),
}


def summarize_tokens(samples: Sequence[SampleTokens]) -> Numbers:
    """Mean over samples of every figure with its standard error (None for one sample) and chance level."""
    found: Numbers = {}
    for name, (_, metric) in METRICS.items():
        rows = [row for row in map(metric, samples) if row is not None]
        found[name] = None
        if rows:
            center, error = mean_and_error([value for value, _ in rows])
            chance = mean(level for _, level in rows)
            found[name] = {"mean": center, "standard_error": error, "chance": chance, "samples": len(rows)}
    return found


def compare_tokens(first: Sequence[SampleTokens], second: Sequence[SampleTokens]) -> Numbers:
    """First minus second checkpoint, paired by sample: mean and standard error of every figure."""
    found: Numbers = {}
    for name, (_, metric) in METRICS.items():
        pairs = zip(map(metric, first), map(metric, second), strict=True)
        gaps = [one[0] - other[0] for one, other in pairs if one is not None and other is not None]
        found[name] = None
        if gaps:
            found[name] = dict(zip(("mean", "standard_error"), mean_and_error(gaps), strict=True))
    return found
