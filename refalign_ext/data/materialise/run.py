"""`data materialise`: crops every reference to a picture file, and on request packs clips and references into tar shards.

Whoever finishes the last piece joins them: what is written depends on the rows alone, not on workers, shares or
interruptions.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from refalign_ext.data.clip_set import MANIFEST, ClipSet, open_clip_set
from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.materialise.files import FilesJob
from refalign_ext.data.materialise.pack import PackJob
from refalign_ext.data.pieces import Share
from refalign_ext.data.shards import LISTING, SHARD_FOLDER

REPORT = "report.json"
SHARD_SIZE = 256
PIECE_ROWS = 64  # without shards; what a worker does at once, and loses if the work is killed
_WORK = ".work"


def materialise(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    pack: bool = False,
    shard_size: int = SHARD_SIZE,
    copy: bool = False,
    share: Share | None = None,
    workers: int = 0,
) -> ConversionReport:
    """Crops the references of a clip set and writes one in which nothing is left to be cropped.

    Without `pack` it is `<out>/manifest.jsonl`, with pictures below `<out>/references`. Videos and pictures that
    need no cropping stay where they are if `out` is the manifest's folder or one above it; otherwise they appear
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
    rows, whole = len(clip_set), out.resolve()
    if not rows:
        raise ValueError(f"{path} has no rows")
    if pack:
        job = PackJob(whole / _WORK, rows, shard_size, clip_set, whole)
    else:
        job = FilesJob(whole / _WORK, rows, PIECE_ROWS, clip_set, whole, copy)
    report, mine = ConversionReport(), set()
    for piece, header in job.run(share or Share(), workers, "packing" if pack else "cropping"):
        report.merge(ConversionReport.from_dict(header["report"]))
        mine.add(piece)
    pieces = job.pieces()
    left = sum(piece not in mine and job.finished(piece) is None for piece in pieces)
    if left:
        report.next_step = (
            f"{len(pieces) - left} of {len(pieces)} pieces are finished; the share that finishes last writes "
            f"{out / job.result} (if none did, run any of them again)"
        )
        return report
    job.join()
    report = ConversionReport()
    for piece in pieces:
        report.merge(ConversionReport.from_dict(job.read_header(piece)["report"]))
    report.write(whole / REPORT)
    shutil.rmtree(job.parts, ignore_errors=True)
    return report


def _check_out(clip_set: ClipSet, out: Path, pack: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give --out a folder")
    if clip_set.path.resolve() in (out.resolve(), (out / MANIFEST).resolve()):
        raise ValueError(f"{out} is where the clips come from: give --out another folder")
    # Looked for first: another share may be creating all of it just now, its records before anything else.
    names = (LISTING, SHARD_FOLDER, REPORT) if pack else (MANIFEST, REPORT)
    there = [name for name in names if (out / name).exists()]
    if there and not (out / _WORK).is_dir():
        raise ValueError(
            f"{out / there[0]} exists already and is not part of an earlier run: give --out another folder"
        )
    other = out / (MANIFEST if pack else LISTING)
    if other.exists():
        kind = "files that are not packed" if pack else "packed shards"
        raise ValueError(f"{out} already holds {kind} ({other.name}): give --out another folder")
