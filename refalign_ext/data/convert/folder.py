"""A folder of clips, or a table that names them, as a manifest."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from refalign_ext.data.conversion_report import Report, report_path
from refalign_ext.data.convert.folder_files import Found, clips_in_folder
from refalign_ext.data.convert.folder_probe import Probed, ProbedVideos
from refalign_ext.data.convert.folder_table import TableOptions, clips_in_table
from refalign_ext.data.convert.places import inside, manifest_root, nothing_left
from refalign_ext.data.convert.selection import FOLDER_SELECTION, Selection
from refalign_ext.data.length import Length
from refalign_ext.data.manifest_file import ManifestReader, write_manifest
from refalign_ext.data.schema import Clip, VideoSpan

GROUPS = ("folder", "none")
FOLDER_PAIRS = ("cross", "regular")
_TABLES = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson")


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
) -> Report:
    """Writes the manifest `out` and `<out>.report.json` of a folder's clips, or of those that a table lists.

    How files have to be called says `folder_files`, what columns a table has `folder_table`. Videos are probed, so
    rows tell their size, rate and frames; the results lie in `<out>.probed`, and work that was killed goes on there.

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
    """
    from tqdm import tqdm

    root = _checked_root(source, out, media_root, columns, prompt_suffix, group, pair)
    report, found = Report(), Found()
    if source.is_dir():
        suffix = prompt_suffix.lower()
        drafts = clips_in_folder(source.resolve(), root, suffix, pair, group == "folder", report, found)
    else:
        base = (media_root or source.parent).resolve()
        drafts = clips_in_table(source, TableOptions(root, base, pair, group == "folder", columns), report)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=root) as scratch:
        # Millions of clips do not fit into memory while their videos are probed.
        draft = Path(scratch, "draft.jsonl")
        shown = tqdm(drafts, desc="looking for clips", unit="clip", dynamic_ncols=True, disable=None)
        if not write_manifest(draft, shown):
            raise ValueError(_nothing_fits(source, root, report, found, prompt_suffix))
        videos = ProbedVideos(out.with_name(out.name + ".probed"), root)
        try:
            with ManifestReader(draft) as rows:
                videos.add((clip.video.path for clip in rows), workers)
                clips = _finished(rows, videos, length, selection, report)
                first = next(clips, None)
                if first is None:
                    raise ValueError(_nothing_fits(source, root, report, found, prompt_suffix))
                write_manifest(out, chain([first], clips))
        finally:
            videos.close()
    report.write(report_path(out))
    return report


def _checked_root(
    source: Path,
    out: Path,
    media_root: Path | None,
    columns: Mapping[str, str] | None,
    prompt_suffix: str,
    group: str,
    pair: str,
) -> Path:
    if not source.exists():
        raise ValueError(f"{source}: no such folder or table")
    if source.is_file() and source.suffix.lower() not in _TABLES:
        raise ValueError(
            f"{source}: expected a folder or a table ({', '.join(_TABLES)}): save it as CSV or JSON lines"
        )
    if group not in GROUPS:
        raise ValueError(f"--group {group}: choose one of {', '.join(GROUPS)}")
    if pair not in FOLDER_PAIRS:
        raise ValueError(f"--pair {pair}: choose one of {', '.join(FOLDER_PAIRS)}")
    if source.is_dir() and (media_root or columns):
        flag = "--column" if columns else "--media_root"
        raise ValueError(f"{flag} is for tables, and {source} is a folder")
    if not prompt_suffix.startswith(".") or len(prompt_suffix) < 2:
        raise ValueError(f"--prompt_suffix {prompt_suffix!r}: give a suffix with its dot, such as .txt")
    root = manifest_root(out)
    if source.is_dir():
        inside(source, root, "SOURCE")
    if source.is_file() and source.resolve() == out.resolve():
        raise ValueError(f"{out} is the table itself: choose another name for the manifest")
    return root


def _finished(
    drafts: ManifestReader, videos: ProbedVideos, length: Length | None, selection: Selection, report: Report
) -> Iterator[Clip]:
    """The drafts whose videos can be used, with what was found in them."""
    for clip in drafts:
        video = videos.get(clip.video.path)
        if isinstance(video, str):
            report.drop("clips", "video_unreadable", f"{clip.id} ({video})")
            continue
        span = _span_in(clip.video, video, clip.meta.get("fps"))
        if isinstance(span, str):
            report.drop("clips", span, clip.id)
            continue
        frames = _frames(span, video)
        is_short = length is not None and not length.fits(frames, video.fps)
        if selection.clip_problem(frames, clip.scores) or is_short:
            report.drop("clips", "too_short", f"{clip.id} ({frames} frames at {video.fps:.3g} fps)")
            continue
        kept = clip.subjects[: selection.max_references]
        report.drop(
            "references", "too_many", clip.id, sum(len(item.refs) for item in clip.subjects[len(kept) :])
        )
        subjects = []
        for subject in kept:
            # A limit for cross pairs is one for a choice of equals, which must not take the last picture away.
            most = len(subject.refs) if selection.max_cross is None else max(1, selection.max_cross)
            report.drop("references", "too_many", clip.id, len(subject.refs[most:]))
            subjects.append(replace(subject, refs=subject.refs[:most]))
        report.keep("clips")
        report.keep("references", sum(len(subject.refs) for subject in subjects))
        yield replace(clip, video=span, subjects=tuple(subjects), meta={})


def _span_in(span: VideoSpan, video: Probed, counted_at: float | None) -> VideoSpan | str:
    """The part of the video with its properties, or why there is none."""
    known = {"fps": video.fps, "width": video.width, "height": video.height}
    if span.start_s is not None:
        # Ends are often rounded: a frame's time beyond the last one is still this end.
        end = video.duration_s if span.end_s is None else span.end_s
        if span.start_s >= video.duration_s or end > video.duration_s + 1 / video.fps:
            return "span_outside_video"
        return replace(span, end_s=min(end, video.duration_s), **known)
    if counted_at is not None and abs(counted_at / video.fps - 1) > 0.01:
        return "span_counted_at_another_fps"
    end = video.frames if span.end_frame is None else span.end_frame
    if (span.start_frame or 0) >= end or end > video.frames:
        return "span_outside_video"
    return replace(span, start_frame=span.start_frame or 0, end_frame=end, **known)


def _frames(span: VideoSpan, video: Probed) -> int:
    if span.start_s is not None:
        return round((span.end_s - span.start_s) * video.fps)
    return span.end_frame - span.start_frame


def _nothing_fits(source: Path, root: Path, report: Report, found: Found, prompt_suffix: str) -> str:
    hint = found.hint(prompt_suffix) if source.is_dir() else None
    if hint:
        return f"{source}: {hint}"
    lines = [nothing_left(source, report)]
    if "outside_folder" in report.dropped["clips"]:
        lines.append(f"paths in a manifest are relative to its folder, {root}: write it above the clips")
    elif report.dropped["references"]:
        name, number = max(report.dropped["references"].items(), key=lambda item: item[1])
        lines.append(f"references: {number} x {name}, such as {report.examples['references'][name][0]}")
    return "; ".join(lines)
