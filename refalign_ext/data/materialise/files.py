"""A manifest whose references are picture files, and whose videos are where they were, linked or copied."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refalign_ext.atomic_io import atomic_open, atomic_path
from refalign_ext.data.clip_set import MANIFEST
from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.manifest_file import ManifestReader, index_path
from refalign_ext.data.materialise.row import CroppedRow, MaterialiseJob, suffix
from refalign_ext.data.media_source import Media, MediaBytes
from refalign_ext.data.schema import VideoSpan

PICTURES, FILES = "references", "media"
_PICTURE = re.compile(r"[0-9]{8,}-[A-Za-z0-9_-]*-[0-9]+-[0-9]+\.png")


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
        folder = self._pictures_folder(rows)
        old = set(os.listdir(folder)) if folder.exists() else set()
        foreign = sorted(name for name in old if not _PICTURE.fullmatch(name))
        if foreign:
            raise OSError(
                f"{folder / foreign[0]} is in the way and not from an earlier run: move it elsewhere"
            )
        report, lines, pictures = ConversionReport(), [], set[str]()
        for cropped in self.crop_rows(rows, report):
            images = {}
            for (i, j), picture in cropped.pictures.items():
                if isinstance(picture, bytes):
                    name = f"{cropped.row:08d}-{_safe(cropped.clip.id)}-{i}-{j}.png"
                    with atomic_open(folder / name, self.parts) as file:
                        file.write(picture)
                    pictures.add(name)
                    images[i, j] = f"{PICTURES}/{folder.name}/{name}"
                else:
                    name = f"{cropped.row:08d}-{i}-{j}{cropped.suffix((i, j))}"
                    images[i, j] = self._placed(picture, name)
            line = self.line(cropped, self._video(cropped), images, report)
            if line is not None:
                lines.append(line)
        for name in old - pictures:
            (folder / name).unlink()
        return {"report": report.to_dict(), "pictures": len(pictures)}, lines

    def stands(self, rows: range, header: dict[str, Any]) -> bool:
        return not header["pictures"] or len(os.listdir(self._pictures_folder(rows))) == header["pictures"]

    def join(self) -> None:
        target = self.out / MANIFEST
        # Not among the parts: another share may be at this too, and clear them away.
        joined = self.folder / f"{MANIFEST}.{uuid.uuid4().hex}"
        try:
            with joined.open("xb") as manifest:
                for rows in self.pieces():
                    manifest.writelines(self.lines(rows))
                manifest.flush()
                os.fsync(manifest.fileno())
            # A manifest that says what it said keeps its time of change, by which others know it.
            if not (target.is_file() and filecmp.cmp(joined, target, shallow=False)):
                index_path(target).unlink(missing_ok=True)
                os.replace(joined, target)
            ManifestReader(target).close()  # builds the index
        finally:
            joined.unlink(missing_ok=True)

    def _pictures_folder(self, rows: range) -> Path:
        return self.out / PICTURES / f"{self.number(rows):06d}"

    def _video(self, cropped: CroppedRow) -> VideoSpan:
        span = cropped.clip.video
        return replace(span, path=self._placed(cropped.video, f"{cropped.row:08d}{suffix(span.path)}"))

    def _placed(self, media: Media, name: str) -> str:
        """The path relative to `out` of a file that is used as it is; puts it there unless it already is inside."""
        if isinstance(media, MediaBytes):
            target = self.out / FILES / name
            with atomic_open(target, self.parts) as file:
                file.write(media.data)
            return target.relative_to(self.out).as_posix()
        if media.is_relative_to(self.out):
            return media.relative_to(self.out).as_posix()
        target = self.out / FILES / media.relative_to(self.clip_set.path.parent.resolve())
        if not self._is_there(media, target):
            try:
                with atomic_path(target, self.parts) as path:
                    shutil.copy2(media, path) if self.copy else os.link(media, path)
            except OSError as error:
                remedy = "; give --copy, or an --out on the disk of the videos or above them"
                raise OSError(
                    f"{media} cannot be put into {self.out} ({error.strerror}){'' if self.copy else remedy}"
                ) from error
        return target.relative_to(self.out).as_posix()

    def _is_there(self, source: Path, target: Path) -> bool:
        try:
            there, wanted = target.stat(), source.stat()
        except FileNotFoundError:
            return False
        if self.copy:
            return (there.st_size, there.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns)
        return os.path.samestat(there, wanted)


def _safe(name: str) -> str:
    """A part of a file name that says which clip it is; rows tell apart what looks the same."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:48]
