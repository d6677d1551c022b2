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
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from refalign_ext.data.conversion_report import Report
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan, parse, resolve_inside, to_dict

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"]
)
PICTURE_SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"])
MAX_PROMPT_BYTES = 1 << 16
_REFERENCE = re.compile(
    r"(?P<clip>.+)\.ref(?P<subject>\d{0,4})(?P<picture>[a-z]?)(?P<suffix>\.\w+)", re.IGNORECASE
)


class Found:
    """What a folder holds, counted by suffix in lower case, for the hint that is given when nothing fits."""

    def __init__(self) -> None:
        self.suffixes: Counter[str] = Counter()
        self.prompts = 0
        self.references = 0

    @property
    def videos(self) -> int:
        return sum(count for suffix, count in self.suffixes.items() if suffix in VIDEO_SUFFIXES)

    @property
    def pictures(self) -> int:
        return sum(count for suffix, count in self.suffixes.items() if suffix in PICTURE_SUFFIXES)

    def hint(self, prompt_suffix: str) -> str | None:
        """What files are missing altogether, and what to do."""
        if not self.videos:
            listed = ", ".join(f"{count} {suffix}" for suffix, count in self.suffixes.most_common(5))
            return f"found no video ({listed or 'no files at all'}); known are {', '.join(sorted(VIDEO_SUFFIXES))}"
        common = next(suffix for suffix, _ in self.suffixes.most_common() if suffix in VIDEO_SUFFIXES)
        found = f"found {self.videos} videos ({common})"
        if not self.prompts:
            return (
                f"{found} but no {prompt_suffix} beside them: write one prompt per clip, such as "
                f"clip{prompt_suffix} for clip{common}"
            )
        if not self.references:
            return (
                f"{found} and {self.pictures} pictures, none of them named as a reference: call the pictures of "
                f"clip{common} clip.ref1.png, clip.ref2.png"
            )
        return None


def clips_in_folder(
    source: Path, root: Path, prompt_suffix: str, pair: str, by_folder: bool, report: Report, found: Found
) -> Iterator[Clip]:
    """The clips of a folder in the order of their names, their videos not looked at.

    Args:
        source: the folder, somewhere in `root`; both resolved.
        root: the folder of the manifest, which paths are relative to.
        prompt_suffix: of the files that hold prompts, such as ".txt".
        pair: of all references, see `Reference`.
        by_folder: whether clips of one folder form a group; clips at the top of `source` have none.
        report, found: what could not be used, and what there is, are added to these.
    """
    for folder, folders, names in os.walk(source):
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                report.drop("clips", "folder_is_a_link", os.path.relpath(os.path.join(folder, name), root))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(folder)
        group = here.relative_to(source).as_posix() if by_folder and here != source else None
        shown = sorted(name for name in names if not name.startswith("."))
        yield from _clips_beside(here, shown, root, prompt_suffix, pair, group, report, found)


def _clips_beside(
    folder: Path,
    names: Sequence[str],
    root: Path,
    prompt_suffix: str,
    pair: str,
    group: str | None,
    report: Report,
    found: Found,
) -> Iterator[Clip]:
    """The clips whose files lie in this one folder."""
    by_lower = {name.lower(): name for name in names}
    beside: dict[str, list[tuple[int, str, str, str]]] = defaultdict(list)  # subject, picture, suffix, name
    videos: dict[str, str] = {}
    for name in names:
        stem, suffix = os.path.splitext(name.lower())
        found.suffixes[suffix] += 1
        if suffix in VIDEO_SUFFIXES:
            if stem in videos:
                report.drop("clips", "name_used_twice", _shown(folder / name, root))
            else:
                videos[stem] = name
        match = _REFERENCE.fullmatch(name)
        if match and suffix in PICTURE_SUFFIXES | {".txt"}:
            number = int(match["subject"] or 1)
            beside[match["clip"].lower()].append((number, match["picture"].lower(), suffix, name))
            found.references += suffix in PICTURE_SUFFIXES
        elif name.lower().endswith(prompt_suffix):
            found.prompts += 1
    for stem in sorted(beside.keys() - videos.keys()):
        for *_, suffix, name in beside[stem]:
            if suffix in PICTURE_SUFFIXES:
                report.drop("references", "no_video_beside", _shown(folder / name, root))
    for stem, name in videos.items():
        prompt_name = by_lower.get(stem + prompt_suffix)
        if prompt_name is None:
            report.drop("clips", "no_prompt_file", _shown(folder / name, root))
            continue
        path = inside(folder / name, root)
        if path is None:
            report.drop("clips", "outside_folder", _shown(folder / name, root))
            continue
        identity = os.path.splitext(path)[0]
        prompt, problem = _read_prompt(folder / prompt_name, root)
        if problem:
            report.drop("clips", problem, identity)
            continue
        subjects = _subjects(folder, sorted(beside.get(stem, [])), root, pair, report)
        if not subjects:
            report.drop("clips", "no_reference", identity)
            continue
        clip = Clip(identity, "custom", VideoSpan(path), prompt, subjects, group_id=group)
        if is_valid(clip, report):
            yield clip


def _subjects(
    folder: Path, files: Sequence[tuple[int, str, str, str]], root: Path, pair: str, report: Report
) -> tuple[Subject, ...]:
    phrases: dict[int, str] = {}
    pictures: dict[int, list[Reference]] = defaultdict(list)
    for number, _, suffix, name in files:
        if suffix == ".txt":
            # A phrase that cannot be read costs nothing but itself.
            phrase, problem = _read_prompt(folder / name, root)
            if not problem:
                phrases[number] = phrase
        elif reference := picture(folder / name, root, pair, report):
            pictures[number].append(reference)
    return tuple(
        Subject(str(number), phrase=phrases.get(number), refs=tuple(pictures[number]))
        for number in sorted(pictures)
    )


def picture(path: Path, root: Path, pair: str, report: Report) -> Reference | None:
    """A picture file as a reference; None, and counted, if it cannot be one."""
    name = inside(path, root)
    if name is None:
        report.drop("references", "outside_folder", _shown(path, root))
        return None
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError:
        size = None
    if not size:
        report.drop("references", "file_missing" if size is None else "file_empty", name)
        return None
    return Reference(pair=pair, image=name, bg="raw")


def inside(path: Path, root: Path) -> str | None:
    """The name of a file relative to `root` (resolved), or None if it lies elsewhere, also by a link."""
    name = Path(os.path.relpath(path, root)).as_posix()
    try:
        resolve_inside(root, name)
    except (ValueError, OSError, RuntimeError):  # links in circles are a RuntimeError
        return None
    return name


def is_valid(clip: Clip, report: Report) -> bool:
    """Whether a manifest can hold this clip; counted if not."""
    try:
        parse(to_dict(clip), clip.id)
    except ValueError as error:
        report.drop("clips", "not_valid", str(error))
        return False
    return True


def text_of(data: bytes) -> str:
    """Text in UTF-8, or in UTF-16 if it starts with that mark, as some editors save it; without the mark.

    Raises:
        UnicodeDecodeError: if it is neither.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def _read_prompt(path: Path, root: Path) -> tuple[str, str | None]:
    """The text of a file on one line, and under which reason it cannot be used."""
    if inside(path, root) is None:
        return "", "prompt_outside_folder"
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return "", "prompt_unreadable"
        with path.open("rb") as file:
            data = file.read(MAX_PROMPT_BYTES + 1)
        text = " ".join(text_of(data).split())
    except OSError:
        return "", "prompt_unreadable"
    except UnicodeDecodeError:
        return "", "prompt_not_utf8"
    if len(data) > MAX_PROMPT_BYTES:
        return "", "prompt_too_long"
    return text, None if text else "prompt_empty"


def _shown(path: Path, root: Path) -> str:
    return os.path.relpath(path, root)
