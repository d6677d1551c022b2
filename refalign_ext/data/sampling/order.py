"""The order of samples: which row of which set is at a global position, a function of the seed and the position alone.

A batch takes all its samples from one bucket of one set. Which, is found in closed form: batches are interleaved block
by block, each block giving a stream (a set, or within it a bucket) the whole batches that its share has come to by then.
So the number of batches that a stream had before is known without walking there.

The names that random numbers are keyed with are part of the order: with others, a seed would mean another order.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from refalign_ext.data.hashing import keyed_generator
from refalign_ext.data.sampling.sample_spec import Bucket

FALLBACK_ROWS = 8
_FEW_ROWS = 32  # of a bucket: then all others are fallbacks
_BLOCK = 128  # batches over which the shares of sets come out even
_CACHED = 2  # blocks, or epochs of a bucket, kept: batches fetched ahead may be in the next one already


@dataclass(frozen=True)
class OrderEntry:
    """What is at a global position: row `row` of set `set_index`, shown in `bucket`.

    `fallback_rows` are rows of the same set and bucket, to be tried in this order if it cannot be loaded.
    """

    position: int
    set_index: int
    row: int
    bucket: Bucket
    fallback_rows: tuple[int, ...]


class Interleaver:
    """Interleaves the batches of several streams by their shares.

    Args:
        shares: batches of each stream per block, fractions allowed.
        seed, name: what the order within a block depends on.
    """

    def __init__(self, shares: Sequence[Fraction], seed: int, name: str) -> None:
        assert sum(shares) > 0 and min(shares) >= 0
        # Blocks of less than one batch would make the search for a batch's block long.
        scale = max(1, math.ceil(1 / sum(shares)))
        self.shares, self.seed, self.name = [share * scale for share in shares], seed, name
        self._cached_block = lru_cache(_CACHED)(self._block)

    def at(self, batch: int) -> tuple[int, int]:
        """(stream, how many batches that stream had before) of a batch."""
        block = int(batch / sum(self.shares))  # or later, as each stream has whole batches only
        while self._start(block + 1) <= batch:
            block += 1
        streams, ordinals = self._cached_block(block)
        offset = batch - self._start(block)
        return int(streams[offset]), int(ordinals[offset])

    def _start(self, block: int) -> int:
        return sum(math.floor(block * share) for share in self.shares)

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(stream, ordinal within the stream) of each batch of a block."""
        firsts = [math.floor(block * share) for share in self.shares]
        counts = [math.floor((block + 1) * share) - first for share, first in zip(self.shares, firsts)]
        streams = np.repeat(np.arange(len(counts)), counts)
        if len(counts) > 1:
            streams = keyed_generator(self.seed, self.name, block).permutation(streams)
        ordinals = np.empty(len(streams), np.int64)
        for stream, (first, count) in enumerate(zip(firsts, counts)):
            ordinals[streams == stream] = np.arange(first, first + count)
        return streams, ordinals


class SetOrder:
    """The endless order of one clip set: every row of a bucket comes once before any comes twice.

    Args:
        buckets: of every row, as positions in `shapes`, -1 where the row is not used; at least one is.
        shard_ranges: rows that are stored together. With several, these are shuffled, and rows only within
            `mixed_shards` of them.
        seed, name: what the order depends on.
    """

    def __init__(
        self,
        buckets: np.ndarray,
        shapes: Sequence[Bucket],
        shard_ranges: Sequence[range],
        batch_size: int,
        *,
        mixed_shards: int,
        seed: int,
        name: str,
    ) -> None:
        self.batch_size, self.mixed_shards, self.seed, self.name = batch_size, mixed_shards, seed, name
        self.shard_starts = np.array([rows.start for rows in shard_ranges] or [0], np.int64)
        rows = [np.flatnonzero(buckets == number).astype(np.int64) for number in range(len(shapes))]
        self.rows = [found for found in rows if len(found)]
        self.shapes = [shape for shape, found in zip(shapes, rows, strict=True) if len(found)]
        # One block is one pass over all rows, in which each bucket gets the batches that its rows fill.
        shares = [Fraction(len(found), batch_size) for found in self.rows]
        self.interleaver = Interleaver(shares, seed, f"buckets of {name}")
        self._cached_epoch = lru_cache(_CACHED * len(self.rows))(self._epoch)

    def __len__(self) -> int:
        """Rows in use."""
        return sum(len(found) for found in self.rows)

    def at(self, batch: int, offset: int, position: int) -> tuple[int, Bucket, tuple[int, ...]]:
        """(row, bucket, fallback rows) of sample `offset` of the set's batch number `batch`, at a global position."""
        stream, ordinal = self.interleaver.at(batch)
        rows = self.rows[stream]
        epoch, place = divmod(ordinal * self.batch_size + offset, len(rows))
        row = int(self._cached_epoch(stream, epoch)[place])
        generator = keyed_generator(self.seed, "spare", position)
        # Of a few rows all are tried; of many, enough that all being bad is no accident.
        if len(rows) <= _FEW_ROWS:
            others = rows[generator.permutation(len(rows))]
        else:
            others = rows[generator.choice(len(rows), FALLBACK_ROWS, replace=False)]
        return row, self.shapes[stream], tuple(other for other in others.tolist() if other != row)

    def _epoch(self, stream: int, epoch: int) -> np.ndarray:
        """A stream's rows in the order of one pass over them."""
        rows, shards = self.rows[stream], len(self.shard_starts)
        generator = keyed_generator(self.seed, f"rows of {self.name}", stream, epoch)
        if shards == 1:
            return generator.permutation(rows)
        # All buckets walk through the shards in the same order: what is read lies close together.
        order = keyed_generator(self.seed, f"windows of {self.name}", epoch).permutation(shards)
        group = np.empty(shards, np.int64)
        group[order] = np.arange(shards) // self.mixed_shards
        of_row = group[np.searchsorted(self.shard_starts, rows, side="right") - 1]
        return rows[np.lexsort((generator.random(len(rows)), of_row))]


class Order:
    """The order over all clip sets.

    Args:
        sets: at least one, all of the same batch size.
        shares: of the samples that each set gives.
        schedule: "mixed": sets are interleaved; "stages": one set after the other.
        total: positions that the stages are divided over; beyond them the last set goes on.
        shift: positions before the first batch; 0 unless a run of another batch size is continued.
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
        self.sets, self.batch_size, self.schedule, self.shift = sets, sets[0].batch_size, schedule, shift
        exact = [Fraction(share).limit_denominator(10**6) for share in shares]
        whole = sum(exact)
        self._interleaver = Interleaver([_BLOCK * share / whole for share in exact], seed, "sets")
        batches, ends = total // self.batch_size, np.cumsum([float(share / whole) for share in exact])[:-1]
        self._ends = [round(float(end) * batches) for end in ends]

    def at(self, position: int) -> OrderEntry:
        """What is at a global position."""
        batch, offset = divmod(position - self.shift, self.batch_size)
        if self.schedule == "stages":
            set_index = bisect.bisect_right(self._ends, batch)
            within = batch - (self._ends[set_index - 1] if set_index else 0)
        else:
            set_index, within = self._interleaver.at(batch)
        return OrderEntry(position, set_index, *self.sets[set_index].at(within, offset, position))
