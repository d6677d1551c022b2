"""Counts the clips that cannot be used while training runs, and stops it if they are too many."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from refalign_ext.data.loading.dataset import LoadedSample

logger = logging.getLogger(__name__)

LEAST_TRIED = 50  # clips to try before a share of bad ones means something
_EXAMPLES = 5


def are_too_many(bad: int, tried: int, max_share: float) -> bool:
    """Whether so many bad clips of those that were tried are more than an accident."""
    return tried >= LEAST_TRIED and bad > max_share * tried


class BadClips:
    """Counts the clips that could not be used, names each in the log once, and stops training if they are too many.

    Args:
        max_share: of the clips tried that may be bad.
        rows: of each clip set.
    """

    def __init__(self, max_share: float, rows: Sequence[int] = ()) -> None:
        self.max_share, self.count = max_share, 0
        self._tried = [np.zeros(number, bool) for number in rows]
        self._bad = [np.zeros(number, bool) for number in rows]
        self._examples: list[str] = []

    def add(self, sample: LoadedSample) -> None:
        """Counts the clips that were tried for a sample; raises ValueError with examples if too many were bad."""
        tried, bad = self._tried[sample.entry.set_index], self._bad[sample.entry.set_index]
        for failure in sample.failures:
            tried[failure.row] = True
            if not bad[failure.row]:
                bad[failure.row] = True
                self.count += 1
                self._examples = [*self._examples, f"{failure.clip}: {failure.reason}"][:_EXAMPLES]
                logger.warning(
                    "skipping clip %s (%d skipped so far): %s", failure.clip, self.count, failure.reason
                )
        if sample.spec is None:
            return
        tried[sample.spec.row] = True
        number = sum(int(tried.sum()) for tried in self._tried) if sample.failures else 0
        if are_too_many(self.count, number, self.max_share):
            raise ValueError(
                f"{self.count} of the {number} clips tried so far cannot be used, more than max_bad_share "
                f"{self.max_share:g}: {'; '.join(self._examples)}"
            )
