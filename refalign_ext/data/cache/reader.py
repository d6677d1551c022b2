"""Latents, text and teacher features computed before training, read from a folder's chunks when they are asked for."""

from __future__ import annotations

import logging
import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from refalign_ext.data.cache.files import (
    CacheError,
    chunk_path,
    open_chunk,
    read_header,
    read_record,
)
from refalign_ext.data.cache.names import (
    AGAIN,
    differences,
    features_name,
    reference_name,
    row_name,
    short_hash,
    text_name,
    video_name,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from refalign_ext.data.sampling.sample_spec import Bucket, ReferenceSpec
    from refalign_ext.data.schema import Clip

logger = logging.getLogger(__name__)

_OPEN_FILES = 16


class LatentCache:
    """A complete cache, read-only; rows are found by id, so their order does not matter.

    Memory is 20 bytes per row and 12 per prompt; tensors stay in their files. It can be pickled.

    Args:
        folder: where it lies.
        expected: the run's `cache_fingerprint`; None: whatever it was made from.

    Raises:
        ValueError: saying why, if it was made from something else, is not complete or is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], expected: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        found = [] if expected is None else differences(self.header.fingerprint, expected)
        if found:
            raise ValueError(
                f"the cache {self.folder} does not fit: {'; '.join(found)}: make one for this run with `data cache` in "
                "another folder, or train without it (--cache off)"
            )
        numbers = range(self.header.chunks)
        # No more are looked for than are told: a damaged header may say that there are billions.
        absent = (str(number) for number in numbers if not chunk_path(self.folder, number).exists())
        missing = list(islice(absent, 9))
        if missing:
            listed = ", ".join(missing[:8]) + (" and more" if len(missing) > 8 else "")
            raise ValueError(
                f"{self.folder}: chunks {listed} of {self.header.chunks} are missing: {AGAIN}, it goes on with them "
                "(or train with --cache off)"
            )
        self.failures = 0
        self._read_tables()
        self._files: OrderedDict[int, _OpenChunk] = OrderedDict()

    def _read_tables(self) -> None:
        ids, digests, row_chunks = array("Q"), array("Q"), array("I")
        prompts, prompt_chunks = array("Q"), array("I")
        numbers = range(self.header.chunks)
        for number in tqdm(numbers, "opening the cache", unit="chunk", disable=None, delay=2, leave=False):
            path = chunk_path(self.folder, number)
            record, names = read_record(open_chunk(path), path)
            found = differences(record.fingerprint, self.header.fingerprint)
            if not found and len(record.rows) != len(self.header.chunk(number)):
                expected = len(self.header.chunk(number))
                found = [f"{len(record.rows)} rows instead of {expected}"]
            if found:
                raise ValueError(
                    f"{path} does not belong to this cache: {'; '.join(found)}: delete it and {AGAIN}"
                )
            self.failures += len(record.failures)
            for clip_id, digest in record.rows:
                if clip_id:
                    ids.append(short_hash(row_name(clip_id)))
                    digests.append(int(digest, 16))
                    row_chunks.append(number)
            texts = [short_hash(name) for name in names if name.startswith("text-")]
            prompts.extend(texts)
            prompt_chunks.extend([number] * len(texts))
        order = np.argsort(np.array(ids, np.uint64), kind="stable")
        self._ids, self._digests = np.array(ids, np.uint64)[order], np.array(digests, np.uint64)[order]
        self._row_chunks = np.array(row_chunks, np.uint32)[order]
        if (self._ids[1:] == self._ids[:-1]).any():
            raise ValueError(f"{self.folder}: two rows have the same id: `data check` names them")
        self._prompts, first = np.unique(np.array(prompts, np.uint64), return_index=True)
        self._prompt_chunks = np.array(prompt_chunks, np.uint32)[first]

    def __len__(self) -> int:
        """Rows, with those that could not be read."""
        return self.header.rows

    def check_row(self, place: str, clip: Clip, digest: str) -> None:
        """Makes sure that a row is the one that was cached.

        Args:
            place: what errors start with, such as "data.jsonl, row 3".
            digest: the row's `row_digest` now.

        Raises:
            ValueError: if the cache does not have the row, or had another one of this id.
        """
        found = _find(self._ids, short_hash(row_name(clip.id)))
        if found is None:
            raise ValueError(f"{place} ({clip.id}) is not in the cache {self.folder}: {AGAIN}")
        if int(self._digests[found]) != int(digest, 16):
            raise ValueError(f"{place} ({clip.id}) changed since the cache {self.folder} was made: {AGAIN}")

    def video(self, clip_id: str, bucket: Bucket, cut: int) -> Tensor | None:
        """Latents [C, F, h, w] float32 of a cut; None: not in the cache.

        Raises:
            ValueError: saying why, if the cut could not be loaded when the cache was made.
            CacheError: if a file is missing or damaged.
        """
        return self._of_row(clip_id, video_name(clip_id, bucket, cut))

    def reference(
        self, clip_id: str, bucket: Bucket, choice: ReferenceSpec
    ) -> tuple[Tensor, Tensor | None] | None:
        """Latents [C, 1, h, w] and teacher features [N, D] (None: the cache has none), float32; None: not in the cache.

        Raises:
            ValueError: as `video`.
        """
        name = reference_name(clip_id, bucket, choice)
        latents = self._of_row(clip_id, name)
        return None if latents is None else (latents, self._of_row(clip_id, features_name(name)))

    def text(self, prompt: str) -> Tensor | None:
        """Text features [L, D] float32 of a prompt; None: not in the cache.

        Raises:
            CacheError: if a file is missing or damaged.
        """
        name = text_name(prompt)
        found = _find(self._prompts, short_hash(name))
        return None if found is None else self._tensor(int(self._prompt_chunks[found]), name)

    def _of_row(self, clip_id: str, name: str) -> Tensor | None:
        found = _find(self._ids, short_hash(row_name(clip_id)))
        return None if found is None else self._tensor(int(self._row_chunks[found]), name)

    def _tensor(self, number: int, name: str) -> Tensor | None:
        from safetensors import SafetensorError

        chunk = self._opened(number)
        if name in chunk.failures:
            raise ValueError(f"{chunk.failures[name]} (when the cache {self.folder} was made)")
        if name not in chunk.names:
            return None
        try:
            return chunk.file.get_tensor(name).float()
        except (SafetensorError, OSError) as error:
            raise CacheError(
                f"{chunk_path(self.folder, number)} is damaged ({error}): delete it and {AGAIN}"
            ) from None

    def _opened(self, number: int) -> _OpenChunk:
        if number not in self._files:
            path = chunk_path(self.folder, number)
            file = open_chunk(path)
            record, names = read_record(file, path)
            self._files[number] = _OpenChunk(file, frozenset(names), record.failures)
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(number)
        return self._files[number]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_files": OrderedDict()}


@dataclass(frozen=True)
class _OpenChunk:
    file: Any
    names: frozenset[str]
    failures: dict[str, str]


class CachedText:
    """Text features from caches, as the trainer asks for them: the text encoder need not be loaded.

    Args:
        caches: where they are, asked one after the other; at least one.
        device: where they are put.
        fallback: called at the first prompt that no cache has; gives the encoder for such prompts, which puts its
            features on `device` itself.
    """

    def __init__(
        self,
        caches: Sequence[LatentCache],
        device: torch.device | str,
        fallback: Callable[[], Callable[[Sequence[str]], list[Tensor]]] | None = None,
    ) -> None:
        self.caches, self.device, self.fallback = list(caches), device, fallback
        self._encode: Callable[[Sequence[str]], list[Tensor]] | None = None

    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text features of each prompt, [L, D] float32.

        Raises:
            ValueError: for a prompt that no cache has, if there is no fallback.
        """
        return [self._one(prompt) for prompt in prompts]

    def _one(self, prompt: str) -> Tensor:
        for cache in self.caches:
            found = cache.text(prompt)
            if found is not None:
                return found.to(self.device)
        folders = ", ".join(str(cache.folder) for cache in self.caches)
        if self.fallback is None:
            raise ValueError(
                f"the cache {folders} does not have the prompt {prompt[:80]!r}: {AGAIN} with the rows that use it"
            )
        if self._encode is None:
            logger.warning(
                "loading the text encoder: the cache %s does not have the prompt %r", folders, prompt[:80]
            )
            self._encode = self.fallback()
        return self._encode([prompt])[0]


def _find(table: np.ndarray, value: int) -> int | None:
    place = int(np.searchsorted(table, np.uint64(value)))
    return place if place < len(table) and int(table[place]) == value else None
