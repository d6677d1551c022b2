"""Manifest files: written whole or not at all, read by row number through an index of byte offsets."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from refalign_ext.atomic_io import atomic_open
from refalign_ext.data.schema import Clip, parse, parse_line, to_dict

MAX_ROW_BYTES = 16 << 20
_MAGIC = b"RAROWS1\n"
_HEADER = struct.Struct("<8sQQQ")  # magic, rows, the manifest's size in bytes, its time of change in ns
_OFFSET = struct.Struct("<Q")


def write_manifest(path: str | os.PathLike[str], clips: Iterable[Clip]) -> int:
    """Writes clips as a manifest with its index `<path>.index`, one at a time; both appear complete or not at all.

    Every clip is checked as it will be when it is read. The ids' being distinct is not: that needs memory.

    Returns:
        The number of rows.

    Raises:
        ValueError: for a clip that `parse` would refuse, a value that is not JSON, or a row above `MAX_ROW_BYTES`.
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
    """The line of a clip, with its end, checked as it will be when it is read.

    Raises:
        ValueError: starting with `place`, for a clip that `parse` would refuse, a value that is not JSON, or a row above
            `MAX_ROW_BYTES`.
    """
    entry = to_dict(clip)
    parse(entry, place)
    line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    if len(line) > MAX_ROW_BYTES:
        raise ValueError(f"{place}: {len(line)} bytes; a row has at most {MAX_ROW_BYTES}")
    return line


def index_path(manifest: Path) -> Path:
    """Where the offsets of a manifest's rows are stored."""
    return manifest.with_name(manifest.name + ".index")


class ManifestReader:
    """The rows of a manifest by number, each read and checked when it is asked for.

    Memory does not grow with the number of rows: offsets stay in the index file. It holds a header `_HEADER` and one
    little-endian uint64 for each row, and is built anew if it is missing, damaged, or the manifest's size or time of
    change is not what it says; in a folder that cannot be written to, in a temporary file. Blank lines are not rows.
    Readers may be pickled and may be used by several threads and by processes forked after opening.

    Raises:
        ValueError: if there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise ValueError(f"{self.path}: the manifest cannot be opened ({error.strerror})") from None
        status = os.fstat(self._file.fileno())
        self._index = _open_index(index_path(self.path), status) or _build_index(
            self._file, index_path(self.path)
        )
        self._rows = _HEADER.unpack(os.pread(self._index.fileno(), _HEADER.size, 0))[1]
        self._size = status.st_size

    @property
    def root(self) -> Path:
        """The folder that the rows' paths are relative to."""
        return self.path.parent

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Clip:
        """Row `row`, from 0; negative numbers count from the end.

        Raises:
            IndexError: if there is no such row.
            ValueError: naming the file, the row (from 1) and the field that is not as it should be.
        """
        number = row + self._rows if row < 0 else row
        if not 0 <= number < self._rows:
            raise IndexError(f"{self.path} has {self._rows} rows, there is no row {row}")
        return parse_line(self.line(number), f"{self.path}, row {number + 1}")

    def __iter__(self) -> Iterator[Clip]:
        return (self[row] for row in range(self._rows))

    def line(self, row: int) -> bytes:
        """The text of row `row`, from 0, unchecked; use it to report or copy rows that are not valid.

        Raises:
            ValueError: if the row is longer than `MAX_ROW_BYTES`, or the manifest was changed since it was opened.
        """
        stored = os.pread(self._index.fileno(), 2 * _OFFSET.size, _HEADER.size + row * _OFFSET.size)
        start = _OFFSET.unpack_from(stored)[0]
        end = _OFFSET.unpack_from(stored, _OFFSET.size)[0] if row + 1 < self._rows else self._size
        if not start <= end <= self._size:
            raise ValueError(f"{index_path(self.path)} is damaged: delete it, it is made anew")
        data = os.pread(self._file.fileno(), min(end - start, MAX_ROW_BYTES + 1), start)
        text, newline, rest = data.partition(b"\n")
        if len(text) >= MAX_ROW_BYTES:
            raise ValueError(
                f"{self.path}, row {row + 1}: more than {MAX_ROW_BYTES} bytes in one line: is this JSON lines?"
            )
        if rest.strip() or not (newline or end == self._size):
            raise ValueError(f"{self.path} was changed while it was in use: start again")
        return text

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
        whole = os.fstat(file.fileno()).st_size == _HEADER.size + rows * _OFFSET.size
        if magic == _MAGIC and whole and (size, changed) == (manifest.st_size, manifest.st_mtime_ns):
            return file
    file.close()
    return None


def _build_index(manifest: BinaryIO, path: Path) -> BinaryIO:
    """Scans a manifest line by line and stores where its rows start; the file stays usable if it cannot be kept."""
    status = os.fstat(manifest.fileno())
    try:
        with atomic_open(path) as aside:
            _scan(manifest, status, aside)
            return os.fdopen(os.dup(aside.fileno()), "rb")
    except OSError:
        file = tempfile.TemporaryFile()  # noqa: SIM115, the reader closes it
        _scan(manifest, status, file)
        return file


def _scan(manifest: BinaryIO, status: os.stat_result, index: BinaryIO) -> None:
    writer, offset, at_start = _IndexWriter(index), 0, True
    manifest.seek(0)
    if manifest.read(3) == b"\xef\xbb\xbf":  # a byte order mark
        offset = 3
    manifest.seek(offset)
    while chunk := manifest.readline(1 << 20):
        if at_start and chunk.strip():
            writer.add(offset)
        at_start = chunk.endswith(b"\n")
        offset += len(chunk)
    writer.finish(status)
