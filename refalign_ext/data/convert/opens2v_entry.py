"""One entry of an OpenS2V-5M part, checked and brought into the manifest's terms, without its cross pairs.

The traps of the native form (PKU-YuanGroup/OpenS2V-Nexus): `crop` is [x0, x1, y0, y1]; `face_cut` is half-open and may
exceed `num_frames`; subjects are numbered from 1 in `mask_map` and `mask_annotation` and lie at that number less one in
`annotations`; boxes and masks are in pixels of the cropped frame; scores are absent where a mask is empty; one subject may
occur under several names.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import msgspec

from refalign_ext.data.boxes import Box, BoxProblem, box_in_frame
from refalign_ext.data.conversion_report import ConversionReport, Unusable
from refalign_ext.data.convert.rows import Number, converted
from refalign_ext.data.convert.selection import Selection, kind_of_class
from refalign_ext.data.masks import RunLengthMask, area, bounding_box, iou, parse_mask
from refalign_ext.data.schema import ClipScores, ReferenceScores, relative_path_problem

LONGEST_KEY = 240

_Integer = Annotated[int, msgspec.Meta(gt=-(10**9), lt=10**9)]


class _Resolution(msgspec.Struct):
    width: _Integer
    height: _Integer


class _Metadata(msgspec.Struct):
    path: str
    num_frames: _Integer
    resolution: _Resolution
    crop: tuple[_Integer, _Integer, _Integer, _Integer]
    fps: Annotated[float, msgspec.Meta(gt=0, lt=1e9)] | None = None
    face_cut: tuple[_Integer, _Integer] | None = None
    cut: tuple[_Integer, _Integer] | None = None
    face_cap_qwen: str | None = None  # the better caption
    cap: list[str] | None = None
    aesthetic: Number | None = None
    motion: Number | None = None
    tech: Number | None = None


class _AnnotatedBox(msgspec.Struct):
    class_name: Annotated[str, msgspec.Meta(pattern=r"\S")]
    bbox: tuple[Number, Number, Number, Number]
    gme_score: Number | None = None
    aes_score: Number | None = None


class _AnnotatedFrame(msgspec.Struct):
    ann_frame_idx: _Integer
    annotations: Annotated[list[Any], msgspec.Meta(max_length=256)]  # a broken one costs itself only
    img_width: _Integer
    img_height: _Integer
    box_format: Literal["xyxy"] = "xyxy"


class _Annotation(msgspec.Struct):
    ann_frame_data: _AnnotatedFrame
    mask_map: dict[str, Any]
    mask_annotation: dict[str, dict[str, Any]]


class _Entry(msgspec.Struct):
    metadata: _Metadata
    annotation: _Annotation
    word_tags: dict[str, list[str]] = {}


@dataclass(frozen=True)
class _AnnotatedSubject:
    """One annotated subject with a mask that is not empty, and what the manifest says of it."""

    number: int
    name: str
    mask: RunLengthMask
    area_ratio: float
    gme: float | None
    unfit: Unusable | None  # why it is no good as a reference
    line: dict[str, Any]


def read_entry(
    key: str, entry: object, selection: Selection, identity: str, report: ConversionReport
) -> dict[str, Any]:
    """What the second pass needs of an entry; subjects that cannot be used, or referred to, are counted as dropped.

    Args:
        identity: what names in the report start with, such as "total_part1/key".

    Returns:
        `reason` why the clip is dropped or None; `clip`, a line of the manifest whose subjects have one regular reference
        or none, its paths relative to the part's videos; `ids`, number and class name -> subject, also of duplicates;
        `areas` of subjects as shares of the frame; `background`, what it is or None.

    Raises:
        Unusable: if nothing can be made of the entry.
    """
    if relative_path_problem(key) or len(key) > LONGEST_KEY or not key.isprintable():
        raise Unusable("bad_entry", "its key cannot be part of a file name")
    native = converted(entry, _Entry, "bad_entry")
    metadata, frame = native.metadata, native.annotation.ann_frame_data.ann_frame_idx
    video = _video(metadata)
    if not video["start_frame"] <= frame < video["end_frame"]:
        raise Unusable("frame_outside_clip", f"ann_frame_idx {frame}")
    captions = [
        text.strip() for text in (metadata.face_cap_qwen or "", *(metadata.cap or ())) if text.strip()
    ]
    if not captions:
        raise Unusable("no_prompt", "neither face_cap_qwen nor cap says anything")
    annotated = _subjects(native.annotation, video, selection, identity, report)
    distinct, ids = _distinct(annotated, selection.max_mask_iou, identity, report)
    if not distinct:
        raise Unusable("no_references")
    for subject in distinct:
        if subject.unfit:
            report.drop("references", subject.unfit.reason, f"{identity}, {subject.number}: {subject.name}")
    scores, reason = ClipScores(metadata.aesthetic, metadata.motion, metadata.tech), None
    try:
        selection.check_clip(video["end_frame"] - video["start_frame"], scores)
    except Unusable as problem:
        reason = problem.reason
    line = {"source": "opens2v", "video": video, "prompt": captions[0]}
    line |= {"prompt_alt": [text for text in dict.fromkeys(captions) if text != captions[0]]}
    line |= {"scores": asdict(scores), "subjects": [subject.line for subject in distinct]}
    areas = {str(subject.number): subject.area_ratio for subject in distinct}
    background = next((text.strip() for text in native.word_tags.get("background", ()) if text.strip()), None)
    return {"reason": reason, "clip": line, "ids": ids, "areas": areas, "background": background}


def pack_record(record: dict[str, Any]) -> bytes:
    """A record of `read_entry` as it is staged; the fastest compression halves what masks take."""
    return zlib.compress(json.dumps(record, separators=(",", ":")).encode(), 1)


def unpack_record(data: bytes) -> dict[str, Any]:
    """The record that `pack_record` packed."""
    return json.loads(zlib.decompress(data))


def _video(metadata: _Metadata) -> dict[str, Any]:
    if relative_path_problem(metadata.path):
        raise Unusable("bad_entry", "metadata.path is not a path relative to the part's videos")
    width, height = metadata.resolution.width, metadata.resolution.height
    x0, x1, y0, y1 = metadata.crop
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise Unusable("crop_beyond_frame", f"[x0, x1, y0, y1] = {metadata.crop} of {width}x{height} pixels")
    cut = metadata.face_cut or metadata.cut or (0, metadata.num_frames)
    start, end = max(cut[0], 0), min(cut[1], metadata.num_frames)
    if start >= end:
        raise Unusable("cut_empty", f"face_cut {list(cut)} of {metadata.num_frames} frames")
    span = {"path": metadata.path, "start_frame": start, "end_frame": end, "fps": metadata.fps}
    return span | {"width": width, "height": height, "crop_xyxy": [x0, y0, x1, y1]}


def _subjects(
    annotation: _Annotation,
    video: dict[str, Any],
    selection: Selection,
    identity: str,
    report: ConversionReport,
) -> list[_AnnotatedSubject]:
    frame, (x0, y0, x1, y1) = annotation.ann_frame_data, video["crop_xyxy"]
    if (frame.img_width, frame.img_height) != (x1 - x0, y1 - y0):
        raise Unusable("crop_differs", f"img_width {frame.img_width} and img_height {frame.img_height}")
    masks = annotation.mask_annotation.get(str(frame.ann_frame_idx), {})
    subjects = []
    for number, item in enumerate(frame.annotations, 1):
        try:
            annotated = converted(item, _AnnotatedBox, "bad_annotation")
            named = annotation.mask_map.get(str(number))
            if not isinstance(named, dict) or named.get("class_name") != annotated.class_name:
                raise Unusable("mask_missing", f"mask_map has no {annotated.class_name!r}")
            subjects.append(
                _subject(number, annotated, masks.get(str(number)), video, frame.ann_frame_idx, selection)
            )
        except Unusable as problem:
            report.drop("references", problem.reason, f"{identity}, {number}: {problem}")
    return subjects


def _subject(
    number: int,
    annotated: _AnnotatedBox,
    entry: object,
    video: dict[str, Any],
    frame: int,
    selection: Selection,
) -> _AnnotatedSubject:
    """A subject of the manifest with one reference, which is a part of the annotated frame, if it is fit to be one."""
    name, (x0, y0, x1, y1) = annotated.class_name.strip(), video["crop_xyxy"]
    width, height = x1 - x0, y1 - y0
    try:
        mask = parse_mask(entry)
    except ValueError as error:
        raise Unusable("mask_broken", error) from None
    if mask.size != (height, width):
        raise Unusable("mask_broken", f"it has {mask.size} pixels, the cropped frame {(height, width)}")
    box = bounding_box(mask)
    if box is None:
        raise Unusable("mask_empty", f"the mask of {name!r} is empty")
    share = round((box[2] - box[0]) * (box[3] - box[1]) / (width * height), 6)
    scores = ReferenceScores(gme=annotated.gme_score, aes=annotated.aes_score, area_ratio=share)
    unfit = None
    try:
        selection.check_reference(scores)
    except Unusable as problem:
        unfit = problem
    target_box = _box_inside(annotated.bbox, (width, height), selection.overflow)
    place = {"frame": frame, "box_space": "cropped_frame"}
    reference = place | {
        "pair": "regular",
        "video": {key: value for key, value in video.items() if key != "fps"},
        "bbox_xyxy": box,
        "mask_rle": {"size": mask.size, "counts": mask.counts},
        "bg": "white",
        "scores": asdict(scores),
    }
    line = {"subject_id": str(number), "phrase": name, "cls": name, "kind": kind_of_class(name)}
    line |= {"target": place | {"bbox_xyxy": target_box}, "refs": [] if unfit else [reference]}
    return _AnnotatedSubject(number, name, mask, share, scores.gme, unfit, line)


def _box_inside(box: Box, size: tuple[int, int], overflow: str) -> Box:
    """A box in pixels of the cropped frame, within it."""
    if overflow == "clamp":
        box = tuple(min(max(side, 0), size[axis % 2]) for axis, side in enumerate(box))
    inside = box_in_frame(box, "frame", size)
    if isinstance(inside, BoxProblem):
        raise Unusable(inside.value, f"bbox {box} in a frame of {size[0]}x{size[1]} pixels")
    return inside


def _distinct(
    subjects: Sequence[_AnnotatedSubject], max_iou: float | None, identity: str, report: ConversionReport
) -> tuple[list[_AnnotatedSubject], dict[str, str]]:
    """Subjects without those whose mask is another's, and which of them every number and name stands for.

    What is fit to be a reference goes before what is not, then the better text match, equal ones in their order.
    """

    def rank(subject: _AnnotatedSubject) -> tuple[bool, float]:
        return subject.unfit is not None, float("inf") if subject.gme is None else -subject.gme

    kept: list[_AnnotatedSubject] = []
    ids: dict[str, str] = {}
    for subject in sorted(subjects, key=rank):
        other = next(
            (other for other in kept if max_iou is not None and _overlaps(subject, other, max_iou)), None
        )
        if other is None:
            kept.append(subject)
        else:
            what = f"{identity}, {subject.number}: is {other.number}, {other.name!r}"
            report.drop("references", "mask_duplicate", what)
        ids[f"{subject.number} {subject.name}"] = str((other or subject).number)
    return sorted(kept, key=lambda subject: subject.number), ids


def _overlaps(first: _AnnotatedSubject, second: _AnnotatedSubject, least: float) -> bool:
    """Whether the masks' IoU reaches `least`; it is at most the ratio of their areas."""
    smaller, larger = sorted((area(first.mask), area(second.mask)))
    return smaller >= least * larger and iou(first.mask, second.mask) >= least
