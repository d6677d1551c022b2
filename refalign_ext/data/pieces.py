"""Long work cut into pieces of rows: shares for several machines, and jobs that go on after they were killed."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from refalign_ext.atomic_io import atomic_open, locked
from refalign_ext.data.worker_pool import run_each

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Part `index` (from 0) of `count` parts of the work, which one of several machines or processes does.

    Raises:
        ValueError: naming --shard, if there is no such part.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ValueError(f"--shard {self.index}/{self.count}: of n parts give 0/n to n-1/n")

    @classmethod
    def parse(cls, text: str) -> Share:
        """The share of "2/8": the third of eight.

        Raises:
            ValueError: naming --shard, for anything else.
        """
        if not re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", text):
            raise ValueError(f"--shard {text!r}: give part/parts counted from 0, such as 0/8 to 7/8")
        index, count = text.split("/")
        return cls(int(index), int(count))

    @classmethod
    def from_environment(cls) -> Share:
        """RANK of WORLD_SIZE as torchrun sets them; the whole if it does not."""
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        try:
            return cls.parse(f"{rank}/{size}")
        except ValueError:
            raise ValueError(
                f"the environment has RANK={rank!r} and WORLD_SIZE={size!r}: start with torchrun or unset both"
            ) from None

    def take(self, items: Sequence[T]) -> list[T]:
        """Every item whose position leaves the remainder `index` when divided by `count`."""
        return list(items[self.index :: self.count])


def chunks(rows: int, size: int) -> list[range]:
    """The rows 0 to `rows` - 1 in pieces of `size`; the last may be shorter."""
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


@dataclass(frozen=True)
class PieceJob(ABC):
    """Work on the rows 0 to `rows` - 1 in pieces of `piece_rows`, which goes on after it was killed.

    A finished piece is one file in `folder`, written whole after everything else that belongs to it: a line of JSON, its
    header, and then lines of its own. It stands as long as its key does. Pieces may be shared out among machines that
    have the folder in common; subclasses are pickled for worker processes.
    """

    folder: Path
    rows: int
    piece_rows: int

    @abstractmethod
    def key(self, rows: range) -> str:
        """A digest of all that a piece is made from."""

    @abstractmethod
    def make(self, rows: range) -> tuple[dict[str, Any], Iterable[bytes]]:
        """Does a piece: what its header says, and its lines with their ends."""

    def stands(self, rows: range, header: dict[str, Any]) -> bool:
        """Whether a piece with the right key need not be made again."""
        return True

    def pieces(self) -> list[range]:
        return chunks(self.rows, self.piece_rows)

    def number(self, rows: range) -> int:
        return rows.start // self.piece_rows

    def run(self, share: Share, workers: int, description: str) -> Iterator[tuple[range, dict[str, Any]]]:
        """Makes the pieces of a share that are not finished, and yields (rows, header) of all of them in order.

        Raises:
            FileLocked: (a ValueError) if another process of this machine does the same share.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / f"share-{share.index}-of-{share.count}"):
            yield from run_each(
                self._finish, share.take(self.pieces()), workers=workers, description=description, weight=len
            )

    def _finish(self, rows: range) -> dict[str, Any]:
        header = self.finished(rows)
        if header is None:
            self._path(rows).unlink(missing_ok=True)
            made, lines = self.make(rows)
            header = {"key": self.key(rows)} | made
            with atomic_open(self._path(rows)) as file:
                file.write(json.dumps(header, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
                file.writelines(lines)
        return header

    def finished(self, rows: range) -> dict[str, Any] | None:
        """The header of a finished piece that stands, or None."""
        try:
            header = self.read_header(rows)
            return header if header["key"] == self.key(rows) and self.stands(rows, header) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def read_header(self, rows: range) -> dict[str, Any]:
        """The header of a piece that is known to be finished."""
        with self._path(rows).open("rb") as file:
            return json.loads(file.readline())

    def lines(self, rows: range) -> Iterator[bytes]:
        """The lines of a finished piece."""
        with self._path(rows).open("rb") as file:
            next(file)
            yield from file

    def _path(self, rows: range) -> Path:
        return self.folder / f"{self.number(rows):06d}.jsonl"
