"""Where clips, pictures and videos come from: files of their own, or stored inside an archive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from refalign_ext.data.schema import Clip, parse_line


@dataclass(frozen=True)
class MediaBytes:
    """A file held in memory.

    Attributes:
        name: what errors call it, such as "shards/00000.tar: 000000003.mp4".
        data: its bytes.
    """

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


Media = Path | MediaBytes


class ClipSet(ABC):
    """Rows by number and the files that they name. May be pickled, and used by threads and forked processes.

    All methods raise a ValueError that starts with `place(row)` if a row or file cannot be read.

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

    def __iter__(self) -> Iterator[Clip]:
        return (self[row] for row in range(len(self)))

    @abstractmethod
    def place(self, row: int) -> str:
        """What errors about a row start with: "data.jsonl, row 3"."""

    @abstractmethod
    def line(self, row: int) -> bytes:
        """The text of row `row`, from 0, unchecked."""

    @abstractmethod
    def media(self, row: int, name: str) -> Media:
        """The file that row `row` means by `name`; an error if it is outside of where the clips are stored."""

    @abstractmethod
    def file_size(self, row: int, name: str) -> int:
        """Bytes of that file, without reading it."""

    @abstractmethod
    def shard_ranges(self) -> list[range]:
        """Rows that are stored together, in order; reading those of one range one after the other is fast."""
