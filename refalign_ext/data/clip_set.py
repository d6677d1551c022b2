"""Clips with their files, wherever they are stored: a manifest next to its files, or a folder packed into tar shards."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from refalign_ext.data.manifest_file import MAX_ROW_BYTES, ManifestReader
from refalign_ext.data.media_source import ClipSet, MediaBytes
from refalign_ext.data.shards import LISTING, ShardTable, read_listing, scan_shard

MANIFEST = "manifest.jsonl"
_OPEN_SHARDS = 16


def open_clip_set(path: str | Path) -> ClipSet:
    """The clips of a manifest (.jsonl), or of a folder that `data materialise` wrote."""
    path = Path(path)
    if path.is_file():
        return ManifestReader(path)
    if (path / LISTING).is_file():
        return ShardRows(path)
    if (path / MANIFEST).is_file():
        return ManifestReader(path / MANIFEST)
    found = f"has neither {MANIFEST} nor {LISTING}" if path.exists() else "does not exist"
    raise ValueError(
        f"{path} {found}: give a manifest (.jsonl) or a folder that data materialise has finished"
    )


class ShardRows(ClipSet):
    """The samples of a packed folder, read from its tar shards without unpacking them.

    A shard that is missing, cut off or damaged costs the rows that cannot be read from it and no others. The tables
    of the `_OPEN_SHARDS` shards used last are kept; memory does not grow with the number of rows.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        infos = read_listing(self.path)
        self._names = [info.name for info in infos]
        self._ends = list(accumulate(info.samples for info in infos))
        self._scan = lru_cache(_OPEN_SHARDS)(
            scan_shard
        )  # files close once no thread reads from them any more

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
        table = self._scan(self.path / self._names[shard])
        if sample >= len(table.keys):
            raise ValueError(f"the shard is {table.damage or 'shorter than ' + LISTING + ' says'}")
        return table, table.keys[sample]

    def _table_with(self, row: int, name: str) -> ShardTable:
        """The table of a row's shard, if `name` is a file of its sample."""
        table, key = self._sample(row)
        if not name.startswith(f"{key}."):
            raise ValueError(f"{name!r} is not a file of this sample, whose names start with {key!r}")
        return table

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        ShardRows.__init__(self, path)
