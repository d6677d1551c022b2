"""A folder of clips, or a table that names them, as a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from refalign_ext.atomic_io import locked
from refalign_ext.data.clip_index import USABLE, open_clip_index, probe_media
from refalign_ext.data.conversion_report import ConversionReport, Unusable, no_clips_message, report_path
from refalign_ext.data.convert.folder_clip import ClipMaker
from refalign_ext.data.convert.folder_files import VIDEO_SUFFIXES, rows_in_folder
from refalign_ext.data.convert.folder_table import TABLE_SUFFIXES, rows_in_table
from refalign_ext.data.convert.rows import clip_lines, folder_inside, manifest_root, write_lines
from refalign_ext.data.convert.selection import FOLDER_SELECTION, Selection
from refalign_ext.data.length import Length
from refalign_ext.data.manifest_file import ManifestReader, index_path
from refalign_ext.data.schema import Clip, Subject, VideoSpan
from refalign_ext.data.spans import steady_frame


def convert_folder(
    source: Path,
    out: Path,
    *,
    prompt_suffix: str = ".txt",
    columns: Mapping[str, str] | None = None,
    media_root: Path | None = None,
    group: str = "none",
    pair: str = "cross",
    length: Length | None = None,
    selection: Selection = FOLDER_SELECTION,
    workers: int = 0,
) -> ConversionReport:
    """Writes the manifest `out` and `<out>.report.json` of a folder's clips, or of those that a table lists.

    How files have to be called says `folder_files`, what columns a table has `folder_table`. Videos are probed, so
    rows tell their size, rate and frames. What was found out is kept in `.<out>.draft.clip_index`.

    Args:
        source: the folder, or a .csv, .tsv or .jsonl file; all media have to lie in the folder of `out` or below.
        columns: names of a table's columns by what they hold, where they are not found by themselves.
        media_root: the folder that file names in a table are relative to; None: that of the table.
        group: "folder": clips of one folder are never split between training and validation; "none": any may be.
        pair: "cross" for pictures that were not cut out of the clip, "regular" if they were.
        length: how long a clip must be; None: training leaves out what is too short for it.
        selection: `max_references` (the first ones), `max_cross` (of a subject) and `min_frames` (of the file) apply.

    Raises:
        ValueError: if an option cannot be or no clip can be used: with the reason and what to do.
        FileLocked: (a ValueError) if another process writes the same manifest.
    """
    from tqdm import tqdm

    root = _checked_root(source, out, media_root, columns, prompt_suffix)
    base = source if source.is_dir() else media_root or source.parent
    report = ConversionReport()
    maker = ClipMaker(root, base.resolve(), pair, group == "folder", report)
    if source.is_dir():
        found = rows_in_folder(maker.base, prompt_suffix.lower(), report)
    else:
        found = rows_in_table(source, columns or {}, report)
    shown = tqdm(found, desc="looking for clips", unit="clip", dynamic_ncols=True, disable=None)
    # Millions of clips do not fit into memory while their videos are probed. Hidden, so that no walk finds it.
    draft = out.with_name(f".{out.name}.draft")
    with locked(draft):
        try:
            if not write_lines(draft, clip_lines(shown, maker.clip, report)):
                raise ValueError(_nothing_fits(source, root, prompt_suffix, report))
            report.kept.clear()  # until their videos are known
            rows = ManifestReader(draft)
            records = open_clip_index(rows, workers=workers, logs_bad_clips=False)

            def probed(row: int) -> Clip:
                return _probed_clip(rows, row, records[row], length, selection, report)

            numbered = ((rows[row].id, row) for row in range(len(rows)))
            lines = clip_lines(numbered, probed, report)
            first = next(lines, None)
            if first is None:
                raise ValueError(_nothing_fits(source, root, prompt_suffix, report))
            write_lines(out, chain([first], lines))
        finally:
            for path in (draft, index_path(draft)):
                path.unlink(missing_ok=True)
    report.write(report_path(out))
    return report


def _checked_root(
    source: Path, out: Path, media_root: Path | None, columns: Mapping[str, str] | None, prompt_suffix: str
) -> Path:
    """The manifest's folder, once the options are known to fit together."""
    if not source.exists():
        raise ValueError(f"{source}: no such folder or table")
    if not prompt_suffix.startswith(".") or len(prompt_suffix) < 2:
        raise ValueError(f"--prompt_suffix {prompt_suffix!r}: give a suffix with its dot, such as .txt")
    root = manifest_root(out)
    if source.is_dir():
        if media_root or columns:
            raise ValueError(f"--column and --media_root are for tables, and {source} is a folder")
        folder_inside(source, root, "SOURCE")
    elif source.suffix.lower() not in TABLE_SUFFIXES:
        raise ValueError(
            f"{source}: expected a folder or a table ({', '.join(TABLE_SUFFIXES)}): save it as CSV or JSON lines"
        )
    elif source.resolve() == out.resolve():
        raise ValueError(f"{out} is the table itself: choose another name for the manifest")
    return root


def _probed_clip(
    rows: ManifestReader,
    row: int,
    record: np.void,
    length: Length | None,
    selection: Selection,
    report: ConversionReport,
) -> Clip:
    """A clip of the draft with what its index record says of the video, if that can be used."""
    clip, frames, fps = rows[row], int(record["frames"]), float(record["fps"])
    if record["state"] != USABLE or not fps > 0:
        raise _why_unusable(rows, row, clip)
    if selection.clip_problem(frames, clip.scores) or (length and not length.fits(frames, fps)):
        raise Unusable("too_short", f"{frames} frames at {fps:.3g} fps")
    subjects = _selected(clip, selection, report)
    return replace(clip, video=_filled_in(clip.video, record), subjects=subjects)


def _why_unusable(rows: ManifestReader, row: int, clip: Clip) -> Unusable:
    try:
        if probe_media(rows.media(row, clip.video.path)).fps > 0:
            return Unusable("span_outside_video")
        return Unusable("video_unreadable", "it tells no frame rate")
    except ValueError as error:
        place = f"{rows.path.parent / clip.video.path}: "
        return Unusable(
            "video_unreadable", str(error).removeprefix(f"{rows.place(row)}: ").removeprefix(place)
        )


def _filled_in(span: VideoSpan, record: np.void) -> VideoSpan:
    """The span with its end, and the size and rate of its file."""
    fps, frames = float(record["fps"]), int(record["frames"])
    known = {"fps": fps, "width": int(record["width"]), "height": int(record["height"])}
    if span.start_s is None and span.end_s is None:
        start = span.start_frame or 0
        return replace(span, start_frame=start, end_frame=start + frames, **known)
    # Ends are often rounded: one beyond the last frame is still the end of the file.
    start_s = span.start_s or 0.0
    end_s = (steady_frame(start_s, fps) + frames) / fps
    return replace(span, start_s=start_s, end_s=min(end_s, span.end_s or end_s), **known)


def _selected(clip: Clip, selection: Selection, report: ConversionReport) -> tuple[Subject, ...]:
    """The first subjects and the first references of each, as many as are wanted."""
    # A limit for cross pairs is one for a choice of equals, which must not take the last picture away.
    most = None if selection.max_cross is None else max(1, selection.max_cross)
    kept = clip.subjects[: selection.max_references]
    subjects = tuple(replace(subject, refs=subject.refs[:most]) for subject in kept)
    counts = [sum(len(subject.refs) for subject in group) for group in (clip.subjects, subjects)]
    report.drop("references", "too_many", clip.id, counts[0] - counts[1])
    return subjects


def _nothing_fits(source: Path, root: Path, prompt_suffix: str, report: ConversionReport) -> str:
    """The error of a conversion that kept no clip: the most frequent reason, and what to do about it."""
    if source.is_dir() and not report.dropped["clips"]:
        return f"{source}: found no video; known are {', '.join(sorted(VIDEO_SUFFIXES))}"
    lines = [no_clips_message(source, report)]
    remedies = {
        "outside_folder": f"paths in a manifest are relative to its folder, {root}: write it above the clips"
    }
    if source.is_dir():
        remedies["no_prompt"] = f"write the prompt of clip.mp4 into clip{prompt_suffix} beside it"
        remedies["no_reference"] = "call the pictures of clip.mp4 clip.ref1.png, clip.ref2.png"
    lines += [remedy for reason, remedy in remedies.items() if reason in report.dropped["clips"]]
    for reason, number in report.dropped["references"].most_common(1):
        lines.append(f"references: {number} x {reason}, such as {report.examples['references'][reason][0]}")
    return "; ".join(lines)
