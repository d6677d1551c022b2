"""The rows of a clip set with every reference cropped: what is left of them, and what was dropped for which reason."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import ClassVar

from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.crop import CropError, FrameMemory, read_reference
from refalign_ext.data.manifest_file import MAX_ROW_BYTES
from refalign_ext.data.media_source import Media, MediaBytes
from refalign_ext.data.pieces import PieceJob
from refalign_ext.data.schema import Clip, Reference, VideoSpan, parse_line, to_dict
from refalign_ext.data.worker_pool import RowCrashedWorker, begin_row

Position = tuple[int, int]  # of a reference: subject in the clip, reference in the subject
_FORMAT = 2


class RowDropped(ValueError):
    """Why a row cannot be used; `reason` is a word to count it under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class CroppedRow:
    """A row whose files are all there.

    Attributes:
        row: its number in the clip set, from 0.
        clip: as it is in the clip set.
        video: its file.
        pictures: (file extension, file) of every reference that can be used; crops are in memory.
    """

    row: int
    clip: Clip
    video: Media
    pictures: Mapping[Position, tuple[str, Media]]


@dataclass(frozen=True)
class MaterialiseJob(PieceJob):
    """Crops the references of the rows of `clip_set` and writes them into the folder `out`, which is resolved.

    Pieces that are finished lie in `<out>/.work`; the header of each has its report.
    """

    clip_set: ClipSet
    out: Path
    is_packed: ClassVar[bool]
    result: ClassVar[str]  # the file that is written last

    @property
    def parts(self) -> Path:
        """Where files lie until they are complete."""
        return self.folder / "parts"

    @abstractmethod
    def join(self) -> None:
        """Makes one clip set of all pieces, in order."""

    def key(self, rows: range) -> str:
        """A digest of all that a piece is made from, except the contents of videos and pictures."""
        source = os.path.relpath(self.clip_set.path.resolve(), self.out)
        settings = [_FORMAT, self.is_packed, self.piece_rows, rows.start, source]
        digest = hashlib.sha256(json.dumps(settings).encode("utf-8"))
        for row in rows:
            try:
                line = self.clip_set.line(row)
            except ValueError as error:
                line = str(error).encode("utf-8", "replace")
            digest.update(hashlib.sha256(line).digest())
        return digest.hexdigest()

    def lines_of(
        self, rows: range, report: ConversionReport, write: Callable[[CroppedRow], bytes]
    ) -> Iterator[bytes]:
        """The line that `write` makes of each row; what cannot be used is counted in the report."""
        for row in rows:
            try:
                clip = self.clip_set[row]
            except ValueError as error:
                report.drop("clips", "invalid_row", str(error))
                continue
            before = report.total("references")
            try:
                cropped = self._crop(row, clip, report)
                line = write(cropped)
            except RowDropped as error:
                message = f"{error} (clip {clip.id})"
                left = (
                    sum(len(subject.refs) for subject in clip.subjects) + before - report.total("references")
                )
                report.drop("clips", error.reason, message)
                report.drop("references", "clip_dropped", message, left)
                continue
            report.keep("clips")
            report.keep("references", len(cropped.pictures))
            yield line

    def _crop(self, row: int, clip: Clip, report: ConversionReport) -> CroppedRow:
        place = self.clip_set.place(row)
        try:
            begin_row(row)
            video = self.clip_set.media(row, clip.video.path)
        except RowCrashedWorker as error:
            raise RowDropped("killed_process", f"{place}: {error}") from None
        except ValueError as error:
            raise RowDropped("video_missing", str(error)) from None
        pictures: dict[Position, tuple[str, Media]] = {}
        frames = FrameMemory()
        for i, subject in enumerate(clip.subjects):
            for j, reference in enumerate(subject.refs):
                try:
                    image = read_reference(self.clip_set, row, reference, frames)
                except CropError as error:
                    report.drop("references", error.reason, f"{error} (clip {clip.id})")
                    continue
                if reference.image and reference.bbox_xyxy is None and reference.mask_rle is None:
                    media = self.clip_set.media(row, reference.image)
                    pictures[i, j] = extension(reference.image), media
                else:
                    file = io.BytesIO()
                    image.save(file, "PNG")
                    pictures[i, j] = ".png", MediaBytes(place, file.getvalue())
        if not pictures:
            raise RowDropped("no_references", place)
        return CroppedRow(row, clip, video, pictures)

    def line(
        self, cropped: CroppedRow, video: VideoSpan, images: Mapping[Position, str], frames_before: int = 0
    ) -> bytes:
        """The line of a row's new clip.

        Args:
            video: the clip's own; images: the file of each reference that is kept.
            frames_before: how many frames less the new video has in front of the span.

        Raises:
            RowDropped: if it is too long to be read again.
        """
        clip, place = (
            _with_files(cropped.clip, video, images, frames_before),
            self.clip_set.place(cropped.row),
        )
        line = json.dumps(to_dict(clip), ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
        if len(line) > MAX_ROW_BYTES:
            raise RowDropped("row_too_long", f"{place}: {len(line)} bytes; a row has at most {MAX_ROW_BYTES}")
        parse_line(line, place)
        return line


def extension(name: str) -> str:
    """The ending of a file's name in small letters, if it is a plain one."""
    ending = PurePath(name).suffix.lower()
    return ending if re.fullmatch(r"\.[a-z0-9]{1,8}", ending) else ".bin"


def _with_files(clip: Clip, video: VideoSpan, images: Mapping[Position, str], frames_before: int) -> Clip:
    """The clip with `video` as its own and its references as whole picture files; those without one are left out."""
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
        target = subject.target
        if target is not None and target.frame is not None:
            target = replace(target, frame=target.frame - frames_before)
        if refs:
            subjects.append(replace(subject, refs=refs, target=target))
    return replace(clip, video=video, subjects=tuple(subjects))
