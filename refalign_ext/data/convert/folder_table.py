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
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.convert.folder_files import (
    DraftOptions,
    is_valid,
    numbered_subjects,
    path_inside,
    picture_reference,
)
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan

TABLE_SUFFIXES = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson")
COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("id",),
    "video": ("video", "video_path", "path", "file_name"),
    "prompt": ("prompt", "caption", "text"),
    "references": ("references", "refs"),
    "group_id": ("group_id", "group"),
    **{name: (name,) for name in ("start_s", "end_s", "start_frame", "end_frame", "fps")},
}
_NUMBERED = re.compile(r"ref_?(?P<subject>\d{1,4})(?P<picture>[a-z]?)(?P<phrase>_phrase)?")
_MAX_FIELD = 1 << 20  # characters of one cell or line
_REST = "\n"  # the column of cells that have none


def clips_in_table(path: Path, options: DraftOptions) -> Iterator[Clip]:
    """The clips of a table in its order, their videos not looked at; what cannot be used is counted.

    Raises:
        ValueError: if the file is no table or lacks a column; what is wrong with one row is counted instead.
    """
    report = options.report
    read = _json_rows if path.suffix.lower() in (".jsonl", ".ndjson") else _csv_rows
    seen: set[int] = set()  # hashes of ids: eight bytes each tell as much
    columns: dict[str, tuple[str, ...]] = {}
    for number, row in read(path, report):
        columns = columns or _columns(path, row, options.columns)
        values = _values(row, columns)
        clip = _clip(values, f"row {number}", options)
        if clip is None:
            continue
        if hash(clip.id) in seen and "id" not in values:
            clip = replace(clip, id=f"{clip.id}#{number}")
        if hash(clip.id) in seen:
            report.drop("clips", "id_used_twice", f"row {number} ({clip.id})")
        elif is_valid(clip, report):
            seen.add(hash(clip.id))
            yield clip


def _columns(path: Path, names: Iterable[str], chosen: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """By what names each thing is found, given the first row's columns and those that the user names."""
    plain = {_plain(name) for name in names}
    # Half of a character, which a damaged file may have, could not be shown.
    listed = ", ".join(names).encode("utf-8", "backslashreplace").decode("utf-8")
    columns = dict(COLUMNS)
    for what, name in chosen.items():
        if what not in COLUMNS and not _NUMBERED.fullmatch(what):
            known = ", ".join(COLUMNS)
            raise ValueError(f"--column {what}={name}: unknown {what!r}; known are {known} and ref1, ...")
        if _plain(name) not in plain:
            close = difflib.get_close_matches(name, list(names), 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {listed}"
            raise ValueError(f"--column {what}={name}: {path} has no such column; {hint}")
        columns[what] = (_plain(name),)
    for what in ("video", "prompt"):
        if plain.isdisjoint(columns[what]):
            raise ValueError(
                f"{path}: no column of {listed} holds the {what}: name it with --column {what}=..."
            )
    if plain.isdisjoint(columns["references"]) and not any(map(_NUMBERED.fullmatch, {*plain, *chosen})):
        raise ValueError(
            f"{path}: no column of {listed} holds references: call them ref1, ref2, ... or name one with "
            "--column references=..."
        )
    return columns


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _values(row: Mapping[str, Any], columns: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """What a row says, by key of `columns` or "ref1a" and "ref1_phrase"; empty cells are left out."""
    cells = {_plain(name): value for name, value in row.items() if value not in (None, "")}
    values = {name: value for name, value in cells.items() if _NUMBERED.fullmatch(name)}
    for what, names in columns.items():
        found = [cells[name] for name in names if name in cells]
        values |= {what: found[0]} if found else {}
    return values


def _clip(values: Mapping[str, Any], place: str, options: DraftOptions) -> Clip | None:
    def dropped(reason: str, detail: object = "") -> None:
        options.report.drop("clips", reason, f"{place} {detail}".strip())

    def text(key: str) -> str:
        value = values.get(key, "")
        return " ".join(str(value).split()) if isinstance(value, (str, int, float)) else ""

    if not text("video"):
        return dropped("no_video")
    video = path_inside(options.base / str(values["video"]).strip(), options.root)
    if video is None:
        return dropped("outside_folder", values["video"])
    if not text("prompt"):
        return dropped("no_prompt")
    try:
        span = _span(video, values)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        return dropped("span_not_valid", f"({error})")
    subjects = _subjects(values, place, options)
    if not subjects:
        return dropped("no_reference")
    group = text("group_id") or (os.path.dirname(video) if options.by_folder else "")
    start = text("start_frame") or text("start_s")
    identity = text("id") or os.path.splitext(video)[0] + (f"@{float(start):g}" if start else "")
    return Clip(identity, "custom", span, text("prompt"), subjects, group_id=group or None)


def _span(video: str, values: Mapping[str, Any]) -> VideoSpan:
    """The part of the video that a row names; whether there is such a part is seen later.

    Raises:
        TypeError, ValueError, OverflowError, ZeroDivisionError: if a number is none.
    """
    seconds = {key: float(values[key]) for key in ("start_s", "end_s") if key in values}
    frames = {key: float(values[key]) for key in ("start_frame", "end_frame") if key in values}
    if any(number != int(number) for number in frames.values()):
        raise ValueError(f"{frames} are no whole numbers of frames")
    if "fps" in values and not seconds:
        rate = float(values["fps"])
        seconds = {key.replace("_frame", "_s"): number / rate for key, number in frames.items()}
        frames = {}
    return VideoSpan(video, **seconds, **{key: int(number) for key, number in frames.items()})


def _subjects(values: Mapping[str, Any], place: str, options: DraftOptions) -> tuple[Subject, ...]:
    pictures: dict[int, list[Reference]] = defaultdict(list)
    phrases: dict[int, str] = {}
    named: list[tuple[int, str, Any]] = []  # subject, picture, name of a file
    for key, value in values.items():
        match = _NUMBERED.fullmatch(key)
        if match and match["phrase"]:
            phrases[int(match["subject"])] = " ".join(str(value).split())
        elif match:
            named.append((int(match["subject"]), match["picture"], value))
    following = max((number for number, *_ in named), default=0) + 1
    for number, item in enumerate(_listed(values.get("references")), following):
        named += [(number, "", one) for one in (item if isinstance(item, list) else [item])]
    for number, _, value in sorted(named, key=lambda item: item[:2]):
        if not isinstance(value, str) or not value.strip():
            options.report.drop("references", "not_a_file_name", place)
        elif reference := picture_reference(options.base / value.strip(), options):
            pictures[number].append(reference)
    return numbered_subjects(pictures, phrases)


def _listed(value: Any) -> list[Any]:
    """A list as JSON lines have it, or the text of a cell."""
    if isinstance(value, str):
        try:
            if value.lstrip().startswith("["):
                return json.loads(value)
        except (ValueError, RecursionError):
            return [value]
        return [name for name in value.split(";") if name.strip()]
    return value if isinstance(value, list) else [] if value is None else [value]


def _csv_rows(path: Path, report: ConversionReport) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, cells by column); rows with too many or too few cells are counted and left out."""
    with path.open("rb") as file:
        encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    csv.field_size_limit(_MAX_FIELD)
    # One byte that is not text must cost its row alone: it becomes a lone surrogate, which no text holds.
    with path.open(encoding=encoding, errors="surrogateescape", newline="") as file:
        try:
            yield from _csv_cells(path, file, report)
        except UnicodeError as error:  # of UTF-16, where nothing tells where the next character begins
            raise ValueError(
                f"{path}: the text is damaged ({error}): save the table as CSV in UTF-8"
            ) from None


def _csv_cells(path: Path, file: TextIO, report: ConversionReport) -> Iterator[tuple[int, dict[str, Any]]]:
    first = file.readline(_MAX_FIELD)
    file.seek(0)
    reader = csv.DictReader(file, delimiter=max(",\t;", key=first.count), restkey=_REST)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
    except csv.Error as error:
        raise ValueError(
            f"{path}: its first line is damaged ({error}): save the table as CSV in UTF-8"
        ) from None
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: two columns are called {twice[0]!r}: rename one")
    reader.fieldnames = names
    number = 0
    while True:
        number += 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            report.drop("clips", "row_not_readable", f"row {number} ({error})")
            continue
        if _REST in cells or None in cells.values():
            report.drop("clips", "row_not_readable", f"row {number} (not as many cells as columns)")
        elif any(cell.strip() for cell in cells.values()):
            yield number, cells


def _json_rows(path: Path, report: ConversionReport) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, values by key); rows that are no JSON object are counted and left out."""
    number = 0
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        while line := file.readline(_MAX_FIELD):
            if not line.strip():
                continue
            number += 1
            try:
                row = json.loads(line)
                problem = "" if isinstance(row, dict) else "not an object"
            except (ValueError, RecursionError) as error:
                problem = str(error)
            if problem:
                report.drop("clips", "row_not_readable", f"row {number} ({problem})")
            else:
                yield number, row
