"""Clips of a table: CSV or TSV with a line of column names, or JSON lines.

Columns, of which `video`, a prompt and at least one reference are needed, whatever their order or case:

    id            unique; else the name of the video, and where in it the clip starts
    video         the file (also: video_path, path, file_name)
    prompt        (also: caption, text)
    references    file names, separated by ";" or as a JSON list; an inner list holds pictures of one subject (also: refs)
    ref1 ref2 ..  one picture each; ref1a and ref1b are two pictures of the first subject
    ref1_phrase   what the first subject is called
    group_id      clips that must not be split between training and validation (also: group)
    start_s end_s, or start_frame end_frame: the part of the video, the end exclusive
    fps           frames per second that start_frame and end_frame were counted at; without it the file's own

Names of files are relative to the table's folder. Other columns are passed over.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from refalign_ext.data.conversion_report import ConversionReport, Unusable
from refalign_ext.data.convert.folder_clip import NUMBERED, SPAN_KEYS, text_encoding

TABLE_SUFFIXES = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson")
COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("id",),
    "video": ("video", "video_path", "path", "file_name"),
    "prompt": ("prompt", "caption", "text"),
    "references": ("references", "refs"),
    "group_id": ("group_id", "group"),
    **{name: (name,) for name in SPAN_KEYS},
}
_MAX_FIELD = 1 << 20  # characters of one cell or line


def rows_in_table(
    path: Path, chosen: Mapping[str, str], report: ConversionReport
) -> Iterator[tuple[str, dict[str, Any]]]:
    """("row 1", its cells as `ClipMaker` takes them), and so on; rows that cannot be read are counted.

    Args:
        chosen: names of columns by what they hold, where they are not found by themselves.

    Raises:
        ValueError: if the file is no table or lacks a column.
    """
    read = _json_rows if path.suffix.lower() in (".jsonl", ".ndjson") else _csv_rows
    columns: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(read(path), 1):
        if isinstance(row, Unusable):
            report.drop("clips", row.reason, f"row {number}: {row}")
            continue
        columns = columns or _columns(path, row, chosen)
        cells = {_column_key(name): value for name, value in row.items() if value not in (None, "")}
        values = {name: value for name, value in cells.items() if NUMBERED.fullmatch(name)}
        for what, names in columns.items():
            given = [cells[name] for name in names if name in cells]
            values |= {what: given[0]} if given else {}
        yield f"row {number}", values


def _columns(path: Path, names: Iterable[str], chosen: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """By what names each thing is found, given the first row's columns and those that the user names."""
    plain = {_column_key(name) for name in names}
    # Half of a character, which a damaged file may have, could not be shown.
    listed = ", ".join(names).encode("utf-8", "backslashreplace").decode("utf-8")
    for what, name in chosen.items():
        if what not in COLUMNS and not NUMBERED.fullmatch(what):
            raise ValueError(
                f"--column {what}={name}: unknown {what!r}; known are {', '.join(COLUMNS)} and ref1, ..."
            )
        if _column_key(name) not in plain:
            close = difflib.get_close_matches(name, list(names), 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {listed}"
            raise ValueError(f"--column {what}={name}: {path} has no such column; {hint}")
    columns = COLUMNS | {what: (_column_key(name),) for what, name in chosen.items()}
    has_references = any(map(NUMBERED.fullmatch, {*plain, *chosen}))
    for what in ("video", "prompt", *(() if has_references else ("references",))):
        if plain.isdisjoint(columns[what]):
            hint = "call them ref1, ref2, ... or " if what == "references" else ""
            raise ValueError(
                f"{path}: no column of {listed} holds the {what}: {hint}name it with --column {what}=..."
            )
    return columns


def _column_key(name: str) -> str:
    return re.sub(r"\s+", "_", name.strip().lower())


def _csv_rows(path: Path) -> Iterator[dict[str, Any] | Unusable]:
    """Cells by column; empty rows are passed over."""
    with path.open("rb") as file:
        encoding = text_encoding(file.read(2))
    csv.field_size_limit(_MAX_FIELD)
    # One byte that is not text must cost its row alone: it becomes a lone surrogate, which no text holds.
    with path.open(encoding=encoding, errors="surrogateescape", newline="") as file:
        try:
            first = file.readline(_MAX_FIELD)
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",\t;", key=first.count))
            header = [name.strip() for name in next(reader, [])]
        except (csv.Error, UnicodeError) as error:
            raise _damaged(path, error) from None
        twice = [name for name in header if name and header.count(name) > 1]
        if twice:
            raise ValueError(f"{path}: two columns are called {twice[0]!r}: rename one")
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Unusable("row_not_readable", error)
                continue
            except UnicodeError as error:  # of UTF-16, where nothing tells where the next character begins
                raise _damaged(path, error) from None
            if cells is None:
                return
            if not any(map(str.strip, cells)):
                continue
            is_whole = len(cells) == len(header)
            yield (
                dict(zip(header, cells))
                if is_whole
                else Unusable("row_not_readable", "not as many cells as columns")
            )


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: the text is damaged ({error}): save the table as CSV in UTF-8")


def _json_rows(path: Path) -> Iterator[dict[str, Any] | Unusable]:
    """Values by key; empty lines are passed over."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        while line := file.readline(_MAX_FIELD):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    row = Unusable("row_not_readable", error)
                yield (
                    row
                    if isinstance(row, (dict, Unusable))
                    else Unusable("row_not_readable", "not an object")
                )
