"""A folder of clips, or a table that names them, as a manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from refalign_ext.atomic_io import locked
from refalign_ext.data.clip_index import USABLE, open_clip_index, probe_media
from refalign_ext.data.conversion_report import ConversionReport, no_clips_message, report_path
from refalign_ext.data.convert.folder_files import VIDEO_SUFFIXES, DraftOptions, clips_in_folder
from refalign_ext.data.convert.folder_table import TABLE_SUFFIXES, clips_in_table
from refalign_ext.data.convert.paths import folder_inside, manifest_root
from refalign_ext.data.convert.selection import FOLDER_SELECTION, Selection
from refalign_ext.data.length import Length
from refalign_ext.data.manifest_file import ManifestReader, index_path, write_manifest
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
        source: the folder, or a .csv, .tsv or .jsonl file.
        out: the manifest. Paths in it are relative to its folder, so all media have to lie there or below.
        prompt_suffix: of the files that hold prompts; folders only.
        columns: names of a table's columns by what they hold, where they are not found by themselves.
        media_root: the folder that file names in a table are relative to; None: that of the table.
        group: "folder": clips of one folder are never split between training and validation; "none": any may be.
        pair: "cross" for pictures that were not cut out of the clip, "regular" if they were.
        length: how long a clip must be; None: training leaves out what is too short for it.
        selection: `max_references` (the first ones of a clip), `max_cross` (of a subject) and `min_frames` (of the file)
            apply.
        workers: processes that probe videos; 0: this one.

    Raises:
        ValueError: if there is no such source, an option cannot be, `out` lies elsewhere than the clips, or no clip can
            be used: with the reason and what to do.
        FileLocked: (a ValueError) if another process writes the same manifest.
    """
    from tqdm import tqdm

    root = _checked_root(source, out, media_root, columns, prompt_suffix)
    base = source if source.is_dir() else media_root or source.parent
    options = DraftOptions(
        root, base.resolve(), pair, group == "folder", prompt_suffix.lower(), columns or {}
    )
    report = options.report
    found = clips_in_folder(options) if source.is_dir() else clips_in_table(source, options)
    shown = tqdm(found, desc="looking for clips", unit="clip", dynamic_ncols=True, disable=None)
    # Millions of clips do not fit into memory while their videos are probed. Hidden, so that no walk finds it.
    draft = out.with_name(f".{out.name}.draft")
    with locked(draft):
        try:
            if not write_manifest(draft, shown):
                raise ValueError(_nothing_fits(source, options))
            rows = ManifestReader(draft)
            records = open_clip_index(rows, workers=workers, logs_bad_clips=False)
            clips = _finished(rows, records, length, selection, report)
            first = next(clips, None)
            if first is None:
                raise ValueError(_nothing_fits(source, options))
            write_manifest(out, chain([first], clips))
        finally:
            for path in (draft, index_path(draft)):
                path.unlink(missing_ok=True)
    report.write(report_path(out))
    return report


def _checked_root(
    source: Path, out: Path, media_root: Path | None, columns: Mapping[str, str] | None, prompt_suffix: str
) -> Path:
    if not source.exists():
        raise ValueError(f"{source}: no such folder or table")
    if not prompt_suffix.startswith(".") or len(prompt_suffix) < 2:
        raise ValueError(f"--prompt_suffix {prompt_suffix!r}: give a suffix with its dot, such as .txt")
    root = manifest_root(out)
    if source.is_dir():
        if media_root or columns:
            flag = "--column" if columns else "--media_root"
            raise ValueError(f"{flag} is for tables, and {source} is a folder")
        folder_inside(source, root, "SOURCE")
    elif source.suffix.lower() not in TABLE_SUFFIXES:
        raise ValueError(
            f"{source}: expected a folder or a table ({', '.join(TABLE_SUFFIXES)}): save it as CSV or JSON lines"
        )
    elif source.resolve() == out.resolve():
        raise ValueError(f"{out} is the table itself: choose another name for the manifest")
    return root


def _finished(
    rows: ManifestReader,
    records: np.ndarray,
    length: Length | None,
    selection: Selection,
    report: ConversionReport,
) -> Iterator[Clip]:
    """The clips of a draft whose videos can be used, with what its index says of them."""
    for row, record in enumerate(records):
        clip, frames, fps = rows[row], int(record["frames"]), float(record["fps"])
        if record["state"] != USABLE or not fps > 0:
            report.drop("clips", *_why_unusable(rows, row, clip))
        elif selection.clip_problem(frames, clip.scores) or (length and not length.fits(frames, fps)):
            report.drop("clips", "too_short", f"{clip.id} ({frames} frames at {fps:.3g} fps)")
        else:
            subjects = _selected(clip, selection, report)
            report.keep("clips")
            report.keep("references", sum(len(subject.refs) for subject in subjects))
            yield replace(clip, video=_filled_in(clip.video, record), subjects=subjects)


def _why_unusable(rows: ManifestReader, row: int, clip: Clip) -> tuple[str, str]:
    """Under which reason a clip is dropped, and its name with the error."""
    try:
        media = rows.media(row, clip.video.path)
        if probe_media(media).fps > 0:
            return "span_outside_video", clip.id
        problem = "it tells no frame rate"
    except ValueError as error:
        problem = (
            str(error)
            .removeprefix(f"{rows.place(row)}: ")
            .removeprefix(f"{rows.path.parent / clip.video.path}: ")
        )
    return "video_unreadable", f"{clip.id} ({problem})"


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
    kept = clip.subjects[: selection.max_references]
    left = sum(len(subject.refs) for subject in clip.subjects[len(kept) :])
    subjects = []
    for subject in kept:
        # A limit for cross pairs is one for a choice of equals, which must not take the last picture away.
        most = len(subject.refs) if selection.max_cross is None else max(1, selection.max_cross)
        left += len(subject.refs[most:])
        subjects.append(replace(subject, refs=subject.refs[:most]))
    report.drop("references", "too_many", clip.id, left)
    return tuple(subjects)


def _nothing_fits(source: Path, options: DraftOptions) -> str:
    """The error of a conversion that kept no clip: the most frequent reason, and what to do about it."""
    report = options.report
    if source.is_dir() and not report.dropped["clips"]:
        return f"{source}: found no video; known are {', '.join(sorted(VIDEO_SUFFIXES))}"
    lines = [no_clips_message(source, report)]
    remedies = {
        "no_prompt_file": f"write the prompt of clip.mp4 into clip{options.prompt_suffix} beside it",
        "no_reference": "call the pictures of clip.mp4 clip.ref1.png, clip.ref2.png",
        "outside_folder": f"paths in a manifest are relative to its folder, {options.root}: write it above the clips",
    }
    lines += [remedy for reason, remedy in remedies.items() if reason in report.dropped["clips"]]
    if report.dropped["references"]:
        name, number = max(report.dropped["references"].items(), key=lambda item: item[1])
        lines.append(f"references: {number} x {name}, such as {report.examples['references'][name][0]}")
    return "; ".join(lines)
