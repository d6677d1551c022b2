"""Clips of a folder, by the names of the files that lie beside each other.

    clip.mp4          the video: mp4, mov, mkv, webm, avi, m4v, mpg, mpeg, ts, wmv or flv
    clip.txt          its prompt, UTF-8; several lines are joined
    clip.ref1.png     a picture of its first subject: png, jpg, jpeg, webp, bmp, tif or tiff
    clip.ref2.jpg     a picture of its second subject
    clip.ref3a.png    two pictures of its third subject, of which training takes one at a time
    clip.ref3b.png
    clip.ref1.txt     optional: what the first subject is called, such as "the red fox"

Any depth of folders; upper and lower case are the same; `clip.ref.png` is the first subject. Hidden files and folders,
whose names start with a dot, are passed over, and links to folders are not followed.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan, parse, resolve_inside, to_dict

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"]
)
PICTURE_SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"])
MAX_PROMPT_BYTES = 1 << 16
_REFERENCE = re.compile(r"(?P<clip>.+)\.ref(?P<subject>\d{0,4})(?P<picture>[a-z]?)\.\w+")
_PROMPTS, _REFERENCES = (
    "prompts",
    "references",
)  # counted beside suffixes, which are empty or start with a dot


@dataclass(frozen=True)
class DraftOptions:
    """How files and rows of a table become clips, and what became of them.

    Attributes:
        root: the folder of the manifest, resolved, which paths in it are relative to.
        base: the folder that is walked, or that the table's file names are relative to; resolved.
        pair: of all references, see `Reference`.
        by_folder: whether clips of one folder form a group; those at the top have none.
        prompt_suffix: of the files that hold prompts, in lower case.
        columns: names of a table's columns by what they hold, where they are not found by themselves.
        report: what could not be used is counted here.
    """

    root: Path
    base: Path
    pair: str
    by_folder: bool
    prompt_suffix: str
    columns: Mapping[str, str]
    report: ConversionReport = field(default_factory=ConversionReport)


def clips_in_folder(options: DraftOptions) -> Iterator[Clip]:
    """The clips of a folder in the order of their names, their videos not looked at."""
    for folder, folders, names in os.walk(options.base):
        here = Path(folder)
        for name in folders:
            if (here / name).is_symlink():
                options.report.drop("clips", "folder_is_a_link", os.path.relpath(here / name, options.root))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from _clips_beside(here, sorted(name for name in names if not name.startswith(".")), options)


def _clips_beside(folder: Path, names: Sequence[str], options: DraftOptions) -> Iterator[Clip]:
    """The clips whose files lie in this one folder."""
    report = options.report
    is_grouped = options.by_folder and folder != options.base
    group = folder.relative_to(options.base).as_posix() if is_grouped else None
    by_lower = {name.lower(): name for name in names}
    beside: dict[str, list[tuple[int, str, str, str]]] = defaultdict(list)  # subject, picture, suffix, name
    videos: dict[str, str] = {}

    def shown(name: str) -> str:
        return os.path.relpath(folder / name, options.root)

    for name in names:
        lower = name.lower()
        stem, suffix = os.path.splitext(lower)
        if suffix in VIDEO_SUFFIXES and videos.setdefault(stem, name) != name:
            report.drop("clips", "name_used_twice", shown(name))
        match = _REFERENCE.fullmatch(lower)
        if match and suffix in PICTURE_SUFFIXES | {".txt"}:
            beside[match["clip"]].append((int(match["subject"] or 1), match["picture"], suffix, name))
    for stem in sorted(beside.keys() - videos.keys()):
        for *_, suffix, name in beside[stem]:
            if suffix in PICTURE_SUFFIXES:
                report.drop("references", "no_video_beside", shown(name))
    for stem, name in sorted(videos.items()):
        prompt_name = by_lower.get(stem + options.prompt_suffix)
        if prompt_name is None:
            report.drop("clips", "no_prompt_file", shown(name))
            continue
        path = path_inside(folder / name, options.root)
        if path is None:
            report.drop("clips", "outside_folder", shown(name))
            continue
        identity = os.path.splitext(path)[0]
        prompt, problem = _read_prompt(folder / prompt_name, options.root)
        if problem:
            report.drop("clips", problem, identity)
            continue
        subjects = _subjects(folder, sorted(beside.get(stem, [])), options)
        if not subjects:
            report.drop("clips", "no_reference", identity)
            continue
        clip = Clip(identity, "custom", VideoSpan(path), prompt, subjects, group_id=group)
        if is_valid(clip, report):
            yield clip


def _subjects(
    folder: Path, files: Sequence[tuple[int, str, str, str]], options: DraftOptions
) -> tuple[Subject, ...]:
    phrases: dict[int, str] = {}
    pictures: dict[int, list[Reference]] = defaultdict(list)
    for number, _, suffix, name in files:
        if suffix == ".txt":
            # A phrase that cannot be read costs nothing but itself.
            phrase, problem = _read_prompt(folder / name, options.root)
            if not problem:
                phrases[number] = phrase
        elif reference := picture_reference(folder / name, options):
            pictures[number].append(reference)
    return numbered_subjects(pictures, phrases)


def numbered_subjects(
    pictures: Mapping[int, Sequence[Reference]], phrases: Mapping[int, str]
) -> tuple[Subject, ...]:
    """Subjects by their numbers; those without a picture are left out."""
    return tuple(
        Subject(str(number), phrase=phrases.get(number) or None, refs=tuple(pictures[number]))
        for number in sorted(pictures)
    )


def picture_reference(path: Path, options: DraftOptions) -> Reference | None:
    """A picture file as a reference; None, and counted, if it cannot be one."""
    name = path_inside(path, options.root)
    if name is None:
        options.report.drop("references", "outside_folder", os.path.relpath(path, options.root))
        return None
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError:
        size = None
    if not size:
        options.report.drop("references", "file_missing" if size is None else "file_empty", name)
        return None
    return Reference(pair=options.pair, image=name, bg="raw")


def path_inside(path: Path, root: Path) -> str | None:
    """The name of a file relative to `root` (resolved), or None if it lies elsewhere, also by a link."""
    name = Path(os.path.relpath(path, root)).as_posix()
    try:
        resolve_inside(root, name)
    except (ValueError, OSError, RuntimeError):  # links in circles are a RuntimeError
        return None
    return name


def is_valid(clip: Clip, report: ConversionReport) -> bool:
    """Whether a manifest can hold this clip; counted if not."""
    try:
        parse(to_dict(clip), clip.id)
    except ValueError as error:
        report.drop("clips", "not_valid", str(error))
        return False
    return True


def _read_prompt(path: Path, root: Path) -> tuple[str, str | None]:
    """The text of a file on one line, and under which reason it cannot be used."""
    if path_inside(path, root) is None:
        return "", "prompt_outside_folder"
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return "", "prompt_unreadable"
        with path.open("rb") as file:
            data = file.read(MAX_PROMPT_BYTES + 1)
        # Some editors save UTF-16, which starts with a mark.
        is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = " ".join(data.decode("utf-16" if is_utf16 else "utf-8-sig").split())
    except OSError:
        return "", "prompt_unreadable"
    except UnicodeDecodeError:
        return "", "prompt_not_utf8"
    if len(data) > MAX_PROMPT_BYTES:
        return "", "prompt_too_long"
    return text, None if text else "prompt_empty"
