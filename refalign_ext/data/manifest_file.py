"""Manifest files: written whole or not at all, read by row number through an index of byte offsets."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from refalign_ext.atomic_io import atomic_open
from refalign_ext.data.media_source import ClipSet
from refalign_ext.data.schema import Clip, parse, resolve_inside, to_dict

MAX_ROW_BYTES = 16 << 20
_MAGIC = b"RAROWS1\n"
_HEADER = struct.Struct("<8sQQQ")  # magic, rows, the manifest's size in bytes, its time of change in ns
_OFFSET = struct.Struct("<Q")


def write_manifest(path: str | os.PathLike[str], clips: Iterable[Clip]) -> int:
    """Writes clips as a manifest with its index `<path>.index`, one at a time; both appear complete or not at all.

    Every clip is checked as it will be when it is read. The ids' being distinct is not: that needs memory.

    Returns:
        The number of rows.
    """
    target = Path(path)
    with atomic_open(index_path(target)) as index:
        writer = _IndexWriter(index)
        with atomic_open(target) as manifest:
            for row, clip in enumerate(clips, 1):
                writer.add(manifest.tell())
                manifest.write(checked_line(clip, f"{target}, row {row}"))
        writer.finish(target.stat())
    return writer.rows


def checked_line(clip: Clip, place: str) -> bytes:
    """The line of a clip, with its end, checked as it will be when it is read."""
    entry = to_dict(clip)
    parse(entry, place)
    line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    if len(line) > MAX_ROW_BYTES:
        raise ValueError(f"{place}: {len(line)} bytes; a row has at most {MAX_ROW_BYTES}")
    return line


def index_path(manifest: Path) -> Path:
    """Where the offsets of a manifest's rows are stored."""
    return manifest.with_name(manifest.name + ".index")


class ManifestReader(ClipSet):
    """The rows of a manifest, and files below its folder.

    Memory does not grow with the number of rows: offsets stay in the index file. It holds a header `_HEADER` and one
    little-endian uint64 for each row, and is built anew if it is missing, damaged, or the manifest's size or time of
    change is not what it says; in a folder that cannot be written to, in a temporary file. Blank lines are not rows.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise ValueError(f"{self.path}: the manifest cannot be opened ({error.strerror})") from None
        status, index = os.fstat(self._file.fileno()), index_path(self.path)
        self._index = _open_index(index, status) or _build_index(self._file, index, status)
        self._rows = _HEADER.unpack(os.pread(self._index.fileno(), _HEADER.size, 0))[1]
        self._size = status.st_size

    def __len__(self) -> int:
        return self._rows

    def place(self, row: int) -> str:
        return f"{self.path}, row {row + 1}"

    def line(self, row: int) -> bytes:
        stored = os.pread(self._index.fileno(), 2 * _OFFSET.size, _HEADER.size + row * _OFFSET.size)
        start = _OFFSET.unpack_from(stored)[0]
        end = _OFFSET.unpack_from(stored, _OFFSET.size)[0] if row + 1 < self._rows else self._size
        if not start <= end <= self._size:
            raise ValueError(f"{index_path(self.path)} is damaged: delete it, it is made anew")
        data = os.pread(self._file.fileno(), min(end - start, MAX_ROW_BYTES + 1), start)
        text, newline, rest = data.partition(b"\n")
        if len(text) >= MAX_ROW_BYTES:
            raise ValueError(
                f"{self.place(row)}: more than {MAX_ROW_BYTES} bytes in one line: is this JSON lines?"
            )
        if rest.strip() or not (newline or end == self._size):
            raise ValueError(f"{self.path} was changed while it was in use: start again")
        return text

    def media(self, row: int, name: str) -> Path:
        try:
            path = resolve_inside(self.path.parent, name)
            if not path.is_file():
                raise ValueError(f"{name} does not exist or is no file")
        except (ValueError, OSError) as error:  # long names, locked folders, circles of links
            raise ValueError(f"{self.place(row)}: {error}") from None
        return path

    def file_size(self, row: int, name: str) -> int:
        return self.media(row, name).stat().st_size

    def shard_ranges(self) -> list[range]:
        return [range(len(self))] if len(self) else []

    def close(self) -> None:
        """Closes the files; the reader cannot be used any more."""
        self._file.close()
        self._index.close()

    def __enter__(self) -> ManifestReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        ManifestReader.__init__(self, path)


class _IndexWriter:
    """Writes offsets as they come and the header, which makes them an index, at the end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.rows = file, 0
        file.write(bytes(_HEADER.size))

    def add(self, offset: int) -> None:
        self.file.write(_OFFSET.pack(offset))
        self.rows += 1

    def finish(self, manifest: os.stat_result) -> None:
        self.file.seek(0)
        self.file.write(_HEADER.pack(_MAGIC, self.rows, manifest.st_size, manifest.st_mtime_ns))
        self.file.flush()


def _open_index(path: Path, manifest: os.stat_result) -> BinaryIO | None:
    """The index file if it belongs to this state of the manifest, else None."""
    try:
        file = path.open("rb")
    except OSError:
        return None
    header = file.read(_HEADER.size)
    if len(header) == _HEADER.size:
        magic, rows, size, changed = _HEADER.unpack(header)
        is_whole = os.fstat(file.fileno()).st_size == _HEADER.size + rows * _OFFSET.size
        if is_whole and (magic, size, changed) == (_MAGIC, manifest.st_size, manifest.st_mtime_ns):
            return file
    file.close()
    return None


def _build_index(manifest: BinaryIO, path: Path, status: os.stat_result) -> BinaryIO:
    """Scans a manifest line by line and stores where its rows start; the file stays usable if it cannot be kept."""
    try:
        with atomic_open(path) as kept:
            _scan(manifest, status, kept)
            return os.fdopen(os.dup(kept.fileno()), "rb")
    except OSError:
        file = tempfile.TemporaryFile()  # noqa: SIM115, the reader closes it
        _scan(manifest, status, file)
        return file


def _scan(manifest: BinaryIO, status: os.stat_result, index: BinaryIO) -> None:
    writer, is_start = _IndexWriter(index), True
    manifest.seek(0)
    offset = 3 if manifest.read(3) == b"\xef\xbb\xbf" else 0  # a byte order mark
    manifest.seek(offset)
    while chunk := manifest.readline(1 << 20):
        if is_start and chunk.strip():
            writer.add(offset)
        is_start = chunk.endswith(b"\n")
        offset += len(chunk)
    writer.finish(status)
