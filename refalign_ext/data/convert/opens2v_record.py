"""One entry of an OpenS2V-5M part, checked and brought into the manifest's terms, without its pairs.

An entry is `{"metadata", "word_tags", "annotation"}` (PKU-YuanGroup/OpenS2V-Nexus). Its traps: `crop` is [x0, x1, y0, y1];
`face_cut` is half-open and may exceed `num_frames`; things are numbered from 1 in `mask_map` and `mask_annotation` and lie
at that number less one in `annotations`; boxes and masks are in pixels of the cropped frame; scores are absent where a
mask is empty; one thing may occur under several names.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refalign_ext.data.boxes import Box, BoxProblem, box_in_frame
from refalign_ext.data.conversion_report import Report
from refalign_ext.data.convert.selection import Selection, kind_of_class
from refalign_ext.data.masks import RunLengthMask, area, bounding_box, iou, parse_mask
from refalign_ext.data.schema import ClipScores, ReferenceScores, relative_path_problem

LONGEST_KEY = 240
MOST_THINGS = 256
_LARGEST = 1e9
_BANDS = 4096


class EntryProblem(ValueError):
    """Why an entry, or one thing of it, cannot be used: a reason to count under, and what is wrong."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class _Thing:
    """One annotated thing with a mask that is not empty."""

    number: int
    name: str
    box: Box
    mask: RunLengthMask
    extent: tuple[int, int, int, int]  # of the mask
    pixels: int  # of the mask
    profile: np.ndarray  # of the mask, see _profile
    scores: ReferenceScores
    unfit: str | None  # why it is no good as a reference


def read_entry(key: str, entry: object, selection: Selection, place: str, report: Report) -> dict[str, Any]:
    """What the join needs of an entry. Things that cannot be used are counted as dropped, the others not yet.

    Args:
        place: what names in the report start with, such as "total_part1/key".

    Returns:
        `{"reason": why the clip is dropped or None, "clip": a line of the manifest, None without anything to refer to,
        "unfit": {number: reason} of things that are no good as a reference, "names": {number: class name}, "aliases":
        {number of a duplicate: number of the thing it is}, "background": what the background is or None}`. The line has
        one subject for each thing, named by its number, with one regular reference; its paths are relative to the
        part's folder of videos.

    Raises:
        EntryProblem: if nothing can be made of the entry.
    """
    if relative_path_problem(key) or len(key) > LONGEST_KEY or not key.isprintable():
        raise EntryProblem("bad_entry", "its key cannot be part of a file name")
    entry = _object(entry, "the entry")
    metadata, annotation = (_object(entry.get(name), name) for name in ("metadata", "annotation"))
    frames = _object(annotation.get("ann_frame_data"), "ann_frame_data")
    video, frame = _video(metadata), _integer(frames.get("ann_frame_idx"), "ann_frame_idx")
    start, end = video["start_frame"], video["end_frame"]
    if not start <= frame < end:
        span = f"[{start}, {end})"
        raise EntryProblem("frame_outside_clip", f"ann_frame_idx {frame} lies outside of the clip {span}")
    scores = {name: _score(metadata, name) for name in ("aesthetic", "motion", "tech")}
    captions = [text for name in ("face_cap_qwen", "cap") for text in _texts(metadata.get(name), name)]
    if not captions:
        raise EntryProblem("no_prompt", "neither face_cap_qwen nor cap says anything")
    found = _things(annotation, frames, video, frame, selection, place, report)
    things, aliases = _distinct(found, selection, place, report)
    record: dict[str, Any] = {"reason": selection.clip_problem(end - start, ClipScores(**scores))}
    if not things:
        return record | {"reason": record["reason"] or "no_references", "clip": None}
    # Plain objects, which the join checks as it makes the manifest's lines: these are few of the things that are here.
    line = {
        "id": key,
        "source": "opens2v",
        "video": video,
        "prompt": captions[0],
        "prompt_alt": [text for text in dict.fromkeys(captions) if text != captions[0]],
        "scores": scores,
        "subjects": [_subject(thing, video, frame) for thing in things],
    }
    tags = entry.get("word_tags")
    phrases = tags.get("background") if isinstance(tags, dict) else None
    phrases = [text for text in phrases if isinstance(text, str)] if isinstance(phrases, list) else []
    return record | {
        "clip": line,
        "unfit": {str(thing.number): thing.unfit for thing in things if thing.unfit},
        "names": {str(thing.number): thing.name for thing in found},
        "aliases": {str(number): str(other) for number, other in aliases.items()},
        "background": next((text.strip() for text in phrases if text.strip()), None),
    }


def pack(record: dict[str, Any]) -> bytes:
    """A record as it is staged; the fastest compression halves what masks take."""
    return zlib.compress(json.dumps(record, separators=(",", ":")).encode(), 1)


def unpack(data: bytes) -> dict[str, Any]:
    """The record that `pack` packed."""
    return json.loads(zlib.decompress(data))


def _video(metadata: dict[str, Any]) -> dict[str, Any]:
    path = metadata.get("path")
    if not isinstance(path, str) or relative_path_problem(path):
        raise EntryProblem("bad_entry", "metadata.path is not a path relative to the part's videos")
    resolution = _object(metadata.get("resolution"), "metadata.resolution")
    width, height = (_integer(resolution.get(name), f"resolution.{name}") for name in ("width", "height"))
    frames = _integer(metadata.get("num_frames"), "num_frames")
    crop = metadata.get("crop")
    x0, x1, y0, y1 = (0, width, 0, height) if crop is None else _integers(crop, 4, "crop")
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        what = f"crop [x0, x1, y0, y1] = {[x0, x1, y0, y1]} exceeds {width}x{height} pixels or is empty"
        raise EntryProblem("crop_beyond_frame", what)
    cut = metadata.get("face_cut")
    cut = metadata.get("cut") if cut is None else cut
    start, end = (0, frames) if cut is None else _integers(cut, 2, "face_cut")
    start, end = max(start, 0), min(end, frames)
    if start >= end:
        raise EntryProblem("cut_empty", f"face_cut {cut} has nothing in common with the {frames} frames")
    fps = metadata.get("fps")
    if fps is not None and _number(fps, "fps") <= 0:
        raise EntryProblem("bad_entry", "fps is not above 0")
    return {
        "path": path,
        "start_frame": start,
        "end_frame": end,
        "fps": fps,
        "width": width,
        "height": height,
        "crop_xyxy": [x0, y0, x1, y1],
    }


def _things(
    annotation: dict[str, Any],
    frames: dict[str, Any],
    video: dict[str, Any],
    frame: int,
    selection: Selection,
    place: str,
    report: Report,
) -> list[_Thing]:
    if frames.get("box_format", "xyxy") != "xyxy":
        raise EntryProblem("bad_entry", "box_format is not xyxy")
    x0, y0, x1, y1 = video["crop_xyxy"]
    size = (x1 - x0, y1 - y0)
    named = (frames.get("img_width", size[0]), frames.get("img_height", size[1]))
    if named != size:
        what = f"img_width and img_height {named} are not the size of the crop {size}"
        raise EntryProblem("crop_differs", what)
    boxes = frames.get("annotations")
    if not isinstance(boxes, list) or len(boxes) > MOST_THINGS:
        raise EntryProblem("bad_entry", f"annotations is not a list of at most {MOST_THINGS}")
    names = _object(annotation.get("mask_map"), "mask_map")
    masks = _object(annotation.get("mask_annotation"), "mask_annotation").get(str(frame))
    masks = {} if masks is None else _object(masks, f"mask_annotation.{frame}")
    things = []
    for number, box in enumerate(boxes, 1):
        key = str(number)
        try:
            things.append(_thing(number, box, names.get(key), masks.get(key), size, selection))
        except EntryProblem as problem:
            report.drop("references", problem.reason, f"{place}, {number}: {problem}")
    return things


def _thing(
    number: int, box: object, named: object, entry: object, size: tuple[int, int], selection: Selection
) -> _Thing:
    box, named = _object(box, "annotation", "bad_annotation"), _object(named, "mask_map", "mask_missing")
    name = box.get("class_name")
    if not isinstance(name, str) or not name.strip():
        raise EntryProblem("bad_annotation", "class_name is not a text")
    if named.get("class_name") != name:
        raise EntryProblem("class_mismatch", f"{name!r} in annotations, another name in mask_map")
    if entry is None:
        raise EntryProblem("mask_missing", f"{name!r} has no mask in the annotated frame")
    try:
        mask = parse_mask(entry)
    except ValueError as error:
        raise EntryProblem("mask_broken", str(error)) from None
    if mask.size != (size[1], size[0]):
        what = f"the mask has {mask.size[1]}x{mask.size[0]} pixels, the cropped frame {size[0]}x{size[1]}"
        raise EntryProblem("mask_size_differs", what)
    extent = bounding_box(mask)
    if extent is None:
        raise EntryProblem("mask_empty", f"the mask of {name!r} is empty")
    gme, aes = _score(box, "gme_score", "score_broken"), _score(box, "aes_score", "score_broken")
    share = (extent[2] - extent[0]) * (extent[3] - extent[1]) / (size[0] * size[1])
    scores = ReferenceScores(gme=gme, aes=aes, area_ratio=round(share, 6))
    unfit = selection.reference_problem(scores)
    if (
        unfit is None
        and gme is None
        and aes is None
        and (selection.min_gme, selection.min_aesthetic) != (None, None)
    ):
        unfit = "score_missing"
    box = _box(box.get("bbox"), size, selection)
    return _Thing(number, name.strip(), box, mask, extent, area(mask), _profile(mask), scores, unfit)


def _box(value: object, size: tuple[int, int], selection: Selection) -> Box:
    """A box in pixels of the cropped frame, within it."""
    if not isinstance(value, list) or len(value) != 4:
        raise EntryProblem("bad_annotation", "bbox is not a list of four numbers")
    x0, y0, x1, y1 = (_number(item, "bbox", "bad_annotation") for item in value)
    if selection.overflow == "clamp":
        x0, x1 = (min(max(side, 0), size[0]) for side in (x0, x1))
        y0, y1 = (min(max(side, 0), size[1]) for side in (y0, y1))
    box = box_in_frame((x0, y0, x1, y1), "frame", size)
    if isinstance(box, BoxProblem):
        raise EntryProblem(box.value, f"bbox {[x0, y0, x1, y1]} in a frame of {size[0]}x{size[1]} pixels")
    return box


def _distinct(
    things: Sequence[_Thing], selection: Selection, place: str, report: Report
) -> tuple[list[_Thing], dict[int, int]]:
    """Things without those whose mask is another's, and which thing each of these is.

    What is fit to be a reference goes before what is not, then the better text match, equal ones in their order.
    """
    least = selection.max_mask_iou
    if least is None:
        return list(things), {}
    ranked = sorted(things, key=lambda thing: (thing.unfit is not None, -_rank(thing.scores.gme)))
    kept: list[_Thing] = []
    aliases: dict[int, int] = {}
    for thing in ranked:
        other = next((other for other in kept if _overlaps(thing, other, least)), None)
        if other is None:
            kept.append(thing)
        else:
            aliases[thing.number] = other.number
            report.drop(
                "references", "mask_duplicate", f"{place}, {thing.number}: is {other.number}, {other.name!r}"
            )
    return sorted(kept, key=lambda thing: thing.number), aliases


def _rank(score: float | None) -> float:
    return -_LARGEST if score is None else score


def _profile(mask: RunLengthMask) -> np.ndarray:
    """Pixels inside of the mask in each of `_BANDS` equal pieces of its column-by-column order [_BANDS] float64."""
    inside = np.cumsum(np.where(np.arange(mask.runs.size) % 2, mask.runs, 0))
    borders = np.linspace(0, mask.size[0] * mask.size[1], _BANDS + 1)
    counts = np.interp(borders, np.concatenate([[0], np.cumsum(mask.runs)]), np.concatenate([[0], inside]))
    return np.diff(counts)


def _overlaps(first: _Thing, second: _Thing, least: float) -> bool:
    """Whether the masks' IoU reaches `least`; they are compared run by run only if their profiles allow it."""
    total = first.pixels + second.pixels
    most = min(first.pixels, second.pixels)
    if most < least * (total - most):
        return False
    # One more for rounding: the intersection has at most as many pixels.
    most = float(np.minimum(first.profile, second.profile).sum()) + 1
    return most >= least * (total - most) and iou(first.mask, second.mask) >= least


def _subject(thing: _Thing, video: dict[str, Any], frame: int) -> dict[str, Any]:
    """A subject of the manifest with one reference, which is a part of the annotated frame."""
    mask = thing.mask
    reference = {
        "pair": "regular",
        "video": {name: value for name, value in video.items() if name != "fps"},
        "frame": frame,
        "bbox_xyxy": thing.extent,
        "box_space": "cropped_frame",
        "mask_rle": {"size": mask.size, "counts": mask.counts},
        "bg": "white",
        "scores": {"gme": thing.scores.gme, "aes": thing.scores.aes, "area_ratio": thing.scores.area_ratio},
    }
    if thing.unfit:
        del reference["mask_rle"]  # nothing will be cut with it, and masks are most of what is staged
    return {
        "subject_id": str(thing.number),
        "phrase": thing.name,
        "cls": thing.name,
        "kind": kind_of_class(thing.name),
        "target": {"frame": frame, "bbox_xyxy": thing.box, "box_space": "cropped_frame"},
        "refs": [reference],
    }


def _object(value: object, what: str, reason: str = "bad_entry") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise EntryProblem(reason, f"{what} is {'missing' if value is None else 'not an object'}")
    return value


def _number(value: object, what: str, reason: str = "bad_entry") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
        raise EntryProblem(reason, f"{what} is {'missing' if value is None else 'not a finite number'}")
    return value


def _integer(value: object, what: str) -> int:
    number = _number(value, what)
    if number != int(number):
        raise EntryProblem("bad_entry", f"{what} is not a whole number")
    return int(number)


def _integers(value: object, count: int, what: str) -> list[int]:
    if not isinstance(value, list) or len(value) != count:
        raise EntryProblem("bad_entry", f"{what} is not a list of {count} numbers")
    return [_integer(item, what) for item in value]


def _score(entry: dict[str, Any], name: str, reason: str = "bad_entry") -> float | None:
    value = entry.get(name)
    return None if value is None else _number(value, name, reason)


def _texts(value: object, what: str) -> list[str]:
    """A caption, or a list of them, without empty ones."""
    texts = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise EntryProblem("bad_entry", f"{what} is not a text")
    return [text.strip() for text in texts if text.strip()]
