"""Latents, text and teacher features computed before training, read from a folder's chunks when they are asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from refalign_ext.data.cache.files import Chunk, chunk_path, open_chunk, read_header
from refalign_ext.data.cache.names import (
    AGAIN,
    differences,
    features_name,
    name_hash,
    reference_name,
    row_digest,
    row_hash,
    text_name,
    video_name,
)
from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.sampling.sample_spec import Bucket, ReferenceSpec

logger = logging.getLogger(__name__)

_OPEN_FILES = 16


class LatentCache:
    """A complete cache, read-only; rows are found by id, so their order does not matter.

    Memory is 24 bytes per row and 16 per prompt; tensors stay in their files. It can be pickled.

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
        missing = next((n for n in numbers if not chunk_path(self.folder, n).exists()), None)
        if missing is not None:
            raise ValueError(
                f"{self.folder}: chunk {missing} of {len(numbers)} is missing: {AGAIN}, it goes on where it stopped "
                "(or train with --cache off)"
            )
        self.failures = 0
        rows, prompts = [np.zeros((0, 3), np.uint64)], [np.zeros((0, 2), np.uint64)]
        for number in tqdm(numbers, "opening the cache", unit="chunk", disable=None, delay=2, leave=False):
            chunk = self._checked_chunk(number)
            self.failures += len(chunk.record.failures)
            ids = [(row_hash(i), int(digest, 16), number) for i, digest in chunk.record.rows if i]
            texts = [(name_hash(name), number) for name in chunk.names if name.startswith("text-")]
            rows.append(np.array(ids, np.uint64).reshape(-1, 3))
            prompts.append(np.array(texts, np.uint64).reshape(-1, 2))
        self._rows = _sorted_columns(rows)  # [3, rows]: hash of the id, digest, chunk
        self._prompts = _sorted_columns(prompts)  # [2, prompts]: hash of the name, chunk
        if (self._rows[0, 1:] == self._rows[0, :-1]).any():
            raise ValueError(f"{self.folder}: two rows have the same id: `data check` names them")
        self._open: dict[int, Chunk] = {}  # the last used comes last

    def _checked_chunk(self, number: int) -> Chunk:
        chunk = open_chunk(chunk_path(self.folder, number))
        found = differences(chunk.record.fingerprint, self.header.fingerprint)
        rows, expected = len(chunk.record.rows), len(self.header.chunk(number))
        if rows != expected:
            found.append(f"{rows} rows instead of {expected}")
        if found:
            raise ValueError(
                f"{chunk.path} does not belong to this cache: {'; '.join(found)}: delete it and {AGAIN}"
            )
        return chunk

    def __len__(self) -> int:
        """Rows, with those that could not be read."""
        return self.header.rows

    def check_rows(self, clip_set: ClipSet) -> None:
        """Raises ValueError naming the first row that is not in the cache as it is now; unreadable rows do not count."""
        for row in tqdm(range(len(clip_set)), "checking the cache's rows", unit="row", disable=None):
            try:
                clip = clip_set[row]
            except ValueError:
                continue
            place, found = f"{clip_set.place(row)} ({clip.id})", _find(self._rows, row_hash(clip.id))
            if found is None:
                raise ValueError(f"{place} is not in the cache {self.folder}: {AGAIN}")
            if int(found[1]) != int(row_digest(clip_set, row, clip), 16):
                raise ValueError(f"{place} changed since the cache {self.folder} was made: {AGAIN}")

    def video(self, clip_id: str, bucket: Bucket, clip_variant: int) -> Tensor | None:
        """Latents [C, F, h, w] float32 of a variant of a clip; None: not in the cache.

        Raises:
            ValueError: saying why, if it could not be loaded when the cache was made.
            CacheError: if a file is missing or damaged.
        """
        return self._tensor(_find(self._rows, row_hash(clip_id)), video_name(clip_id, bucket, clip_variant))

    def reference(
        self, clip_id: str, bucket: Bucket, spec: ReferenceSpec
    ) -> tuple[Tensor, Tensor | None] | None:
        """Latents [C, 1, h, w] and teacher features [N, D] (None: the cache has none), float32; else as `video`."""
        found, name = _find(self._rows, row_hash(clip_id)), reference_name(clip_id, bucket, spec)
        latents = self._tensor(found, name)
        return None if latents is None else (latents, self._tensor(found, features_name(name)))

    def text(self, prompt: str) -> Tensor | None:
        """Text features [L, D] float32 of a prompt; None: not in the cache. Raises CacheError as `video`."""
        name = text_name(prompt)
        return self._tensor(_find(self._prompts, name_hash(name)), name)

    def _tensor(self, found: np.ndarray | None, name: str) -> Tensor | None:
        if found is None:
            return None
        number = int(found[-1])
        chunk = self._open.pop(number, None) or open_chunk(chunk_path(self.folder, number))
        self._open[number] = chunk
        if len(self._open) > _OPEN_FILES:
            del self._open[next(iter(self._open))]
        if name in chunk.record.failures:
            raise ValueError(f"{chunk.record.failures[name]} (when the cache {self.folder} was made)")
        return chunk.tensor(name) if name in chunk.names else None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": {}}


class CachedText:
    """Text features from caches, as the trainer asks for them: the text encoder need not be loaded.

    Args:
        caches: at least one, asked one after the other.
        device: where features are put.
        load_encoder: called at the first prompt that no cache has; the encoder itself puts features on `device`.
    """

    def __init__(
        self,
        caches: Sequence[LatentCache],
        device: torch.device | str,
        load_encoder: Callable[[], Callable[[Sequence[str]], list[Tensor]]],
    ) -> None:
        self.caches, self.device, self.load_encoder = list(caches), device, load_encoder
        self._encode: Callable[[Sequence[str]], list[Tensor]] | None = None

    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text features of each prompt, [L, D] float32."""
        return [self._features(prompt) for prompt in prompts]

    def _features(self, prompt: str) -> Tensor:
        for cache in self.caches:
            found = cache.text(prompt)
            if found is not None:
                return found.to(self.device)
        if self._encode is None:
            folder, text = self.caches[0].folder, prompt[:80]
            logger.warning("loading the text encoder: the cache %s does not have the prompt %r", folder, text)
            self._encode = self.load_encoder()
        return self._encode([prompt])[0]


def _sorted_columns(tables: list[np.ndarray]) -> np.ndarray:
    """The rows of tables [n, columns], ascending by the first column, transposed: [columns, sum of n]."""
    table = np.concatenate(tables)
    return np.ascontiguousarray(table[np.argsort(table[:, 0], kind="stable")].T)


def _find(table: np.ndarray, key: int) -> np.ndarray | None:
    """The column of a table [columns, n] that begins with `key`."""
    place = int(np.searchsorted(table[0], np.uint64(key)))
    return table[:, place] if place < table.shape[1] and int(table[0, place]) == key else None
