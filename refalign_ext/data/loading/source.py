"""Training samples from clip sets: indexed, split, ordered, loaded ahead, and encoded where training runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from refalign_ext.data.batch import EncodedSample
from refalign_ext.data.cache.reader import LatentCache
from refalign_ext.data.clip_index import open_clip_index
from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.loading.bad_clips import BadClips
from refalign_ext.data.loading.dataset import ClipDataset, LoadedReference, LoadedSample
from refalign_ext.data.loading.loader import ClipLoader
from refalign_ext.data.loading.selection import assign_rows, reference_rules
from refalign_ext.data.pixels import from_uint8
from refalign_ext.data.sampling.order import Order, SetOrder
from refalign_ext.data.sampling.sample_spec import Sampling
from refalign_ext.data.sampling.split import Split

Encode = Callable[[list[Tensor]], list[Tensor]]  # each [3, T, H, W] in [-1, 1] -> [C, t, h, w]
Features = Callable[[Tensor], Tensor]  # [M, 3, H, W] in [-1, 1] -> [M, N, D]


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
        split: which side of a division into training and validation.
        mix, schedule, total: shares of the sets (None: by their numbers of clips), see `Order`.
        batch_size, data_rank, data_size: as the trainer asks for samples.
        caches: what `data cache` made, for each set; None where there is none.
        workers: processes that load ahead; 0 loads when a sample is needed.
        max_bad_share: of the clips tried that may be unusable before training stops; 1: never.
        mixed_shards: tar shards among which rows are shuffled: more mix better, fewer read more nearly in sequence.
        start_method: how processes begin.
        fallback_dir: folder for the indexes of sets beside which they cannot be written.
        tries_bad_again: see `open_clip_index`.

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
        workers: int = 0,
        max_bad_share: float = 0.1,
        mixed_shards: int = 4,
        start_method: str = "spawn",
        fallback_dir: Path | None = None,
        tries_bad_again: bool = True,
    ) -> None:
        if mix is not None and len(mix) != len(clip_sets):
            raise ValueError(
                f"data_mix has {len(mix)} shares for {len(clip_sets)} clip sets: give one for each"
            )
        if mix is not None and not all(math.isfinite(share) and share > 1e-6 for share in mix):
            raise ValueError(f"data_mix is {tuple(mix)}: shares are above 0, such as 0.6,0.4")
        self.clip_sets, self.sampling, self.split = list(clip_sets), sampling, split or Split()
        self.encode, self.features, self.device = encode, features, torch.device(device)
        self.mix, self.schedule, self.total = mix, schedule, total
        self.batch_size, self.data_rank, self.data_size = batch_size, data_rank, data_size
        self.caches, self.workers, self.max_bad_share = caches, workers, max_bad_share
        self.mixed_shards, self.start_method, self.fallback_dir = mixed_shards, start_method, fallback_dir
        self.tries_bad_again = tries_bad_again
        self._sets: list[SetOrder] = []
        self._dataset: ClipDataset | None = None
        self._loader: ClipLoader | None = None
        self._bad_clips = BadClips(max_bad_share)

    def prepare(self) -> None:
        """Looks at every clip once, in parallel; raises ValueError if too few of a set can be used."""
        if self._dataset is not None:
            return
        limits = {"max_bad_share": self.max_bad_share, "fallback_dir": self.fallback_dir}
        indexes = [
            open_clip_index(
                clip_set,
                workers=self.workers,
                fallback_dir=self.fallback_dir,
                tries_bad_again=self.tries_bad_again,
            )
            for clip_set in self.clip_sets
        ]
        rules = reference_rules(indexes, self.split)
        for number, (clip_set, records) in enumerate(zip(self.clip_sets, indexes, strict=True)):
            rule = rules[number] if rules else None
            order = SetOrder(
                assign_rows(clip_set, records, self.sampling, rule, **limits),
                self.sampling.buckets,
                clip_set.shard_ranges(),
                self.batch_size,
                mixed_shards=self.mixed_shards,
                seed=self.sampling.seed,
                name=str(number),
            )
            self._sets.append(order)
        self._bad_clips = BadClips(self.max_bad_share, [len(records) for records in indexes])
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
        shares = self.mix or [float(len(rows)) for rows in self._sets]
        shift, seed = start % self.batch_size, self.sampling.seed
        self._loader = ClipLoader(
            self._dataset,
            Order(self._sets, shares, self.schedule, total=self.total, shift=shift, seed=seed),
            batch_size=len(indices),
            data_rank=self.data_rank,
            data_size=self.data_size,
            start=start,
            workers=self.workers,
            start_method=self.start_method,
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
        pictures = [None if one.pixels is None else self._pixels(one.pixels) for one in sample.references]
        latents = sample.latents
        if latents is None:
            latents = self.encode([self._pixels(sample.pixels)])[0]
        references = [
            one.latents if one.latents is not None else self.encode([picture[:, None]])[0]
            for one, picture in zip(sample.references, pictures, strict=True)
        ]
        return EncodedSample(
            sample.clip,
            sample.spec.prompt,
            latents.to(self.device),
            torch.cat([one.to(self.device) for one in references], 1),  # [C, M, h, w]
            None if self.features is None else self._features(sample.references, pictures),
        )

    def _pixels(self, pixels: Tensor) -> Tensor:
        # Bytes are moved and become floats there: a fourth of the traffic.
        return from_uint8(pixels.to(self.device))

    def _features(self, references: Sequence[LoadedReference], pictures: list[Tensor | None]) -> Tensor:
        """Teacher features [M, N, D], computed at once where the cache has none."""
        missing = [picture for one, picture in zip(references, pictures) if one.features is None]
        computed = iter(self.features(torch.stack(missing)) if missing else ())
        found = [next(computed) if one.features is None else one.features for one in references]
        return torch.stack([features.to(self.device) for features in found])
