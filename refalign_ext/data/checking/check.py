"""`data check`: every row of a manifest or packed folder is tried, and whatever is wrong is named with row and field."""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from refalign_ext.atomic_io import atomic_open
from refalign_ext.data.checking.processes import run_rows
from refalign_ext.data.checking.row import DECODE_MODES, Finding, RowSettings
from refalign_ext.data.checking.spool import Spool
from refalign_ext.data.clip_set import ClipSet, open_clip_set
from refalign_ext.data.length import Length
from refalign_ext.data.shards import LISTING, ShardInfo, read_listing, verify_shard
from refalign_ext.data.work import Share, chunks, run_each

CHUNK = 16  # rows that a process does at once: what is lost and done again if the check is killed
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
        share: check only these chunks of rows, and this part of the shards' checksums.
        decode: "ends" decodes the first and last frame and those of targets, "all" every frame of the span, "none"
            only looks whether files exist.
        length: a training clip; videos too short for it are errors.
        max_errors: stop once there are more; None never does.

    Raises:
        ValueError: if the data set cannot be opened or an argument is out of range.
    """
    if decode not in DECODE_MODES:
        raise ValueError(f"--decode {decode!r}: choose one of {', '.join(DECODE_MODES)}")
    if max_errors is not None and max_errors < 0:
        raise ValueError(f"--max_errors {max_errors}: it cannot be negative")
    share = share or Share()
    clip_set = open_clip_set(Path(path))
    if not len(clip_set):
        raise ValueError(f"{path} has no rows")
    report = report_path(Path(path), share)
    parts = share.take(chunks(len(clip_set), CHUNK))
    settings = RowSettings(decode, length)
    result = CheckResult(Path(path), len(clip_set), share, report=report)
    spool_path = report.with_name(f".{report.name}.part")
    with Spool(spool_path, _fingerprint(clip_set.path, len(clip_set), settings, share)) as spool:
        left = [part for part in parts if part.start not in spool.clean]
        errors = 0
        with closing(run_rows(clip_set.path, settings, left, workers)) as found:
            for part, rows in found:
                spool.add(part, rows)
                errors += sum(finding.level == "error" for findings, _ in rows for finding in findings)
                if max_errors is not None and errors > max_errors:
                    result.stopped = True
                    break
        result.rows = spool.rows
        shards = [] if result.stopped else _check_shards(clip_set.path, share, workers)
        _summarise(result, clip_set, spool, shards)
    spool_path.unlink(missing_ok=True)
    return result


def report_path(path: Path, share: Share) -> Path:
    """Where the findings of a check go."""
    path = Path(os.path.abspath(path))
    part = f".{share.index}of{share.count}" if share.count > 1 else ""
    return path.with_name(f"{path.name}.check{part}.jsonl")


def _summarise(result: CheckResult, clip_set: ClipSet, spool: Spool, shards: Sequence[Finding]) -> None:
    """Writes the report and fills in the counts, reading what was spooled line by line."""
    groups: dict[tuple[str, str, str], Group] = {}
    bad_rows = array("Q")
    with atomic_open(result.report) as file:
        for finding in _all_findings(clip_set, spool, shards):
            file.write(json.dumps(asdict(finding), ensure_ascii=False).encode() + b"\n")
            _count(groups, finding)
            if finding.level == "error":
                result.errors += 1
                bad_rows.append(finding.row)
            else:
                result.warnings += 1
    result.bad_rows = np.count_nonzero(np.unique(np.frombuffer(bad_rows, np.uint64)))
    result.groups = sorted(groups.values(), key=lambda group: (group.level, -group.count, group.reason))


def _all_findings(clip_set: ClipSet, spool: Spool, shards: Sequence[Finding]) -> Iterator[Finding]:
    yield from shards
    hashes, places = array("Q"), array("Q")
    for row, findings, number in spool.read():
        yield from findings
        if number is not None:
            hashes.append(number)
            places.append(row)
    yield from _duplicate_ids(clip_set, np.frombuffer(hashes, np.uint64), np.frombuffer(places, np.uint64))


def _count(groups: dict[tuple[str, str, str], Group], finding: Finding) -> None:
    key = (finding.level, finding.reason, re.sub(r"\[\d+\]", "[]", finding.field))
    if key not in groups and len(groups) >= _MAX_GROUPS:  # keys that rows made up
        key = (finding.level, finding.reason, "")
    group = groups.setdefault(key, Group(*key))
    group.count += 1
    if len(group.examples) < _EXAMPLES:
        group.examples.append(finding)


def _duplicate_ids(clip_set: ClipSet, hashes: np.ndarray, rows: np.ndarray) -> Iterator[Finding]:
    """Ids that rows share: equal hashes [n] are looked up in the rows [n] (from 0) and compared as text."""
    order = np.lexsort((rows, hashes))
    hashes, rows = hashes[order], rows[order]
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])) if len(hashes) else rows
    sizes = np.diff(np.concatenate([starts, [len(hashes)]]))
    for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist()):
        first: dict[str, int] = {}
        for row in rows[start : start + size].tolist():
            name = clip_set[row].id
            if name in first:
                message = f"id {name!r} is already used in row {first[name] + 1}: give every row its own"
                yield Finding(row + 1, "error", "duplicate_id", "id", message, name)
            else:
                first[name] = row


def _fingerprint(path: Path, rows: int, settings: RowSettings, share: Share) -> str:
    """One line that tells this check from others: what it reads, and how."""
    status = (path / LISTING if path.is_dir() else path).stat()
    state = [str(path), rows, CHUNK, status.st_size, status.st_mtime_ns, asdict(settings), asdict(share)]
    return json.dumps(state, ensure_ascii=True)


def _check_shards(path: Path, share: Share, workers: int) -> list[Finding]:
    """Shards of a packed folder whose bytes are not those that were written."""
    if not path.is_dir():
        return []
    infos = share.take(read_listing(path))
    work, weight = partial(_verify, path), lambda info: info.bytes
    verified = run_each(work, infos, workers=workers, description="checksums", weight=weight, unit="B")
    return [Finding(0, "error", "checksum", info.name, problem) for info, problem in verified if problem]


def _verify(folder: Path, info: ShardInfo) -> str | None:
    return verify_shard(folder, info)
