"""The manifest that every source of clips is converted to: JSON lines, one target clip per line, checked strictly.

    {"id", "source": "opens2v|phantom|custom", "group_id",
     "video": {"path", "start_frame", "end_frame", "start_s", "end_s", "fps", "width", "height", "crop_xyxy"},
     "prompt", "prompt_alt": [], "scores": {"aesthetic", "motion", "tech"},
     "subjects": [{"subject_id", "phrase", "cls", "kind": "human|face|object|background",
       "target": {"frame" | "frame_frac", "bbox_xyxy", "box_space", "mask_rle"},
       "refs": [{"pair": "regular|cross|generated", "image": path | "video": {...}, "frame" | "frame_frac",
         "bbox_xyxy", "box_space": "frame|cropped_frame|long768", "mask_rle", "bg": "raw|white",
         "scores": {"gme", "aes", "sim", "area_ratio"}, "source_id", "source_group"}]}],
     "meta": {}}

Paths are relative to the manifest's folder. A key that is null, [] or {} counts as absent and is not written. A span
is in frames or in seconds, never both, and ends are exclusive. Unknown keys are errors; `meta` takes anything.

The simple line `{"id", "video": "clip.mp4", "prompt", "references": ["a.png"]}` means the same as a clip with one
subject per picture. Its pairs are "cross": pictures that users bring were not cut out of the clip, and only "regular"
references get the augmentation that keeps a model from copying its own frames.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from refalign_ext.data.boxes import BOX_SPACES, Box
from refalign_ext.data.masks import RunLengthMask
from refalign_ext.errors import shortened
from refalign_ext.request import MAX_REFERENCES

SOURCES = ("opens2v", "phantom", "custom")
KINDS = ("human", "face", "object", "background")
PAIRS = ("regular", "cross", "generated")
BACKGROUNDS = ("raw", "white")

_LARGEST = 10**12  # no number in a manifest comes near
# At least one letter that is no space, and no half of a surrogate pair.
_Text = Annotated[str, Meta(pattern=r"(?s)\A(?=.*\S)[^\ud800-\udfff]+\Z")]
_Index = Annotated[int, Meta(ge=0, lt=_LARGEST)]
_Count = Annotated[int, Meta(ge=1, lt=_LARGEST)]
# Whole numbers stay whole, so that a line comes back as it was.
_Number = (
    Annotated[int, Meta(gt=-_LARGEST, lt=_LARGEST)]
    | Annotated[float, Meta(gt=-float(_LARGEST), lt=float(_LARGEST))]
)
_Positive = Annotated[int, Meta(ge=0, lt=_LARGEST)] | Annotated[float, Meta(ge=0, lt=float(_LARGEST))]
_Share = Annotated[int, Meta(ge=0, lt=1)] | Annotated[float, Meta(ge=0, lt=1)]
_Box = tuple[_Number, _Number, _Number, _Number]


@dataclass(frozen=True)
class VideoSpan:
    """A video file, or a part of it given in frames of the file or in seconds.

    `width` and `height` are those of the whole frame in pixels; `crop_xyxy` is the part of it that is used.
    """

    path: _Text
    start_frame: _Index | None = None
    end_frame: _Count | None = None
    start_s: _Positive | None = None
    end_s: _Positive | None = None
    fps: _Positive | None = None
    width: _Count | None = None
    height: _Count | None = None
    crop_xyxy: tuple[_Index, _Index, _Index, _Index] | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) of the whole frame, if it is known."""
        return None if self.width is None or self.height is None else (self.width, self.height)


@dataclass(frozen=True)
class ClipScores:
    """Quality of a clip as its data set scored it."""

    aesthetic: _Number | None = None
    motion: _Number | None = None
    tech: _Number | None = None


@dataclass(frozen=True)
class ReferenceScores:
    """Quality of a reference: text match, aesthetics, likeness to the subject, and share of the frame's area."""

    gme: _Number | None = None
    aes: _Number | None = None
    sim: _Number | None = None
    area_ratio: _Number | None = None


@dataclass(frozen=True)
class Target:
    """Where a subject is seen in the target clip: its frame is an index in the file, or a share of the span's frames."""

    frame: _Index | None = None
    frame_frac: _Share | None = None
    bbox_xyxy: _Box | None = None
    box_space: Literal[BOX_SPACES] | None = None
    mask_rle: RunLengthMask | None = None


@dataclass(frozen=True)
class Reference:
    """One picture of a subject: an image file, or a frame of a video that is still to be cut.

    `pair` is "regular" (from the target clip itself), "cross" (from elsewhere) or "generated". `source_id` is the clip
    that it comes from, `source_group` that clip's group, which must not be split from it.
    """

    pair: Literal[PAIRS]
    image: _Text | None = None
    video: VideoSpan | None = None
    frame: _Index | None = None
    frame_frac: _Share | None = None
    bbox_xyxy: _Box | None = None
    box_space: Literal[BOX_SPACES] | None = None
    mask_rle: RunLengthMask | None = None
    bg: Literal[BACKGROUNDS] | None = None
    scores: ReferenceScores = ReferenceScores()
    source_id: _Text | None = None
    source_group: _Text | None = None


@dataclass(frozen=True)
class Subject:
    """One thing or person of a clip and the references that may stand for it; ids are unique within the clip."""

    subject_id: _Text
    phrase: _Text | None = None
    cls: _Text | None = None
    kind: Literal[KINDS] = "object"
    target: Target | None = None
    refs: tuple[Reference, ...] = field(kw_only=True)


@dataclass(frozen=True)
class Clip:
    """One line of a manifest."""

    id: _Text
    source: Literal[SOURCES]
    video: VideoSpan
    prompt: _Text
    subjects: tuple[Subject, ...]
    group_id: _Text | None = None
    prompt_alt: tuple[_Text, ...] = ()
    scores: ClipScores = ClipScores()
    meta: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def group(self) -> str:
        """What must not be split between training and validation: `group_id`, or the clip alone."""
        return self.id if self.group_id is None else self.group_id


@dataclass(frozen=True)
class _SimpleClip:
    """The simple form of a line."""

    id: _Text
    video: _Text
    prompt: _Text
    references: Annotated[tuple[_Text, ...], Meta(max_length=MAX_REFERENCES)]
    group_id: _Text | None = None
    meta: dict[str, Any] = field(default_factory=dict)


# A line's keys are written in the order of the description above; dataclasses have defaults last.
_CLIP_KEYS = ("id", "source", "group_id", "video", "prompt", "prompt_alt", "scores", "subjects", "meta")
_NESTED: dict[type, dict[str, type]] = {
    Clip: {"video": VideoSpan, "scores": ClipScores, "subjects": Subject},
    Subject: {"target": Target, "refs": Reference},
    Target: {"mask_rle": RunLengthMask},
    Reference: {"video": VideoSpan, "mask_rle": RunLengthMask, "scores": ReferenceScores},
}
_EXPECTED = {
    "bbox_xyxy": "four finite numbers [x0, y0, x1, y1]",
    "crop_xyxy": "four whole pixels, none negative, [x0, y0, x1, y1]",
    "frame_frac": "a number, at least 0 and below 1",
    "source": f"one of {', '.join(SOURCES)}",
    "kind": f"one of {', '.join(KINDS)}",
    "pair": f"one of {', '.join(PAIRS)}",
    "bg": f"one of {', '.join(BACKGROUNDS)}",
    "box_space": f"one of {', '.join(BOX_SPACES)}",
}
_TYPE_NAMES = {
    " | null": "",
    "`int | float`": "a finite number",
    "`float`": "a finite number",
    "`int`": "a whole number",
    "`array`": "a list",
    "`object`": "an object",
}


class _Problem(ValueError):
    """What is wrong with which field."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(f"{where}: {message}" if where else message)


def parse(entry: object, place: str) -> Clip:
    """The clip that a decoded line describes.

    Args:
        entry: what `json.loads` gave, in the full or in the simple form.
        place: what errors start with, such as "data.jsonl, row 3".

    Raises:
        ValueError: `place: field: what is wrong`, such as `place: subjects[1].refs[0].box_space: is missing`.
    """
    is_simple = isinstance(entry, dict) and (isinstance(entry.get("video"), str) or "references" in entry)
    try:
        if is_simple:
            clip = _full_clip(_convert(entry, _SimpleClip))
        else:
            clip = _convert(entry, Clip)
            for index, subject in enumerate(entry["subjects"]):
                _require(not _is_absent(subject.get("kind")), f"subjects[{index}].kind", "is missing")
        _check_clip(clip)
    except _Problem as problem:
        text = f"{place}: {problem}" if place else str(problem)
        # A key may hold half of a surrogate pair, which no log takes.
        raise ValueError(text.encode("utf-8", "backslashreplace").decode("utf-8")) from None
    return clip


def to_dict(clip: Clip) -> dict[str, Any]:
    """The line of a clip, ready for JSON: keys in a fixed order, absent values left out.

    `parse(to_dict(clip), place) == clip`, and a full line without absent values comes back as it was.
    """
    plain = {key: _to_plain(getattr(clip, key)) for key in _CLIP_KEYS if key != "meta"} | {"meta": clip.meta}
    return {key: value for key, value in plain.items() if not _is_absent(value)}


def parse_line(line: bytes, place: str) -> Clip:
    """The clip of one line of a manifest."""
    try:
        entry = msgspec.json.decode(line)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON in UTF-8 ({error})") from None
    return parse(entry, place)


def relative_path_problem(name: str) -> str | None:
    """Why `name` cannot name a file below the manifest's folder, judged by its text alone; None if it can."""
    if not name or "\0" in name:
        return f"{name!r} is not a file name"
    windows = PureWindowsPath(name)
    if name.startswith("/") or windows.drive or windows.root:
        return f"{name!r} is absolute: give a path relative to the manifest's folder"
    depth = 0
    for part in re.split(r"[/\\]", name):
        depth += {"": 0, ".": 0, "..": -1}.get(part, 1)
        if depth < 0:
            return f"{name!r} lies outside the manifest's folder"
    return None if depth else f"{name!r} names a folder, not a file"


def resolve_inside(root: Path, name: str) -> Path:
    """The file that a manifest in folder `root` means by `name`."""
    problem = relative_path_problem(name)
    if problem:
        raise ValueError(problem)
    # Path.resolve ends in a RuntimeError where links go round in a circle.
    root, inside = Path(os.path.realpath(root)), Path(os.path.realpath(root / name))
    if not inside.is_relative_to(root):
        raise ValueError(f"{name!r} leads outside the manifest's folder by a link: copy the file into it")
    return inside


def _convert(entry: object, kind: type) -> Any:
    """An object of type `kind`, its types and ranges checked by msgspec."""
    try:
        present = _present(entry, kind, "")
        return msgspec.convert(present, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        path = path.removeprefix(".").removesuffix("`")
        missing = re.fullmatch(r"Object missing required field `(\w+)`", message)
        if missing:
            raise _Problem(f"{path}.{missing[1]}".lstrip("."), "is missing") from None
        raise _Problem(path, _explanation(message, path, present)) from None
    except UnicodeEncodeError as error:  # where msgspec looks a text up
        raise _Problem("", f"holds half of a surrogate pair: {shortened(error.object)}") from None
    except RecursionError:
        raise _Problem("", "is nested too deeply") from None


def _present(value: Any, kind: type | None, where: str) -> Any:
    """An object, or a list of them, without the keys that count as absent; unknown keys are problems."""
    if isinstance(value, list) and kind is not None:
        return [_present(item, kind, f"{where}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, dict) or kind is None:
        return value
    known, nested, present = _field_names(kind), _NESTED.get(kind, {}), {}
    for key, item in value.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise _Problem(path[:200], f"unknown key; {hint}")
        if not _is_absent(item):
            present[key] = _present(item, nested.get(key), path)
    return present


def _explanation(message: str, path: str, entry: Any) -> str:
    """What msgspec found wrong at `path` of an entry, with what is expected there and what stands there."""
    steps = re.findall(r"\[(\d+)\]|(\w+)", path)
    for number, key in steps:
        entry = entry[int(number)] if number else entry[key]
    name = next((key for _, key in reversed(steps) if key), "")
    if name in _EXPECTED:
        message = f"expected {_EXPECTED[name]}"
    elif re.match(r"Expected `str( \| null)?`", message):
        message = "expected text that is not empty and can be written as UTF-8"
    elif message.startswith("Expected"):
        message = message.split(", got")[0].replace("Expected", "expected", 1)
        for type_name, words in _TYPE_NAMES.items():
            message = message.replace(type_name, words)
    else:
        return message  # of a mask
    return f"{message}, got {shortened(entry)}"


def _full_clip(line: _SimpleClip) -> Clip:
    for index, name in enumerate(line.references):
        _check_path(name, f"references[{index}]")
    subjects = tuple(
        Subject(subject_id=str(number), refs=(Reference(pair="cross", image=name, bg="raw"),))
        for number, name in enumerate(line.references, 1)
    )
    return Clip(
        line.id, "custom", VideoSpan(line.video), line.prompt, subjects, line.group_id, meta=line.meta
    )


# What msgspec cannot know: rules between fields.


def _require(is_met: bool, where: str, message: str) -> None:
    if not is_met:
        raise _Problem(where, message)


def _check_clip(clip: Clip) -> None:
    _check_video(clip.video, "video")
    seen: set[str] = set()
    for index, subject in enumerate(clip.subjects):
        where = f"subjects[{index}]"
        _require(subject.subject_id not in seen, f"{where}.subject_id", "is used twice in this clip")
        seen.add(subject.subject_id)
        if subject.target is not None:
            is_marked = subject.target.bbox_xyxy is not None or subject.target.mask_rle is not None
            _check_region(subject.target, clip.video, f"{where}.target")
            _require(is_marked, f"{where}.target", "has neither bbox_xyxy nor mask_rle")
        for number, reference in enumerate(subject.refs):
            _check_reference(reference, f"{where}.refs[{number}]")
    try:
        json.dumps(clip.meta, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise _Problem("meta", f"cannot be written as JSON ({error})") from None


def _check_path(name: str, where: str) -> None:
    problem = relative_path_problem(name)
    _require(problem is None, where, str(problem))


def _check_video(video: VideoSpan, where: str) -> None:
    _check_path(video.path, f"{where}.path")
    frames, seconds = (video.start_frame, video.end_frame), (video.start_s, video.end_s)
    _require((None, None) in (frames, seconds), where, "the span is given in frames and in seconds: use one")
    for (start, end), key in ((frames, "end_frame"), (seconds, "end_s")):
        is_after = end is None or end > (start or 0)
        _require(is_after, f"{where}.{key}", f"{end} is not after the start {start or 0}; ends are exclusive")
    _require(video.fps != 0, f"{where}.fps", "expected a number above 0, got 0")
    _require((video.width is None) == (video.height is None), where, "give width and height, or neither")
    if video.crop_xyxy is not None:
        _check_box(video.crop_xyxy, f"{where}.crop_xyxy")
        width, height = video.size or video.crop_xyxy[2:]
        exceeds = f"{list(video.crop_xyxy)} exceeds the frame of {width}x{height} pixels"
        is_inside = video.crop_xyxy[2] <= width and video.crop_xyxy[3] <= height
        _require(is_inside, f"{where}.crop_xyxy", exceeds)


def _check_box(box: Box, where: str) -> None:
    is_ordered = box[0] < box[2] and box[1] < box[3]
    _require(is_ordered, where, f"expected x0 < x1 and y0 < y1, got {shortened(list(box))}")


def _check_region(region: Target | Reference, video: VideoSpan | None, where: str) -> None:
    """What part of which frame of a video or, where it is None, of a picture."""
    space, frame = region.box_space, region.frame
    if region.bbox_xyxy is not None:
        _check_box(region.bbox_xyxy, f"{where}.bbox_xyxy")
    if region.bbox_xyxy is not None or region.mask_rle is not None:
        _require(space is not None, f"{where}.box_space", "is missing")
    else:
        _require(space is None, f"{where}.box_space", "has no bbox_xyxy or mask_rle that it could apply to")
    if video is None:
        _require(frame is None and region.frame_frac is None, f"{where}.frame", "a picture has no frames")
        _require(space != "cropped_frame", f"{where}.box_space", "a picture has no cropped_frame: use frame")
        return
    is_one_frame = (frame is None) != (region.frame_frac is None)
    _require(is_one_frame, f"{where}.frame", "a video needs one of frame and frame_frac")
    start, end = video.start_frame or 0, _LARGEST if video.end_frame is None else video.end_frame
    is_inside = frame is None or start <= frame < end
    _require(is_inside, f"{where}.frame", f"{frame} lies outside the span [{start}, {end}) of its video")
    has_crop = space != "cropped_frame" or video.crop_xyxy is not None
    _require(has_crop, f"{where}.box_space", "is cropped_frame, but its video has no crop_xyxy")


def _check_reference(reference: Reference, where: str) -> None:
    is_one_file = (reference.image is None) != (reference.video is None)
    _require(is_one_file, f"{where}.image", "a reference needs one of image and video")
    _check_region(reference, reference.video, where)
    if reference.video is None:
        _check_path(reference.image, f"{where}.image")
        return
    _check_video(reference.video, f"{where}.video")
    can_be_cut = reference.bg != "white" or reference.mask_rle is not None
    _require(can_be_cut, f"{where}.mask_rle", 'is missing: bg "white" cannot be cut from a video without it')


@cache
def _field_names(kind: type) -> tuple[str, ...]:
    return tuple(item.name for item in fields(kind))


def _is_absent(value: Any) -> bool:
    return value is None or value in ([], {})


def _to_plain(value: Any) -> Any:
    """Dataclasses and tuples as JSON's objects and lists, absent values left out."""
    if is_dataclass(value):
        plain = {name: _to_plain(getattr(value, name)) for name in _field_names(type(value))}
        return {name: item for name, item in plain.items() if not _is_absent(item)}
    return [_to_plain(item) for item in value] if isinstance(value, tuple) else value
