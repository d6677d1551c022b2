"""One row tried as training would: its files are there, decode and fit to what the row says of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refalign_ext.data.boxes import BoxProblem, box_in_frame
from refalign_ext.data.clip_index import probe_media
from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.crop import (
    CropError,
    FrameMemory,
    mask_in_frame,
    read_reference,
)
from refalign_ext.data.length import Length
from refalign_ext.data.schema import Clip, Reference, Target, VideoSpan
from refalign_ext.data.spans import steady_range
from refalign_ext.data.worker_pool import RowCrashedWorker, begin_row

if TYPE_CHECKING:
    from PIL import Image

    from refalign_ext.data.video_file import VideoInfo

DECODE_MODES = ("ends", "all", "none")
_RATE_TOLERANCE = 0.005  # 23.976 and 24, 29.97 and 30 are each other's rounding
_WHITE = 250  # JPEG's white is not always 255
_FLAT = 3  # levels between the darkest and the lightest pixel of what has one colour
_SMALL = 32  # pixels: what is smaller is a blur at any training size
_PIECE = 64  # frames decoded at a time
_MAX_FINDINGS = 100  # of one row
_MAX_TARGET_FRAMES = 16
_THUMBNAIL = (16, 16)
_LAST = 1 - 2**-40  # the share of the last frame
_FIELD = re.compile(r"[A-Za-z_]\w*(\[\d+\])?(\.[A-Za-z_]\w*(\[\d+\])?)*")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        row: from 1; 0 if it is about no row.
        level: "error" (training would skip the row, or learn something wrong from it) or "warning".
        reason: a word to count it under; field: where in the row.
        message: what is wrong, without row and field; id: the row's, if it could be read.
    """

    row: int
    level: str
    reason: str
    field: str
    message: str
    id: str | None = None


@dataclass(frozen=True)
class RowSettings:
    """`decode`: one of `DECODE_MODES`; `length`: the training clip that videos have to be long enough for."""

    decode: str = "ends"
    length: Length | None = None


def check_row(clip_set: ClipSet, row: int, settings: RowSettings) -> tuple[list[Finding], str | None]:
    """What is wrong with row `row` (from 0), and its id if it can be read; nothing is raised."""
    place = clip_set.place(row)
    try:
        clip = clip_set[row]
    except (ValueError, OSError) as error:
        return [_unreadable(row, place, str(error))], None
    except Exception as error:  # noqa: BLE001, a row that nobody thought of must not hide the others
        return [Finding(row + 1, "error", "unexpected", "", f"{type(error).__name__}: {error}")], None
    tried = RowCheck(clip_set, row, clip, settings)
    try:
        begin_row(row)
        tried.check()
    except RowCrashedWorker as error:
        tried.error("killed_process", "", str(error))
    except Exception as error:  # noqa: BLE001, nor a file
        tried.error("unexpected", "", f"{type(error).__name__}: {error}")
    return tried.findings[:_MAX_FINDINGS], clip.id


def _unreadable(row: int, place: str, message: str) -> Finding:
    """The finding of a row that is not valid: errors of the schema say `place: field: what`."""
    message = message.removeprefix(f"{place}: ")
    where, separator, rest = message.partition(": ")
    if separator and (_FIELD.fullmatch(where) or rest.startswith("unknown key")):
        return Finding(row + 1, "error", "schema", where, rest)
    is_text = message.startswith(("not valid JSON", "not UTF-8"))
    return Finding(row + 1, "error", "not_json" if is_text else "row_unreadable", "", message)


class RowCheck:
    """The row being checked and what was found so far."""

    def __init__(self, clip_set: ClipSet, row: int, clip: Clip, settings: RowSettings) -> None:
        self.clip_set, self.row, self.clip, self.settings = clip_set, row, clip, settings
        self.place = clip_set.place(row)
        self.findings: list[Finding] = []
        self.probed: dict[str, VideoInfo] = {}
        self.frames = FrameMemory()

    def error(self, reason: str, where: str, message: str) -> None:
        self._add("error", reason, where, message)

    def warn(self, reason: str, where: str, message: str) -> None:
        self._add("warning", reason, where, message)

    def _add(self, level: str, reason: str, where: str, message: str) -> None:
        message = message.removeprefix(f"{self.place}: ")
        self.findings.append(Finding(self.row + 1, level, reason, where, message, self.clip.id))

    def check(self) -> None:
        self._check_video()
        for number, subject in enumerate(self.clip.subjects):
            for index, reference in enumerate(subject.refs):
                self._check_reference(f"subjects[{number}].refs[{index}]", reference, subject.kind)

    @property
    def decodes(self) -> bool:
        return self.settings.decode != "none"

    # The clip's own video

    def _check_video(self) -> None:
        span = self.clip.video
        info = self._probe("video.path", span.path)
        size = (info.width, info.height) if info else span.size
        if size is not None and _has_crop_beyond(span, size):
            self.error(
                BoxProblem.CROP_BEYOND_FRAME.value,
                "video.crop_xyxy",
                f"crop {list(span.crop_xyxy)} does not lie in the frame of {size[0]}x{size[1]} pixels",
            )
            size = None
        if size is not None:
            for number, subject in enumerate(self.clip.subjects):
                if subject.target is not None:
                    self._check_target(f"subjects[{number}].target", subject.target, size)
        if info is None:
            return
        targets = any(subject.target is not None for subject in self.clip.subjects)
        self._compare("video", span, info, depends=targets or span.crop_xyxy is not None)
        frames = self._span("video", span, info)
        if frames is None:
            return
        length = self.settings.length
        if length is not None and (possible := length.possible(len(frames), info.fps)) < length.frames:
            message = f"{len(frames)} frames at {info.fps:g} fps are {possible} of the {length} needed"
            self.error("too_short", "video", message)
        self._decode(frames)

    def _probe(self, where: str, name: str) -> VideoInfo | None:
        """What a video file says of itself; None if it is missing or broken, which is noted, or not to be opened."""
        if name in self.probed:
            return self.probed[name]
        try:
            media = self.clip_set.media(self.row, name)
        except ValueError as error:
            self.error("file_missing", where, str(error))
            return None
        if not self.decodes:
            return None
        try:
            self.probed[name] = probe_media(media)
        except ValueError as error:
            self.error("unreadable", where, str(error))
            return None
        return self.probed[name]

    def _compare(self, where: str, span: VideoSpan, info: VideoInfo, *, depends: bool) -> None:
        """The size and rate that a row tells of a file with those that it has."""
        recorded = span.size
        if recorded is not None and recorded != (info.width, info.height):
            message = (
                f"the row says {recorded[0]}x{recorded[1]} pixels, frames of {span.path} are shown at "
                f"{info.width}x{info.height}"
            )
            if depends:
                self.error("size_differs", f"{where}.width", f"{message}, and boxes depend on it")
            else:
                self.warn("size_differs", f"{where}.width", message)
        if span.fps and info.fps and abs(span.fps / info.fps - 1) > _RATE_TOLERANCE:
            message = f"the row says {span.fps:g} frames per second, {span.path} has {info.fps:g}"
            self.warn("fps_differs", f"{where}.fps", message)

    def _span(self, where: str, span: VideoSpan, info: VideoInfo) -> range | None:
        """The frames of the file that a span means; None, noted, if the file does not have them."""
        if span.start_s is None and span.end_s is None:
            key = "start_frame" if span.end_frame is None else "end_frame"
            end = info.frames if span.end_frame is None else span.end_frame
            asked = f"frames [{span.start_frame or 0}, {end})"
        else:
            key = "start_s" if span.end_s is None else "end_s"
            asked = f"seconds [{span.start_s or 0:g}, {'end' if span.end_s is None else f'{span.end_s:g}'})"
        message = f"{asked} are asked for, {span.path} has {info.frames} frames ({info.duration_s:.2f} s)"
        try:
            frames = range(*steady_range(span, info.fps, info.frames))
        except ValueError:
            self.error("span_beyond_file", f"{where}.{key}", message)
            return None
        if span.end_frame is not None and span.end_frame > info.frames:
            self.warn("span_beyond_file", f"{where}.{key}", message)
        return frames

    def _decode(self, frames: range) -> None:
        """Decodes what the settings ask for; `frames` of the file are those of the clip."""
        from refalign_ext.data.decoding import read_clip, read_frame

        span = self.clip.video
        media = self.clip_set.media(self.row, span.path)
        if self.settings.decode == "all":
            for start in range(frames.start, frames.stop, _PIECE):
                end = min(start + _PIECE, frames.stop)
                try:
                    read_clip(media, end - start, _THUMBNAIL, span=VideoSpan(span.path, start, end))
                except ValueError as error:
                    self.error("unreadable", "video", f"frames [{start}, {end}): {error}")
                    return
        # Only the file's own times tell what exactly the frames at the ends of a span in seconds are.
        wanted: dict[tuple[int | None, float | None], str] = {(None, 0.0): "video", (None, _LAST): "video"}
        for number, subject in enumerate(self.clip.subjects[:_MAX_TARGET_FRAMES]):
            if (target := subject.target) is not None:
                wanted.setdefault((target.frame, target.frame_frac), f"subjects[{number}].target.frame")
        for (frame, share), where in wanted.items():
            if frame is not None and frame >= len(frames) + frames.start:
                message = (
                    f"frame {frame} is not one of the frames [{frames.start}, {frames.stop}) of the clip"
                )
                self.error("target_beyond_file", where, message)
                continue
            try:
                read_frame(media, frame=frame, frame_share=share, span=span)
            except ValueError as error:
                self.error("unreadable", where, str(error))

    # Boxes and masks

    def _check_target(self, where: str, target: Target, size: tuple[int, int]) -> None:
        self._check_region(where, target, size, self.clip.video.crop_xyxy)

    def _check_region(
        self,
        where: str,
        region: Target | Reference,
        size: tuple[int, int],
        crop: tuple[int, int, int, int] | None,
    ) -> None:
        if region.bbox_xyxy is not None:
            span = self.clip.video if isinstance(region, Target) else region.video
            declared = None if span is None else span.size
            box = box_in_frame(region.bbox_xyxy, region.box_space, size, crop, declared)
            if isinstance(box, BoxProblem):
                message = (
                    f"box {list(region.bbox_xyxy)} ({region.box_space}) does not fit into the frame of "
                    f"{size[0]}x{size[1]} pixels"
                )
                self.error(box.value, f"{where}.bbox_xyxy", message)
        if region.mask_rle is None:
            return
        try:
            inside = mask_in_frame(region, size, crop)
        except CropError as error:
            self.error(error.reason, f"{where}.mask_rle", str(error))
            return
        if not inside.any():
            self.error("mask_empty", f"{where}.mask_rle", "the mask is empty")

    # References

    def _check_reference(self, where: str, reference: Reference, kind: str) -> None:
        span = reference.video
        if not self.decodes:
            self._check_undecoded(where, reference)
            return
        if span is not None:
            info = self._probe(f"{where}.video.path", span.path)
            if info is None:
                return
            self._compare(f"{where}.video", span, info, depends=reference.box_space is not None)
        try:
            picture = read_reference(self.clip_set, self.row, reference, self.frames)
        except CropError as error:
            self.error(error.reason, f"{where}.{_field_of(error.reason, reference)}", str(error))
        except ValueError as error:
            self.error("unreadable", where, str(error))
        else:
            self._check_picture(where, picture, kind)

    def _check_undecoded(self, where: str, reference: Reference) -> None:
        span = reference.video
        name, key = (reference.image, "image") if span is None else (span.path, "video.path")
        try:
            self.clip_set.media(self.row, name)
        except ValueError as error:
            self.error("file_missing", f"{where}.{key}", str(error))
        size = None if span is None else span.size
        if size is not None and not _has_crop_beyond(span, size):
            self._check_region(where, reference, size, span.crop_xyxy)

    def _check_picture(self, where: str, picture: Image.Image, kind: str) -> None:
        extremes = picture.getextrema()
        size = f"{picture.width}x{picture.height} pixels"
        if all(darkest >= _WHITE for darkest, _ in extremes):
            self.error("reference_empty", where, f"the reference ({size}) is all white")
        elif kind != "background" and all(lightest - darkest < _FLAT for darkest, lightest in extremes):
            colour = tuple(darkest for darkest, _ in extremes)
            self.warn("reference_flat", where, f"the reference ({size}) is of one colour, {colour}")
        elif min(picture.size) < _SMALL:
            self.warn("reference_small", where, f"the reference has only {size}")


def _has_crop_beyond(span: VideoSpan, size: tuple[int, int]) -> bool:
    crop = span.crop_xyxy
    return crop is not None and (crop[2] > size[0] or crop[3] > size[1])


def _field_of(reason: str, reference: Reference) -> str:
    """The key of a reference that a reason is about."""
    if reason == BoxProblem.CROP_BEYOND_FRAME.value:
        return "video.crop_xyxy"
    if reason.startswith("box_"):
        return "bbox_xyxy"
    if reason.startswith("mask_"):
        return "mask_rle"
    return "image" if reference.video is None else "video.path"
