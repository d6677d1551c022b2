"""The processes that check rows: one that a row kills is replaced, and the row found out and named."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from refalign_ext.data.checking.row import Finding, RowSettings, check_row
from refalign_ext.data.checking.spool import RowResult
from refalign_ext.data.clip_set import open_clip_set
from refalign_ext.data.statistics.stats import opened_once
from refalign_ext.data.work import run_each

_DEATHS_WITHOUT_SUSPECT = 3


def run_rows(
    path: Path, settings: RowSettings, parts: list[range], workers: int
) -> Iterator[tuple[range, list[RowResult]]]:
    """(rows, what was found in each) of every part; rows that kill their process are found out and tried alone."""
    known: dict[int, RowResult] = {}
    description, deaths = "checking", 0
    marks = Path(tempfile.mkdtemp(prefix="refalign-check-"))
    work = partial(check_part, path, uuid.uuid4().hex, settings, marks)
    try:
        while parts:
            done = 0
            try:
                each = run_each(
                    partial(work, known), parts, workers=workers, description=description, weight=len
                )
                for part, rows in each:
                    done += 1
                    yield part, rows
                return
            except (OSError, BrokenExecutor):
                if not workers:
                    raise
                suspects = _take_marks(marks) - known.keys()
                deaths = 0 if suspects else deaths + 1
                if deaths == _DEATHS_WITHOUT_SUSPECT:
                    raise
            parts = parts[done:]
            known |= _check_alone(work, path, sorted(suspects))
            _take_marks(marks)
            description = "checking (a process died, the others go on)"
    finally:
        shutil.rmtree(marks, ignore_errors=True)


def _check_alone(work: Callable[..., list[RowResult]], path: Path, rows: list[int]) -> dict[int, RowResult]:
    """Rows that were being read when a process died, one after the other in a process of their own."""
    results: dict[int, RowResult] = {}
    while left := [range(row, row + 1) for row in rows if row not in results]:
        try:
            for part, [result] in run_each(partial(work, {}), left, workers=1, description="rows alone"):
                results[part.start] = result
        except (OSError, BrokenExecutor):
            # A single process works in order: the first row without a result is the one that it died of.
            row = next(row for row in rows if row not in results)
            results[row] = _killed(path, row)
    return results


def _killed(path: Path, row: int) -> RowResult:
    name = None
    with suppress(ValueError, OSError):
        name = open_clip_set(path)[row].id
    message = (
        "the process that read this row died (a fault in a decoder, or too little memory): remove the row"
    )
    finding = Finding(row + 1, "error", "killed_process", "", message, name)
    return [finding], None if name is None else id_hash(name)


def check_part(
    path: Path, stamp: str, settings: RowSettings, marks: Path, known: Mapping[int, RowResult], rows: range
) -> list[RowResult]:
    """What is found in each row; which one it is at, a process leaves in a file that outlives it."""
    clip_set, mark, results = opened_once(path, stamp), marks / str(os.getpid()), []
    for row in rows:
        if row in known:
            results.append(known[row])
            continue
        mark.write_text(str(row))
        findings, name = check_row(clip_set, row, settings)
        results.append((findings, None if name is None else id_hash(name)))
    mark.unlink(missing_ok=True)
    return results


def _take_marks(marks: Path) -> set[int]:
    """The rows that processes were at when they ended."""
    rows = set()
    for mark in marks.iterdir():
        with suppress(ValueError, OSError):
            rows.add(int(mark.read_text()))
        mark.unlink(missing_ok=True)
    return rows


def id_hash(name: str) -> int:
    """64 bits that stand for an id while all of them are compared."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
