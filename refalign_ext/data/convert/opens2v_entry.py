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
from dataclasses import asdict
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from refalign_ext.data.boxes import Box, BoxProblem, box_in_frame, lies_in_frame
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


class _AnnotatedSubject(NamedTuple):
    """One annotated subject with a mask that is not empty, and what the manifest says of it."""

    number: int
    name: str
    mask: RunLengthMask
    scores: ReferenceScores
    unfit: str | None  # why it is no good as a reference
    line: dict[str, Any]


class EntryReader:
    """Makes of each entry what the second pass needs; subjects that cannot be used are counted in `report`."""

    def __init__(self, selection: Selection, report: ConversionReport) -> None:
        self.selection, self.report = selection, report

    def read(self, key: str, entry: object, identity: str) -> dict[str, Any]:
        """The record of an entry, `identity` being what names in the report start with, such as "total_part1/key".

        Returns:
            `reason` why the clip is dropped or None; `clip`, a line of the manifest whose subjects have one regular
            reference, without its video, or none; `fps` of the video, whose path is relative to the part's folder; `ids`,
            number and class name -> subject, also of duplicates; `areas` of subjects as shares of the frame;
            `background`, what it is or None.

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
        captions = [text.strip() for text in (metadata.face_cap_qwen or "", *(metadata.cap or ()))]
        prompts = list(dict.fromkeys(filter(None, captions)))
        if not prompts:
            raise Unusable("no_prompt", "neither face_cap_qwen nor cap says anything")
        distinct, ids = self._distinct(self._subjects(native.annotation, video, identity), identity)
        if not distinct:
            raise Unusable("no_references")
        scores = ClipScores(metadata.aesthetic, metadata.motion, metadata.tech)
        line = {"source": "opens2v", "video": video, "prompt": prompts[0], "prompt_alt": prompts[1:]}
        line |= {"scores": asdict(scores), "subjects": [subject.line for subject in distinct]}
        phrases = map(str.strip, native.word_tags.get("background", ()))
        return {
            "reason": self.selection.clip_problem(video["end_frame"] - video["start_frame"], scores),
            "clip": line,
            "fps": metadata.fps,
            "ids": ids,
            "areas": {str(subject.number): subject.scores.area_ratio for subject in distinct},
            "background": next(filter(None, phrases), None),
        }

    def _subjects(
        self, annotation: _Annotation, video: dict[str, Any], identity: str
    ) -> list[_AnnotatedSubject]:
        frame, (x0, y0, x1, y1) = annotation.ann_frame_data, video["crop_xyxy"]
        if (frame.img_width, frame.img_height) != (x1 - x0, y1 - y0):
            raise Unusable("crop_differs", f"img_width {frame.img_width} and img_height {frame.img_height}")
        masks = annotation.mask_annotation.get(str(frame.ann_frame_idx), {})
        subjects = []
        for number, item in enumerate(frame.annotations, 1):
            try:
                annotated = converted(item, _AnnotatedBox, "bad_annotation")
                named, mask = annotation.mask_map.get(str(number)), masks.get(str(number))
                if not isinstance(named, dict) or named.get("class_name") != annotated.class_name:
                    raise Unusable("mask_missing", f"mask_map has no {annotated.class_name!r}")
                subjects.append(self._subject(number, annotated, mask, video, frame.ann_frame_idx))
            except Unusable as problem:
                self.report.drop("references", problem.reason, f"{identity}, {number}: {problem}")
        return subjects

    def _subject(
        self, number: int, annotated: _AnnotatedBox, entry: object, video: dict[str, Any], frame: int
    ) -> _AnnotatedSubject:
        """A subject with one reference, which is a part of the annotated frame, if it is fit to be one."""
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
        unfit = self.selection.reference_problem(scores)
        place = {"frame": frame, "box_space": "cropped_frame"}
        reference = place | {
            "pair": "regular",
            "bbox_xyxy": box,
            "mask_rle": {"size": mask.size, "counts": mask.counts},
            "bg": "white",
            "scores": asdict(scores),
        }
        target = place | {"bbox_xyxy": self._box_inside(annotated.bbox, (width, height))}
        line = {"subject_id": str(number), "phrase": name, "cls": name, "kind": kind_of_class(name)}
        line |= {"target": target, "refs": [] if unfit else [reference]}
        return _AnnotatedSubject(number, name, mask, scores, unfit, line)

    def _box_inside(self, box: Box, size: tuple[int, int]) -> Box:
        """A box in pixels of the cropped frame, within it."""
        if self.selection.overflow == "clamp":
            box = tuple(min(max(side, 0), size[axis % 2]) for axis, side in enumerate(box))
        inside = box_in_frame(box, "frame", size)
        if isinstance(inside, BoxProblem):
            raise Unusable(inside.value, f"bbox {box} in a frame of {size[0]}x{size[1]} pixels")
        return inside

    def _distinct(
        self, subjects: Sequence[_AnnotatedSubject], identity: str
    ) -> tuple[list[_AnnotatedSubject], dict[str, str]]:
        """Subjects without those whose mask is another's, and which of them every number and name stands for.

        What is fit to be a reference goes before what is not, then the better text match, equal ones in their order.
        """

        def rank(subject: _AnnotatedSubject) -> tuple[bool, float]:
            gme = subject.scores.gme
            return subject.unfit is not None, float("inf") if gme is None else -gme

        kept: list[_AnnotatedSubject] = []
        ids: dict[str, str] = {}
        for subject in sorted(subjects, key=rank):
            what, reason = f"{identity}, {subject.number}: {subject.name}", subject.unfit
            other = next((other for other in kept if self._is_same(subject, other)), None)
            if other is None:
                kept.append(subject)
            else:
                what, reason = (
                    f"{identity}, {subject.number}: is {other.number}, {other.name!r}",
                    "mask_duplicate",
                )
            if reason:
                self.report.drop("references", reason, what)
            ids[f"{subject.number} {subject.name}"] = str((other or subject).number)
        return sorted(kept, key=lambda subject: subject.number), ids

    def _is_same(self, first: _AnnotatedSubject, second: _AnnotatedSubject) -> bool:
        """Whether two masks overlap too much for two subjects; their IoU is at most the ratio of their areas."""
        least, (smaller, larger) = self.selection.max_mask_iou, sorted((area(first.mask), area(second.mask)))
        return least is not None and smaller >= least * larger and iou(first.mask, second.mask) >= least


def pack_record(record: dict[str, Any]) -> bytes:
    """A record as it is staged; the fastest compression halves what masks take."""
    return zlib.compress(json.dumps(record, separators=(",", ":")).encode(), 1)


def unpack_record(data: bytes) -> dict[str, Any]:
    """The record that `pack_record` packed."""
    return json.loads(zlib.decompress(data))


def _video(metadata: _Metadata) -> dict[str, Any]:
    if relative_path_problem(metadata.path):
        raise Unusable("bad_entry", "metadata.path is not a path relative to the part's videos")
    size = (metadata.resolution.width, metadata.resolution.height)
    x0, x1, y0, y1 = metadata.crop
    if not lies_in_frame((x0, y0, x1, y1), size):
        raise Unusable("crop_beyond_frame", f"[x0, x1, y0, y1] = {metadata.crop} of {size} pixels")
    cut = metadata.face_cut or metadata.cut or (0, metadata.num_frames)
    start, end = max(cut[0], 0), min(cut[1], metadata.num_frames)
    if start >= end:
        raise Unusable("cut_empty", f"face_cut {list(cut)} of {metadata.num_frames} frames")
    span = {"path": metadata.path, "start_frame": start, "end_frame": end}
    return span | {"width": size[0], "height": size[1], "crop_xyxy": [x0, y0, x1, y1]}
