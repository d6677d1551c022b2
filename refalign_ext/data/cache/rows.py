"""Rows on their way into a cache: everything that training may ask of a row, loaded by whichever process has time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from refalign_ext.data.cache.names import reference_name, row_digest, video_name
from refalign_ext.data.clip_index import measure
from refalign_ext.data.sampling.buckets import assign
from refalign_ext.data.sampling.sample_spec import Sampling, possible_prompts, possible_references
from refalign_ext.data.schema import Clip
from refalign_ext.data.worker_pool import begin_row

if TYPE_CHECKING:
    from refalign_ext.data.cache.reader import LatentCache
    from refalign_ext.data.clip_set import ClipSet
    from refalign_ext.data.sampling.sample_spec import Bucket

_MAX_REASON = 500  # characters kept of why something failed


@dataclass(frozen=True)
class LoadedItem:
    """A video's cut or a reference.

    Attributes:
        name: what the cache calls its latents.
        levels: [3, T, H, W] or [3, H, W] uint8; None if it could not be loaded.
        reason: why not.
    """

    name: str
    levels: np.ndarray | None
    reason: str = ""


@dataclass(frozen=True)
class LoadedRow:
    """One row.

    Attributes:
        clip_id: empty if the row could not be read or fits no bucket.
        digest: of its content and its files' sizes.
        prompts: all that its samples may have.
        reason: why it could not be read.
    """

    clip_id: str
    digest: str
    prompts: tuple[str, ...] = ()
    items: list[LoadedItem] = field(default_factory=list)
    reason: str = ""


class RowLoader:
    """Loads rows by number; may be pickled.

    Args:
        clip_set: where they come from.
        sampling: what samples are drawn from; its number of cuts must be finite.

    Raises:
        ValueError: if it is not.
    """

    def __init__(self, clip_set: ClipSet, sampling: Sampling) -> None:
        if sampling.clip_variants < 1:
            raise ValueError(
                "clip_variants is 0: a cache needs a number of temporal cuts per clip, such as --sampling.clip_variants 1"
            )
        self.clip_set, self.sampling = clip_set, sampling

    def identify(self, row: int) -> tuple[str, str]:
        """A row's id and digest as the cache stores them, without decoding anything."""
        try:
            clip = self.clip_set[row]
        except ValueError as error:
            return "", self._digest(error)
        return clip.id, row_digest(clip, file_sizes(self.clip_set, row, clip))

    def __call__(self, row: int) -> LoadedRow:
        """Everything of a row; what cannot be loaded says why and costs nothing else."""
        try:
            clip = self.clip_set[row]
        except ValueError as error:
            return LoadedRow("", self._digest(error), reason=_short(error))
        digest = row_digest(clip, file_sizes(self.clip_set, row, clip))
        try:
            begin_row(row)
            bucket = self._bucket(row, clip)
        except (ValueError, OSError) as error:
            return LoadedRow(clip.id, digest, reason=_short(error))
        items = list(self._items(row, clip, bucket))
        return LoadedRow(clip.id, digest, possible_prompts(clip, self.sampling), items)

    def _digest(self, error: ValueError) -> str:
        # Where the rows lie, and how the path to them was given, does not matter.
        text = str(error).replace(str(self.clip_set.path), "")
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]

    def _bucket(self, row: int, clip: Clip) -> Bucket:
        """The bucket in which training shows a clip."""
        if not any(subject.refs for subject in clip.subjects):
            raise ValueError(f"{self.clip_set.place(row)}: it has no references")
        if len(self.sampling.buckets) == 1:
            return self.sampling.buckets[0]
        width, height, frames, fps = measure(self.clip_set, row, clip.video)
        sizes = [np.array([size], np.int32) for size in (width, height, frames)]
        number = int(assign(*sizes, np.array([fps], np.float32), self.sampling)[0])
        if number < 0:
            raise ValueError(f"{self.clip_set.place(row)}: its {frames} frames are too few for every bucket")
        return self.sampling.buckets[number]

    def _items(self, row: int, clip: Clip, bucket: Bucket) -> Iterator[LoadedItem]:
        from refalign_ext.data.pixels import load_reference, to_uint8, video_uint8

        for cut in range(self.sampling.clip_variants):
            name = video_name(clip.id, bucket, cut)
            try:
                video = video_uint8(self.clip_set, row, clip, bucket, cut, self.sampling)
                yield LoadedItem(name, video.numpy())
            except (ValueError, OSError) as error:
                yield LoadedItem(name, None, _short(error))
        for choice in possible_references(clip, self.sampling):
            name = reference_name(clip.id, bucket, choice)
            try:
                image = load_reference(self.clip_set, row, clip, choice, bucket, self.sampling)
                yield LoadedItem(name, to_uint8(image).numpy())
            except (ValueError, OSError) as error:
                yield LoadedItem(name, None, _short(error))


def file_sizes(clip_set: ClipSet, row: int, clip: Clip) -> list[int]:
    """Bytes of the files that a row names, in its order; -1 for one that cannot be had."""
    names = [clip.video.path]
    for subject in clip.subjects:
        names += [reference.image or reference.video.path for reference in subject.refs]
    return [_file_size(clip_set, row, name) for name in names]


def _file_size(clip_set: ClipSet, row: int, name: str) -> int:
    try:
        return clip_set.file_size(row, name)
    except (ValueError, OSError):
        return -1


def check_rows(cache: LatentCache, clip_set: ClipSet, *, progress: bool = True) -> None:
    """Makes sure that a cache holds the rows of a clip set as they are now; rows that cannot be read are passed over.

    Raises:
        ValueError: naming the first row that is missing or changed.
    """
    from tqdm import tqdm

    for row in tqdm(
        range(len(clip_set)), "checking the cache's rows", unit="row", disable=None if progress else True
    ):
        try:
            clip = clip_set[row]
        except ValueError:
            continue
        cache.check_row(clip_set.place(row), clip, row_digest(clip, file_sizes(clip_set, row, clip)))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:_MAX_REASON]
