"""Training samples from clip sets: indexed, split, ordered, loaded ahead, and encoded where training runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refalign_ext.data.batch import EncodedSample
from refalign_ext.data.clip_index import open_clip_index
from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.loading.bad_clips import BadClips
from refalign_ext.data.loading.dataset import ClipDataset, LoadedSample
from refalign_ext.data.loading.loader import ClipLoader
from refalign_ext.data.loading.selection import assign_rows, reference_rules
from refalign_ext.data.pixels import from_uint8
from refalign_ext.data.sampling.order import Order, SetOrder, check_mix
from refalign_ext.data.sampling.sample_spec import Sampling
from refalign_ext.data.sampling.split import Split

if TYPE_CHECKING:
    from refalign_ext.data.cache.reader import LatentCache

Encode = Callable[[list[Tensor]], list[Tensor]]  # each [3, T, H, W] in [-1, 1] -> [C, t, h, w]
Features = Callable[[Tensor], Tensor]  # [M, 3, H, W] in [-1, 1] -> [M, N, D]


@dataclass(frozen=True)
class LoaderSettings:
    """How samples are fetched; nothing here changes what they are, but `mixed_shards`, which changes their order.

    Attributes:
        workers: processes that load ahead; 0 loads when a sample is needed.
        prefetch: batches that each of them loads ahead.
        mixed_shards: tar shards among which rows are shuffled: more mix better, fewer read more nearly in sequence.
        max_bad_share: of the clips tried that may be unusable before training stops; 1: never.
        start_method: how processes begin.

    Raises:
        ValueError: naming a setting that is out of range.
    """

    workers: int = 4
    prefetch: int = 2
    mixed_shards: int = 4
    max_bad_share: float = 0.1
    start_method: str = "spawn"

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("prefetch", 1), ("mixed_shards", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share is {self.max_bad_share}: it is a share, between 0 and 1")


class ClipSource:
    """Seeded samples from clip sets; see `Source`. What a position gives does not depend on ranks or workers.

    A clip that cannot be used is replaced by one that the position determines, counted, and named in the log once.
    Batches of `batch_size` positions share a set and a bucket. With several of either, another batch size is another
    order; continuing with one moves the batches to where it continues.

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
        self._bad_clips = BadClips(settings.max_bad_share)

    def prepare(self) -> None:
        """Looks at every clip once, in parallel; what it finds is kept beside each set.

        Raises:
            ValueError: if a set has no clip to use, or more than `max_bad_share` of them are bad.
        """
        if self._dataset is not None:
            return
        settings = self.settings
        indexes = [
            open_clip_index(clip_set, workers=settings.workers, fallback_dir=self.fallback_dir)
            for clip_set in self.clip_sets
        ]
        rules = reference_rules(indexes, self.split)
        for number, (clip_set, records) in enumerate(zip(self.clip_sets, indexes, strict=True)):
            buckets = assign_rows(
                clip_set,
                records,
                self.sampling,
                rules[number] if rules else None,
                max_bad_share=settings.max_bad_share,
                fallback_dir=self.fallback_dir,
            )
            order = SetOrder(
                buckets,
                self.sampling.buckets,
                clip_set.shard_ranges(),
                self.batch_size,
                mixed_shards=settings.mixed_shards,
                seed=self.sampling.seed,
                name=str(number),
            )
            self._sets.append(order)
        self._bad_clips = BadClips(settings.max_bad_share, [len(records) for records in indexes])
        self._dataset = ClipDataset(
            self.clip_sets,
            self.sampling,
            allowed=rules,
            caches=self.caches,
            needs_features=self.features is not None,
        )

    @property
    def bad_clips(self) -> int:
        """Different clips that could not be used so far, besides those that the index left out."""
        return self._bad_clips.count

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
        return [self._encoded(self._checked(sample)) for sample in next(loader)]

    def close(self) -> None:
        """Ends the loader processes; the next samples start new ones."""
        if self._loader is not None:
            self._loader.close()
        self._loader = None

    def _start(self, indices: range) -> ClipLoader:
        self.close()
        assert self._dataset is not None
        start = indices.start - self.data_rank * len(indices)
        order = Order(
            self._sets,
            self.mix or [float(len(rows)) for rows in self._sets],
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

    def _checked(self, sample: LoadedSample) -> LoadedSample:
        if sample.stop:
            raise ValueError(sample.stop)
        self._bad_clips.add(sample)
        if sample.spec is None:
            raise ValueError(
                f"{self.clip_sets[sample.entry.set_index].path}: none of {len(sample.failures)} clips tried for "
                f"position {sample.entry.position} can be used; the last: {sample.failures[-1].reason}"
            )
        return sample

    def _encoded(self, sample: LoadedSample) -> EncodedSample:
        assert sample.spec is not None
        latents = sample.latents
        if latents is None:
            latents = self.encode([self._pixels(sample.pixels)])[0]
        pictures = [None if one.pixels is None else self._pixels(one.pixels) for one in sample.references]
        references = [
            one.latents if one.latents is not None else self.encode([picture[:, None]])[0]
            for one, picture in zip(sample.references, pictures, strict=True)
        ]
        return EncodedSample(
            sample.clip,
            sample.spec.prompt,
            latents.to(self.device),
            torch.cat([one.to(self.device) for one in references], 1),  # [C, M, h, w]
            None if self.features is None else self._features(sample, pictures),
        )

    def _pixels(self, pixels: Tensor) -> Tensor:
        # Bytes are moved and become floats there: a fourth of the traffic.
        return from_uint8(pixels.to(self.device))

    def _features(self, sample: LoadedSample, pictures: list[Tensor | None]) -> Tensor:
        """Teacher features [M, N, D], computed at once where the cache has none."""
        features = [one.features for one in sample.references]
        missing = [number for number, found in enumerate(features) if found is None]
        if missing:
            computed = self.features(torch.stack([pictures[number] for number in missing]))
            for number, found in zip(missing, computed, strict=True):
                features[number] = found
        return torch.stack([found.to(self.device) for found in features])
