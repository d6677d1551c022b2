"""`data check`: every row of a manifest or packed folder is tried, and whatever is wrong is named with row and field."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refalign_ext.atomic_io import atomic_open
from refalign_ext.data.check.row import DECODE_MODES, Finding, RowSettings, check_row
from refalign_ext.data.clip_set import ClipSet, open_clip_set
from refalign_ext.data.hashing import hash64
from refalign_ext.data.length import Length
from refalign_ext.data.pieces import PieceJob, Share
from refalign_ext.data.shards import LISTING, read_listing, verify_shard
from refalign_ext.data.worker_pool import run_each

PIECE_ROWS = 64  # what a worker does at once, and loses if the check is killed
_EXAMPLES = 3
_MAX_GROUPS = 1000


@dataclass
class Group:
    """Findings of one kind: how many, and the first ones."""

    level: str
    reason: str
    field: str
    count: int = 0
    examples: list[Finding] = field(default_factory=list)


@dataclass
class CheckResult:
    """What a check found.

    Attributes:
        rows: how many were checked, of `total`; fewer if only a share was, or it stopped at `max_errors`.
        errors, warnings: how many; `bad_rows` is the number of rows with an error.
        groups: by level, reason and field (without the numbers in it), the most frequent first.
        report: JSON lines of all findings, each with row (from 1), id, level, reason, field and message.
    """

    path: Path
    total: int
    share: Share
    rows: int = 0
    errors: int = 0
    warnings: int = 0
    bad_rows: int = 0
    stopped: bool = False
    groups: list[Group] = field(default_factory=list)
    report: Path | None = None

    def table(self) -> str:
        """The summary as text for a terminal."""
        part = f"share {self.share.index}/{self.share.count} of " if self.share.count > 1 else ""
        lines = [
            f"{self.path}: {part}{self.total:,} rows; {self.rows:,} checked, {self.bad_rows:,} with errors; "
            f"{self.errors:,} errors, {self.warnings:,} warnings"
        ]
        if self.stopped:
            lines.append("stopped early: there are more errors than --max_errors allows")
        if self.share.count > 1:
            lines.append("ids were compared within this share only; a check without --shard compares all")
        for group in self.groups:
            where = f" at {group.field}" if group.field else ""
            lines.append(f"\n{group.count:>9,}  {group.level} {group.reason}{where}")
            for finding in group.examples:
                name = f" ({finding.id[:40]})" if finding.id else ""
                places = [f"row {finding.row}{name}"] if finding.row else []
                places += [finding.field] if finding.field != group.field else []
                lines.append(
                    f"           {': '.join([', '.join(places), finding.message[:300]]).lstrip(': ')}"
                )
            if group.count > len(group.examples):
                lines.append("           ...")
        if self.report is not None and self.groups:
            lines.append(f"\nall of them: {self.report}")
        return "\n".join(lines)


@dataclass(frozen=True)
class CheckJob(PieceJob):
    """The rows to check. The lines of a piece are those of its rows: what is wrong with it, and the hash of its id."""

    clip_set: ClipSet
    settings: RowSettings
    state: str  # what is read, and how

    def key(self, rows: range) -> str:
        return hashlib.sha256(f"{self.state} {rows}".encode()).hexdigest()

    def make(self, rows: range) -> tuple[dict[str, Any], Iterable[bytes]]:
        lines, errors = [], 0
        for row in rows:
            findings, name = check_row(self.clip_set, row, self.settings)
            errors += sum(finding.level == "error" for finding in findings)
            entry = [[asdict(finding) for finding in findings], None if name is None else hash64(name)]
            lines.append(json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        return {"errors": errors}, lines

    def stands(self, rows: range, header: dict[str, Any]) -> bool:
        """Rows with errors are looked at again: somebody may have mended their files."""
        return not header["errors"]

    def read(self, rows: range) -> Iterator[tuple[int, list[Finding], int | None]]:
        """(row from 0, findings, hash of the id) of each row of a finished piece."""
        for row, line in zip(rows, self.lines(rows), strict=True):
            findings, id_hash = json.loads(line)
            yield row, [Finding(**finding) for finding in findings], id_hash


def check(
    path: str | os.PathLike[str],
    *,
    workers: int = 1,
    share: Share | None = None,
    decode: str = "ends",
    length: Length | None = None,
    max_errors: int | None = None,
) -> CheckResult:
    """Checks every row of a manifest or packed folder; what is found never ends the check.

    All findings go to `<path>.check.jsonl`, those of a share to `<path>.check.<i>of<n>.jsonl`. If the check is killed, the
    next one with the same settings goes on from it: rows without errors are not read again. A row that kills the process
    reading it (a fault in a decoder) is named too, unless `workers` is 0.

    Args:
        path: a JSON-lines manifest, or a folder written by `data materialise --pack`.
        workers: processes; 0 checks in this one.
        share: check only this part of the rows, and of the shards' checksums.
        decode: "ends" decodes the first and last frame and those of targets, "all" every frame of the span, "none"
            only looks whether files exist.
        length: a training clip; videos too short for it are errors.
        max_errors: stop once there are more; None never does.

    Raises:
        ValueError: if the data set cannot be opened, an argument is out of range, or the same check is running.
    """
    if decode not in DECODE_MODES:
        raise ValueError(f"--decode {decode!r}: choose one of {', '.join(DECODE_MODES)}")
    if max_errors is not None and max_errors < 0:
        raise ValueError(f"--max_errors {max_errors}: it cannot be negative")
    share = share or Share()
    clip_set = open_clip_set(path)
    if not len(clip_set):
        raise ValueError(f"{path} has no rows")
    report = report_path(Path(path), share)
    settings = RowSettings(decode, length)
    job = CheckJob(
        report.with_name(f".{report.name}.part"),
        len(clip_set),
        PIECE_ROWS,
        clip_set,
        settings,
        _state(clip_set.path, len(clip_set), settings),
    )
    result = CheckResult(Path(path), len(clip_set), share, report=report)
    pieces, errors = [], 0
    with closing(job.run(share, workers, "checking")) as finished:
        for rows, header in finished:
            pieces.append(rows)
            errors += header["errors"]
            if max_errors is not None and errors > max_errors:
                result.stopped = True
                break
        result.rows = sum(map(len, pieces))
        shards = [] if result.stopped else _check_shards(clip_set.path, share, workers)
        _summarise(result, clip_set, job, pieces, shards)
        shutil.rmtree(job.folder, ignore_errors=True)
    return result


def report_path(path: Path, share: Share) -> Path:
    """Where the findings of a check go."""
    path = Path(os.path.abspath(path))
    part = f".{share.index}of{share.count}" if share.count > 1 else ""
    return path.with_name(f"{path.name}.check{part}.jsonl")


def _summarise(
    result: CheckResult, clip_set: ClipSet, job: CheckJob, pieces: list[range], shards: list[Finding]
) -> None:
    """Writes the report and fills in the counts, reading what was found piece by piece."""
    groups: dict[tuple[str, str, str], Group] = {}
    bad_rows = array("Q")
    with atomic_open(result.report) as file:
        for finding in _all_findings(clip_set, job, pieces, shards):
            file.write(json.dumps(asdict(finding), ensure_ascii=False).encode() + b"\n")
            _count(groups, finding)
            if finding.level == "error":
                result.errors += 1
                bad_rows.append(finding.row)
            else:
                result.warnings += 1
    result.bad_rows = np.count_nonzero(np.unique(np.frombuffer(bad_rows, np.uint64)))
    result.groups = sorted(groups.values(), key=lambda group: (group.level, -group.count, group.reason))


def _all_findings(
    clip_set: ClipSet, job: CheckJob, pieces: list[range], shards: list[Finding]
) -> Iterator[Finding]:
    yield from shards
    hashes, rows = array("Q"), array("Q")
    for piece in pieces:
        for row, findings, id_hash in job.read(piece):
            yield from findings
            if id_hash is not None:
                hashes.append(id_hash)
                rows.append(row)
    yield from _duplicate_ids(clip_set, np.frombuffer(hashes, np.uint64), np.frombuffer(rows, np.uint64))


def _count(groups: dict[tuple[str, str, str], Group], finding: Finding) -> None:
    key = (finding.level, finding.reason, re.sub(r"\[\d+\]", "[]", finding.field))
    if key not in groups and len(groups) >= _MAX_GROUPS:  # keys that rows made up
        key = (finding.level, finding.reason, "")
    group = groups.setdefault(key, Group(*key))
    group.count += 1
    if len(group.examples) < _EXAMPLES:
        group.examples.append(finding)


def _duplicate_ids(clip_set: ClipSet, hashes: np.ndarray, rows: np.ndarray) -> Iterator[Finding]:
    """Ids that rows share: where hashes [n] of the rows [n] (from 0) are equal, the ids are compared as text."""
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    first: dict[str, int] = {}
    for row in rows[counts[inverse] > 1].tolist():
        name = clip_set[row].id
        if name in first:
            message = f"id {name!r} is already used in row {first[name] + 1}: give every row its own"
            yield Finding(row + 1, "error", "duplicate_id", "id", message, name)
        else:
            first[name] = row


def _state(path: Path, rows: int, settings: RowSettings) -> str:
    """What tells this check from others: what it reads, and how."""
    status = (path / LISTING if path.is_dir() else path).stat()
    return json.dumps([str(path), rows, status.st_size, status.st_mtime_ns, asdict(settings)])


def _check_shards(path: Path, share: Share, workers: int) -> list[Finding]:
    """Shards of a packed folder whose bytes are not those that were written."""
    if not path.is_dir():
        return []
    verified = run_each(
        partial(verify_shard, path),
        share.take(read_listing(path)),
        workers=workers,
        description="checksums",
        weight=lambda info: info.bytes,
        unit="B",
    )
    return [Finding(0, "error", "checksum", info.name, problem) for info, problem in verified if problem]
