"""One entry of an OpenS2V-5M part, checked and brought into the manifest's terms, without its cross pairs."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from refalign_ext.data.boxes import Box, BoxProblem, box_in_frame
from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.convert.opens2v_format import AnnotatedBox, Annotation, Entry, Metadata
from refalign_ext.data.convert.selection import Selection, kind_of_class
from refalign_ext.data.masks import RunLengthMask, area, bounding_box, iou, parse_mask
from refalign_ext.data.schema import ClipScores, ReferenceScores, relative_path_problem

LONGEST_KEY = 240


class EntryError(ValueError):
    """Why an entry, or one subject of it, cannot be used: a reason to count under, and what is wrong."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class _AnnotatedSubject:
    """One annotated subject with a mask that is not empty, and what the manifest says of it."""

    number: int
    name: str
    mask: RunLengthMask
    mask_box: tuple[int, int, int, int]
    pixels: int  # of the mask
    gme: float | None
    unfit: str | None  # why it is no good as a reference
    line: dict[str, Any]


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
    native = _converted(entry, Entry, "bad_entry")
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
    annotated = _subjects(native.annotation, video, selection, identity, report)
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
            "scores": asdict(scores),
            "subjects": [subject.line for subject in distinct],
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


def _video(metadata: Metadata) -> dict[str, Any]:
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
    annotation: Annotation,
    video: dict[str, Any],
    selection: Selection,
    identity: str,
    report: ConversionReport,
) -> list[_AnnotatedSubject]:
    frame, (x0, y0, x1, y1) = annotation.ann_frame_data, video["crop_xyxy"]
    size = (x1 - x0, y1 - y0)
    declared = (frame.img_width or size[0], frame.img_height or size[1])
    if declared != size:
        raise EntryError(
            "crop_differs", f"img_width and img_height {declared} are not the crop's size {size}"
        )
    masks = annotation.mask_annotation.get(str(frame.ann_frame_idx))
    masks = _converted({} if masks is None else masks, dict[str, Any], "bad_entry")
    subjects = []
    for number, item in enumerate(frame.annotations, 1):
        try:
            annotated = _converted(item, AnnotatedBox, "bad_annotation")
            mask = _mask(
                annotated.class_name, annotation.mask_map.get(str(number)), masks.get(str(number)), size
            )
            subjects.append(_subject(number, annotated, mask, video, frame.ann_frame_idx, size, selection))
        except EntryError as error:
            report.drop("references", error.reason, f"{identity}, {number}: {error}")
    return subjects


def _mask(name: str, named: object, entry: object, size: tuple[int, int]) -> RunLengthMask:
    """The mask of an annotation, whose name has to be the one that the masks are listed under."""
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
    return mask


def _subject(
    number: int,
    annotated: AnnotatedBox,
    mask: RunLengthMask,
    video: dict[str, Any],
    frame: int,
    size: tuple[int, int],
    selection: Selection,
) -> _AnnotatedSubject:
    """A subject of the manifest with one reference, which is a part of the annotated frame."""
    name, gme, aes = annotated.class_name.strip(), annotated.gme_score, annotated.aes_score
    mask_box = bounding_box(mask)
    if mask_box is None:
        raise EntryError("mask_empty", f"the mask of {name!r} is empty")
    share = (mask_box[2] - mask_box[0]) * (mask_box[3] - mask_box[1]) / (size[0] * size[1])
    scores = ReferenceScores(gme=gme, aes=aes, area_ratio=round(share, 6))
    unfit = selection.reference_problem(scores)
    is_judged = selection.min_gme is not None or selection.min_aesthetic is not None
    if unfit is None and gme is None and aes is None and is_judged:
        unfit = "score_missing"
    reference = {
        "pair": "regular",
        "video": {key: value for key, value in video.items() if key != "fps"},
        "frame": frame,
        "bbox_xyxy": mask_box,
        "box_space": "cropped_frame",
        # With one that is unfit nothing will be cut, and masks are most of what is staged.
        "mask_rle": None if unfit else {"size": mask.size, "counts": mask.counts},
        "bg": "white",
        "scores": asdict(scores),
    }
    line = {
        "subject_id": str(number),
        "phrase": name,
        "cls": name,
        "kind": kind_of_class(name),
        "target": {
            "frame": frame,
            "bbox_xyxy": _box(annotated.bbox, size, selection.overflow),
            "box_space": "cropped_frame",
        },
        "refs": [reference],
    }
    return _AnnotatedSubject(number, name, mask, mask_box, area(mask), gme, unfit, line)


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
        return subject.unfit is not None, float("inf") if subject.gme is None else -subject.gme

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
    """Whether the masks' IoU reaches `least`; they are compared only if their boxes and areas allow it."""
    (a0, b0, a1, b1), (c0, d0, c1, d1) = first.mask_box, second.mask_box
    shared = max(0, min(a1, c1) - max(a0, c0)) * max(0, min(b1, d1) - max(b0, d0))
    most = min(first.pixels, second.pixels, shared)
    if most < least * (first.pixels + second.pixels - most):
        return False
    return iou(first.mask, second.mask) >= least
