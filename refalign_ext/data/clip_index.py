"""Size, length and rate of clips: measured from a row or its file, and the index of a set, a file that keeps them.

Where a manifest does not say how large, long or fast a clip is, the file is opened, once. A record of the index has a
fixed size, so that of a million clips is 80 MB on disk, is mapped and not read, and goes on where it was interrupted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.hashing import hash64
from refalign_ext.data.media_source import Media, MediaBytes
from refalign_ext.data.pieces import chunks
from refalign_ext.data.sampling.split import source_hash
from refalign_ext.data.schema import Clip, VideoSpan
from refalign_ext.data.spans import steady_range
from refalign_ext.data.worker_pool import run_each

if TYPE_CHECKING:
    from refalign_ext.data.video_file import VideoInfo

logger = logging.getLogger(__name__)

USABLE, BAD_ROW, BAD_VIDEO = range(3)
REASONS = {BAD_ROW: "invalid row", BAD_VIDEO: "unreadable video"}
MAX_SOURCES = 4  # of a clip's references; more are not looked at where clips are split
RECORD = np.dtype(
    [
        ("id", "<u8"),  # hashes
        ("group", "<u8"),
        ("sources", "<u8", (MAX_SOURCES,)),  # where references come from; with a free one they do not matter
        ("measured", "<u8"),  # hash of the span and the state of the file that was opened; 0: none was
        ("fps", "<f8"),
        ("width", "<i4"),  # pixels, after the crop
        ("height", "<i4"),
        ("frames", "<i4"),  # of the span
        ("state", "u1"),
        ("is_free", "u1"),  # whether some reference is of the clip's own group
        ("source_count", "u1"),
        ("source_is_group", "u1"),  # a bit for each
    ]
)
_MAGIC = b"RACLIP1\n"
_MARK_BYTES = len(_MAGIC) + 32
_LARGEST = 2**31 - 1  # that a record holds
_CHUNK = 64  # rows; what each worker loses when it is killed
_NAMED = 20  # of a chunk
_EXAMPLES = 5
_EARLIER = ".earlier"  # what was found out for another state of the set by a run that was killed
_REMEMBERED = 128  # files that a process does not open again: many clips may lie in one


class ClipFacts(NamedTuple):
    """Width and height of a clip in pixels, after its crop; its frames, and how many of them a second has."""

    width: int
    height: int
    frames: int
    fps: float


def measure(clip_set: ClipSet, row: int, span: VideoSpan, *, opens_files: bool = True) -> ClipFacts:
    """How large, long and fast the span of a row is; the file is opened only where the row does not say.

    Then everything is as the file says. Spans in seconds are counted at a steady rate.

    Raises:
        ValueError: if the file is needed and cannot be read, has no such frames, or may not be opened.
    """
    width, height, fps, total = span.width, span.height, span.fps, None
    if span.crop_xyxy is not None:
        left, top, right, bottom = span.crop_xyxy
        width, height = right - left, bottom - top
    if not _is_told(span):
        if not opens_files:
            raise ValueError(f"{span.path}: the row does not tell its size, rate and end")
        info = probe_media(clip_set.media(row, span.path))
        fps, total = info.fps or fps or 0.0, info.frames
        if span.crop_xyxy is None:
            width, height = info.width, info.height
    start, end = steady_range(span, fps, total)
    if max(width, height, end - start) > _LARGEST:
        raise ValueError(f"{span.path}: {end - start} frames of {width}x{height} pixels are in no video")
    return ClipFacts(width, height, end - start, float(fps))


def _is_told(span: VideoSpan) -> bool:
    """Whether a row says everything itself."""
    has_size = span.crop_xyxy is not None or None not in (span.width, span.height)
    return has_size and span.fps is not None and (span.end_frame is not None or span.end_s is not None)


def probe_media(media: Media) -> VideoInfo:
    """`video_file.probe`; a file whose size and time of change are as they were is not opened again.

    Raises:
        ValueError: if it has no video that can be decoded.
    """
    from refalign_ext.data.video_file import probe

    return probe(media) if isinstance(media, MediaBytes) else _probe_file(media, *_file_state(media))


@lru_cache(_REMEMBERED)
def _probe_file(path: Path, size: int, modified: int) -> VideoInfo:
    from refalign_ext.data.video_file import probe

    return probe(path)


def _file_state(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds."""
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    return status.st_size, status.st_mtime_ns


def open_clip_index(
    clip_set: ClipSet, *, workers: int = 0, fallback_dir: Path | None = None, logs_bad_clips: bool = True
) -> np.ndarray:
    """Records [rows] of `RECORD`, kept in a file and used again until the set changes; in memory if none can be written.

    What an index of another state of the set says of a file that has not changed is taken from there.

    Args:
        workers: processes that open files; 0: this one.
        fallback_dir: folder for the index if it cannot be written beside the set.
        logs_bad_clips: rows that cannot be used are counted in the log, the first few by name.

    Raises:
        ValueError: if the set has no rows.
    """
    if not len(clip_set):
        raise ValueError(f"{clip_set.path} has no clips")
    paths, mark = clip_index_paths(clip_set, fallback_dir), _MAGIC + _set_state(clip_set)
    opened = (_opened(path, mark, len(clip_set)) for path in paths)
    found = next((records for records in opened if records is not None), None)
    if found is None:
        found = _build(clip_set, paths, mark, workers, logs_bad_clips)
    if logs_bad_clips:
        _log_unusable(clip_set, found)
    return found


def clip_index_paths(clip_set: ClipSet, fallback_dir: Path | None = None) -> list[Path]:
    """Where the index of a set may be kept, the preferred place first."""
    path = clip_set.path
    paths = [path / "clip_index.bin" if path.is_dir() else path.with_name(path.name + ".clip_index")]
    if fallback_dir is not None:
        paths.append(fallback_dir / f"{hash64(str(path.absolute())):016x}.clip_index")
    return paths


def delete_clip_index(clip_set: ClipSet, fallback_dir: Path | None = None) -> None:
    """Has clips looked at again next time: a folder that was not mounted then may be there now."""
    for path in clip_index_paths(clip_set, fallback_dir):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _opened(path: Path, mark: bytes, rows: int) -> np.ndarray | None:
    try:
        with path.open("rb") as file:
            is_right = file.read(_MARK_BYTES) == mark
        if is_right and path.stat().st_size == _MARK_BYTES + rows * RECORD.itemsize:
            return np.memmap(path, RECORD, "r", offset=_MARK_BYTES, shape=(rows,))
    except OSError:
        pass
    return None


def _build(
    clip_set: ClipSet, paths: Sequence[Path], mark: bytes, workers: int, logs_bad_clips: bool
) -> np.ndarray:
    for path in paths:
        part = path.with_name(path.name + ".part")
        try:
            if path != paths[0]:
                path.parent.mkdir(parents=True, exist_ok=True)
            file = _continued(part, mark)
            break
        except OSError as error:
            reason = error
    else:
        logger.warning("%s cannot be kept (%s): clips will be looked at again next time", path, reason)
        return np.concatenate(list(_chunks(clip_set, 0, workers, (), logs_bad_clips)))
    known = (path, part.with_suffix(_EARLIER))
    _known_records.cache_clear()
    with file:
        done = (file.tell() - _MARK_BYTES) // RECORD.itemsize
        for records in _chunks(clip_set, done, workers, known, logs_bad_clips):
            file.write(records.tobytes())
            file.flush()
        os.fsync(file.fileno())
        with suppress(FileNotFoundError):  # another run was a moment earlier
            os.replace(part, path)
        known[1].unlink(missing_ok=True)
    found = _opened(path, mark, len(clip_set))
    if found is None:
        raise ValueError(f"{clip_set.path} was changed while its clips were looked at: start again")
    return found


def _continued(path: Path, mark: bytes) -> BinaryIO:
    """The file of an interrupted run after its last whole record, or a new one beside what it held."""
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # another run is at it
        file.close()
        raise
    except OSError:  # some file systems have no locks
        pass
    file.seek(0)
    content = file.read()
    whole = max(0, len(content) - _MARK_BYTES) // RECORD.itemsize
    if content.startswith(mark):
        file.truncate(_MARK_BYTES + whole * RECORD.itemsize)
    else:
        if whole:
            path.with_suffix(_EARLIER).write_bytes(content)
        file.truncate(0)
        file.write(mark)
    file.seek(0, os.SEEK_END)
    return file


def _chunks(
    clip_set: ClipSet, start: int, workers: int, known: tuple[Path, ...], logs_bad_clips: bool
) -> Iterator[np.ndarray]:
    rows = [range(start + piece.start, start + piece.stop) for piece in chunks(len(clip_set) - start, _CHUNK)]
    # A handful of clips is looked at faster than processes start.
    workers = workers if len(rows) > 1 else min(workers, 0)
    for _, (records, reasons) in run_each(
        partial(_index_rows, clip_set, known),
        rows,
        workers=workers,
        description="looking at clips",
        weight=len,
        unit="clip",
    ):
        for name, reason in reasons if logs_bad_clips else ():
            logger.warning("skipping %s", reason if reason.startswith(name) else f"clip {name}: {reason}")
        yield records


def _index_rows(
    clip_set: ClipSet, known: tuple[Path, ...], rows: range
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Records of some rows, and (clip, reason) of the first that cannot be used."""
    records, reasons = np.zeros(len(rows), RECORD), []
    for record, row in zip(records, rows, strict=True):
        name = clip_set.place(row)
        record["state"] = BAD_ROW
        try:
            clip = clip_set[row]
            name, record["state"] = clip.id, BAD_VIDEO
            record["id"], record["group"] = hash64(clip.id), hash64(clip.group)
            _index_sources(clip, record)
            _index_video(clip_set, row, clip.video, known, record)
            record["state"] = USABLE
        except (ValueError, OSError) as error:
            if len(reasons) < _NAMED:
                reasons.append((name, str(error)))
    return records, reasons


def _index_video(
    clip_set: ClipSet, row: int, span: VideoSpan, known: tuple[Path, ...], record: np.void
) -> None:
    facts = None
    if not _is_told(span) and isinstance(media := clip_set.media(row, span.path), Path):
        record["measured"] = hash64(repr((span, *_file_state(media))))
        facts = _known_facts(known, record["measured"])
    record["width"], record["height"], record["frames"], record["fps"] = facts or measure(clip_set, row, span)


def _known_facts(paths: tuple[Path, ...], measured: np.uint64) -> ClipFacts | None:
    """What an index in one of `paths` says of the same span of the same state of a file."""
    records = _known_records(paths)
    place = np.searchsorted(records["measured"], measured)
    if place == len(records) or records["measured"][place] != measured:
        return None
    return ClipFacts(*(records[name][place].item() for name in ClipFacts._fields))


@lru_cache(1)
def _known_records(paths: tuple[Path, ...]) -> np.ndarray:
    """The usable records of files that were opened, in the order of `measured`."""
    found = [np.zeros(0, RECORD)]
    for path in paths:
        with suppress(OSError):
            content = path.read_bytes()
            if content.startswith(_MAGIC):
                whole = max(0, len(content) - _MARK_BYTES) // RECORD.itemsize
                records = np.frombuffer(content, RECORD, whole, _MARK_BYTES if whole else 0)
                found.append(records[(records["measured"] > 0) & (records["state"] == USABLE)])
    records = np.concatenate(found)
    return records[np.argsort(records["measured"])]


def _index_sources(clip: Clip, record: np.void) -> None:
    sources: list[tuple[int, bool]] = []
    for subject in clip.subjects:
        for reference in subject.refs:
            known, is_group = source_hash(clip, reference)
            if known is None:
                record["is_free"] = 1
            elif (known, is_group) not in sources and len(sources) < MAX_SOURCES:
                sources.append((known, is_group))
    record["source_count"] = len(sources)
    for number, (known, is_group) in enumerate(sources):
        record["sources"][number] = known
        record["source_is_group"] |= is_group << number


def _set_state(clip_set: ClipSet) -> bytes:
    """32 bytes that change with the set: sizes and times of change of the manifest or of the shards."""
    path = clip_set.path
    files: Sequence[Path] = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".tar", ".json", ".jsonl"))
    stats = [(file.name, *_file_state(file)) for file in files]
    return hashlib.sha256(json.dumps([len(clip_set), stats]).encode()).digest()


def _log_unusable(clip_set: ClipSet, records: np.ndarray) -> None:
    unusable = np.flatnonzero(records["state"] != USABLE)
    if not len(unusable):
        return
    counts = {name: int((records["state"] == state).sum()) for state, name in REASONS.items()}
    logger.warning(
        "%s: %d of %d clips cannot be used (%s): %s%s%s",
        clip_set.path,
        len(unusable),
        len(records),
        ", ".join(f"{count} {name}" for name, count in counts.items() if count),
        "; ".join(clip_set.place(row) for row in unusable[:_EXAMPLES].tolist()),
        " and others" if len(unusable) > _EXAMPLES else "",
        f" (delete {records.filename} to have them looked at again)"
        if isinstance(records, np.memmap)
        else "",
    )
