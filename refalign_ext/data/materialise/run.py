"""`data materialise`: cuts every reference to a picture file, and on request packs clips and references into tar shards.

Rows are worked on in pieces. Each finished piece is recorded in `<out>/.work` after everything it wrote, so that work
that was killed goes on with the next one, and shares on several machines need nothing but the folder. Whoever finishes
the last piece joins them: what is written depends on the rows alone, not on workers, shares or interruptions.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from refalign_ext.atomic_io import atomic_open, locked
from refalign_ext.data.clip_set import MANIFEST, ClipSet, open_clip_set
from refalign_ext.data.conversion_report import Report
from refalign_ext.data.manifest_file import MAX_ROW_BYTES, ManifestReader, index_path
from refalign_ext.data.materialise.files import Place, cut_piece, pictures_folder
from refalign_ext.data.materialise.pack import pack_piece
from refalign_ext.data.pieces import Share, chunks
from refalign_ext.data.shards import (
    LISTING,
    SHARD_FOLDER,
    ShardInfo,
    shard_name,
    write_listing,
)
from refalign_ext.data.worker_pool import run_each

REPORT = "report.json"
SHARD_SIZE = 256
_PIECE = 64  # rows; without shards a piece is only what is lost if the work is killed
_FORMAT = 1
_WORK, _PARTS = ".work", "parts"


@dataclass(frozen=True)
class _Job:
    """What is done with every piece; `size` rows are one piece, `copy` and `pack` as for `materialise`."""

    clip_set: ClipSet
    out: Path
    pack: bool
    copy: bool
    size: int

    @property
    def place(self) -> Place:
        return Place(self.clip_set, self.out, self.out / _WORK / _PARTS, self.copy)

    def record(self, piece: int) -> Path:
        """The file that says that a piece is finished: a header and, without shards, its rows."""
        return self.out / _WORK / f"{piece:06d}.jsonl"


def materialise(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    pack: bool = False,
    shard_size: int = SHARD_SIZE,
    copy: bool = False,
    share: Share | None = None,
    workers: int = 0,
) -> Report:
    """Cuts the references of a clip set and writes one in which nothing is left to be cut.

    Without `pack` it is `<out>/manifest.jsonl`, with pictures below `<out>/references`. Videos and pictures that
    need no cutting stay where they are if `out` is the manifest's folder or one above it; otherwise they appear
    below `<out>/media` as hard links, which take no space. With `pack` everything is in `<out>/shards/*.tar` and
    nothing else is needed; a file of which a span is less than half is trimmed to it (`trimming.trim`).

    Rows without a usable reference are dropped. `<out>/report.json` counts and names what was. Done again after the
    rows changed, only pieces with other rows are done; `<out>/.work` knows which (contents of videos and pictures are
    not compared: for these use another folder).

    Args:
        path: a manifest or a packed folder.
        pack: write tar shards; shard_size: rows of the source in each.
        copy: copy files to `<out>/media` instead of linking, for an `out` on another file system.
        share: do only this part of the pieces.
        workers: processes; 0 works in this one.

    Returns:
        The report of all rows; `next_step` is set if other shares are not finished yet, whose rows are missing in it.

    Raises:
        ValueError: if the clips cannot be opened, `out` cannot take them, or another process does this share.
        OSError: if a file cannot be written, linked or copied.
    """
    out = Path(out)
    if shard_size < 1:
        raise ValueError(f"--shard_size {shard_size}: a shard has at least 1 row")
    clip_set = open_clip_set(Path(path))
    _check_out(clip_set, out, pack)
    (out / _WORK).mkdir(parents=True, exist_ok=True)
    job = _Job(clip_set, out.resolve(), pack, copy, shard_size if pack else _PIECE)
    pieces = chunks(len(clip_set), job.size)
    if not pieces:
        raise ValueError(f"{path} has no rows")
    report, keys = Report(), {}
    work = partial(_finish, job)
    share = share or Share()
    with locked(job.out / _WORK / f"share-{share.index}-of-{share.count}"):
        for rows, header in run_each(
            work,
            share.take(pieces),
            workers=workers,
            description="packing" if pack else "cutting",
            weight=len,
        ):
            report.merge(Report.from_dict(header["report"]))
            keys[rows.start // job.size] = header["key"]
    finished = sum(
        _read_header(job, piece, keys.get(piece) or _key(job, rows)) is not None
        for piece, rows in enumerate(pieces)
        if piece in keys or job.record(piece).is_file()
    )
    if finished < len(pieces):
        report.next_step = (
            f"{finished} of {len(pieces)} pieces are finished; the share that finishes last writes "
            f"{out / (LISTING if pack else MANIFEST)} (if none did, run any of them again)"
        )
        return report
    return _join(job, len(pieces))


def _check_out(clip_set: ClipSet, out: Path, pack: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give --out a folder")
    if clip_set.path.resolve() in (out.resolve(), (out / MANIFEST).resolve()):
        raise ValueError(f"{out} is where the clips come from: give --out another folder")
    # Looked for first: another share may be creating all of it just now, its records before anything else.
    there = [name for name in _names(pack) if (out / name).exists()]
    if there and not (out / _WORK).is_dir():
        raise ValueError(
            f"{out / there[0]} exists already and is not part of an earlier run: give --out another folder"
        )
    other = out / (MANIFEST if pack else LISTING)
    if other.exists():
        kind = "files that are not packed" if pack else "packed shards"
        raise ValueError(f"{out} already holds {kind} ({other.name}): give --out another folder")


def _names(pack: bool) -> tuple[str, ...]:
    """What is written into the folder and may replace what an earlier run wrote."""
    return (LISTING, SHARD_FOLDER, REPORT) if pack else (MANIFEST, REPORT)


def _finish(job: _Job, rows: range) -> dict[str, Any]:
    """Does a piece unless it is recorded as finished; gives its header."""
    piece, key = rows.start // job.size, _key(job, rows)
    header = _read_header(job, piece, key)
    if header is not None:
        return header
    job.record(piece).unlink(missing_ok=True)
    if job.pack:  # the listing of an earlier run would not be that of the shards any more
        (job.out / LISTING).unlink(missing_ok=True)
    report, lines = Report(), []
    if job.pack:
        written: dict[str, Any] = {"shard": asdict(pack_piece(job.place, piece, rows, report))}
    else:
        lines, count = cut_piece(job.place, piece, rows, report)
        written = {"pictures": count}
    header = {"key": key, "report": report.to_dict()} | written
    with atomic_open(job.record(piece), job.place.parts) as file:
        file.write(json.dumps(header, ensure_ascii=False).encode("utf-8") + b"\n")
        file.writelines(lines)
    return header


def _key(job: _Job, rows: range) -> str:
    """A digest of all that a piece is made from, except the contents of videos and pictures."""
    source = os.path.relpath(job.clip_set.path.resolve(), job.out)
    digest = hashlib.sha256(json.dumps([_FORMAT, job.pack, job.size, rows.start, source]).encode("utf-8"))
    for row in rows:
        try:
            line = job.clip_set.line(row)
        except ValueError as error:
            line = str(error).encode("utf-8", "replace")
        digest.update(hashlib.sha256(line).digest())
    return digest.hexdigest()


def _read_header(job: _Job, piece: int, key: str) -> dict[str, Any] | None:
    """The header of a piece that is finished, made from what `key` says, and still there; else None."""
    try:
        with job.record(piece).open("rb") as file:
            header = json.loads(file.readline(MAX_ROW_BYTES))
        if header["key"] != key:
            return None
        if job.pack:
            there = (job.out / shard_name(piece)).stat().st_size == header["shard"]["bytes"]
        else:
            there = (
                not header["pictures"]
                or len(os.listdir(pictures_folder(job.out, piece))) == header["pictures"]
            )
        return header if there else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _join(job: _Job, pieces: int) -> Report:
    """Makes one clip set of all pieces, in order."""
    report, shards = Report(), []
    target = job.out / (LISTING if job.pack else MANIFEST)
    # Not among the parts: another share may be at this too, and clear them away.
    aside = job.out / _WORK / f"{target.name}.{uuid.uuid4().hex}"
    try:
        with aside.open("xb") as manifest:
            for piece in range(pieces):
                with job.record(piece).open("rb") as file:
                    header = json.loads(file.readline(MAX_ROW_BYTES))
                    shutil.copyfileobj(file, manifest, 1 << 20)
                report.merge(Report.from_dict(header["report"]))
                if job.pack:
                    shards.append(ShardInfo(**header["shard"]))
            manifest.flush()
            os.fsync(manifest.fileno())
        if job.pack:
            write_listing(job.out, shards)
            _remove_surplus(job.out / SHARD_FOLDER, pieces)
        else:
            # A manifest that says what it said keeps its time of change, by which others know it.
            if not (target.is_file() and filecmp.cmp(aside, target, shallow=False)):
                index_path(target).unlink(missing_ok=True)
                os.replace(aside, target)
            ManifestReader(target).close()  # builds the index
    finally:
        aside.unlink(missing_ok=True)
    report.write(job.out / REPORT)
    shutil.rmtree(job.place.parts, ignore_errors=True)
    return report


def _remove_surplus(folder: Path, pieces: int) -> None:
    """Removes shards that an earlier, longer version of the rows left."""
    for path in folder.iterdir():
        if re.fullmatch(r"[0-9]{5,9}\.tar", path.name) and int(path.stem) >= pieces:
            path.unlink()
