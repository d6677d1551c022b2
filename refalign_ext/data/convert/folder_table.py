"""Clips of a table: CSV or TSV with a line of column names, or JSON lines.

Columns, of which `video`, a prompt and at least one reference are needed, whatever their order or case:

    id            unique; else the name of the video, and where in it the clip starts
    video         the file (also: video_path, path, file, filename, file_name, clip)
    prompt        (also: caption, text, description, video_caption)
    references    file names, separated by ";" or as a JSON list; an inner list holds pictures of one subject
    ref1 ref2 ..  one picture each; ref1a and ref1b are two pictures of the first subject
    ref1_phrase   what the first subject is called
    group_id      clips that must not be split between training and validation (also: group)
    start_s end_s, or start_frame end_frame: the part of the video, the end exclusive
    fps           frames per second that start_frame and end_frame were counted at

Names of files are relative to the table's folder. Other columns are passed over.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from refalign_ext.data.conversion_report import Report
from refalign_ext.data.convert.folder_files import inside, is_valid, picture
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan

T = TypeVar("T")

ALIASES: dict[str, tuple[str, ...]] = {
    "id": ("id", "clip_id", "video_id"),
    "video": ("video", "video_path", "path", "file", "filename", "file_name", "clip"),
    "prompt": ("prompt", "caption", "text", "description", "video_caption"),
    "references": ("references", "refs", "reference", "ref", "images", "reference_images"),
    "group_id": ("group_id", "group"),
    "start_s": ("start_s",),
    "end_s": ("end_s",),
    "start_frame": ("start_frame",),
    "end_frame": ("end_frame",),
    "fps": ("fps",),
}
_NUMBERED = re.compile(
    r"(?:ref|reference|image)_?(?P<subject>\d{1,4})(?P<picture>[a-z]?)(?P<phrase>_phrase)?"
)
_DELIMITERS = {".tsv": "\t", ".tab": "\t"}
_MAX_FIELD = 1 << 20  # characters of one cell or line


@dataclass(frozen=True)
class TableOptions:
    """How the rows of a table become clips.

    Attributes:
        root: the folder of the manifest, resolved; base: the folder that the table's file names are relative to.
        pair: of all references, see `Reference`.
        by_folder: whether rows without a group take the folder of their video as one.
        columns: names of columns by what they hold, where they are not found by themselves: {"video": "movie"}.
    """

    root: Path
    base: Path
    pair: str = "cross"
    by_folder: bool = False
    columns: Mapping[str, str] | None = None


def clips_in_table(path: Path, options: TableOptions, report: Report) -> Iterator[Clip]:
    """The clips of a table in its order, their videos not looked at; what cannot be used is counted in `report`.

    Raises:
        ValueError: if the file is no table or lacks a column; what is wrong with one row is counted instead.
    """
    rows = (
        _json_rows(path, report) if path.suffix.lower() in (".jsonl", ".ndjson") else _csv_rows(path, report)
    )
    seen: set[int] = set()  # hashes of ids: eight bytes each tell as much
    fields: dict[str, str] = {}
    for number, row in rows:
        place = f"row {number}"
        # The columns of JSON lines are those of their first row and whatever the others add.
        if row.keys() - fields.keys():
            fields |= _known_columns(path, row.keys(), options.columns or {}, fields)
        clip = _clip(row, fields, place, options, report)
        if clip is None:
            continue
        if hash(clip.id) in seen and not any(fields[name] == "id" and row[name] for name in row):
            clip = replace(clip, id=f"{clip.id}#{number}")
        if hash(clip.id) in seen:
            report.drop("clips", "id_used_twice", f"{place} ({clip.id})")
        elif is_valid(clip, report):
            seen.add(hash(clip.id))
            yield clip


def _known_columns(
    path: Path, names: Any, chosen: Mapping[str, str], before: Mapping[str, str]
) -> dict[str, str]:
    """Column name -> what it holds, a key of `ALIASES`, "ref1a" or "ref1_phrase"; "" for those that are not used.

    `before`: what is known from other rows, whose columns this one need not have.
    """
    plain = {name: re.sub(r"[\s-]+", "_", name.strip().lower()) for name in names}
    result = dict.fromkeys(names, "")
    for name, simple in plain.items():
        if match := _NUMBERED.fullmatch(simple):
            result[name] = f"ref{int(match['subject'])}{match['picture']}{match['phrase'] or ''}"
    for field, aliases in ALIASES.items():
        ranked = sorted((aliases.index(simple), name) for name, simple in plain.items() if simple in aliases)
        if ranked:
            result[ranked[0][1]] = field
    for field, name in chosen.items():
        if field not in ALIASES and not _NUMBERED.fullmatch(field):
            raise ValueError(
                f"--column {field}={name}: unknown {field!r}; known are {', '.join(ALIASES)} and ref1, ..."
            )
        if name in before and name not in result:
            continue
        if name not in result:
            close = difflib.get_close_matches(name, list(names), 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(names)}"
            raise ValueError(f"--column {field}={name}: {path} has no such column; {hint}")
        for other, held in result.items():
            if held == field:
                result[other] = ""
        result[name] = field
    held = {*result.values(), *before.values()}
    for field in ("video", "prompt"):
        if field not in held:
            raise ValueError(
                f"{path}: no column of {', '.join(names)} holds the {field}: name it with --column {field}=..."
            )
    if "references" not in held and not any(_NUMBERED.fullmatch(item) for item in held):
        raise ValueError(
            f"{path}: no column of {', '.join(names)} holds references: call them ref1, ref2, ... or name one with "
            "--column references=..."
        )
    return result


def _clip(
    row: Mapping[str, Any], fields: Mapping[str, str], place: str, options: TableOptions, report: Report
) -> Clip | None:
    values = {
        fields[name]: value for name, value in row.items() if fields.get(name) and value not in (None, "")
    }

    def dropped(reason: str, detail: object = "") -> None:
        report.drop("clips", reason, f"{place} {detail}".strip())

    def text(key: str) -> str:
        value = values.get(key, "")
        return " ".join(str(value).split()) if isinstance(value, (str, int, float)) else ""

    if any(
        isinstance(value, str) and not value.isprintable() and _is_broken(value) for value in values.values()
    ):
        return dropped("not_utf8")
    if not text("video"):
        return dropped("no_video")
    video = inside(options.base / str(values["video"]).strip(), options.root)
    if video is None:
        return dropped("outside_folder", values["video"])
    if not text("prompt"):
        return dropped("no_prompt")
    try:
        span = _span(video, values)
    except ValueError as error:
        return dropped("span_not_valid", f"({error})")
    subjects = _subjects(values, place, options, report)
    if not subjects:
        return dropped("no_reference")
    group = text("group_id") or None
    folder = os.path.dirname(video)
    if group is None and options.by_folder and folder:
        group = folder
    meta = {"fps": float(values["fps"])} if span.start_frame is not None and "fps" in values else {}
    part = (
        ""
        if (span.start_frame, span.start_s) == (None, None)
        else f"@{span.start_frame or span.start_s or 0:g}"
    )
    identity = text("id") or os.path.splitext(video)[0] + part
    return Clip(identity, "custom", span, text("prompt"), subjects, group_id=group, meta=meta)


def _span(video: str, values: Mapping[str, Any]) -> VideoSpan:
    """The part of the video that a row names.

    Raises:
        ValueError: if its numbers are none, or make no part.
    """
    numbers: dict[str, float] = {}
    for key in ("start_s", "end_s", "start_frame", "end_frame", "fps"):
        if key in values:
            try:
                numbers[key] = float(values[key])
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"{key} is {str(values[key])[:40]!r}, not a number") from None
            if not (math.isfinite(numbers[key]) and numbers[key] >= 0):
                raise ValueError(f"{key} is {numbers[key]}: give 0 or more")
    by_frames = [key for key in ("start_frame", "end_frame") if key in numbers]
    by_seconds = [key for key in ("start_s", "end_s") if key in numbers]
    if by_frames and by_seconds:
        raise ValueError(f"{by_frames[0]} and {by_seconds[0]}: give frames or seconds")
    if any(numbers[key] != int(numbers[key]) for key in by_frames):
        raise ValueError(f"{by_frames[0]} is no whole number of frames")
    start, end = ("start_frame", "end_frame") if by_frames else ("start_s", "end_s")
    if end in numbers and numbers[end] <= numbers.get(start, 0):
        raise ValueError(f"{end} is not after {start}")
    if by_frames:
        return VideoSpan(
            video,
            start_frame=int(numbers.get(start, 0)),
            end_frame=int(numbers[end]) if end in numbers else None,
        )
    if by_seconds:
        return VideoSpan(video, start_s=numbers.get(start, 0.0), end_s=numbers.get(end))
    return VideoSpan(video)


def _subjects(
    values: Mapping[str, Any], place: str, options: TableOptions, report: Report
) -> tuple[Subject, ...]:
    pictures: dict[int, list[Reference]] = defaultdict(list)
    phrases: dict[int, str] = {}
    named: list[tuple[int, str, Any]] = []
    for field, value in values.items():
        match = _NUMBERED.fullmatch(field)
        if match and match["phrase"]:
            phrases[int(match["subject"])] = " ".join(str(value).split())
        elif match:
            named.append((int(match["subject"]), match["picture"], value))
    following = max((number for number, *_ in named), default=0) + 1
    for offset, item in enumerate(_listed(values.get("references"))):
        named += [(following + offset, "", one) for one in (item if isinstance(item, list) else [item])]
    for number, _, value in sorted(named, key=lambda item: item[:2]):
        if not isinstance(value, str) or not value.strip():
            report.drop("references", "not_a_file_name", place)
        elif reference := picture(options.base / value.strip(), options.root, options.pair, report):
            pictures[number].append(reference)
    return tuple(
        Subject(str(number), phrase=phrases.get(number) or None, refs=tuple(refs))
        for number, refs in sorted(pictures.items())
    )


def _listed(value: Any) -> list[Any]:
    """A list as JSON lines have it, or the text of a cell."""
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                return list(json.loads(value))
            except (ValueError, RecursionError):
                return [value]
        return [name for name in value.split(";") if name.strip()]
    return value if isinstance(value, list) else [] if value is None else [value]


def _csv_rows(path: Path, report: Report) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, cells by column); rows with too many or too few cells are counted and left out."""
    with path.open("rb") as file:
        start = file.read(4)
    encoding = "utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    csv.field_size_limit(_MAX_FIELD)
    # One byte that is not text must cost its row alone: it becomes a lone surrogate, which no text holds.
    with path.open(encoding=encoding, errors="surrogateescape", newline="") as file:
        first = _decoded(path, lambda: file.readline(_MAX_FIELD))
        counts = [(first.count(mark), mark) for mark in (",", "\t", ";")]
        delimiter = _DELIMITERS.get(path.suffix.lower()) or max(counts, key=lambda item: item[0])[1]
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter)
        names: list[str] | None = None
        number = 0
        while True:
            try:
                cells = _decoded(path, lambda: next(reader))
            except StopIteration:
                break
            except csv.Error as error:
                number += 1
                report.drop("clips", "row_not_readable", f"row {number} ({error})")
                continue
            if not any(cell.strip() for cell in cells):
                continue
            if names is None:
                names = [cell.strip() for cell in cells]
                _check_names(path, names)
                continue
            number += 1
            if len(cells) != len(names):
                report.drop(
                    "clips", "row_not_readable", f"row {number} ({len(cells)} cells, not {len(names)})"
                )
            else:
                yield number, dict(zip(names, cells))


def _decoded(path: Path, read: Callable[[], T]) -> T:
    """What `read` gives. UTF-16 that is damaged cannot be read any further: where characters begin is not known."""
    try:
        return read()
    except UnicodeError as error:
        raise ValueError(f"{path}: the text is damaged ({error}): save the table as CSV in UTF-8") from None


def _check_names(path: Path, names: list[str]) -> None:
    if any(_is_broken(name) for name in names):
        raise ValueError(f"{path}: the column names are not UTF-8 text: save the table as CSV in UTF-8")
    twice = {name for name in names if name and names.count(name) > 1}
    if twice:
        raise ValueError(f"{path}: two columns are called {sorted(twice)[0]!r}: rename one")


def _json_rows(path: Path, report: Report) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, values by key); rows that are no JSON object are counted and left out."""
    number = 0
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        while line := file.readline(_MAX_FIELD):
            if not line.strip():
                continue
            number += 1
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                report.drop("clips", "row_not_readable", f"row {number} ({error})")
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                report.drop("clips", "row_not_readable", f"row {number} (not an object)")


def _is_broken(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
