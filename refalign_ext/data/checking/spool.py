"""What a check found so far, on disk: memory does not grow with it, and a check that was killed goes on from it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refalign_ext.data.checking.row import Finding

RowResult = tuple["list[Finding]", "int | None"]  # what is wrong with a row, and the hash of its id


class Spool:
    """A file of finished parts, which a check that was killed leaves behind.

    Attributes:
        clean: first rows of the parts that need not be checked again, as nothing but warnings was found in them.
        rows: how many rows are in it.
    """

    def __init__(self, path: Path, fingerprint: str, resume: bool) -> None:
        self.path, self.clean, self.rows = path, set[int](), 0
        self.file = self._reopened(fingerprint) if resume and path.exists() else None
        if self.file is None:
            self.file = path.open("w+", encoding="utf-8")
            self.file.write(fingerprint + "\n")

    def _reopened(self, fingerprint: str) -> Any:
        """The file with its clean parts alone, if it belongs to this check."""
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        with (
            self.path.open(encoding="utf-8", errors="replace") as old,
            aside.open("w", encoding="utf-8") as new,
        ):
            if old.readline().rstrip("\n") != fingerprint:
                aside.unlink()
                return None
            new.write(fingerprint + "\n")
            for line in old:
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
        return self.path.open("a+", encoding="utf-8")

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
