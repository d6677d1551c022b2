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
from typing import TYPE_CHECKING, Any

from refalign_ext.atomic_io import atomic_open, atomic_path, sync
from refalign_ext.data.cache.names import AGAIN

if TYPE_CHECKING:
    from torch import Tensor

HEADER = "cache.json"
_KEY = "refalign_cache"  # the one key of a file's metadata: with several their order would be by chance
_MAX_HEADER_BYTES = 1 << 20
_MAX_ROWS = 1 << 48
_DIGEST = re.compile("[0-9a-f]{16}")
_NAME = re.compile("(video|reference|features|text)-[0-9a-f]{32}")


class CacheError(ValueError):
    """A file of a cache is missing or damaged."""


@dataclass(frozen=True)
class CacheHeader:
    """The contents of `cache.json`: what the cache was made from and how its rows are divided."""

    fingerprint: dict[str, Any]
    rows: int
    chunk_rows: int

    @property
    def chunks(self) -> int:
        """How many chunk files there are when the cache is complete."""
        return -(-self.rows // self.chunk_rows)

    def chunk(self, number: int) -> range:
        """The rows of a chunk."""
        return range(number * self.chunk_rows, min(self.rows, (number + 1) * self.chunk_rows))


@dataclass(frozen=True)
class ChunkRecord:
    """What a chunk's header says.

    Attributes:
        fingerprint: what it was made from.
        rows: [id, digest] of each row; the id is empty if the row could not be read.
        failures: why something could not be loaded, by its tensor's name or, for a whole row, its place.
    """

    fingerprint: dict[str, Any]
    rows: list[list[str]]
    failures: dict[str, str] = field(default_factory=dict)


def default_folder(data: Path) -> Path:
    """Where the cache of a manifest or of a packed folder lies unless another place is given; training looks there."""
    return data / "cache" if data.is_dir() else data.with_name(data.name + ".cache")


def chunk_path(folder: Path, number: int) -> Path:
    """Where a chunk is stored."""
    return folder / f"chunk-{number:06d}.safetensors"


def write_header(folder: Path, header: CacheHeader) -> None:
    """Writes `cache.json`, whole or not at all; several processes may write the same at once."""
    text = json.dumps(vars(header), indent=2, sort_keys=True) + "\n"
    with atomic_open(folder / HEADER) as file:
        file.write(text.encode("utf-8"))
    sync(folder)


def read_header(folder: Path) -> CacheHeader:
    """The header of a cache.

    Raises:
        ValueError: if there is no cache or its header is damaged.
    """
    path = folder / HEADER
    try:
        with path.open("rb") as file:
            entry = json.loads(file.read(_MAX_HEADER_BYTES))
        header = CacheHeader(**entry)
        are_counts = all(type(value) is int for value in (header.rows, header.chunk_rows))
        if (
            not are_counts
            or not 0 <= header.rows < _MAX_ROWS
            or header.chunk_rows < 1
            or not _is_fingerprint(header.fingerprint)
        ):
            raise ValueError("its values cannot be")
    except FileNotFoundError:
        raise ValueError(f"{folder}: there is no {HEADER}: make the cache with `data cache`") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({_told(error)}): delete it and {AGAIN}") from None
    return header


def write_chunk(folder: Path, number: int, tensors: Mapping[str, Tensor], record: ChunkRecord) -> None:
    """Writes a chunk, whole or not at all; the same contents give the same bytes.

    Raises:
        OSError: if it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = chunk_path(folder, number)
    metadata = {_KEY: json.dumps(vars(record), sort_keys=True)}
    whole = {name: tensors[name].contiguous() for name in sorted(tensors)}
    try:
        with atomic_path(path) as aside:
            save_file(whole, aside, metadata)
        sync(folder)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}): is the disk full?") from None


def read_record(path: Path) -> tuple[ChunkRecord, list[str]]:
    """A chunk's record and the names of its tensors.

    Raises:
        CacheError: if the file is missing, cut off or damaged, naming it.
    """
    return opened_record(open_chunk(path), path)


def opened_record(file: Any, path: Path) -> tuple[ChunkRecord, list[str]]:
    """As `read_record`, of a file that `open_chunk` gave."""
    try:
        record = ChunkRecord(**json.loads((file.metadata() or {})[_KEY]))
        names = list(file.keys())
        are_rows = all(
            isinstance(clip_id, str) and _DIGEST.fullmatch(digest) for clip_id, digest in record.rows
        )
        are_names = all(_NAME.fullmatch(name) for name in names)
        if not (are_rows and are_names and _is_fingerprint(record.fingerprint) and _is_text(record.failures)):
            raise ValueError("its header's values cannot be")
        return record, names
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CacheError(f"{path} is damaged ({_told(error)}): delete it and {AGAIN}") from None


def open_chunk(path: Path) -> Any:
    """A chunk as a `safe_open` file, whose tensors are read one by one.

    Raises:
        CacheError: as `read_record`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CacheError(f"{path} is missing: {AGAIN}") from None
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path} is damaged or cut off ({error}): delete it and {AGAIN}") from None


def _told(error: Exception) -> str:
    """What an error says; a key of a damaged file may hold half of a surrogate pair, which no log takes."""
    return str(error).encode("utf-8", "backslashreplace").decode("utf-8")


def _is_fingerprint(value: object) -> bool:
    return (
        isinstance(value, dict) and _is_text(value.get("files")) and isinstance(value.get("settings"), dict)
    )


def _is_text(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
