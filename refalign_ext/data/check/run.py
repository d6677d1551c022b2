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
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from refalign_ext.atomic_io import atomic_open
from refalign_ext.data.check.row import Finding, check_row
from refalign_ext.data.clip_set import ClipSet, open_clip_set
from refalign_ext.data.hashing import hash64
from refalign_ext.data.length import Length
from refalign_ext.data.pieces import PieceJob, Share
from refalign_ext.data.shards import LISTING, read_listing, verify_shard
from refalign_ext.data.worker_pool import run_each

PIECE_ROWS = 64  # what a worker does at once, and loses if the check is killed
_EXAMPLES = 3
_MAX_KINDS = 1000


@dataclass
class CheckResult:
    """What a check found.

    Attributes:
        rows: how many were checked, of `total`; fewer if only a share was, or it stopped at `max_errors`.
        errors, warnings: how many; bad_rows: the number of rows with an error.
        counts: (level, reason, field without its numbers) -> how many; examples: the first findings of each.
        report: JSON lines of all findings, each with row (from 1), id, level, reason, field and message.
    """

    path: Path
    total: int
    share: Share
    report: Path
    rows: int = 0
    errors: int = 0
    warnings: int = 0
    bad_rows: int = 0
    stopped: bool = False
    counts: dict[tuple[str, str, str], int] = field(default_factory=dict)
    examples: dict[tuple[str, str, str], list[Finding]] = field(default_factory=dict)

    def count(self, finding: Finding) -> None:
        if finding.level == "error":
            self.errors += 1
        else:
            self.warnings += 1
        kind = (finding.level, finding.reason, re.sub(r"\[\d+\]", "[]", finding.field))
        if kind not in self.counts and len(self.counts) >= _MAX_KINDS:  # keys that rows made up
            kind = (finding.level, finding.reason, "")
        self.counts[kind] = self.counts.get(kind, 0) + 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(finding)

    def table(self) -> str:
        """The summary as text for a terminal: kinds of findings, errors and the most frequent first."""
        part = f"share {self.share.index}/{self.share.count} of " if self.share.count > 1 else ""
        lines = [
            f"{self.path}: {part}{self.total:,} rows; {self.rows:,} checked, {self.bad_rows:,} with errors; "
            f"{self.errors:,} errors, {self.warnings:,} warnings"
        ]
        if self.stopped:
            lines.append("stopped early: there are more errors than --max_errors allows")
        if self.share.count > 1:
            lines.append("ids were compared within this share only; a check without --shard compares all")
        for kind, count in sorted(self.counts.items(), key=lambda item: (item[0][0], -item[1])):
            level, reason, where = kind
            lines.append(f"\n{count:>9,}  {level} {reason}{where and f' at {where}'}")
            for finding in self.examples[kind]:
                name = f" ({finding.id[:40]})" if finding.id else ""
                row = f"row {finding.row}{name}" if finding.row else ""
                place = ", ".join(filter(None, (row, finding.field)))
                lines.append(f"           {place}: {finding.message[:300]}")
        if self.counts:
            lines.append(f"\nall of them: {self.report}")
        return "\n".join(lines)


@dataclass(frozen=True)
class CheckJob(PieceJob):
    """The rows to check. The lines of a piece are those of its rows: what is wrong with it, and the hash of its id."""

    clip_set: ClipSet
    decode: str
    length: Length | None

    def key(self, rows: range) -> str:
        path = self.clip_set.path
        status = (path / LISTING if path.is_dir() else path).stat()
        length = self.length and asdict(self.length)
        state = [str(path), self.rows, status.st_size, status.st_mtime_ns, self.decode, length, str(rows)]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def make(self, rows: range) -> tuple[dict[str, Any], Iterable[bytes]]:
        lines, errors = [], 0
        for row in rows:
            findings, name = check_row(self.clip_set, row, self.decode, self.length)
            errors += sum(finding.level == "error" for finding in findings)
            entry = [[asdict(finding) for finding in findings], None if name is None else hash64(name)]
            lines.append(json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        return {"errors": errors}, lines

    def stands(self, rows: range, header: dict[str, Any]) -> bool:
        """Rows with errors are looked at again: somebody may have mended their files."""
        return not header["errors"]

    def findings(self, pieces: list[range]) -> Iterator[Finding]:
        """What is wrong with the rows of finished pieces, and with ids that several of them have."""
        hashes, rows = array("Q"), array("Q")
        for piece in pieces:
            for row, line in zip(piece, self.lines(piece), strict=True):
                findings, id_hash = json.loads(line)
                yield from (Finding(**finding) for finding in findings)
                if id_hash is not None:
                    hashes.append(id_hash)
                    rows.append(row)
        # Where hashes are equal the ids are compared as text.
        _, inverse, counts = np.unique(np.array(hashes), return_inverse=True, return_counts=True)
        first: dict[str, int] = {}
        for row in np.array(rows)[counts[inverse] > 1].tolist():
            name = self.clip_set[row].id
            if first.setdefault(name, row) != row:
                message = f"id {name!r} is already used in row {first[name] + 1}: give every row its own"
                yield Finding(row + 1, "error", "duplicate_id", "id", message, name)


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

    All findings go to `<path>.check.jsonl`, those of a share to `<path>.check.<i>of<n>.jsonl`. After a check that was
    killed, rows without errors are not read again. A row that kills the process reading it (a fault in a decoder) is
    named too, unless `workers` is 0.

    Args:
        path: a manifest, or a folder written by `data materialise --pack`.
        share: check only this part of the rows, and of the shards' checksums.
        decode: "ends" decodes the first and last frame and those of targets, "all" every frame of the span, "none"
            only looks whether files exist.
        length: a training clip; videos too short for it are errors.
        max_errors: stop once there are more; None never does.

    Raises:
        ValueError: if the data set cannot be opened or is empty, or the same check is running.
    """
    share = share or Share()
    clip_set = open_clip_set(path)
    if not len(clip_set):
        raise ValueError(f"{path} has no rows")
    whole = Path(os.path.abspath(path))
    part = f".{share.index}of{share.count}" if share.count > 1 else ""
    report = whole.with_name(f"{whole.name}.check{part}.jsonl")
    folder = report.with_name(f".{report.name}.part")
    job = CheckJob(folder, len(clip_set), PIECE_ROWS, clip_set, decode, length)
    result = CheckResult(Path(path), len(clip_set), share, report)
    pieces, errors = [], 0
    with closing(job.run(share, workers, "checking")) as finished:
        for rows, header in finished:
            pieces.append(rows)
            errors += header["errors"]
            if max_errors is not None and errors > max_errors:
                result.stopped = True
                break
        result.rows = sum(map(len, pieces))
        bad_rows = set()
        with atomic_open(report) as file:
            shards = [] if result.stopped else _check_shards(clip_set.path, share, workers)
            for finding in chain(shards, job.findings(pieces)):
                file.write(json.dumps(asdict(finding), ensure_ascii=False).encode() + b"\n")
                result.count(finding)
                if finding.level == "error" and finding.row:
                    bad_rows.add(finding.row)
        result.bad_rows = len(bad_rows)
        shutil.rmtree(folder, ignore_errors=True)
    return result


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
