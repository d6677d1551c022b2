"""A manifest whose references are picture files, and whose videos are where they were, linked or copied."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refalign_ext.atomic_io import atomic_open, atomic_path
from refalign_ext.data.clip_set import MANIFEST
from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.manifest_file import ManifestReader
from refalign_ext.data.materialise.row import CroppedRow, MaterialiseJob, extension
from refalign_ext.data.media_source import Media, MediaBytes

PICTURES, FILES = "references", "media"
_PICTURE = re.compile(r"[0-9]{8,}-[A-Za-z0-9_-]*-[0-9]+-[0-9]+\.[a-z0-9]+")


@dataclass(frozen=True)
class FilesJob(MaterialiseJob):
    """Writes pictures and a manifest; `copy` copies videos instead of linking them."""

    copy: bool
    is_packed = False
    result = MANIFEST

    def make(self, rows: range) -> tuple[dict[str, Any], Iterable[bytes]]:
        """Writes the pictures of a piece into its folder, and links the files that need no cropping.

        Raises:
            OSError: if something cannot be written, linked or copied.
        """
        folder, report = self._pictures_folder(rows), ConversionReport()
        written: list[str] = []

        def write(cropped: CroppedRow) -> bytes:
            number, span = f"{cropped.row:08d}", cropped.clip.video
            # Which clip it is; rows tell apart what looks the same.
            label = re.sub(r"[^A-Za-z0-9_-]+", "_", cropped.clip.id)[:48]
            images = {}
            for (i, j), (ending, picture) in cropped.pictures.items():
                path = folder / f"{number}-{label}-{i}-{j}{ending}"
                images[i, j] = self._put(picture, path)
                if isinstance(picture, MediaBytes):
                    written.append(path.name)
            video = self._put(cropped.video, self.out / FILES / f"{number}{extension(span.path)}")
            return self.line(cropped, replace(span, path=video), images)

        lines = list(self.lines_of(rows, report, write))
        for path in folder.glob("*"):
            if _PICTURE.fullmatch(path.name) and path.name not in written:
                path.unlink()
        return {"report": report.to_dict(), "pictures": written}, lines

    def stands(self, rows: range, header: dict[str, Any]) -> bool:
        return all((self._pictures_folder(rows) / name).exists() for name in header["pictures"])

    def join(self) -> None:
        target = self.out / MANIFEST
        # Not among the parts: another share may be at this too, and clear them away.
        with atomic_path(target, self.folder) as joined:
            with joined.open("xb") as manifest:
                for rows in self.pieces():
                    manifest.writelines(self.lines(rows))
            # A manifest that says what it said keeps its time of change, by which others know it.
            if target.is_file() and filecmp.cmp(joined, target, shallow=False):
                shutil.copystat(target, joined)
        ManifestReader(target).close()  # builds the index

    def _pictures_folder(self, rows: range) -> Path:
        return self.out / PICTURES / f"{self.number(rows):06d}"

    def _put(self, media: Media, path: Path) -> str:
        """The path relative to `out` of a file: written to `path`, or linked unless it already is inside."""
        if isinstance(media, MediaBytes):
            with atomic_open(path, self.parts) as file:
                file.write(media.data)
        elif media.is_relative_to(self.out):
            path = media
        else:
            path = self.out / FILES / media.relative_to(self.clip_set.path.parent.resolve())
            if not _is_copy(path, media):
                self._link(media, path)
        return path.relative_to(self.out).as_posix()

    def _link(self, media: Path, target: Path) -> None:
        try:
            with atomic_path(target, self.parts) as path:
                shutil.copy2(media, path) if self.copy else os.link(media, path)
        except OSError as error:
            remedy = "" if self.copy else "; give --copy, or an --out on the disk of the videos or above them"
            raise OSError(f"{media} cannot be put into {self.out} ({error.strerror}){remedy}") from error


def _is_copy(path: Path, source: Path) -> bool:
    """Whether `path` is a link to, or has the size and time of change of `source`."""
    if not path.exists():
        return False
    there, wanted = path.stat(), source.stat()
    return (there.st_size, there.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns)
