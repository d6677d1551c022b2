"""The order of samples: which row of which set is at a global position, a function of the seed and the position alone.

Positions come in runs of one batch. What a run takes is found in closed form: a schedule deals runs to streams (sets,
and within them buckets) block by block, each block giving a stream the whole runs that its share has come to by then.
So the number of runs that a stream had before is known without walking there.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np

from refalign_ext.config import DATA_SCHEDULES
from refalign_ext.data.hashing import keyed_generator
from refalign_ext.data.sampling.choice import Bucket

T = TypeVar("T")

SPARE_ROWS = 8  # rows that may stand in for one that cannot be loaded
_FEW_ROWS = 32
_BLOCK = 128  # runs over which the shares of sets come out even
_KEPT = 2  # permutations kept of each kind: batches fetched ahead may be in the next one already


@dataclass(frozen=True)
class Place:
    """What is at a position.

    Attributes:
        position: the global one.
        part: number of the clip set.
        row: in that set.
        bucket: its shape.
        spare: rows of the same set and bucket, to be tried in this order if it cannot be loaded.
    """

    position: int
    part: int
    row: int
    bucket: Bucket
    spare: tuple[int, ...]


class Deal:
    """Deals runs to streams by their shares.

    Args:
        shares: runs of each stream per block, fractions allowed.
        seed, name: what the order within a block depends on.
    """

    def __init__(self, shares: Sequence[Fraction], seed: int, name: str) -> None:
        assert sum(shares) > 0 and min(shares) >= 0
        # Blocks of less than one run would make the search for a run's block long.
        self.scale = max(1, math.ceil(1 / sum(shares)))
        self.shares, self.seed, self.name = [share * self.scale for share in shares], seed, name
        self.per_block = sum(self.shares)
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def at(self, run: int) -> tuple[int, int]:
        """(stream, how many runs that stream had before) of a run."""
        block = int(run / self.per_block)
        while self._before(block) > run:
            block -= 1
        while self._before(block + 1) <= run:
            block += 1
        streams, ordinals = self._block(block)
        place = run - self._before(block)
        return int(streams[place]), int(ordinals[place])

    def _before(self, block: int) -> int:
        return sum(math.floor(block * share) for share in self.shares)

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        def make() -> tuple[np.ndarray, np.ndarray]:
            firsts = [math.floor(block * share) for share in self.shares]
            counts = [math.floor((block + 1) * share) - first for share, first in zip(self.shares, firsts)]
            streams = np.repeat(np.arange(len(counts)), counts)
            if len(counts) > 1:
                streams = keyed_generator(self.seed, self.name, block).permutation(streams)
            ordinals = np.empty(len(streams), np.int64)
            for stream, (first, count) in enumerate(zip(firsts, counts)):
                ordinals[streams == stream] = np.arange(first, first + count)
            return streams, ordinals

        return _kept(self._blocks, block, make)


class SetOrder:
    """The endless order of one clip set: every row of a bucket comes once before any comes twice.

    Args:
        buckets: of every row, as positions in `shapes`; -1: the row is not used.
        shapes: the buckets.
        windows: rows that are stored together. With several, these are shuffled, and rows only within a few of them.
        run: samples of a batch.
        together: windows among which rows are shuffled.
        seed, name: what the order depends on.

    Raises:
        ValueError: if no row is used.
    """

    def __init__(
        self,
        buckets: np.ndarray,
        shapes: Sequence[Bucket],
        windows: Sequence[range],
        run: int,
        *,
        together: int,
        seed: int,
        name: str,
    ) -> None:
        self.run, self.together, self.seed, self.name = run, max(1, together), seed, name
        self.windows = np.array([window.start for window in windows] or [0], np.int64)
        rows = [np.flatnonzero(buckets == number).astype(np.int64) for number in range(len(shapes))]
        self.rows = [found for found in rows if len(found)]
        self.shapes = [shape for shape, found in zip(shapes, rows, strict=True) if len(found)]
        if not self.rows:
            raise ValueError("no clip is left to train on")
        # One block is one pass over all rows, in which each bucket gets the runs that its rows fill.
        self.deal = Deal([Fraction(len(found), run) for found in self.rows], seed, f"buckets of {name}")
        self._epochs: list[dict[int, np.ndarray]] = [{} for _ in self.rows]

    def __len__(self) -> int:
        """Rows in use."""
        return sum(len(found) for found in self.rows)

    def at(self, run: int, offset: int, position: int) -> tuple[int, Bucket, tuple[int, ...]]:
        """(row, bucket, spare rows) of sample `offset` of the set's run number `run`, at a global position."""
        stream, ordinal = self.deal.at(run)
        rows = self.rows[stream]
        epoch, place = divmod(ordinal * self.run + offset, len(rows))
        row = int(self._epoch(stream, epoch)[place])
        lots = keyed_generator(self.seed, "spare", position)
        # Of a few rows all are tried; of many, enough that all being bad is no accident.
        if len(rows) <= _FEW_ROWS:
            spare = rows[lots.permutation(len(rows))]
        else:
            spare = rows[lots.choice(len(rows), SPARE_ROWS, replace=False)]
        return row, self.shapes[stream], tuple(other for other in spare.tolist() if other != row)

    def _epoch(self, stream: int, epoch: int) -> np.ndarray:
        def make() -> np.ndarray:
            rows = self.rows[stream]
            generator = keyed_generator(self.seed, f"rows of {self.name}", stream, epoch)
            if len(self.windows) == 1:
                return generator.permutation(rows)
            # All buckets walk through the windows in the same order: what is read lies close together.
            order = keyed_generator(self.seed, f"windows of {self.name}", epoch).permutation(
                len(self.windows)
            )
            group = np.empty(len(order), np.int64)
            group[order] = np.arange(len(order)) // self.together
            of_row = group[np.searchsorted(self.windows, rows, side="right") - 1]
            return rows[np.lexsort((generator.random(len(rows)), of_row))]

        return _kept(self._epochs[stream], epoch, make)


class Order:
    """The order over all clip sets.

    Args:
        sets: at least one, all of the same run length.
        shares: of the samples that each set gives.
        schedule: "mixed": runs draw their set; "stages": one set after the other.
        total: positions that the stages are divided over; beyond them the last set goes on.
        shift: positions before the first run; 0 unless a run of another batch size is continued.

    Raises:
        ValueError: naming `mix` or `mix_schedule`, if they do not fit.
    """

    def __init__(
        self,
        sets: Sequence[SetOrder],
        shares: Sequence[float] = (1.0,),
        schedule: str = "mixed",
        *,
        total: int = 0,
        shift: int = 0,
        seed: int = 0,
    ) -> None:
        check_mix(len(sets), shares, schedule)
        self.sets, self.run, self.schedule, self.shift = sets, sets[0].run, schedule, shift
        exact = [Fraction(share).limit_denominator(10**6) for share in shares]
        whole = sum(exact)
        self._deal = Deal([_BLOCK * share / whole for share in exact], seed, "sets")
        runs, ends = total // self.run, np.cumsum([float(share / whole) for share in exact])[:-1]
        self._ends = [round(float(end) * runs) for end in ends]

    def at(self, position: int) -> Place:
        """What is at a global position."""
        run, offset = divmod(position - self.shift, self.run)
        if self.schedule == "stages":
            part = bisect.bisect_right(self._ends, run)
            within = run - (self._ends[part - 1] if part else 0)
        else:
            part, within = self._deal.at(run)
        row, bucket, spare = self.sets[part].at(within, offset, position)
        return Place(position, part, row, bucket, spare)


def check_mix(sets: int, shares: Sequence[float], schedule: str) -> None:
    """Raises ValueError unless the shares and the schedule fit the number of sets."""
    if schedule not in DATA_SCHEDULES:
        raise ValueError(f"mix_schedule is {schedule!r}: choose one of {', '.join(DATA_SCHEDULES)}")
    if len(shares) != sets:
        raise ValueError(f"mix has {len(shares)} shares for {sets} clip sets: give one for each")
    if not all(math.isfinite(share) and share > 1e-6 for share in shares):
        raise ValueError(f"mix is {tuple(shares)}: shares are above 0, such as 0.6,0.4")


def _kept(cache: dict[int, T], key: int, make: Callable[[], T]) -> T:
    if key not in cache:
        made = make()
        while len(cache) >= _KEPT:
            del cache[min(cache)]
        cache[key] = made
    return cache[key]
