"""Rows on their way into a cache: everything that training may ask of a row, loaded by whichever process has time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch import Tensor

from refalign_ext.data.cache.names import reference_name, row_digest, video_name
from refalign_ext.data.clip_index import measure
from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.pixels import load_reference, to_uint8, video_uint8
from refalign_ext.data.sampling.buckets import assign
from refalign_ext.data.sampling.sample_spec import Bucket, Sampling, possible_prompts, possible_references
from refalign_ext.data.schema import Clip
from refalign_ext.data.worker_pool import begin_row
from refalign_ext.errors import one_line


@dataclass(frozen=True)
class LoadedRow:
    """One row; its id is empty if it could not be read.

    Attributes:
        prompts: all that its samples may have.
        pixels: its variants by the names of their latents: clips [3, T, H, W] and references [3, H, W], uint8.
        failures: why the others could not be loaded, by name; of the whole row by its place.
    """

    clip_id: str
    digest: str
    prompts: tuple[str, ...] = ()
    pixels: dict[str, np.ndarray] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


class RowLoader:
    """Loads rows by number; may be pickled. Raises ValueError if the number of clip variants is not finite."""

    def __init__(self, clip_set: ClipSet, sampling: Sampling) -> None:
        if sampling.clip_variants < 1:
            raise ValueError(
                "clip_variants is 0: a cache needs a number of variants per clip, such as --sampling.clip_variants 1"
            )
        self.clip_set, self.sampling = clip_set, sampling

    def identify(self, row: int) -> tuple[str, str]:
        """A row's id and digest as the cache stores them, without decoding anything."""
        try:
            clip = self.clip_set[row]
        except ValueError as error:
            # Where the rows lie, and how the path to them was given, does not matter.
            text = str(error).replace(str(self.clip_set.path), "")
            return "", hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
        return clip.id, row_digest(self.clip_set, row, clip)

    def __call__(self, row: int) -> LoadedRow:
        """Everything of a row; what cannot be loaded says why and costs nothing else."""
        clip_id, digest = self.identify(row)
        try:
            begin_row(row)
            clip = self.clip_set[row]
            bucket = self._bucket(row, clip)
        except (ValueError, OSError) as error:
            return LoadedRow(clip_id, digest, failures={self.clip_set.place(row): one_line(error, limit=500)})
        loaded = LoadedRow(clip_id, digest, possible_prompts(clip, self.sampling))
        for name, load in self._variants(row, clip, bucket).items():
            try:
                loaded.pixels[name] = load().numpy()
            except (ValueError, OSError) as error:
                loaded.failures[name] = one_line(error, limit=500)
        return loaded

    def _bucket(self, row: int, clip: Clip) -> Bucket:
        """The bucket in which training shows a clip."""
        if not any(subject.refs for subject in clip.subjects):
            raise ValueError(f"{self.clip_set.place(row)}: it has no references")
        if len(self.sampling.buckets) == 1:
            return self.sampling.buckets[0]
        width, height, frames, fps = (np.array([one]) for one in measure(self.clip_set, row, clip.video))
        number = int(assign(width, height, frames, fps.astype(np.float32), self.sampling)[0])
        if number < 0:
            raise ValueError(
                f"{self.clip_set.place(row)}: its {frames[0]} frames are too few for every bucket"
            )
        return self.sampling.buckets[number]

    def _variants(self, row: int, clip: Clip, bucket: Bucket) -> dict[str, Callable[[], Tensor]]:
        """What loads each variant of the clip and of its references, by the name of its latents."""
        loads: dict[str, Callable[[], Tensor]] = {}
        for variant in range(self.sampling.clip_variants):
            given = (self.clip_set, row, clip, bucket, variant, self.sampling)
            loads[video_name(clip.id, bucket, variant)] = partial(video_uint8, *given)
        for spec in possible_references(clip, self.sampling):
            given = (self.clip_set, row, clip, spec, bucket, self.sampling)
            loads[reference_name(clip.id, bucket, spec)] = partial(_reference_uint8, *given)
        return loads


def _reference_uint8(*given: object) -> Tensor:
    return to_uint8(load_reference(*given))
