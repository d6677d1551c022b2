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
PIECE_ROWS = 64  # without shards; what a worker does at once, and loses if the work is killed
_WORK = ".work"


def materialise(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    pack: bool = False,
    shard_size: int = 256,
    copy: bool = False,
    share: Share | None = None,
    workers: int = 0,
) -> ConversionReport:
    """Crops the references of a clip set and writes one in which nothing is left to be cropped.

    Without `pack` it is `<out>/manifest.jsonl` with pictures below `<out>/references`; files that need no cropping
    stay where they are if they lie in `out`, and are hard links below `<out>/media` otherwise. With `pack` everything
    is in `<out>/shards/*.tar`. `<out>/report.json` counts and names what was dropped. Done again after rows changed,
    only pieces with other rows are done (contents of videos and pictures are not compared).

    Args:
        path: a manifest or a packed folder.
        pack: write tar shards; shard_size: rows of the source in each.
        copy: copy files to `<out>/media` instead of linking, for an `out` on another file system.
        share: do only this part of the pieces.
        workers: processes; 0 works in this one.

    Returns:
        The report of all rows; `next_step` is set if some pieces, whose rows are missing in it, are not finished yet.

    Raises:
        ValueError: if the clips cannot be opened, `out` cannot take them, or another process does this share.
        OSError: if a file cannot be written, linked or copied.
    """
    clip_set, out = open_clip_set(Path(path)), Path(out)
    if not len(clip_set):
        raise ValueError(f"{path} has no rows")
    _check_out(clip_set, out, pack)
    whole = Path(os.path.realpath(out))
    if pack:
        job = PackJob(whole / _WORK, len(clip_set), shard_size, clip_set, whole)
    else:
        job = FilesJob(whole / _WORK, len(clip_set), PIECE_ROWS, clip_set, whole, copy)
    mine = {piece for piece, _ in job.run(share or Share(), workers, "packing" if pack else "cropping")}
    pieces = job.pieces()
    finished = [piece for piece in pieces if piece in mine or job.finished(piece) is not None]
    report = ConversionReport()
    for piece in finished:
        report.merge(ConversionReport.from_dict(job.read_header(piece)["report"]))
    if len(finished) < len(pieces):
        report.next_step = (
            f"{len(finished)} of {len(pieces)} pieces are finished; the share that finishes last writes "
            f"{out / job.result} (if none did, run any of them again)"
        )
        return report
    job.join()
    report.write(whole / REPORT)
    shutil.rmtree(job.parts, ignore_errors=True)
    return report


def _check_out(clip_set: ClipSet, out: Path, pack: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give --out a folder")
    if clip_set.path.resolve() in (out.resolve(), (out / MANIFEST).resolve()):
        raise ValueError(f"{out} is where the clips come from: give --out another folder")
    mine, other = ((LISTING, SHARD_FOLDER), MANIFEST) if pack else ((MANIFEST,), LISTING)
    # Looked for first: another share may be creating all of it just now, its records before anything else.
    there = [name for name in (*mine, REPORT) if (out / name).exists()]
    if (out / _WORK).is_dir():
        there = []
    there += [other] if (out / other).exists() else []
    if there:
        raise ValueError(
            f"{out / there[0]} exists already and is not part of this work: give --out another folder"
        )
