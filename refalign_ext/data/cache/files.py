"""The files of a cache: a header and chunks of rows, each written whole or not at all.

A cache is a folder with `cache.json` (what it was made from, how many rows) and one safetensors file for every
`chunk_rows` rows. A chunk's header says what it was made from too, each row's id and digest, and what could not be
computed and why. Tensors are named as `refalign_ext.data.cache.names` says; a prompt is stored once in a chunk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from refalign_ext.atomic_io import atomic_open, atomic_path, sync
from refalign_ext.data.cache.names import AGAIN

HEADER = "cache.json"
_KEY = "refalign_cache"  # the one key of a file's metadata: with several their order would be by chance
_MAX_HEADER_BYTES = 1 << 20
_INVALID = (ValueError, RecursionError, msgspec.DecodeError)
_NAME = re.compile("(video|reference|features|text)-[0-9a-f]{32}")


class CacheError(ValueError):
    """A file of a cache is missing or damaged."""


class Fingerprint(TypedDict):
    """What a cache was made from: see `refalign_ext.data.cache.names.cache_fingerprint`."""

    format: int
    files: dict[str, str]
    settings: dict[str, Any]


@dataclass(frozen=True)
class CacheHeader:
    """The contents of `cache.json`: what the cache was made from and how its rows are divided."""

    fingerprint: Fingerprint
    rows: Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
    chunk_rows: Annotated[int, msgspec.Meta(ge=1)]

    @property
    def chunks(self) -> int:
        """How many chunk files there are when the cache is complete."""
        return -(-self.rows // self.chunk_rows)

    def chunk(self, number: int) -> range:
        """The rows of a chunk."""
        return range(number * self.chunk_rows, min(self.rows, (number + 1) * self.chunk_rows))


@dataclass(frozen=True)
class ChunkRecord:
    """What a chunk's header says: what it was made from, (id, digest) of each row, and what could not be loaded.

    The id is empty if the row could not be read. `failures` says why, by tensor's name or, for a whole row, its place.
    """

    fingerprint: Fingerprint
    rows: list[tuple[str, Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]]]
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """An open chunk, whose tensors are read one by one."""

    path: Path
    file: Any  # of safetensors
    record: ChunkRecord
    names: frozenset[str]

    def tensor(self, name: str) -> Tensor:
        """A tensor in float32; raises CacheError if the file is damaged."""
        try:
            return self.file.get_tensor(name).float()
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, error) from None


def default_folder(data: Path) -> Path:
    """Where the cache of a manifest or of a packed folder lies unless another place is given; training looks there."""
    return data / "cache" if data.is_dir() else data.with_name(data.name + ".cache")


def chunk_path(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:06d}.safetensors"


def write_header(folder: Path, header: CacheHeader) -> None:
    """Writes `cache.json`; several processes may write the same at once."""
    with atomic_open(folder / HEADER) as file:
        file.write((json.dumps(vars(header), indent=2, sort_keys=True) + "\n").encode())
    sync(folder)


def read_header(folder: Path) -> CacheHeader:
    """The header of a cache; raises ValueError if there is none or it is damaged."""
    path = folder / HEADER
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_HEADER_BYTES), type=CacheHeader)
    except FileNotFoundError:
        raise ValueError(f"{folder}: there is no {HEADER}: make the cache with `data cache`") from None
    except _INVALID as error:
        raise _damaged(path, error) from None


def write_chunk(folder: Path, number: int, tensors: Mapping[str, Tensor], record: ChunkRecord) -> None:
    """Writes a chunk; the same contents give the same bytes. Raises OSError if it cannot be written."""
    path = chunk_path(folder, number)
    for leftover in folder.glob(f".{path.name}.*.part"):  # of a run that was killed
        leftover.unlink(missing_ok=True)
    metadata = {_KEY: json.dumps(vars(record), sort_keys=True)}
    ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
    try:
        with atomic_path(path) as temporary:
            save_file(ordered, temporary, metadata)
        sync(folder)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}): is the disk full?") from None


def open_chunk(path: Path) -> Chunk:
    """Opens a chunk and reads its header; raises CacheError if it is missing or damaged."""
    try:
        file = safe_open(path, framework="pt")
        record = msgspec.json.decode((file.metadata() or {})[_KEY], type=ChunkRecord)
        names = frozenset(file.keys())
        if not all(_NAME.fullmatch(name) for name in names):
            raise ValueError("it has tensors that no cache has")
        return Chunk(path, file, record, names)
    except FileNotFoundError:
        raise CacheError(f"{path} is missing: {AGAIN}") from None
    except (SafetensorError, OSError, KeyError, *_INVALID) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CacheError:
    return CacheError(f"{path} is damaged or cut off ({error}): delete it and {AGAIN}")
