"""Tar shards of rows: each row with its clip, trimmed where that saves much, and its pictures."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from refalign_ext.atomic_io import atomic_open
from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.materialise.row import CroppedRow, MaterialiseJob, drop_row, suffix
from refalign_ext.data.media_source import Media, MediaBytes
from refalign_ext.data.shards import (
    LISTING,
    MAX_MEMBER_BYTES,
    SHARD_FOLDER,
    ShardInfo,
    ShardWriter,
    sha256_of,
    shard_name,
    write_listing,
)


@dataclass(frozen=True)
class PackJob(MaterialiseJob):
    """Writes a shard for each piece, even if none of its rows can be used: shards are numbered without gaps."""

    is_packed = True
    result = LISTING

    def make(self, rows: range) -> tuple[dict[str, Any], Iterable[bytes]]:
        """Writes the shard of a piece.

        Raises:
            OSError: if it cannot be written, or a file changes while it is read.
        """
        # The listing of an earlier run would not be that of the shards any more.
        (self.out / LISTING).unlink(missing_ok=True)
        report, name = ConversionReport(), shard_name(self.number(rows))
        path = self.out / name
        with atomic_open(path, self.parts) as file:
            writer = ShardWriter(file)
            for cropped in self.crop_rows(rows, report):
                self._pack(cropped, writer, report)
            writer.close()
        info = ShardInfo(name, writer.samples, path.stat().st_size, sha256_of(path))
        return {"report": report.to_dict(), "shard": asdict(info)}, []

    def stands(self, rows: range, header: dict[str, Any]) -> bool:
        shard = self.out / shard_name(self.number(rows))
        return shard.stat().st_size == header["shard"]["bytes"]

    def join(self) -> None:
        pieces = self.pieces()
        write_listing(self.out, [ShardInfo(**self.read_header(rows)["shard"]) for rows in pieces])
        for path in (self.out / SHARD_FOLDER).iterdir():  # of an earlier, longer version of the rows
            if re.fullmatch(r"[0-9]{5,9}\.tar", path.name) and int(path.stem) >= len(pieces):
                path.unlink()

    def _pack(self, cropped: CroppedRow, writer: ShardWriter, report: ConversionReport) -> None:
        from refalign_ext.data.materialise.trimming import trim

        key, span, before = f"{cropped.row:09d}", cropped.clip.video, 0
        place, references = self.clip_set.place(cropped.row), len(cropped.pictures)
        video: Media | bytes = cropped.video
        with ExitStack() as stack:
            file, size = _contents(video, stack)
            if (span.start_frame, span.end_frame, span.start_s, span.end_s) != (None,) * 4:
                try:
                    trimmed = trim(video, span, size)
                except ValueError as error:
                    drop_row(report, cropped.clip, "span_unreadable", f"{place}: {error}", references)
                    return
                if trimmed is not None:
                    video, span, before = trimmed
                    file, size = _contents(video, stack)
            members = [(f"{key}{suffix(span.path)}", file, size)]
            images = {}
            for number, (position, picture) in enumerate(cropped.pictures.items()):
                images[position] = f"{key}.{number}{cropped.suffix(position)}"
                members.append((images[position], *_contents(picture, stack)))
            for member, _, size in members:
                if size > MAX_MEMBER_BYTES:
                    message = f"{place}: {member} has {size} bytes; {MAX_MEMBER_BYTES} are the most"
                    drop_row(report, cropped.clip, "file_too_large", message, references)
                    return
            line = self.line(cropped, replace(span, path=members[0][0]), images, report, before)
            if line is not None:
                writer.add(line, key, members)


def _contents(media: Media | bytes, stack: ExitStack) -> tuple[BinaryIO, int]:
    """An open file and its size."""
    if isinstance(media, Path):
        file = stack.enter_context(media.open("rb"))
        return file, os.fstat(file.fileno()).st_size
    data = media.data if isinstance(media, MediaBytes) else media
    return io.BytesIO(data), len(data)
