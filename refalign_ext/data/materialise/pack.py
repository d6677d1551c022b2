"""Tar shards of rows: each row with its clip, trimmed where that saves much, and its pictures."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from refalign_ext.atomic_io import atomic_open
from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.materialise.row import CroppedRow, MaterialiseJob, RowDropped, extension
from refalign_ext.data.media_source import Media
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
            for _ in self.lines_of(rows, report, lambda cropped: self._pack(cropped, writer)):
                pass
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

    def _pack(self, cropped: CroppedRow, writer: ShardWriter) -> bytes:
        from refalign_ext.data.materialise.trimming import trim

        key, place = f"{cropped.row:09d}", self.clip_set.place(cropped.row)
        video, span, before = cropped.video, cropped.clip.video, 0
        if (span.start_frame, span.end_frame, span.start_s, span.end_s) != (None,) * 4:
            try:
                video, span, before = trim(video, span, _size(video)) or (video, span, 0)
            except ValueError as error:
                raise RowDropped("span_unreadable", f"{place}: {error}") from None
        name = f"{key}{extension(span.path)}"
        media, images = {name: video}, {}
        for number, (position, (ending, picture)) in enumerate(cropped.pictures.items()):
            images[position] = f"{key}.{number}{ending}"
            media[images[position]] = picture
        for member, contents in media.items():
            if _size(contents) > MAX_MEMBER_BYTES:
                message = f"{place}: {member} has more than {MAX_MEMBER_BYTES} bytes"
                raise RowDropped("file_too_large", message)
        line = self.line(cropped, replace(span, path=name), images, before)
        with ExitStack() as stack:
            members = []
            for member, contents in media.items():
                is_file = isinstance(contents, Path)
                file = stack.enter_context(contents.open("rb") if is_file else io.BytesIO(contents.data))
                members.append((member, file, _size(contents)))
            writer.add(line, key, members)
        return line


def _size(media: Media) -> int:
    return media.stat().st_size if isinstance(media, Path) else len(media.data)
