"""Training samples from clip sets: indexed, split, ordered, loaded ahead, and encoded where training runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from refalign_ext.data.batch import EncodedSample
from refalign_ext.data.clip_index import MAX_SOURCES, USABLE, delete_clip_index, open_clip_index
from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.loading.dataset import ClipDataset, Failure, LoadedSample
from refalign_ext.data.loading.loader import ClipLoader
from refalign_ext.data.pixels import from_levels
from refalign_ext.data.sampling.buckets import assign
from refalign_ext.data.sampling.choice import Sampling
from refalign_ext.data.sampling.order import Order, SetOrder, check_mix
from refalign_ext.data.sampling.split import Allowed, GroupTable, Split

if TYPE_CHECKING:
    from refalign_ext.data.cache.reader import LatentCache

logger = logging.getLogger(__name__)

Encode = Callable[[list[Tensor]], list[Tensor]]  # each [3, T, H, W] in [-1, 1] -> [C, t, h, w]
Features = Callable[[Tensor], Tensor]  # [M, 3, H, W] in [-1, 1] -> [M, N, D]

LEAST_TRIED = 50  # clips to try before a share of bad ones means something
_EXAMPLES = 5


@dataclass(frozen=True)
class LoaderSettings:
    """How samples are fetched; nothing here changes what they are, but `together`, which changes their order.

    Attributes:
        workers: processes that load ahead; 0 loads when a sample is needed.
        prefetch: batches that each of them loads ahead.
        together: tar shards among which rows are shuffled: more mix better, fewer read more nearly in sequence.
        max_bad_share: of the clips tried that may be unusable before training stops; 1: never.
        start_method: how processes begin.

    Raises:
        ValueError: naming a setting that is out of range.
    """

    workers: int = 4
    prefetch: int = 2
    together: int = 4
    max_bad_share: float = 0.1
    start_method: str = "spawn"

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("prefetch", 1), ("together", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share is {self.max_bad_share}: it is a share, between 0 and 1")


class ClipSource:
    """Seeded samples from clip sets; see `Source`. What a position gives does not depend on ranks or workers.

    A clip that cannot be used is replaced by one that the position determines, counted, and named in the log once.
    Batches of `batch_size` positions share a set and a bucket. With several of either, another batch size is another
    order; continuing with one moves the runs to where it continues.

    Args:
        clip_sets: at least one.
        sampling: what is drawn, and from which seed.
        encode, features: the VAE and the teacher (None: no alignment), in this process; they get pixels on `device`.
        device: where samples are put.
        split: which side of a division into training and validation; None: both.
        mix, schedule, total: shares of the sets (None: by their numbers of clips), see `Order`.
        batch_size, data_rank, data_size: as the trainer asks for samples.
        caches: what `data cache` made, for each set; None where there is none.
        settings: how samples are fetched.
        fallback_dir: folder for the indexes of sets beside which they cannot be written.

    Raises:
        ValueError: for a mix that does not fit the sets.
    """

    def __init__(
        self,
        clip_sets: Sequence[ClipSet],
        sampling: Sampling,
        *,
        encode: Encode,
        features: Features | None,
        device: torch.device | str = "cpu",
        split: Split | None = None,
        mix: Sequence[float] | None = None,
        schedule: str = "mixed",
        total: int = 0,
        batch_size: int = 1,
        data_rank: int = 0,
        data_size: int = 1,
        caches: Sequence[LatentCache | None] = (),
        settings: LoaderSettings = LoaderSettings(),
        fallback_dir: Path | None = None,
    ) -> None:
        check_mix(len(clip_sets), [1.0] * len(clip_sets) if mix is None else mix, schedule)
        self.clip_sets, self.sampling, self.settings = list(clip_sets), sampling, settings
        self.split = split or Split()
        self.encode, self.features, self.device = encode, features, torch.device(device)
        self.mix, self.schedule, self.total = mix, schedule, total
        self.batch_size, self.data_rank, self.data_size = batch_size, data_rank, data_size
        self.caches, self.fallback_dir = list(caches), fallback_dir
        self._sets: list[SetOrder] = []
        self._dataset: ClipDataset | None = None
        self._loader: ClipLoader | None = None
        self._tried: list[np.ndarray] = []
        self._bad: list[np.ndarray] = []
        self._examples: list[Failure] = []

    def prepare(self) -> None:
        """Looks at every clip once, in parallel; what it finds is kept beside each set.

        Raises:
            ValueError: if a set has no clip to use, or more than `max_bad_share` of them are bad.
        """
        if self._dataset is not None:
            return
        records = [
            open_clip_index(clip_set, workers=self.settings.workers, fallback_dir=self.fallback_dir)
            for clip_set in self.clip_sets
        ]
        allowed = self._allowed(records)
        self._sets = [self._set_order(number, found, allowed) for number, found in enumerate(records)]
        self._tried = [np.zeros(len(found), bool) for found in records]
        self._bad = [np.zeros(len(found), bool) for found in records]
        self._dataset = ClipDataset(
            self.clip_sets,
            self.sampling,
            allowed=allowed,
            caches=self.caches,
            needs_features=self.features is not None,
        )

    @property
    def bad_clips(self) -> int:
        """Different clips that could not be used so far, besides those that the index left out."""
        return sum(int(bad.sum()) for bad in self._bad)

    def samples(self, step: int, indices: range) -> list[EncodedSample]:
        """Samples for the global positions `indices`; see `Source`. Fast if they follow the ones asked for last.

        Raises:
            ValueError: if too many clips are bad, none of those for a position can be used, or a cache is damaged.
            OSError: if a loader process was killed.
        """
        self.prepare()
        loader = self._loader
        if loader is None or (loader.position, loader.batch_size) != (indices.start, len(indices)):
            loader = self._start(indices)
        return [self._encoded(self._counted(sample)) for sample in next(loader)]

    def close(self) -> None:
        """Ends the loader processes; the next samples start new ones."""
        if self._loader is not None:
            self._loader.close()
        self._loader = None

    def _start(self, indices: range) -> ClipLoader:
        self.close()
        assert self._dataset is not None
        start = indices.start - self.data_rank * len(indices)
        shares = self.mix or [float(len(rows)) for rows in self._sets]
        order = Order(
            self._sets,
            shares,
            self.schedule,
            total=self.total,
            shift=start % self.batch_size,
            seed=self.sampling.seed,
        )
        self._loader = ClipLoader(
            self._dataset,
            order,
            batch_size=len(indices),
            data_rank=self.data_rank,
            data_size=self.data_size,
            start=start,
            workers=self.settings.workers,
            prefetch=self.settings.prefetch,
            start_method=self.settings.start_method,
        )
        return self._loader

    def _allowed(self, records: Sequence[np.ndarray]) -> list[Allowed] | None:
        if not self.split.divides:
            return None
        rules = []
        for found in records:
            by_id = (1 << found["source_count"].astype(np.int64)) - 1 > found["source_is_group"]
            table = GroupTable.of(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
            if by_id.any():  # 16 bytes for each clip, but only where ids have to be looked up
                table = GroupTable.of(np.array(found["id"]), np.array(found["group"]))
            rules.append(Allowed(self.split, table))
        return rules

    def _set_order(self, number: int, found: np.ndarray, allowed: list[Allowed] | None) -> SetOrder:
        path, is_usable = self.clip_sets[number].path, found["state"] == USABLE
        broken = int((~is_usable).sum())
        if len(found) >= LEAST_TRIED and broken > self.settings.max_bad_share * len(found):
            delete_clip_index(self.clip_sets[number], self.fallback_dir)
            raise ValueError(
                f"{path}: {broken} of {len(found)} clips cannot be used, more than max_bad_share "
                f"{self.settings.max_bad_share:g}: `data check` lists them"
            )
        buckets = assign(found["width"], found["height"], found["frames"], found["fps"], self.sampling)
        fits = is_usable & (buckets >= 0)
        here = fits if allowed is None else fits & self.split.holds(np.array(found["group"]))
        supplied = here if allowed is None else here & _has_source(found, allowed[number])
        counts = {
            "cannot be used": broken,
            f"are shorter than {min(bucket.frames for bucket in self.sampling.buckets)} frames": int(
                (is_usable & ~fits).sum()
            ),
            "belong to the other side of the split": int((fits & ~here).sum()),
            "have all their references on the other side": int((here & ~supplied).sum()),
        }
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        if not supplied.any():
            if broken:
                delete_clip_index(self.clip_sets[number], self.fallback_dir)
            where = "" if self.split.part == "all" else f" for {self.split.part}"
            raise ValueError(
                f"{path}: no clip can be used{where}: of {len(found)} clips {told} (`data check` says why)"
            )
        logger.info("%s: %d of %d clips%s", path, supplied.sum(), len(found), f" ({told})" if told else "")
        return SetOrder(
            np.where(supplied, buckets, -1),
            self.sampling.buckets,
            self.clip_sets[number].windows(),
            self.batch_size,
            together=self.settings.together,
            seed=self.sampling.seed,
            name=str(number),
        )

    def _counted(self, sample: LoadedSample) -> LoadedSample:
        part = sample.place.part
        if sample.stop:
            raise ValueError(sample.stop)
        for failure in sample.failures:
            self._tried[part][failure.row] = True
            if not self._bad[part][failure.row]:
                self._bad[part][failure.row] = True
                self._examples = (self._examples + [failure])[:_EXAMPLES]
                logger.warning(
                    "skipping clip %s (%d skipped so far): %s", failure.clip, self.bad_clips, failure.reason
                )
        if sample.choice is None:
            raise ValueError(
                f"{self.clip_sets[part].path}: none of {len(sample.failures)} clips tried for position "
                f"{sample.place.position} can be used; the last: {sample.failures[-1].reason}"
            )
        self._tried[part][sample.choice.row] = True
        if sample.failures:
            self._check_share()
        return sample

    def _check_share(self) -> None:
        tried, bad = sum(int(tried.sum()) for tried in self._tried), self.bad_clips
        if tried >= LEAST_TRIED and bad > self.settings.max_bad_share * tried:
            examples = "; ".join(f"{failure.clip}: {failure.reason}" for failure in self._examples)
            raise ValueError(
                f"{bad} of the {tried} clips tried so far cannot be used, more than max_bad_share "
                f"{self.settings.max_bad_share:g}: {examples}"
            )

    def _encoded(self, sample: LoadedSample) -> EncodedSample:
        assert sample.choice is not None
        latents = sample.latents
        if latents is None:
            latents = self.encode([self._pixels(sample.levels)])[0]
        pixels = [None if one.levels is None else self._pixels(one.levels) for one in sample.references]
        references = [
            one.latents if one.latents is not None else self.encode([image[:, None]])[0]
            for one, image in zip(sample.references, pixels, strict=True)
        ]
        return EncodedSample(
            sample.clip,
            sample.choice.prompt,
            latents.to(self.device),
            torch.cat([one.to(self.device) for one in references], 1),  # [C, M, h, w]
            None if self.features is None else self._features(sample, pixels),
        )

    def _pixels(self, levels: Tensor) -> Tensor:
        # Bytes are moved and become floats there: a fourth of the traffic.
        return from_levels(levels.to(self.device))

    def _features(self, sample: LoadedSample, pixels: list[Tensor | None]) -> Tensor:
        """Teacher features [M, N, D], computed at once where the cache has none."""
        missing = [n for n, one in enumerate(sample.references) if one.features is None]
        found = {n: one.features for n, one in enumerate(sample.references) if one.features is not None}
        if missing:
            computed = self.features(torch.stack([pixels[n] for n in missing]))
            found |= dict(zip(missing, computed, strict=True))
        return torch.stack([found[n].to(self.device) for n in range(len(found))])


def _has_source(found: np.ndarray, allowed: Allowed) -> np.ndarray:
    """Which clips [n] have a reference on this side of the split."""
    usable = found["is_free"] > 0
    for number in range(MAX_SOURCES):
        sources = np.array(found["sources"][:, number])
        is_group = (found["source_is_group"] >> number) & 1 > 0
        groups = np.where(is_group, sources, allowed.table.groups_of(sources))
        usable = usable | ((found["source_count"] > number) & allowed.split.holds(groups))
    return usable
