"""Large inputs read once into sqlite files of their own, which later runs use again if nothing has changed."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from refalign_ext.atomic_io import locked, sync
from refalign_ext.data.conversion_report import ConversionReport

_META = "CREATE TABLE meta (fingerprint TEXT NOT NULL, report TEXT NOT NULL)"
_CACHE = f"PRAGMA cache_size = -{32 << 10}"  # KiB of pages, for each open file


def fingerprint(settings: Mapping[str, Any], inputs: Sequence[Path]) -> str:
    """What a staged file depends on: settings, and the inputs' names, sizes and times of change."""
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in inputs]
    return hashlib.sha256(json.dumps([dict(settings), states], sort_keys=True).encode()).hexdigest()


def staged_report(target: Path, expected: str) -> ConversionReport | None:
    """What was dropped while `target` was staged; None if it is no complete file with this fingerprint."""
    try:
        with open_staged(target) as staged:
            mark, report = staged.execute("SELECT fingerprint, report FROM meta").fetchone()
    except (sqlite3.Error, TypeError):  # no row
        return None
    return ConversionReport.from_dict(json.loads(report)) if mark == expected else None


@contextmanager
def open_staged(target: Path) -> Iterator[sqlite3.Connection]:
    """A staged file for reading.

    Raises:
        sqlite3.Error: if there is no such file.
    """
    # A "?" or "#" of the path would end it in a URI.
    connection = sqlite3.connect(f"{target.absolute().as_uri()}?mode=ro", uri=True)
    try:
        connection.execute(_CACHE)
        yield connection
    finally:
        connection.close()


@contextmanager
def staging(
    target: Path, mark: str, tables: str, report: ConversionReport, *, exclusive: bool = True
) -> Iterator[sqlite3.Connection]:
    """An empty staged file to be filled; it takes its name, with `report`, once the block ends without an error.

    Args:
        exclusive: one process at a time; otherwise those that do it at once each fill a file, and the last one's stays.

    Raises:
        FileLocked: (a ValueError) if it is exclusive and another process of this machine is staging the same file.
        OSError: if the file cannot be written.
    """
    # Of a killed process nothing must stay for ever: parts are large.
    unfinished = target.with_name(f"{target.name}{'' if exclusive else '.' + uuid.uuid4().hex}.part")
    with locked(target) if exclusive else nullcontext():
        unfinished.unlink(missing_ok=True)
        connection = sqlite3.connect(unfinished)
        try:
            # The file is thrown away if it is not finished: a journal would only cost time.
            connection.executescript(
                f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {_CACHE}; {_META};{tables}"
            )
            yield connection
            connection.execute("INSERT INTO meta VALUES (?, ?)", (mark, json.dumps(report.to_dict())))
            connection.commit()
            connection.close()
            sync(unfinished)
            os.replace(unfinished, target)
        except sqlite3.OperationalError as error:
            raise OSError(f"{unfinished}: cannot be written ({error})") from None
        finally:
            connection.close()
            unfinished.unlink(missing_ok=True)
