"""One entry of an OpenS2V-5M part, checked and brought into the manifest's terms, without its cross pairs.

An entry is `{"metadata", "word_tags", "annotation"}` (PKU-YuanGroup/OpenS2V-Nexus). Its traps: `crop` is [x0, x1, y0, y1];
`face_cut` is half-open and may exceed `num_frames`; subjects are numbered from 1 in `mask_map` and `mask_annotation` and
lie at that number less one in `annotations`; boxes and masks are in pixels of the cropped frame; scores are absent where a
mask is empty; one subject may occur under several names.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from refalign_ext.data.boxes import Box, BoxProblem, box_in_frame
from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.convert.selection import Selection, kind_of_class
from refalign_ext.data.masks import RunLengthMask, area, bounding_box, iou, parse_mask
from refalign_ext.data.schema import ClipScores, ReferenceScores, relative_path_problem

LONGEST_KEY = 240
_Number = Annotated[float, msgspec.Meta(gt=-1e9, lt=1e9)]  # more is damage; not NaN either
_Integer = Annotated[int, msgspec.Meta(gt=-(10**9), lt=10**9)]
_Texts = str | list[str] | None


class _Resolution(msgspec.Struct):
    width: _Integer
    height: _Integer


class _Metadata(msgspec.Struct):
    path: str
    num_frames: _Integer
    resolution: _Resolution
    fps: Annotated[float, msgspec.Meta(gt=0, lt=1e9)] | None = None
    crop: tuple[_Integer, _Integer, _Integer, _Integer] | None = None
    face_cut: tuple[_Integer, _Integer] | None = None
    cut: tuple[_Integer, _Integer] | None = None
    face_cap_qwen: _Texts = None
    cap: _Texts = None
    aesthetic: _Number | None = None
    motion: _Number | None = None
    tech: _Number | None = None

    @property
    def captions(self) -> list[str]:
        """All captions without empty ones, the better ones first."""
        groups = (
            [value] if isinstance(value, str) else value or [] for value in (self.face_cap_qwen, self.cap)
        )
        return [text.strip() for group in groups for text in group if text.strip()]


class _AnnotatedBox(msgspec.Struct):
    class_name: str
    bbox: tuple[_Number, _Number, _Number, _Number]
    gme_score: _Number | None = None
    aes_score: _Number | None = None


class _AnnotatedFrame(msgspec.Struct):
    ann_frame_idx: _Integer
    annotations: Annotated[list[Any], msgspec.Meta(max_length=256)]  # a broken one costs itself only
    box_format: Literal["xyxy"] = "xyxy"
    img_width: _Integer | None = None
    img_height: _Integer | None = None


class _Annotation(msgspec.Struct):
    ann_frame_data: _AnnotatedFrame
    mask_map: dict[str, Any]
    mask_annotation: dict[str, Any]


class _Entry(msgspec.Struct):
    metadata: _Metadata
    annotation: _Annotation
    word_tags: Any = None


class EntryError(ValueError):
    """Why an entry, or one subject of it, cannot be used: a reason to count under, and what is wrong."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class _AnnotatedSubject:
    """One annotated subject with a mask that is not empty."""

    number: int
    name: str
    box: Box
    mask: RunLengthMask
    mask_box: tuple[int, int, int, int]
    pixels: int  # of the mask
    scores: ReferenceScores
    unfit: str | None  # why it is no good as a reference


def read_entry(
    key: str, entry: object, selection: Selection, identity: str, report: ConversionReport
) -> dict[str, Any]:
    """What the second pass needs of an entry. Unusable subjects are counted as dropped, the others not yet.

    Args:
        identity: what names in the report start with, such as "total_part1/key".

    Returns:
        `{"reason": why the clip is dropped or None, "clip": a line of the manifest, None without anything to refer to,
        "unfit": {number: reason} of subjects that are no good as a reference, "names": {number: class name}, "aliases":
        {number of a duplicate: number of the subject it is}, "background": what the background is or None}`. The line
        names subjects by their numbers and has one regular reference of each; its paths are relative to the part's
        folder of videos.

    Raises:
        EntryError: if nothing can be made of the entry.
    """
    if relative_path_problem(key) or len(key) > LONGEST_KEY or not key.isprintable():
        raise EntryError("bad_entry", "its key cannot be part of a file name")
    native = _converted(entry, _Entry, "bad_entry")
    metadata, frame = native.metadata, native.annotation.ann_frame_data.ann_frame_idx
    video = _video(metadata)
    start, end = video["start_frame"], video["end_frame"]
    if not start <= frame < end:
        raise EntryError(
            "frame_outside_clip", f"ann_frame_idx {frame} lies outside of the clip [{start}, {end})"
        )
    captions = metadata.captions
    if not captions:
        raise EntryError("no_prompt", "neither face_cap_qwen nor cap says anything")
    annotated = _subjects(native.annotation, video["crop_xyxy"], selection, identity, report)
    distinct, aliases = _distinct(annotated, selection.max_mask_iou, identity, report)
    scores = ClipScores(metadata.aesthetic, metadata.motion, metadata.tech)
    reason = selection.clip_problem(end - start, scores)
    if not distinct:
        return {"reason": reason or "no_references", "clip": None}
    return {
        "reason": reason,
        "clip": {
            "source": "opens2v",
            "video": video,
            "prompt": captions[0],
            "prompt_alt": [text for text in dict.fromkeys(captions) if text != captions[0]],
            "scores": {"aesthetic": scores.aesthetic, "motion": scores.motion, "tech": scores.tech},
            "subjects": [_manifest_subject(subject, video, frame) for subject in distinct],
        },
        "unfit": {str(subject.number): subject.unfit for subject in distinct if subject.unfit},
        "names": {str(subject.number): subject.name for subject in annotated},
        "aliases": aliases,
        "background": _background_phrase(native.word_tags),
    }


def pack_record(record: dict[str, Any]) -> bytes:
    """A record of `read_entry` as it is staged; the fastest compression halves what masks take."""
    return zlib.compress(json.dumps(record, separators=(",", ":")).encode(), 1)


def unpack_record(data: bytes) -> dict[str, Any]:
    """The record that `pack_record` packed."""
    return json.loads(zlib.decompress(data))


def _converted(value: object, kind: type, reason: str) -> Any:
    try:
        return msgspec.convert(value, kind, strict=False)  # 81.0 is a whole number too
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # half a surrogate pair
        raise EntryError(reason, str(error)) from None


def _video(metadata: _Metadata) -> dict[str, Any]:
    if relative_path_problem(metadata.path):
        raise EntryError("bad_entry", "metadata.path is not a path relative to the part's videos")
    width, height, frames = metadata.resolution.width, metadata.resolution.height, metadata.num_frames
    x0, x1, y0, y1 = metadata.crop or (0, width, 0, height)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        what = f"crop [x0, x1, y0, y1] = {[x0, x1, y0, y1]} exceeds {width}x{height} pixels or is empty"
        raise EntryError("crop_beyond_frame", what)
    cut = metadata.face_cut or metadata.cut or (0, frames)
    start, end = max(cut[0], 0), min(cut[1], frames)
    if start >= end:
        raise EntryError("cut_empty", f"face_cut {list(cut)} has nothing in common with the {frames} frames")
    return {
        "path": metadata.path,
        "start_frame": start,
        "end_frame": end,
        "fps": metadata.fps,
        "width": width,
        "height": height,
        "crop_xyxy": [x0, y0, x1, y1],
    }


def _background_phrase(word_tags: Any) -> str | None:
    phrases = word_tags.get("background") if isinstance(word_tags, dict) else None
    texts = [text.strip() for text in phrases if isinstance(text, str)] if isinstance(phrases, list) else []
    return next(filter(None, texts), None)


def _subjects(
    annotation: _Annotation,
    crop: Sequence[int],
    selection: Selection,
    identity: str,
    report: ConversionReport,
) -> list[_AnnotatedSubject]:
    frame, size = annotation.ann_frame_data, (crop[2] - crop[0], crop[3] - crop[1])
    declared = (frame.img_width or size[0], frame.img_height or size[1])
    if declared != size:
        raise EntryError(
            "crop_differs", f"img_width and img_height {declared} are not the crop's size {size}"
        )
    masks = annotation.mask_annotation.get(str(frame.ann_frame_idx))
    masks = _converted({} if masks is None else masks, dict[str, Any], "bad_entry")
    subjects = []
    for number, box in enumerate(frame.annotations, 1):
        key = str(number)
        try:
            named = annotation.mask_map.get(key)
            subjects.append(_subject(number, box, named, masks.get(key), size, selection))
        except EntryError as error:
            report.drop("references", error.reason, f"{identity}, {number}: {error}")
    return subjects


def _subject(
    number: int, annotation: object, named: object, entry: object, size: tuple[int, int], selection: Selection
) -> _AnnotatedSubject:
    annotated = _converted(annotation, _AnnotatedBox, "bad_annotation")
    name = annotated.class_name
    if not name.strip():
        raise EntryError("bad_annotation", "class_name is empty")
    if not isinstance(named, dict) or entry is None:
        raise EntryError("mask_missing", f"{name!r} has no mask in the annotated frame")
    if named.get("class_name") != name:
        raise EntryError("class_mismatch", f"{name!r} in annotations, another name in mask_map")
    try:
        mask = parse_mask(entry)
    except ValueError as error:
        raise EntryError("mask_broken", str(error)) from None
    if mask.size != (size[1], size[0]):
        what = f"the mask has {mask.size[1]}x{mask.size[0]} pixels, the cropped frame {size[0]}x{size[1]}"
        raise EntryError("mask_size_differs", what)
    mask_box = bounding_box(mask)
    if mask_box is None:
        raise EntryError("mask_empty", f"the mask of {name!r} is empty")
    share = (mask_box[2] - mask_box[0]) * (mask_box[3] - mask_box[1]) / (size[0] * size[1])
    scores = ReferenceScores(gme=annotated.gme_score, aes=annotated.aes_score, area_ratio=round(share, 6))
    unfit = selection.reference_problem(scores)
    is_judged = selection.min_gme is not None or selection.min_aesthetic is not None
    if unfit is None and scores.gme is None and scores.aes is None and is_judged:
        unfit = "score_missing"
    box = _box(annotated.bbox, size, selection.overflow)
    return _AnnotatedSubject(number, name.strip(), box, mask, mask_box, area(mask), scores, unfit)


def _box(box: Box, size: tuple[int, int], overflow: str) -> Box:
    """A box in pixels of the cropped frame, within it."""
    x0, y0, x1, y1 = box
    if overflow == "clamp":
        x0, x1 = (min(max(side, 0), size[0]) for side in (x0, x1))
        y0, y1 = (min(max(side, 0), size[1]) for side in (y0, y1))
    inside = box_in_frame((x0, y0, x1, y1), "frame", size)
    if isinstance(inside, BoxProblem):
        raise EntryError(inside.value, f"bbox {list(box)} in a frame of {size[0]}x{size[1]} pixels")
    return inside


def _distinct(
    subjects: Sequence[_AnnotatedSubject], max_iou: float | None, identity: str, report: ConversionReport
) -> tuple[list[_AnnotatedSubject], dict[str, str]]:
    """Subjects without those whose mask is another's, and which subject each of these is.

    What is fit to be a reference goes before what is not, then the better text match, equal ones in their order.
    """
    if max_iou is None:
        return list(subjects), {}

    def rank(subject: _AnnotatedSubject) -> tuple[bool, float]:
        return subject.unfit is not None, float("inf") if subject.scores.gme is None else -subject.scores.gme

    kept: list[_AnnotatedSubject] = []
    aliases: dict[str, str] = {}
    for subject in sorted(subjects, key=rank):
        other = next((other for other in kept if _overlaps(subject, other, max_iou)), None)
        if other is None:
            kept.append(subject)
        else:
            aliases[str(subject.number)] = str(other.number)
            what = f"{identity}, {subject.number}: is {other.number}, {other.name!r}"
            report.drop("references", "mask_duplicate", what)
    return sorted(kept, key=lambda subject: subject.number), aliases


def _overlaps(first: _AnnotatedSubject, second: _AnnotatedSubject, least: float) -> bool:
    # Masks of very different areas need not be compared run by run.
    smaller, larger = sorted((first.pixels, second.pixels))
    return smaller >= least * larger and iou(first.mask, second.mask) >= least


def _manifest_subject(subject: _AnnotatedSubject, video: dict[str, Any], frame: int) -> dict[str, Any]:
    """A subject of the manifest with one reference, which is a part of the annotated frame."""
    mask, scores = subject.mask, subject.scores
    reference = {
        "pair": "regular",
        "video": {name: value for name, value in video.items() if name != "fps"},
        "frame": frame,
        "bbox_xyxy": subject.mask_box,
        "box_space": "cropped_frame",
        "mask_rle": {"size": mask.size, "counts": mask.counts},
        "bg": "white",
        "scores": {"gme": scores.gme, "aes": scores.aes, "area_ratio": scores.area_ratio},
    }
    if subject.unfit:
        del reference["mask_rle"]  # nothing will be cut with it, and masks are most of what is staged
    return {
        "subject_id": str(subject.number),
        "phrase": subject.name,
        "cls": subject.name,
        "kind": kind_of_class(subject.name),
        "target": {"frame": frame, "bbox_xyxy": subject.box, "box_space": "cropped_frame"},
        "refs": [reference],
    }
