"""One row of a clip set with every reference cut: what is left of it, and what was dropped for which reason."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath

from PIL import Image

from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.manifest_file import MAX_ROW_BYTES
from refalign_ext.data.materialise.reference import CutError, FrameMemory, read_reference
from refalign_ext.data.media_source import Media
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan, parse_line, to_dict

Position = tuple[int, int]  # of a reference: subject in the clip, reference in the subject


@dataclass(frozen=True)
class CutRow:
    """A row whose files are all there.

    Attributes:
        row: its number in the clip set, from 0.
        clip: as it is in the clip set.
        video: its file.
        pictures: for every reference that can be used a PNG (bytes), or the file that it already is.
    """

    row: int
    clip: Clip
    video: Media
    pictures: Mapping[Position, bytes | Media]

    def image_name(self, subject: int, reference: int) -> str:
        """The name of a reference's file in the clip set, if it is a file."""
        return self.clip.subjects[subject].refs[reference].image or ""


def cut_row(clip_set: ClipSet, row: int, report: ConversionReport) -> CutRow | None:
    """Cuts the references of a row; None if it cannot be used. What is dropped is counted in the report."""
    try:
        clip = clip_set[row]
    except ValueError as error:
        report.drop("clips", "invalid_row", str(error))
        return None
    count = sum(len(subject.refs) for subject in clip.subjects)
    try:
        video = clip_set.media(row, clip.video.path)
    except ValueError as error:
        report.drop("clips", "video_missing", str(error))
        report.drop("references", "clip_dropped", str(error), count)
        return None
    pictures: dict[Position, bytes | Media] = {}
    frames = FrameMemory()
    for i, subject in enumerate(clip.subjects):
        for j, reference in enumerate(subject.refs):
            try:
                pictures[i, j] = _picture(clip_set, row, reference, frames)
            except CutError as error:
                report.drop("references", error.reason, f"{error} (clip {clip.id})")
    if not pictures:
        report.drop("clips", "no_references", f"{clip_set.place(row)} (clip {clip.id})")
        return None
    return CutRow(row, clip, video, pictures)


def with_files(clip: Clip, video: VideoSpan, images: Mapping[Position, str], frames_before: int = 0) -> Clip:
    """The clip with `video` as its own and its references as whole picture files; those without one are left out.

    Args:
        images: the file of each reference that is kept.
        frames_before: how many frames less the new video has in front of the span.
    """
    subjects = []
    for i, subject in enumerate(clip.subjects):
        refs = tuple(
            Reference(
                pair=reference.pair,
                image=images[i, j],
                bg=reference.bg or ("white" if reference.mask_rle else None),
                scores=reference.scores,
                source_id=reference.source_id,
                source_group=reference.source_group,
            )
            for j, reference in enumerate(subject.refs)
            if (i, j) in images
        )
        if refs:
            subjects.append(_shifted(replace(subject, refs=refs), frames_before))
    return replace(clip, video=video, subjects=tuple(subjects))


def usable_rows(clip_set: ClipSet, rows: range, report: ConversionReport) -> Iterator[CutRow]:
    """Cuts row after row; what is dropped is counted in the report."""
    for row in rows:
        cut = cut_row(clip_set, row, report)
        if cut is not None:
            yield cut


def finished_line(clip_set: ClipSet, cut: CutRow, clip: Clip, report: ConversionReport) -> bytes | None:
    """The line of a row's new clip, counted as kept; None, counted as dropped, if it is too long to be read again."""
    line = json.dumps(to_dict(clip), ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    place = clip_set.place(cut.row)
    if len(line) > MAX_ROW_BYTES:
        message = f"{place}: {len(line)} bytes; a row has at most {MAX_ROW_BYTES}"
        drop_row(report, cut, "row_too_long", message)
        return None
    parse_line(line, place)
    report.keep("clips")
    report.keep("references", len(cut.pictures))
    return line


def drop_row(report: ConversionReport, cut: CutRow, reason: str, message: str) -> None:
    """Counts a row that cannot be used after all, with its references."""
    report.drop("clips", reason, message)
    report.drop("references", "clip_dropped", message, len(cut.pictures))


def suffix(name: str) -> str:
    """The ending of a file's name in small letters, if it is a plain one."""
    ending = PurePath(name).suffix.lower()
    return ending if re.fullmatch(r"\.[a-z0-9]{1,8}", ending) else ".bin"


def _shifted(subject: Subject, frames_before: int) -> Subject:
    target = subject.target
    if target is None or target.frame is None:
        return subject
    return replace(subject, target=replace(target, frame=target.frame - frames_before))


def _picture(clip_set: ClipSet, row: int, reference: Reference, frames: FrameMemory) -> bytes | Media:
    image = read_reference(clip_set, row, reference, frames)
    if reference.image and reference.bbox_xyxy is None and reference.mask_rle is None:
        return clip_set.media(row, reference.image)
    return _png(image)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
