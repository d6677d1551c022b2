"""The dataset of loader processes: entries of the order as pixels, or why a clip could not be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor
from torch.utils.data import Dataset

from refalign_ext.data.cache.files import CacheError
from refalign_ext.data.cache.reader import LatentCache
from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.pixels import load_reference, to_uint8, video_uint8
from refalign_ext.data.sampling.order import OrderEntry
from refalign_ext.data.sampling.sample_spec import ReferenceSpec, SampleSpec, Sampling, draw_sample_spec
from refalign_ext.data.sampling.split import AllowedReferences
from refalign_ext.data.schema import Clip
from refalign_ext.errors import one_line


@dataclass(frozen=True)
class Failure:
    """A clip that could not be used, and why."""

    row: int
    clip: str
    reason: str


@dataclass(frozen=True)
class LoadedReference:
    """One reference: pixels [3, H, W] uint8 if something has to be computed from them, and what the cache has.

    That is latents [C, 1, h, w] and features [N, D].
    """

    pixels: Tensor | None
    latents: Tensor | None
    features: Tensor | None


@dataclass(frozen=True)
class LoadedSample:
    """One sample as a loader process hands it over; bytes instead of floats, as these are passed between processes.

    Attributes:
        spec: what was drawn, None if no clip could be used; its row is that of the clip that was.
        clip: the clip's id.
        pixels: [3, T, H, W] uint8, or latents: [C, F, h, w] from the cache.
        failures: clips that were tried before it.
        stop: why training cannot go on; empty: it can.
    """

    entry: OrderEntry
    spec: SampleSpec | None = None
    clip: str = ""
    pixels: Tensor | None = None
    latents: Tensor | None = None
    references: tuple[LoadedReference, ...] = ()
    failures: tuple[Failure, ...] = ()
    stop: str = ""


class ClipDataset(Dataset):
    """Samples by their entry in the order; what one is depends on nothing else.

    Args:
        allowed: which references may be used, for each set; None: all.
        caches: latents of each set, None where there are none.
        needs_features: whether the teacher's features are wanted: where the cache has none, pixels are loaded.
    """

    def __init__(
        self,
        clip_sets: Sequence[ClipSet],
        sampling: Sampling,
        *,
        allowed: Sequence[AllowedReferences] | None = None,
        caches: Sequence[LatentCache | None] = (),
        needs_features: bool = True,
    ) -> None:
        self.clip_sets, self.sampling, self.allowed = list(clip_sets), sampling, allowed
        self.caches = list(caches) or [None] * len(self.clip_sets)
        self.needs_features = needs_features

    def __getitem__(self, entry: OrderEntry) -> LoadedSample:
        clip_set, failures = self.clip_sets[entry.set_index], []
        for row in (entry.row, *entry.fallback_rows):
            name = clip_set.place(row)
            try:
                clip = clip_set[row]
                name = clip.id
                return replace(self._load(entry, row, clip), failures=tuple(failures))
            except CacheError as error:
                # Not this clip's fault: passing over all clips of a file would change what is trained without a word.
                return LoadedSample(entry, failures=tuple(failures), stop=str(error))
            except (ValueError, OSError) as error:
                failures.append(Failure(row, name, one_line(error, limit=500)))
        return LoadedSample(entry, failures=tuple(failures))

    def _load(self, entry: OrderEntry, row: int, clip: Clip) -> LoadedSample:
        bucket, cache = entry.bucket, self.caches[entry.set_index]
        allowed = None if self.allowed is None else partial(self.allowed[entry.set_index].allows, clip)
        spec = draw_sample_spec(clip, row, bucket, self.sampling, entry.position, allowed=allowed)
        latents = None if cache is None else cache.video(clip.id, bucket, spec.clip_variant)
        pixels = None
        if latents is None:
            clip_set = self.clip_sets[entry.set_index]
            pixels = video_uint8(clip_set, row, clip, bucket, spec.clip_variant, self.sampling)
        references = tuple(self._load_reference(entry, row, clip, one) for one in spec.references)
        return LoadedSample(entry, spec, clip.id, pixels, latents, references)

    def _load_reference(
        self, entry: OrderEntry, row: int, clip: Clip, spec: ReferenceSpec
    ) -> LoadedReference:
        cache, clip_set = self.caches[entry.set_index], self.clip_sets[entry.set_index]
        cached = None if cache is None else cache.reference(clip.id, entry.bucket, spec)
        latents, features = cached or (None, None)
        pixels = None
        if latents is None or (self.needs_features and features is None):
            pixels = to_uint8(load_reference(clip_set, row, clip, spec, entry.bucket, self.sampling))
        return LoadedReference(pixels, latents, features if self.needs_features else None)
