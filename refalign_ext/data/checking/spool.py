"""What a check found so far, on disk: memory does not grow with it, and a check that was killed goes on from it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from refalign_ext.atomic_io import FileLocked
from refalign_ext.data.checking.row import Finding

RowResult = tuple["list[Finding]", "int | None"]  # what is wrong with a row, and the hash of its id


class Spool:
    """A file of finished parts, which a check that was killed leaves behind; one check at a time has it.

    Attributes:
        clean: first rows of the parts that need not be checked again, as nothing but warnings was found in them.
        rows: how many rows are in it.

    Raises:
        FileLocked: (a ValueError) if the same check is running already.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.clean, self.rows = path, set[int](), 0
        self.file = _opened(path, "a+")
        self.file.seek(0)
        if self.file.readline().rstrip("\n") == fingerprint:
            self._leave_clean(fingerprint)
        else:
            self.file.truncate(0)
            self.file.write(fingerprint + "\n")

    def _leave_clean(self, fingerprint: str) -> None:
        """Drops parts with errors, which are checked again, and what was broken off."""
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        new = _opened(aside, "w+")
        new.write(fingerprint + "\n")
        for line in self.file:
            try:
                entry = json.loads(line)
                bad = any(item["level"] == "error" for findings, _ in entry["rows"] for item in findings)
                start, count = entry["start"], len(entry["rows"])
            except (ValueError, TypeError, KeyError):  # broken off
                continue
            if not bad and start not in self.clean:
                new.write(line)
                self.clean.add(start)
                self.rows += count
        os.replace(aside, self.path)
        self.file.close()
        self.file = new

    def add(self, part: range, rows: Iterable[tuple[list[Finding], int | None]]) -> None:
        """Keeps what was found in the rows of a part."""
        rows = [([asdict(finding) for finding in findings], number) for findings, number in rows]
        self.file.write(json.dumps({"start": part.start, "rows": rows}, ensure_ascii=False) + "\n")
        self.file.flush()
        self.rows += len(rows)

    def read(self) -> Iterator[tuple[int, list[Finding], int | None]]:
        """(row from 0, findings, hash of the id) of every row, by row as far as this check went in one go."""
        self.file.seek(0)
        self.file.readline()
        for line in self.file:
            entry = json.loads(line)
            for row, (findings, number) in enumerate(entry["rows"], entry["start"]):
                yield row, [Finding(**item) for item in findings], number

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _opened(path: Path, mode: str) -> TextIO:
    """A text file that no other process of this machine has opened by this function."""
    file = path.open(mode, encoding="utf-8", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise FileLocked(
            f"{path}: the same check is running already: wait for it, or give each a --shard"
        ) from None
    except OSError:
        pass  # a file system without locks
    return file
