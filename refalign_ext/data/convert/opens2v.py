"""OpenS2V-5M's native files to a manifest: parts are staged one by one, then joined with the pairs between their clips.

The first pass reads every part JSON once, as a stream, into a sqlite file next to the manifest; this is the long one, and
processes and machines may share it. The second joins and writes. Memory stays that of one entry and sqlite's caches.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from refalign_ext.atomic_io import FileLocked, locked
from refalign_ext.data.conversion_report import ConversionReport, Unusable, report_path
from refalign_ext.data.convert.json_stream import IncompleteFile, read_entries
from refalign_ext.data.convert.opens2v_entry import EntryReader, pack_record
from refalign_ext.data.convert.opens2v_join import ClipJoiner
from refalign_ext.data.convert.opens2v_pairs import stage_pairs
from refalign_ext.data.convert.rows import clip_lines, folder_inside, manifest_root, write_lines
from refalign_ext.data.convert.selection import Selection
from refalign_ext.data.convert.staging import fingerprint, open_staged, staged_report, staging
from refalign_ext.data.pieces import Share
from refalign_ext.data.worker_pool import run_each

_VERSION = 3
_TABLES = "CREATE TABLE entry (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, record BLOB NOT NULL)"
_SECOND_PASS_RULES = ("max_references", "max_cross", "min_text_similarity", "min_image_similarity")


@dataclass(frozen=True)
class _Part:
    """One part JSON and the file that it is staged in."""

    path: Path
    target: Path
    mark: str
    number: int


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
) -> ConversionReport:
    """Converts OpenS2V-5M to the manifest `out`, with its index and `<out>.report.json`.

    Parts that are staged in `<out>.staging` are not read again unless they, or the first pass's rules, have changed.
    With shares every process stages its parts, and the one that finds all of them staged joins. A reference is not cut
    here: it names the video, the annotated frame, the mask and the box around it, and a white background.

    Args:
        parts: the part JSONs; a part's name without .json, such as "total_part1", is that of its folders.
        video_root: has `<part>/<metadata.path>`; cross_pairs: has `cluster_videos.json` and the clusters' pairs;
            backgrounds: has `<part>/<key>.png`. Videos and backgrounds lie inside the folder of `out`.
        workers: processes that stage a part each; 0: this process.
        check_videos: drop clips and references whose video file does not exist.

    Returns:
        What was kept and dropped. Its `next_step` says what is missing if no manifest was written.

    Raises:
        ValueError: naming the flag that is not as it should be; OSError: if a file cannot be read or written.
    """
    root = manifest_root(out)
    videos = folder_inside(video_root, root, "--video_root")
    pictures = None if backgrounds is None else folder_inside(backgrounds, root, "--backgrounds")
    if cross_pairs is not None and not cross_pairs.is_dir():
        raise ValueError(f"--cross_pairs {cross_pairs}: no such folder")
    folder = out.with_name(out.name + ".staging")
    folder.mkdir(exist_ok=True)
    listed = _list_parts(parts, folder, selection)
    own = [part for part in share.take(listed) if staged_report(part.target, part.mark) is None]
    stage = partial(_stage_part, selection=selection, bar_lines=max(workers, 1))
    sizes = {part: part.path.stat().st_size for part in own}
    for _ in run_each(stage, own, workers=workers, description="parts", weight=sizes.__getitem__, unit="B"):
        pass
    report = ConversionReport()
    reports = {part: staged_report(part.target, part.mark) for part in listed}
    missing = [part.path.name for part in listed if reports[part] is None]
    if missing:
        report.next_step = (
            f"{len(missing)} of {len(listed)} parts are still to be staged by other shards ({missing[0]}, ...): the last "
            f"one to end writes {out}, and so does the same command without --shard"
        )
        return report
    for found in reports.values():
        report.merge(found)
    try:
        with locked(folder / "join"), ExitStack() as opened:
            pairs = None
            if cross_pairs is not None:
                report.merge(stage_pairs(cross_pairs, folder / "pairs.sqlite", selection))
                pairs = opened.enter_context(open_staged(folder / "pairs.sqlite"))
            files = {part.path.stem: opened.enter_context(open_staged(part.target)) for part in listed}
            joiner = ClipJoiner(files, pairs, root, videos, pictures, selection, check_videos, report)
            write_lines(out, clip_lines(joiner.rows(), joiner.clip, report))
            report.write(report_path(out))
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


def _list_parts(parts: Sequence[Path], folder: Path, selection: Selection) -> list[_Part]:
    """The parts in the order of the numbers in their names, which is the manifest's."""
    if not parts:
        raise ValueError("PARTS: give at least one part JSON, such as total_part1.json")
    rules = {name: value for name, value in asdict(selection).items() if name not in _SECOND_PASS_RULES}
    listed: dict[str, _Part] = {}
    for number, path in enumerate(sorted({Path(path) for path in parts}, key=_natural)):
        if not path.is_file():
            raise ValueError(f"{path}: no such file; PARTS are part JSONs such as total_part1.json")
        if path.stem in listed:
            other = listed[path.stem].path
            raise ValueError(f"{path}: {other} has the same name, and clips are named by it")
        mark = fingerprint({"version": _VERSION} | rules, [path])
        listed[path.stem] = _Part(path, folder / f"{path.stem}.part.sqlite", mark, number)
    return list(listed.values())


def _natural(path: Path) -> tuple[list[str], str]:
    """Sorts total_part2 before total_part10."""
    return [piece.zfill(20) for piece in re.split(r"([0-9]+)", path.stem)], str(path)


def _stage_part(part: _Part, *, selection: Selection, bar_lines: int) -> None:
    """Stages one part; what cannot be used is counted in its report."""
    from tqdm import tqdm

    report, name = ConversionReport(), part.path.name
    reader = EntryReader(selection, report)
    # Parts have tens of gigabytes: each has a bar of its own below that of all of them.
    size, line = part.path.stat().st_size, 1 + part.number % bar_lines
    bar = tqdm(total=size, desc=name, unit="B", unit_scale=True, leave=False, position=line, disable=None)
    with bar, staging(part.target, part.mark, _TABLES, report) as staged:
        try:
            for position, (key, entry) in enumerate(read_entries(part.path, bar.update), 1):
                identity = f"{part.path.stem}/{key}"
                try:
                    record = reader.read(key, entry, identity)
                    row = (position, key, pack_record(record))
                    staged.execute("INSERT INTO entry VALUES (?, ?, ?)", row)
                    if record["reason"]:
                        raise Unusable(record["reason"])
                except Unusable as problem:
                    report.drop("clips", problem.reason, f"{identity}: {problem}".removesuffix(": "))
                except sqlite3.IntegrityError:
                    report.drop("clips", "duplicate_key", f"{identity}: entry {position}")
        except IncompleteFile as error:
            report.incomplete[name] = str(error)
