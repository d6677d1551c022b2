"""OpenS2V-5M's native files to a manifest: parts are staged one by one, then joined with the pairs between their clips.

The first pass reads every part JSON once, as a stream, into a sqlite file next to the manifest; this is the long one, it
may be shared by processes and machines, and what is staged is not read again. The second joins and writes. Memory stays
that of one entry and sqlite's page caches.

A reference is not cut here: it names the video, the annotated frame, the box around its mask in the cropped frame, the
mask, and a white background.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from refalign_ext.atomic_io import FileLocked, locked
from refalign_ext.data.conversion_report import Report, report_path
from refalign_ext.data.convert.opens2v_join import Join, Part
from refalign_ext.data.convert.opens2v_pairs import stage_pairs
from refalign_ext.data.convert.opens2v_record import EntryProblem, pack, read_entry
from refalign_ext.data.convert.opens2v_stream import Incomplete, entries
from refalign_ext.data.convert.places import inside, manifest_root
from refalign_ext.data.convert.selection import Selection
from refalign_ext.data.convert.staging import (
    fingerprint,
    is_staged,
    open_staged,
    staged_report,
    staging,
)
from refalign_ext.data.manifest_file import write_manifest
from refalign_ext.data.pieces import Share
from refalign_ext.data.worker_pool import run_each

_VERSION = 1
_TABLES = "CREATE TABLE entry (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, record BLOB NOT NULL)"
_LATER = (
    "max_references",
    "max_cross",
    "min_text_similarity",
    "min_image_similarity",
)  # rules of the second pass
_POLL_S = 5.0


@dataclass(frozen=True)
class _PartJob:
    """One part JSON and the file that it is staged in."""

    path: Path
    target: Path
    mark: str
    selection: Selection
    line: int = 1  # of the terminal, for its progress bar


def convert_opens2v(
    parts: Sequence[Path],
    out: Path,
    *,
    video_root: Path,
    selection: Selection,
    share: Share,
    cross_pairs: Path | None = None,
    backgrounds: Path | None = None,
    workers: int = 0,
    check_videos: bool = True,
    keep_staging: bool = True,
    wait: bool | None = None,
) -> Report:
    """Converts OpenS2V-5M to the manifest `out`, with its index and `<out>.report.json`.

    Started again after it was stopped, or with other rules of the second pass, it reads only parts that are not staged
    yet in `<out>.staging`; a part counts as staged if its size, its time of change and the first pass's rules are the
    same. With shares every process stages its parts, and the one that finds all of them staged joins.

    Args:
        parts: the part JSONs; a part's name without .json, such as "total_part1", is that of its folders.
        video_root: has `<part>/<metadata.path>`, or the paths themselves; inside the folder of `out`.
        cross_pairs: the folder with `cluster_videos.json` and the clusters' pairs; None: regular pairs only.
        backgrounds: has `<part>/<key>.png`; inside the folder of `out`; None: no backgrounds.
        workers: processes that stage a part each; 0: this process.
        check_videos: drop clips and references whose video file does not exist.
        keep_staging: keep the staged parts after the manifest is written; they are large.
        wait: whether share 0 waits for the others and alone joins; None: if torchrun started them.

    Returns:
        What was kept and dropped. Its `next_step` says what is missing if no manifest was written.

    Raises:
        ValueError: naming the flag that is not as it should be.
        OSError: if a file cannot be read or written.
    """
    out = Path(out)
    root = manifest_root(out)
    videos = inside(Path(video_root), root, "--video_root")
    pictures = None if backgrounds is None else inside(Path(backgrounds), root, "--backgrounds")
    if cross_pairs is not None and not Path(cross_pairs).is_dir():
        raise ValueError(f"--cross_pairs {cross_pairs}: no such folder")
    folder = out.with_name(out.name + ".staging")
    folder.mkdir(exist_ok=True)
    jobs = _jobs(parts, folder, selection)
    mine = [job for job in share.take(jobs) if not is_staged(job.target, job.mark)]
    # Parts have tens of gigabytes: each has a bar of its own below that of all of them.
    for number, job in enumerate(mine):
        mine[number] = replace(job, line=1 + number % max(workers, 1))
    for _ in run_each(
        _stage_part,
        mine,
        workers=workers,
        description="parts",
        weight=lambda job: job.path.stat().st_size,
        unit="B",
    ):
        pass
    if wait is None:
        wait = share.count > 1 and share == _torchrun_share()
    report = Report()
    if wait and share.index:
        report.next_step = f"process 0 writes {out}"
        return report
    while missing := [job for job in jobs if not is_staged(job.target, job.mark)]:
        if not wait:
            names = ", ".join(job.path.name for job in missing[:5]) + (", ..." if len(missing) > 5 else "")
            report.next_step = (
                f"{len(missing)} of {len(jobs)} parts are still to be staged by other shards ({names}): when they have "
                f"ended, run the same command without --shard to write {out}"
            )
            return report
        time.sleep(_POLL_S)
    pairs = None if cross_pairs is None else Path(cross_pairs)
    try:
        with locked(folder / "join"):
            report = _join(jobs, out, folder, videos, pairs, pictures, selection, check_videos)
    except FileLocked:
        if share.count == 1:
            raise
        report.next_step = f"another shard is writing {out}"
        return report
    except sqlite3.Error as error:
        raise OSError(
            f"{folder}: a staged file is damaged ({error}): delete the folder and run again"
        ) from None
    if not keep_staging:
        shutil.rmtree(folder)
    return report


def _join(
    jobs: Sequence[_PartJob],
    out: Path,
    folder: Path,
    videos: Path,
    cross_pairs: Path | None,
    backgrounds: Path | None,
    selection: Selection,
    check_videos: bool,
) -> Report:
    """The second pass: the manifest of parts that are all staged, and its report."""
    staged = [job.target for job in jobs]
    if cross_pairs is not None:
        stage_pairs(cross_pairs, folder / "pairs.sqlite", selection)
        staged.append(folder / "pairs.sqlite")
    report = Report()
    for target in staged:
        report.merge(staged_report(target))
    with ExitStack() as opened:
        files = [opened.enter_context(open_staged(target)) for target in staged]
        parts = [Part(job.path.stem, file) for job, file in zip(jobs, files)]
        pairs = None if cross_pairs is None else files[-1]
        root = out.parent.resolve()
        join = Join(parts, pairs, root, videos, backgrounds, selection, check_videos, report)
        write_manifest(out, join.clips())
    report.write(report_path(out))
    return report


def _jobs(parts: Sequence[Path], folder: Path, selection: Selection) -> list[_PartJob]:
    """The parts in the order of the numbers in their names, which is the manifest's."""
    paths = sorted({Path(path) for path in parts}, key=lambda path: (_natural(path.stem), str(path)))
    if not paths:
        raise ValueError("PARTS: give at least one part JSON, such as total_part1.json")
    rules = {name: value for name, value in asdict(selection).items() if name not in _LATER}
    settings = {"version": _VERSION, **rules}
    jobs: dict[str, _PartJob] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; PARTS are part JSONs such as total_part1.json")
        if path.stem in jobs:
            other = jobs[path.stem].path
            raise ValueError(f"{path}: {other} has the same name, and clips are named by it")
        target = folder / f"{path.stem}.part.sqlite"
        jobs[path.stem] = _PartJob(path, target, fingerprint(settings, [path]), selection)
    return list(jobs.values())


def _stage_part(job: _PartJob) -> None:
    """Stages one part; what cannot be used is counted in its report."""
    from tqdm import tqdm

    report, name = Report(), job.path.name
    size = job.path.stat().st_size
    bar = tqdm(total=size, desc=name, unit="B", unit_scale=True, leave=False, position=job.line, disable=None)
    with bar, staging(job.target, job.mark, _TABLES, report) as staged:
        try:
            for position, (key, entry) in enumerate(entries(job.path, bar.update), 1):
                _stage_entry(staged, position, key, entry, job, report)
        except Incomplete as error:
            report.incomplete[name] = str(error)


def _stage_entry(
    staged: sqlite3.Connection, position: int, key: str, entry: object, job: _PartJob, report: Report
) -> None:
    place, things = f"{job.path.stem}/{key}", Report()
    try:
        record = read_entry(key, entry, job.selection, place, things)
    except EntryProblem as problem:
        report.drop("clips", problem.reason, f"{place}: {problem}")
        return
    row = (position, key, pack(record))
    if not staged.execute("INSERT OR IGNORE INTO entry VALUES (?, ?, ?)", row).rowcount:
        report.drop("clips", "duplicate_key", f"{place}: entry {position} of {job.path.name}")
        return
    report.merge(things)
    if record["reason"]:
        report.drop("clips", record["reason"], place)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts total_part2 before total_part10."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"([0-9]+)", name)]


def _torchrun_share() -> Share | None:
    return Share.from_environment() if "WORLD_SIZE" in os.environ else None
