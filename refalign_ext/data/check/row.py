"""One row tried as training would: its files are there, decode and fit to what the row says of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refalign_ext.data.boxes import BoxProblem, box_in_frame
from refalign_ext.data.clip_index import probe_media
from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.crop import CropError, FrameMemory, mask_in_frame, read_reference
from refalign_ext.data.length import Length
from refalign_ext.data.schema import Clip, Reference, Target, VideoSpan
from refalign_ext.data.spans import steady_range
from refalign_ext.data.worker_pool import RowCrashedWorker, begin_row

if TYPE_CHECKING:
    from PIL import Image

    from refalign_ext.data.video_file import VideoInfo

_RATE_TOLERANCE = 0.005  # 23.976 and 24, 29.97 and 30 are each other's rounding
_WHITE = 250  # JPEG's white is not always 255
_FLAT = 3  # levels between the darkest and the lightest pixel of what has one colour
_SMALL = 32  # pixels: what is smaller is a blur at any training size
_DECODED_AT_ONCE = 64  # frames
_THUMBNAIL = (16, 16)
_MAX_FINDINGS = 100  # of one row
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


def check_row(
    clip_set: ClipSet, row: int, decode: str = "ends", length: Length | None = None
) -> tuple[list[Finding], str | None]:
    """What is wrong with row `row` (from 0), and its id if it can be read; nothing is raised.

    Args:
        decode: "ends", "all" or "none".
        length: the training clip that videos have to be long enough for.
    """
    place = f"{clip_set.place(row)}: "
    try:
        clip = clip_set[row]
    except (ValueError, OSError) as error:
        return [_unreadable(row, str(error).removeprefix(place))], None
    checked = RowCheck(clip_set, row, clip, decode, length)
    try:
        begin_row(row)
        checked.check()
    except RowCrashedWorker as error:
        checked.add("error", "killed_process", "", str(error))
    except Exception as error:  # noqa: BLE001, a file that nobody thought of must not hide the other rows
        checked.add("error", "unexpected", "", f"{type(error).__name__}: {error}")
    return checked.findings[:_MAX_FINDINGS], clip.id


def _unreadable(row: int, message: str) -> Finding:
    """The finding of a row that is not valid: errors of the schema say `field: what`."""
    where, _, what = message.partition(": ")
    if _FIELD.fullmatch(where) or what.startswith("unknown key"):
        return Finding(row + 1, "error", "schema", where, what)
    is_text = message.startswith("not valid JSON")
    return Finding(row + 1, "error", "not_json" if is_text else "row_unreadable", "", message)


class RowCheck:
    """The row being checked and what was found so far."""

    def __init__(self, clip_set: ClipSet, row: int, clip: Clip, decode: str, length: Length | None) -> None:
        self.clip_set, self.row, self.clip, self.decode, self.length = clip_set, row, clip, decode, length
        self.findings: list[Finding] = []

    def add(self, level: str, reason: str, where: str, problem: object) -> None:
        message = str(problem).removeprefix(f"{self.clip_set.place(self.row)}: ")
        self.findings.append(Finding(self.row + 1, level, reason, where, message, self.clip.id))

    def check(self) -> None:
        self._check_video()
        frames = FrameMemory()
        for number, subject in enumerate(self.clip.subjects):
            for index, reference in enumerate(subject.refs):
                where = f"subjects[{number}].refs[{index}]"
                if self.decode == "none":
                    self._check_reference_undecoded(where, reference)
                else:
                    self._check_reference(
                        where, reference, frames, is_background=subject.kind == "background"
                    )

    def _check_video(self) -> None:
        span = self.clip.video
        info = self._open("video.path", span.path)
        size = (info.width, info.height) if info else span.size
        if size is not None and _is_crop_beyond(span, size):
            problem = f"crop {list(span.crop_xyxy)} does not lie in the frame of {size[0]}x{size[1]} pixels"
            self.add("error", BoxProblem.CROP_BEYOND_FRAME.value, "video.crop_xyxy", problem)
            size = None
        targets = list(self._targets())
        if size is not None:
            for where, target in targets:
                self._check_region(where, target, size, span)
        if info is None:
            return
        for oddity in info.oddities:
            self.add("warning", "video_odd", "video", f"{span.path}: {oddity}")
        self._compare("video", span, info, depends=bool(targets) or span.crop_xyxy is not None)
        try:
            frames = range(*steady_range(span, info.fps, info.frames))
        except ValueError as error:
            self.add("error", "span_beyond_file", f"video.{_end_key(span)}", error)
            return
        if span.end_frame is not None and span.end_frame > frames.stop:
            problem = f"the span ends at frame {span.end_frame}, {span.path} has {info.frames}"
            self.add("warning", "span_beyond_file", "video.end_frame", problem)
        if self.length is not None and not self.length.fits(len(frames), info.fps):
            possible = self.length.possible(len(frames), info.fps)
            problem = f"{len(frames)} frames at {info.fps:g} fps are {possible} of the {self.length} needed"
            self.add("error", "too_short", "video", problem)
        self._decode(frames)

    def _targets(self) -> Iterator[tuple[str, Target]]:
        for number, subject in enumerate(self.clip.subjects):
            if subject.target is not None:
                yield f"subjects[{number}].target", subject.target

    def _open(self, where: str, name: str) -> VideoInfo | None:
        """What a video file says of itself; None if it is missing or broken, which is noted, or not to be opened."""
        try:
            media = self.clip_set.media(self.row, name)
        except ValueError as error:
            self.add("error", "file_missing", where, error)
            return None
        try:
            return None if self.decode == "none" else probe_media(media)
        except ValueError as error:
            self.add("error", "unreadable", where, error)
            return None

    def _compare(self, where: str, span: VideoSpan, info: VideoInfo, *, depends: bool) -> None:
        """Size and rate that the row gives against the file's; `depends`: boxes or crops go by the size."""
        if span.size not in (None, (info.width, info.height)):
            given = "x".join(map(str, span.size))
            problem = f"the row says {given} pixels, frames of {span.path} have {info.width}x{info.height}"
            self.add("error" if depends else "warning", "size_differs", f"{where}.width", problem)
        if span.fps and info.fps and abs(span.fps / info.fps - 1) > _RATE_TOLERANCE:
            problem = f"the row says {span.fps:g} frames per second, {span.path} has {info.fps:g}"
            self.add("warning", "fps_differs", f"{where}.fps", problem)

    def _decode(self, frames: range) -> None:
        """Decodes what `decode` asks for of the clip, whose frames of the file are `frames`."""
        from refalign_ext.data.decoding import read_clip, read_frame

        span = self.clip.video
        media = self.clip_set.media(self.row, span.path)
        if self.decode == "all":
            for start in frames[::_DECODED_AT_ONCE]:
                end = min(start + _DECODED_AT_ONCE, frames.stop)
                try:
                    read_clip(media, end - start, _THUMBNAIL, span=VideoSpan(span.path, start, end))
                except ValueError as error:
                    self.add("error", "unreadable", "video", f"frames [{start}, {end}): {error}")
                    return
        # Only the file's own times tell what exactly the frames at the ends of a span in seconds are.
        wanted: dict[tuple[int | None, float | None], str] = {(None, 0.0): "video", (None, _LAST): "video"}
        for where, target in self._targets():
            wanted.setdefault((target.frame, target.frame_frac), f"{where}.frame")
        for (frame, share), where in wanted.items():
            try:
                read_frame(media, frame=frame, frame_share=share, span=span)
            except ValueError as error:
                self.add("error", "unreadable", where, error)

    def _check_region(
        self, where: str, region: Target | Reference, size: tuple[int, int], video: VideoSpan
    ) -> None:
        """The box and mask of a target or reference in frames of `size` (width, height)."""
        if region.bbox_xyxy is not None:
            box = box_in_frame(region.bbox_xyxy, region.box_space, size, video.crop_xyxy, video.size)
            if isinstance(box, BoxProblem):
                problem = (
                    f"box {list(region.bbox_xyxy)} ({region.box_space}) does not fit into the frame of "
                    f"{size[0]}x{size[1]} pixels"
                )
                self.add("error", box.value, f"{where}.bbox_xyxy", problem)
        if region.mask_rle is None:
            return
        try:
            if not mask_in_frame(region, size, video.crop_xyxy).any():
                self.add("error", "mask_empty", f"{where}.mask_rle", "the mask is empty")
        except CropError as error:
            self.add("error", error.reason, f"{where}.mask_rle", error)

    def _check_reference_undecoded(self, where: str, reference: Reference) -> None:
        span = reference.video
        if span is None:
            self._open(f"{where}.image", reference.image)
            return
        self._open(f"{where}.video.path", span.path)
        if span.size is not None and not _is_crop_beyond(span, span.size):
            self._check_region(where, reference, span.size, span)

    def _check_reference(
        self, where: str, reference: Reference, frames: FrameMemory, *, is_background: bool
    ) -> None:
        span = reference.video
        if span is not None:
            info = self._open(f"{where}.video.path", span.path)
            if info is None:
                return
            self._compare(f"{where}.video", span, info, depends=reference.box_space is not None)
        try:
            picture = read_reference(self.clip_set, self.row, reference, frames)
        except CropError as error:
            self.add("error", error.reason, f"{where}.{_key_of(error.reason, reference)}", error)
        else:
            self._check_picture(where, picture, is_background)

    def _check_picture(self, where: str, picture: Image.Image, is_background: bool) -> None:
        extremes = picture.getextrema()
        size = f"{picture.width}x{picture.height} pixels"
        if all(darkest >= _WHITE for darkest, _ in extremes):
            self.add("error", "reference_empty", where, f"the reference ({size}) is all white")
        elif not is_background and all(lightest - darkest < _FLAT for darkest, lightest in extremes):
            self.add("warning", "reference_flat", where, f"the reference ({size}) is of one colour")
        elif min(picture.size) < _SMALL:
            self.add("warning", "reference_small", where, f"the reference has only {size}")


def _is_crop_beyond(span: VideoSpan, size: tuple[int, int]) -> bool:
    crop = span.crop_xyxy
    return crop is not None and (crop[2] > size[0] or crop[3] > size[1])


def _end_key(span: VideoSpan) -> str:
    keys = ("end_frame", "end_s", "start_frame", "start_s")
    return next((key for key in keys if getattr(span, key) is not None), "path")


def _key_of(reason: str, reference: Reference) -> str:
    """The key of a reference that the reason of a `CropError` is about."""
    if reason == BoxProblem.CROP_BEYOND_FRAME.value:
        return "video.crop_xyxy"
    for prefix, key in (("box_", "bbox_xyxy"), ("mask_", "mask_rle")):
        if reason.startswith(prefix):
            return key
    return "image" if reference.video is None else "video.path"
