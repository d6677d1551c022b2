"""A piece of rows as files of their own: pictures in one folder, videos where they are, linked or copied."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from refalign_ext.atomic_io import atomic_open
from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.materialise.row import Position, finished_line, suffix, usable_rows, with_files
from refalign_ext.data.media_source import Media, MediaBytes

PICTURES, FILES = "references", "media"
_PICTURE = re.compile(r"[0-9]{8,}-[A-Za-z0-9_-]*-[0-9]+-[0-9]+\.png")


@dataclass(frozen=True)
class Place:
    """Where a piece comes from and goes to.

    Attributes:
        out: the resolved folder of the new clip set; parts: where files lie until they are complete.
        copy: copy files instead of linking them.
    """

    clip_set: ClipSet
    out: Path
    parts: Path
    copy: bool = False


def pictures_folder(out: Path, number: int) -> Path:
    """Where the pictures of a piece are."""
    return out / PICTURES / f"{number:06d}"


def cut_piece(place: Place, number: int, rows: range, report: ConversionReport) -> tuple[list[bytes], int]:
    """Writes the pictures of a piece into its folder, which appears complete, and links the files that need no cutting.

    Returns:
        (the lines of its rows, how many pictures are in the folder).

    Raises:
        OSError: if something cannot be written, linked or copied.
    """
    target = pictures_folder(place.out, number)
    aside = place.parts / f"{target.name}.{uuid.uuid4().hex}"
    aside.mkdir(parents=True)
    lines, count = [], 0
    try:
        for cut in usable_rows(place.clip_set, rows, report):
            images: dict[Position, str] = {}
            for (i, j), picture in cut.pictures.items():
                if isinstance(picture, bytes):
                    name = f"{cut.row:08d}-{_safe(cut.clip.id)}-{i}-{j}.png"
                    _write(aside / name, picture)
                    count += 1
                    images[i, j] = f"{PICTURES}/{target.name}/{name}"
                else:
                    images[i, j] = _placed(
                        place, picture, f"{cut.row:08d}-{i}-{j}{suffix(cut.image_name(i, j))}"
                    )
            video = replace(
                cut.clip.video, path=_placed(place, cut.video, f"{cut.row:08d}{suffix(cut.clip.video.path)}")
            )
            line = finished_line(place.clip_set, cut, with_files(cut.clip, video, images), report)
            if line is not None:
                lines.append(line)
        _remove_pictures(target)
        if count:
            target.parent.mkdir(exist_ok=True)
            os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return lines, count


def _remove_pictures(folder: Path) -> None:
    """Removes what an earlier run left in the folder of a piece, and nothing else."""
    if not folder.exists():
        return
    foreign = [name for name in os.listdir(folder) if not _PICTURE.fullmatch(name)]
    if foreign:
        raise OSError(f"{folder / foreign[0]} is in the way and not from an earlier run: move it elsewhere")
    shutil.rmtree(folder)


def _safe(name: str) -> str:
    """A part of a file name that says which clip it is; rows tell apart what looks the same."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:48]


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _placed(place: Place, media: Media, name: str) -> str:
    """The path relative to `out` of a file that is used as it is; puts it there unless it already is inside."""
    if isinstance(media, MediaBytes):
        target = place.out / FILES / name
        with atomic_open(target, place.parts) as file:
            file.write(media.data)
        return target.relative_to(place.out).as_posix()
    if media.is_relative_to(place.out):
        return media.relative_to(place.out).as_posix()
    target = place.out / FILES / media.relative_to(place.clip_set.path.parent.resolve())
    if not _is_there(media, target, place.copy):
        target.parent.mkdir(parents=True, exist_ok=True)
        place.parts.mkdir(parents=True, exist_ok=True)
        aside = place.parts / f"{uuid.uuid4().hex}.part"
        try:
            if place.copy:
                shutil.copy2(media, aside)
            else:
                os.link(media, aside)
            os.replace(aside, target)
        except OSError as error:
            remedy = (
                "" if place.copy else "; give --copy, or an --out on the disk of the videos or above them"
            )
            raise OSError(f"{media} cannot be put into {place.out} ({error.strerror}){remedy}") from error
        finally:
            aside.unlink(missing_ok=True)
    return target.relative_to(place.out).as_posix()


def _is_there(source: Path, target: Path, copy: bool) -> bool:
    try:
        there, wanted = target.stat(), source.stat()
    except FileNotFoundError:
        return False
    if copy:
        return (there.st_size, there.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns)
    return os.path.samestat(there, wanted)
