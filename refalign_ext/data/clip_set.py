"""Clips with their files, wherever they are stored: a manifest next to its files, or a folder packed into tar shards."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

from refalign_ext.data.manifest_file import MAX_ROW_BYTES, ManifestReader
from refalign_ext.data.media_source import Media, MediaBytes
from refalign_ext.data.schema import Clip, parse_line, resolve_inside
from refalign_ext.data.shards import LISTING, ShardTable, read_listing, scan_shard

MANIFEST = "manifest.jsonl"
_OPEN_SHARDS = 16


class ClipSet(ABC):
    """Rows by number and the files that they name. May be pickled, and used by threads and forked processes.

    Attributes:
        path: what it was opened from.
    """

    path: Path

    @abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Clip:
        """Row `row`, from 0; negative numbers count from the end.

        Raises:
            IndexError: if there is no such row.
            ValueError: naming the file and the row, if it is not as it should be.
        """
        number = row + len(self) if row < 0 else row
        if not 0 <= number < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, there is no row {row}")
        return parse_line(self.line(number), self.place(number))

    @abstractmethod
    def place(self, row: int) -> str:
        """What errors about a row start with: "data.jsonl, row 3"."""

    @abstractmethod
    def line(self, row: int) -> bytes:
        """The text of row `row`, from 0, unchecked.

        Raises:
            ValueError: if it cannot be read.
        """

    @abstractmethod
    def media(self, row: int, name: str) -> Media:
        """The file that row `row` means by `name`.

        Raises:
            ValueError: if there is none, or it is outside of where the clips are stored.
        """

    @abstractmethod
    def file_size(self, row: int, name: str) -> int:
        """Bytes of that file, without reading it.

        Raises:
            ValueError: as `media`.
        """

    @abstractmethod
    def shard_ranges(self) -> list[range]:
        """Rows that are stored together, in order; reading those of one range one after the other is fast."""


def open_clip_set(path: str | Path) -> ClipSet:
    """The clips of a manifest (.jsonl), or of a folder that `data materialise` wrote.

    Raises:
        ValueError: if there is nothing of the kind.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: give a manifest (.jsonl) or a folder written by data materialise"
        )
    if not path.is_dir():
        return ManifestRows(path)
    if (path / LISTING).is_file():
        return ShardRows(path)
    if (path / MANIFEST).is_file():
        return ManifestRows(path / MANIFEST)
    raise ValueError(
        f"{path} has neither {MANIFEST} nor {LISTING}: give a manifest (.jsonl) or a folder that "
        "data materialise has finished"
    )


class ManifestRows(ClipSet):
    """The rows of a manifest, and files below its folder.

    Raises:
        ValueError: if there is no such manifest.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.reader = ManifestReader(self.path)

    def __len__(self) -> int:
        return len(self.reader)

    def place(self, row: int) -> str:
        return f"{self.path}, row {row + 1}"

    def line(self, row: int) -> bytes:
        return self.reader.line(row)

    def media(self, row: int, name: str) -> Path:
        try:
            path = resolve_inside(self.reader.root, name)
            if not path.is_file():
                raise ValueError(f"{name} does not exist or is no file")
        except (
            ValueError,
            OSError,
            RuntimeError,
        ) as error:  # names too long, folders locked, links in circles
            raise ValueError(f"{self.place(row)}: {error}") from None
        return path

    def file_size(self, row: int, name: str) -> int:
        return self.media(row, name).stat().st_size

    def shard_ranges(self) -> list[range]:
        return [range(len(self))] if len(self) else []


class ShardRows(ClipSet):
    """The samples of a packed folder, read from its tar shards without unpacking them.

    A shard that is missing, cut off or damaged costs the rows that cannot be read from it and no others. The tables
    of the `_OPEN_SHARDS` shards used last are kept; memory does not grow with the number of rows.

    Raises:
        ValueError: if `shards.json` is missing or not as it should be.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._names: list[str] = []
        counts: list[int] = []
        for info in read_listing(self.path):
            self._names.append(info.name)
            counts.append(info.samples)
        self._ends = list(accumulate(counts))
        self._tables: OrderedDict[int, ShardTable] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def line(self, row: int) -> bytes:
        with self._errors_of(row):
            table, key = self._sample(row)
            return table.read(f"{key}.json", MAX_ROW_BYTES)

    def place(self, row: int) -> str:
        shard, sample = self._locate(row)
        return f"{self.path / self._names[shard]}, sample {sample + 1}"

    def media(self, row: int, name: str) -> MediaBytes:
        with self._errors_of(row):
            table = self._table_with(row, name)
            return MediaBytes(f"{table.name}: {name}", table.read(name))

    def file_size(self, row: int, name: str) -> int:
        with self._errors_of(row):
            return self._table_with(row, name).member_range(name)[1]

    def shard_ranges(self) -> list[range]:
        starts = [0, *self._ends]
        return [range(start, end) for start, end in zip(starts, self._ends) if start < end]

    def _locate(self, row: int) -> tuple[int, int]:
        """(shard, sample in it) of a row."""
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, there is no row {row}")
        shard = bisect_right(self._ends, row)
        return shard, row - (self._ends[shard - 1] if shard else 0)

    @contextmanager
    def _errors_of(self, row: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.place(row)}: {error}") from None

    def _sample(self, row: int) -> tuple[ShardTable, str]:
        """The table of a row's shard and the key of its sample."""
        shard, sample = self._locate(row)
        table = self._table(shard)
        if sample >= len(table.keys):
            raise ValueError(f"the shard is {table.damage or 'shorter than ' + LISTING + ' says'}")
        return table, table.keys[sample]

    def _table_with(self, row: int, name: str) -> ShardTable:
        """The table of a row's shard, if `name` is a file of its sample."""
        table, key = self._sample(row)
        if not name.startswith(f"{key}."):
            raise ValueError(f"{name!r} is not a file of this sample, whose names start with {key!r}")
        return table

    def _table(self, shard: int) -> ShardTable:
        with self._lock:
            table = self._tables.get(shard)
            if table is None:
                table = self._tables[shard] = scan_shard(self.path / self._names[shard])
            self._tables.move_to_end(shard)
            if len(self._tables) > _OPEN_SHARDS:
                # Its file closes once no thread reads from it any more.
                self._tables.popitem(last=False)
            return table

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        ShardRows.__init__(self, path)
