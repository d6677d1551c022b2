"""A piece of rows as one tar shard: each row with its clip, trimmed where that saves much, and its pictures."""

from __future__ import annotations

import io
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from refalign_ext.atomic_io import atomic_open
from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.materialise.files import Place
from refalign_ext.data.materialise.row import (
    CutRow,
    Position,
    drop_row,
    finished_line,
    suffix,
    usable_rows,
    with_files,
)
from refalign_ext.data.media_source import Media, MediaBytes
from refalign_ext.data.shards import (
    MAX_MEMBER_BYTES,
    ShardInfo,
    ShardWriter,
    sha256_of,
    shard_name,
)


def pack_piece(place: Place, number: int, rows: range, report: ConversionReport) -> ShardInfo:
    """Writes the shard of a piece, even if none of its rows can be used: shards are numbered without gaps.

    Raises:
        OSError: if it cannot be written, or a file changes while it is read.
    """
    path = place.out / shard_name(number)
    with atomic_open(path, place.parts) as file:
        writer = ShardWriter(file)
        for cut in usable_rows(place.clip_set, rows, report):
            _pack_row(place.clip_set, cut, writer, report)
        writer.close()
    return ShardInfo(shard_name(number), writer.samples, path.stat().st_size, sha256_of(path))


def _pack_row(clip_set: ClipSet, cut: CutRow, writer: ShardWriter, report: ConversionReport) -> None:
    from refalign_ext.data.materialise.trimming import trim

    key, span, before = f"{cut.row:09d}", cut.clip.video, 0
    video: Media | bytes = cut.video
    if (span.start_frame, span.end_frame, span.start_s, span.end_s) != (None,) * 4:
        try:
            trimmed = trim(cut.video, span, _size(cut.video))
        except ValueError as error:
            drop_row(report, cut, "span_unreadable", f"{clip_set.place(cut.row)}: {error}")
            return
        if trimmed is not None:
            video, span, before = trimmed
    with ExitStack() as stack:
        name = f"{key}{suffix(span.path)}"
        members = [(name, *_contents(video, stack))]
        images: dict[Position, str] = {}
        for number, (position, picture) in enumerate(cut.pictures.items()):
            ending = ".png" if isinstance(picture, bytes) else suffix(cut.image_name(*position))
            images[position] = f"{key}.{number}{ending}"
            members.append((images[position], *_contents(picture, stack)))
        for member, _, size in members:
            if size > MAX_MEMBER_BYTES:
                message = (
                    f"{clip_set.place(cut.row)}: {member} has {size} bytes; {MAX_MEMBER_BYTES} are the most"
                )
                drop_row(report, cut, "file_too_large", message)
                return
        clip = with_files(cut.clip, replace(span, path=name), images, before)
        line = finished_line(clip_set, cut, clip, report)
        if line is not None:
            writer.add(line, key, members)


def _size(media: Media | bytes) -> int:
    if isinstance(media, Path):
        return media.stat().st_size
    return len(media.data if isinstance(media, MediaBytes) else media)


def _contents(media: Media | bytes, stack: ExitStack) -> tuple[BinaryIO, int]:
    """An open file and its size."""
    if isinstance(media, Path):
        file = stack.enter_context(media.open("rb"))
        return file, os.fstat(file.fileno()).st_size
    data = media.data if isinstance(media, MediaBytes) else media
    return io.BytesIO(data), len(data)
