"""What loader processes do: turn a place of the order into pixels, or say why a clip could not be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import Dataset

from refalign_ext.data.cache.files import CacheError
from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.pixels import load_reference, to_uint8, video_uint8
from refalign_ext.data.sampling.choice import Bucket, Choice, ReferenceChoice, Sampling, choose
from refalign_ext.data.sampling.order import Place
from refalign_ext.data.sampling.split import Allowed
from refalign_ext.data.schema import Clip

if TYPE_CHECKING:
    from refalign_ext.data.cache.reader import LatentCache


@dataclass(frozen=True)
class Failure:
    """A clip that could not be used, and why."""

    part: int
    row: int
    clip: str
    reason: str


@dataclass(frozen=True)
class LoadedReference:
    """One reference: pixels, or what the cache has of them.

    Attributes:
        levels: [3, H, W] uint8, if something has to be computed from pixels.
        latents: [C, 1, h, w]; features: [N, D].
    """

    levels: Tensor | None
    latents: Tensor | None
    features: Tensor | None


@dataclass(frozen=True)
class LoadedSample:
    """One sample as a loader process hands it over; bytes instead of floats, as these are passed between processes.

    Attributes:
        place: where it is in the order.
        choice: what was drawn, None if no clip could be used; its row is that of the clip that was.
        clip: the clip's id.
        levels: [3, T, H, W] uint8, or latents: [C, F, h, w] from the cache.
        failures: clips that were tried before it.
        stop: why training cannot go on; empty: it can.
    """

    place: Place
    choice: Choice | None
    clip: str
    levels: Tensor | None
    latents: Tensor | None
    references: tuple[LoadedReference, ...]
    failures: tuple[Failure, ...] = ()
    stop: str = ""


class ClipDataset(Dataset):
    """Samples by their place; what one is depends on nothing else.

    Args:
        clip_sets: by their number.
        sampling: what is drawn.
        allowed: which references may be used, for each set; None: all.
        caches: latents of each set, None where there are none.
        needs_features: whether the teacher's features are wanted: where the cache has none, pixels are loaded.
    """

    def __init__(
        self,
        clip_sets: Sequence[ClipSet],
        sampling: Sampling,
        *,
        allowed: Sequence[Allowed] | None = None,
        caches: Sequence[LatentCache | None] = (),
        needs_features: bool = True,
    ) -> None:
        self.clip_sets, self.sampling, self.allowed = list(clip_sets), sampling, allowed
        self.caches = list(caches) or [None] * len(self.clip_sets)
        self.needs_features = needs_features

    def __getitem__(self, place: Place) -> LoadedSample:
        failures: list[Failure] = []
        for row in (place.row, *place.spare):
            name = self.clip_sets[place.part].place(row)
            try:
                clip = self.clip_sets[place.part][row]
                name = clip.id
                return replace(self._load(place, row, clip), failures=tuple(failures))
            except CacheError as error:
                # Not this clip's fault: passing over all clips of a file would change what is trained without a word.
                return LoadedSample(place, None, name, None, None, (), tuple(failures), stop=str(error))
            except (ValueError, OSError) as error:
                failures.append(Failure(place.part, row, name, " ".join(str(error).split())[:500]))
        return LoadedSample(place, None, "", None, None, (), tuple(failures))

    def _load(self, place: Place, row: int, clip: Clip) -> LoadedSample:
        allowed = None if self.allowed is None else partial(self.allowed[place.part].of, clip)
        choice = choose(clip, row, place.bucket, self.sampling, place.position, allowed=allowed)
        cache, clip_set = self.caches[place.part], self.clip_sets[place.part]
        latents = None if cache is None else cache.video(clip.id, place.bucket, choice.cut)
        levels = None
        if latents is None:
            levels = video_uint8(clip_set, row, clip, place.bucket, choice.cut, self.sampling)
        references = tuple(
            self._load_reference(place.part, row, clip, reference, place.bucket)
            for reference in choice.references
        )
        return LoadedSample(place, choice, clip.id, levels, latents, references)

    def _load_reference(
        self, part: int, row: int, clip: Clip, choice: ReferenceChoice, bucket: Bucket
    ) -> LoadedReference:
        cache = self.caches[part]
        found = None if cache is None else cache.reference(clip.id, bucket, choice)
        latents, features = found or (None, None)
        if latents is not None and not (self.needs_features and features is None):
            return LoadedReference(None, latents, features if self.needs_features else None)
        pixels = load_reference(self.clip_sets[part], row, clip, choice, bucket, self.sampling)
        return LoadedReference(to_uint8(pixels), latents, features)
