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
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any, NoReturn

from refalign_ext.data.boxes import BOX_SPACES, Box
from refalign_ext.data.masks import BACKGROUNDS, RunLengthMask, parse_mask, shortened
from refalign_ext.request import MAX_REFERENCES

SOURCES = ("opens2v", "phantom", "custom")
KINDS = ("human", "face", "object", "background")
PAIRS = ("regular", "cross", "generated")

_LARGEST = 1e12  # no number in a manifest comes near


@dataclass(frozen=True)
class VideoSpan:
    """A video file, or a part of it.

    Attributes:
        path: relative to the manifest's folder.
        start_frame, end_frame: the part in frames of the file, the end exclusive.
        start_s, end_s: the part in seconds, instead of frames.
        fps: frames per second; width, height: of the whole frame in pixels.
        crop_xyxy: the part of the frame that is used, in whole pixels, ends exclusive.
    """

    path: str
    start_frame: int | None = None
    end_frame: int | None = None
    start_s: float | None = None
    end_s: float | None = None
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    crop_xyxy: tuple[int, int, int, int] | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) of the whole frame, if it is known."""
        return None if self.width is None or self.height is None else (self.width, self.height)


@dataclass(frozen=True)
class ClipScores:
    """Quality of a clip as its data set scored it."""

    aesthetic: float | None = None
    motion: float | None = None
    tech: float | None = None


@dataclass(frozen=True)
class ReferenceScores:
    """Quality of a reference: text match, aesthetics, likeness to the subject, and share of the frame's area."""

    gme: float | None = None
    aes: float | None = None
    sim: float | None = None
    area_ratio: float | None = None


@dataclass(frozen=True)
class Target:
    """Where a subject is seen in the target clip.

    Attributes:
        frame: index in the file, or frame_frac: share in [0, 1) of the span's frames.
        bbox_xyxy: box in pixels of `box_space`; mask_rle: mask of that space.
    """

    frame: int | None = None
    frame_frac: float | None = None
    bbox_xyxy: Box | None = None
    box_space: str | None = None
    mask_rle: RunLengthMask | None = None


@dataclass(frozen=True)
class Reference:
    """One picture of a subject: an image file, or a frame of a video that is still to be cut.

    Attributes:
        pair: "regular" (from the target clip itself), "cross" (from elsewhere) or "generated".
        image: a picture file, or video: a span, of which `frame` is an index in the file or `frame_frac` a share in
            [0, 1) of the span's frames.
        bbox_xyxy: box in pixels of `box_space`; mask_rle: mask of that space.
        bg: what lies behind the subject once it is cut: "raw" or "white".
        source_id: id of the clip that it comes from; source_group: that clip's group, which must not be split from it.
    """

    pair: str
    image: str | None = None
    video: VideoSpan | None = None
    frame: int | None = None
    frame_frac: float | None = None
    bbox_xyxy: Box | None = None
    box_space: str | None = None
    mask_rle: RunLengthMask | None = None
    bg: str | None = None
    scores: ReferenceScores = ReferenceScores()
    source_id: str | None = None
    source_group: str | None = None


@dataclass(frozen=True)
class Subject:
    """One thing or person of a clip and the references that may stand for it; ids are unique within the clip."""

    subject_id: str
    phrase: str | None = None
    cls: str | None = None
    kind: str = "object"
    target: Target | None = None
    refs: tuple[Reference, ...] = ()


@dataclass(frozen=True)
class Clip:
    """One line of a manifest."""

    id: str
    source: str
    video: VideoSpan
    prompt: str
    subjects: tuple[Subject, ...]
    group_id: str | None = None
    prompt_alt: tuple[str, ...] = ()
    scores: ClipScores = ClipScores()
    meta: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def group(self) -> str:
        """What must not be split between training and validation: `group_id`, or the clip alone."""
        return self.id if self.group_id is None else self.group_id


# The order of a line's keys is that of the description above, not of the fields, which defaults come last in.
_CLIP_KEYS = ("id", "source", "group_id", "video", "prompt", "prompt_alt", "scores", "subjects", "meta")
_SIMPLE_KEYS = ("id", "group_id", "video", "prompt", "references", "meta")


def parse(entry: object, place: str) -> Clip:
    """The clip that a decoded line describes.

    Args:
        entry: what `json.loads` gave, in the full or in the simple form.
        place: what errors start with, such as "data.jsonl, row 3".

    Raises:
        ValueError: `place: field: what is wrong`, such as `place: subjects[1].refs[0].box_space: is missing`.
    """
    if isinstance(entry, dict) and (isinstance(entry.get("video"), str) or "references" in entry):
        return _parse_simple(_Fields(entry, place, "", _SIMPLE_KEYS))
    clip = _Fields(entry, place, "", _CLIP_KEYS)
    subjects = tuple(_parse_subject(item) for item in clip.objects("subjects", _names(Subject)))
    seen: set[str] = set()
    for index, subject in enumerate(subjects):
        if subject.subject_id in seen:
            clip.fail(f"subjects[{index}].subject_id", f"{subject.subject_id!r} is used twice in this clip")
        seen.add(subject.subject_id)
    video = _parse_video(clip.object("video", _names(VideoSpan), required=True))
    _check_targets(clip, video, subjects)
    return Clip(
        id=clip.text("id", required=True),
        source=clip.choice("source", SOURCES),
        group_id=clip.text("group_id"),
        video=video,
        prompt=clip.text("prompt", required=True),
        prompt_alt=clip.texts("prompt_alt"),
        scores=_parse_scores(clip, ClipScores),
        subjects=subjects,
        meta=clip.free("meta"),
    )


def to_dict(clip: Clip) -> dict[str, Any]:
    """The line of a clip, ready for JSON: keys in a fixed order, absent values left out.

    `parse(to_dict(clip), place) == clip`, and a full line without absent values comes back as it was.
    """
    return _plain({key: getattr(clip, key) for key in _CLIP_KEYS if key != "meta"}) | (
        {"meta": clip.meta} if clip.meta else {}
    )


def parse_line(line: bytes, place: str) -> Clip:
    """The clip of one line of a manifest.

    Raises:
        ValueError: starting with `place`, for text that is not UTF-8, not JSON or names a key twice, and as `parse`.
    """
    try:
        entry = json.loads(line.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 text ({error}); save the manifest as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from None
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
    """The file that a manifest in folder `root` means by `name`.

    Raises:
        ValueError: if the name is not one, or leads outside of the folder, also by a symbolic link.
    """
    problem = relative_path_problem(name)
    if problem:
        raise ValueError(problem)
    root = root.resolve()
    inside = (root / name).resolve()
    if not inside.is_relative_to(root):
        raise ValueError(f"{name!r} leads outside the manifest's folder by a link: copy the file into it")
    return inside


class _Fields:
    """One object of a line: takes typed values by key and names the place of whatever is wrong."""

    def __init__(self, value: object, place: str, where: str, known: Sequence[str]) -> None:
        self.place, self.where = place, where
        if not isinstance(value, dict):
            self.fail("", f"expected an object with {', '.join(known)}, got {shortened(value)}")
        self.values = {key: item for key, item in value.items() if item is not None and item not in ([], {})}
        for key in value:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
                self.fail(str(key)[:60], f"unknown key; {hint}")

    def fail(self, key: str, message: str) -> NoReturn:
        where = ".".join(filter(None, (self.where, key)))
        text = ": ".join(filter(None, (self.place, where, message)))
        # A key may hold half of a surrogate pair, which no log takes.
        raise ValueError(text.encode("utf-8", "backslashreplace").decode("utf-8"))

    def has(self, key: str) -> bool:
        return key in self.values

    def need(self, key: str) -> Any:
        if key not in self.values:
            self.fail(key, "is missing")
        return self.values[key]

    def text(self, key: str, *, required: bool = False) -> str | None:
        if not required and key not in self.values:
            return None
        return self._checked_text(key, self.need(key))

    def texts(self, key: str) -> tuple[str, ...]:
        return tuple(self._checked_text(f"{key}[{i}]", item) for i, item in enumerate(self._list(key)))

    def _checked_text(self, key: str, value: object) -> str:
        if not isinstance(value, str) or not value.strip():
            self.fail(key, f"expected text that is not empty, got {shortened(value)}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            self.fail(key, f"holds half of a surrogate pair, which is not text: {shortened(value)}")
        return value

    def path(self, key: str) -> str | None:
        value = self.text(key)
        return None if value is None else self.checked_path(key, value)

    def checked_path(self, key: str, value: object) -> str:
        name = self._checked_text(key, value)
        problem = relative_path_problem(name)
        if problem:
            self.fail(key, problem)
        return name

    def choice(self, key: str, options: Sequence[str]) -> str:
        value = self.need(key)
        if value not in options or not isinstance(value, str):
            self.fail(key, f"expected one of {', '.join(options)}, got {shortened(value)}")
        return value

    def integer(self, key: str, least: int) -> int | None:
        value = self.values.get(key)
        if value is not None and not (_is_number(value) and isinstance(value, int) and value >= least):
            self.fail(key, f"expected a whole number, at least {least}, got {shortened(value)}")
        return value

    def number(self, key: str, least: float = -_LARGEST, below: float = _LARGEST) -> float | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not _is_number(value):
            self.fail(key, f"expected a finite number, got {shortened(value)}")
        if not least <= value < below:
            limits = f"at least {least:g}" + (f" and below {below:g}" if below < _LARGEST else "")
            self.fail(key, f"expected a number of {limits}, got {shortened(value)}")
        return value

    def box(self, key: str, *, pixels: bool = False) -> Any:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 4 or not all(_is_number(item) for item in value):
            self.fail(key, f"expected four finite numbers [x0, y0, x1, y1], got {shortened(value)}")
        if value[0] >= value[2] or value[1] >= value[3]:
            self.fail(key, f"expected x0 < x1 and y0 < y1, got {shortened(value)}")
        if pixels and not all(isinstance(item, int) and item >= 0 for item in value):
            self.fail(key, f"expected whole pixels, none negative, got {shortened(value)}")
        return tuple(value)

    def mask(self, key: str) -> RunLengthMask | None:
        value = self.values.get(key)
        if value is None:
            return None
        inner = _Fields(value, self.place, ".".join(filter(None, (self.where, key))), ("size", "counts"))
        try:
            return parse_mask(inner.values)
        except ValueError as error:
            self.fail(key, str(error))

    def object(self, key: str, known: Sequence[str], *, required: bool = False) -> _Fields | None:
        value = self.need(key) if required else self.values.get(key)
        if value is None:
            return None
        return _Fields(value, self.place, ".".join(filter(None, (self.where, key))), known)

    def objects(self, key: str, known: Sequence[str]) -> list[_Fields]:
        self.need(key)
        prefix = ".".join(filter(None, (self.where, key)))
        return [_Fields(item, self.place, f"{prefix}[{i}]", known) for i, item in enumerate(self._list(key))]

    def _list(self, key: str) -> list[Any]:
        value = self.values.get(key, [])
        if not isinstance(value, list):
            self.fail(key, f"expected a list, got {shortened(value)}")
        return value

    def free(self, key: str) -> dict[str, Any]:
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            self.fail(key, f"expected an object, got {shortened(value)}")
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except (TypeError, ValueError, RecursionError) as error:
            self.fail(key, f"cannot be written as JSON ({error})")
        return value


def _parse_simple(line: _Fields) -> Clip:
    line.need("references")
    names = line._list("references")
    if len(names) > MAX_REFERENCES:
        line.fail("references", f"{len(names)} references; 1 to {MAX_REFERENCES} are possible")
    pictures = [line.checked_path(f"references[{i}]", name) for i, name in enumerate(names)]
    line.need("video")
    return Clip(
        id=line.text("id", required=True),
        source="custom",
        group_id=line.text("group_id"),
        video=VideoSpan(line.path("video")),
        prompt=line.text("prompt", required=True),
        subjects=tuple(
            Subject(subject_id=str(number), refs=(Reference(pair="cross", image=name, bg="raw"),))
            for number, name in enumerate(pictures, 1)
        ),
        meta=line.free("meta"),
    )


def _parse_video(span: _Fields) -> VideoSpan:
    span.need("path")
    video = VideoSpan(
        path=span.path("path"),
        start_frame=span.integer("start_frame", 0),
        end_frame=span.integer("end_frame", 1),
        start_s=span.number("start_s", 0),
        end_s=span.number("end_s", 0),
        fps=span.number("fps", 0),
        width=span.integer("width", 1),
        height=span.integer("height", 1),
        crop_xyxy=span.box("crop_xyxy", pixels=True),
    )
    by_frames = [key for key in ("start_frame", "end_frame") if span.has(key)]
    by_seconds = [key for key in ("start_s", "end_s") if span.has(key)]
    if by_frames and by_seconds:
        span.fail(by_seconds[0], f"the span is already given in frames by {by_frames[0]}: use one of the two")
    for start, end, key in (
        (video.start_frame, video.end_frame, "end_frame"),
        (video.start_s, video.end_s, "end_s"),
    ):
        if end is not None and end <= (start or 0):
            span.fail(
                key, f"{end} is not after the start {0 if start is None else start}; ends are exclusive"
            )
    if video.fps == 0:
        span.fail("fps", "expected a number above 0, got 0")
    if span.has("width") != span.has("height"):
        span.fail("height" if span.has("width") else "width", "is missing: give width and height, or neither")
    crop, size = video.crop_xyxy, (video.width, video.height)
    if crop and None not in size and (crop[2] > size[0] or crop[3] > size[1]):
        span.fail("crop_xyxy", f"{list(crop)} exceeds the frame of {size[0]}x{size[1]} pixels")
    return video


def _parse_subject(subject: _Fields) -> Subject:
    target = subject.object("target", _names(Target))
    return Subject(
        subject_id=subject.text("subject_id", required=True),
        phrase=subject.text("phrase"),
        cls=subject.text("cls"),
        kind=subject.choice("kind", KINDS),
        target=None if target is None else _parse_target(target),
        refs=tuple(_parse_reference(item) for item in subject.objects("refs", _names(Reference))),
    )


def _parse_region(item: _Fields) -> dict[str, Any]:
    """The keys that say what part of which frame: shared by targets and references."""
    if item.has("frame") and item.has("frame_frac"):
        item.fail("frame_frac", "the frame is already given by frame: use one of the two")
    box, mask = item.box("bbox_xyxy"), item.mask("mask_rle")
    space = item.choice("box_space", BOX_SPACES) if box or mask or item.has("box_space") else None
    if space and not (box or mask):
        item.fail("box_space", "has no bbox_xyxy or mask_rle that it could apply to")
    frame, share = item.integer("frame", 0), item.number("frame_frac", 0, 1)
    return {
        "frame": frame,
        "frame_frac": share,
        "bbox_xyxy": box,
        "box_space": space,
        "mask_rle": mask,
    }


def _parse_target(item: _Fields) -> Target:
    target = Target(**_parse_region(item))
    if target.frame is None and target.frame_frac is None:
        item.fail("frame", "is missing: give frame or frame_frac")
    if target.box_space is None:
        item.fail("bbox_xyxy", "is missing: a target has a bbox_xyxy or a mask_rle")
    return target


def _parse_reference(item: _Fields) -> Reference:
    span = item.object("video", _names(VideoSpan))
    reference = Reference(
        pair=item.choice("pair", PAIRS),
        image=item.path("image"),
        video=None if span is None else _parse_video(span),
        **_parse_region(item),
        bg=item.choice("bg", BACKGROUNDS) if item.has("bg") else None,
        scores=_parse_scores(item, ReferenceScores),
        source_id=item.text("source_id"),
        source_group=item.text("source_group"),
    )
    if reference.image and reference.video:
        item.fail("video", "the reference is already given by image: use one of the two")
    if reference.image:
        for key in ("frame", "frame_frac"):
            if item.has(key):
                item.fail(key, "a picture has no frames")
        if reference.box_space == "cropped_frame":
            item.fail("box_space", "a picture has no cropped_frame: use frame")
    elif reference.video:
        if reference.frame is None and reference.frame_frac is None:
            item.fail("frame", "is missing: a video needs frame or frame_frac")
        _check_frame(item, "", reference.video, reference)
        if reference.bg == "white" and reference.mask_rle is None:
            item.fail("mask_rle", 'is missing: bg "white" cannot be cut from a video without it')
    else:
        item.fail("image", "is missing: give image or video")
    return reference


def _check_targets(clip: _Fields, video: VideoSpan, subjects: Sequence[Subject]) -> None:
    for index, subject in enumerate(subjects):
        if subject.target is not None:
            _check_frame(clip, f"subjects[{index}].target.", video, subject.target)


def _check_frame(item: _Fields, prefix: str, video: VideoSpan, region: Target | Reference) -> None:
    """What a frame's region needs of the video that it is in."""
    if region.frame is not None:
        end = video.end_frame
        if region.frame < (video.start_frame or 0) or (end is not None and region.frame >= end):
            span = f"[{video.start_frame or 0}, {'end' if end is None else end})"
            item.fail(f"{prefix}frame", f"{region.frame} lies outside the span {span} of its video")
    if region.box_space == "cropped_frame" and video.crop_xyxy is None:
        item.fail(f"{prefix}box_space", "is cropped_frame, but its video has no crop_xyxy")


def _parse_scores(item: _Fields, kind: type) -> Any:
    scores = item.object("scores", _names(kind))
    return kind() if scores is None else kind(**{key: scores.number(key) for key in _names(kind)})


@cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(item.name for item in fields(kind))


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as JSON's objects and lists, absent values left out."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if is_dataclass(value):
        value = {name: getattr(value, name) for name in _names(type(value))}
    if isinstance(value, dict):
        plain = {key: _plain(item) for key, item in value.items()}
        return {key: item for key, item in plain.items() if item is not None and item not in ([], {})}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _is_number(value: object) -> bool:
    # Comparing comes first: an integer of a thousand digits does not fit into a float.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -_LARGEST < value < _LARGEST


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} occurs twice in one object")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")
