"""A clip of the user's own, as a folder's names or a row of a table describe it."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from refalign_ext.data.conversion_report import ConversionReport, Unusable
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan, resolve_inside

NUMBERED = re.compile(r"ref(?P<subject>\d{1,4})(?P<picture>[a-z]?)(?P<phrase>_phrase)?")
SPAN_KEYS = ("start_s", "end_s", "start_frame", "end_frame", "fps")
MAX_PROMPT_BYTES = 1 << 16


class ClipMaker:
    """Makes clips of what is known about each by key; videos are not looked at, pictures have to be there.

    Keys are `video`, `prompt`, `id`, `group_id`, those of `SPAN_KEYS`, and for pictures `references` and what `NUMBERED`
    describes: "ref1a" for a picture, or a list of pictures, of the first subject, "ref1_phrase" for its name. File names
    are relative to `base`; a prompt or a phrase that is a `Path` is read from that file.

    Args:
        root: the folder of the manifest, resolved, which paths in it are relative to.
        base: what file names are relative to, resolved.
        pair: of all references, see `Reference`.
        by_folder: clips of one folder form a group.
        report: what can be left out of a clip is counted here.
    """

    def __init__(self, root: Path, base: Path, pair: str, by_folder: bool, report: ConversionReport) -> None:
        self.root, self.base, self.pair, self.by_folder, self.report = root, base, pair, by_folder, report
        self._rows, self._seen = 0, set[int]()  # hashes of ids: eight bytes each tell as much

    def clip(self, values: Mapping[str, Any]) -> Clip:
        """The clip.

        Raises:
            Unusable: if there is none.
        """
        self._rows += 1
        video = self._inside(values.get("video"), "no_video")
        prompt = self._text(values.get("prompt"))
        if not prompt:
            raise Unusable("no_prompt")
        span = _span(video, values)
        subjects = self._subjects(values)
        if not subjects:
            raise Unusable("no_reference")
        folder = os.path.relpath(self.root / os.path.dirname(video), self.base)
        group = self._text(values.get("group_id")) or (folder if self.by_folder and folder != "." else None)
        return Clip(self._identity(values, video), "custom", span, prompt, subjects, group_id=group)

    def _identity(self, values: Mapping[str, Any], video: str) -> str:
        """The row's id, or one made of the video's name and where in it the clip starts."""
        identity = self._text(values.get("id"))
        if not identity:
            start = self._text(values.get("start_frame")) or self._text(values.get("start_s"))
            identity = os.path.splitext(video)[0] + (f"@{float(start):g}" if start else "")
            if hash(identity) in self._seen:
                identity = f"{identity}#{self._rows}"
        if hash(identity) in self._seen:
            raise Unusable("id_used_twice", identity)
        self._seen.add(hash(identity))
        return identity

    def _subjects(self, values: Mapping[str, Any]) -> tuple[Subject, ...]:
        """Subjects by their numbers; those without a picture are left out."""
        named: list[tuple[int, str, Any]] = []  # subject, picture, name of a file or list of names
        for key, value in values.items():
            if (match := NUMBERED.fullmatch(key)) and not match["phrase"]:
                named.append((int(match["subject"]), match["picture"], value))
        following = max((number for number, *_ in named), default=0) + 1
        named += [
            (number, "", value) for number, value in enumerate(_listed(values.get("references")), following)
        ]
        pictures: dict[int, list[Reference]] = defaultdict(list)
        for number, _, value in sorted(named, key=lambda item: item[:2]):
            for name in value if isinstance(value, list) else [value]:
                try:
                    reference = self._reference(name)
                    pictures[number].append(reference)
                except Unusable as problem:
                    self.report.drop("references", problem.reason, str(problem))
        phrases: dict[int, str] = {}
        for number in pictures:
            with suppress(Unusable):  # a file that costs nothing but itself
                phrases[number] = self._text(values.get(f"ref{number}_phrase"))
        return tuple(
            Subject(str(number), phrase=phrases.get(number) or None, refs=tuple(pictures[number]))
            for number in sorted(pictures)
        )

    def _reference(self, name: Any) -> Reference:
        inside = self._inside(name, "not_a_file_name")
        path = self.root / inside
        if not (os.path.isfile(path) and os.path.getsize(path)):
            raise Unusable("file_missing", inside)
        return Reference(pair=self.pair, image=inside, bg="raw")

    def _inside(self, name: Any, reason_if_none: str = "") -> str:
        """The name of a file relative to the manifest's folder, which it may not leave, also not by a link."""
        if not isinstance(name, (str, Path)) or not str(name).strip():
            raise Unusable(reason_if_none, "" if name is None else name)
        name = name.strip() if isinstance(name, str) else name
        name = Path(os.path.relpath(self.base / name, self.root)).as_posix()
        try:
            resolve_inside(self.root, name)
        except (ValueError, OSError):
            raise Unusable("outside_folder", name) from None
        return name

    def _text(self, value: Any) -> str:
        """A cell, or the text of a file, on one line; "" if it is none."""
        if isinstance(value, Path):
            value = self._read_text(value)
        return " ".join(str(value).split()) if isinstance(value, (str, int, float)) else ""

    def _read_text(self, path: Path) -> str:
        name = self._inside(path)
        try:
            if not path.is_file():  # opening a pipe would wait for ever
                raise Unusable("prompt_unreadable", name)
            with path.open("rb") as file:
                data = file.read(MAX_PROMPT_BYTES + 1)
            text = data.decode(text_encoding(data))
        except (OSError, UnicodeDecodeError) as error:
            raise Unusable("prompt_unreadable", f"{name} ({error})") from None
        if len(data) > MAX_PROMPT_BYTES:
            raise Unusable("prompt_unreadable", f"{name} has more than {MAX_PROMPT_BYTES} bytes")
        return text


def text_encoding(start: bytes) -> str:
    """The encoding of a text by its first bytes: UTF-16, which some programs save, starts with a mark."""
    return "utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"


def _span(video: str, values: Mapping[str, Any]) -> VideoSpan:
    """The part of the video that a row names; whether there is such a part is seen later."""
    try:
        numbers = {key: float(values[key]) for key in SPAN_KEYS if key in values}
        rate = numbers.pop("fps", None)
        if rate is not None and not {"start_s", "end_s"} & numbers.keys():
            numbers = {key.replace("_frame", "_s"): number / rate for key, number in numbers.items()}
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise Unusable("not_valid", error) from None
    is_frame = {key: key.endswith("_frame") and number.is_integer() for key, number in numbers.items()}
    return VideoSpan(
        video, **{key: int(number) if is_frame[key] else number for key, number in numbers.items()}
    )


def _listed(value: Any) -> list[Any]:
    """The subjects' pictures: a list as JSON lines have it, or the text of a cell."""
    if not isinstance(value, str):
        return value if isinstance(value, list) else [] if value is None else [value]
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return [value]
    return [name for name in value.split(";") if name.strip()]
