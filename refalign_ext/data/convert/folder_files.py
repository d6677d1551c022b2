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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from refalign_ext.data.conversion_report import ConversionReport

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"]
)
PICTURE_SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"])
_REFERENCE = re.compile(r"(?P<clip>.+)\.ref(?P<subject>\d{0,4})(?P<picture>[a-z]?)\.\w+")


def rows_in_folder(
    base: Path, prompt_suffix: str, report: ConversionReport
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(the video's name below `base`, what belongs to it as `ClipMaker` takes it), in the order of the names."""
    for folder, folders, names in os.walk(base):
        here = Path(folder)
        for name in folders:
            if (here / name).is_symlink():
                report.drop("clips", "folder_is_a_link", os.path.relpath(here / name, base))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from _rows_beside(
            here, sorted(name for name in names if name[0] != "."), base, prompt_suffix, report
        )


def _rows_beside(
    folder: Path, names: Sequence[str], base: Path, prompt_suffix: str, report: ConversionReport
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The clips whose files lie in this one folder."""
    by_lower = {name.lower(): folder / name for name in names}
    beside: dict[str, dict[str, Any]] = defaultdict(dict)
    videos: dict[str, Path] = {}
    for name in names:
        stem, suffix = os.path.splitext(name.lower())
        if suffix in VIDEO_SUFFIXES and videos.setdefault(stem, folder / name).name != name:
            report.drop("clips", "name_used_twice", os.path.relpath(folder / name, base))
        if match := _REFERENCE.fullmatch(name.lower()):
            key = f"ref{int(match['subject'] or 1)}"
            if suffix == ".txt":
                beside[match["clip"]][f"{key}_phrase"] = folder / name
            elif suffix in PICTURE_SUFFIXES:
                beside[match["clip"]].setdefault(key + match["picture"], []).append(folder / name)
    for stem in sorted(beside.keys() - videos.keys()):
        report.drop("references", "no_video_beside", os.path.relpath(folder / stem, base), len(beside[stem]))
    for stem, video in sorted(videos.items()):
        values = beside.get(stem, {}) | {"video": video, "prompt": by_lower.get(stem + prompt_suffix)}
        yield os.path.relpath(video, base), values
