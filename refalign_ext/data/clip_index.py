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

from refalign_ext.atomic_io import atomic_open
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
_EXAMPLES = 5  # rows that a warning names
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
    """`video_file.probe`; a file whose size and time of change are as they were is not opened again."""
    from refalign_ext.data.video_file import probe

    return probe(media) if isinstance(media, MediaBytes) else _probe_file(media, _file_state(media))


@lru_cache(_REMEMBERED)
def _probe_file(path: Path, state: tuple[int, int]) -> VideoInfo:
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
    clip_set: ClipSet,
    *,
    workers: int = 0,
    fallback_dir: Path | None = None,
    logs_bad_clips: bool = True,
    tries_bad_again: bool = True,
) -> np.ndarray:
    """Records [rows] of `RECORD`, kept in a file and used again until the set changes; in memory if none can be written.

    What an index of another state of the set says of a file that has not changed is taken from there.

    Args:
        workers: processes that open files; 0: this one.
        fallback_dir: folder for the index if it cannot be written beside the set.
        logs_bad_clips: rows that cannot be used are counted in the log, the first few by name.
        tries_bad_again: files that could not be used are opened again, as their download may have ended since. Of several
            ranks one does it, before the others.
    """
    if not len(clip_set):
        raise ValueError(f"{clip_set.path} has no clips")
    paths, mark = clip_index_paths(clip_set, fallback_dir), _MAGIC + _set_state(clip_set)
    opened = (_opened(path, mark, len(clip_set)) for path in paths)
    records = next((found for found in opened if found is not None), None)
    if records is None:
        records = _build(clip_set, paths, mark, workers, logs_bad_clips)
    elif tries_bad_again:
        records = _with_mended(clip_set, records, mark, workers)
    if logs_bad_clips:
        _log_unusable(clip_set, records)
    return records


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
    with suppress(OSError), path.open("rb") as file:
        size = _MARK_BYTES + rows * RECORD.itemsize
        if file.read(_MARK_BYTES) == mark and os.fstat(file.fileno()).st_size == size:
            return np.memmap(path, RECORD, "r", offset=_MARK_BYTES, shape=(rows,))
    return None


def _build(
    clip_set: ClipSet, paths: list[Path], mark: bytes, workers: int, logs_bad_clips: bool
) -> np.ndarray:
    file = None
    for path in paths:
        part = path.with_name(path.name + ".part")
        known = _measured_records(path, part)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _continued(part, mark)
            break
        except OSError as error:
            reason = error
    if file is None:
        logger.warning("%s cannot be kept (%s): clips will be looked at again next time", path, reason)
        return np.concatenate(list(_chunks(clip_set, 0, workers, known, logs_bad_clips)))
    with file:
        done = (file.tell() - _MARK_BYTES) // RECORD.itemsize
        for records in _chunks(clip_set, done, workers, known, logs_bad_clips):
            file.write(records.tobytes())
            file.flush()
        os.fsync(file.fileno())
        with suppress(FileNotFoundError):  # another run was a moment earlier
            os.replace(part, path)
    found = _opened(path, mark, len(clip_set))
    if found is None:
        raise ValueError(f"{clip_set.path} was changed while its clips were looked at: start again")
    return found


def _with_mended(clip_set: ClipSet, records: np.ndarray, mark: bytes, workers: int) -> np.ndarray:
    """The records, kept anew if some of the files can be used by now that could not before."""
    bad = np.flatnonzero(records["state"] == BAD_VIDEO)
    if not len(bad):
        return records
    pieces = [bad[start : start + _CHUNK].tolist() for start in range(0, len(bad), _CHUNK)]
    work = partial(_index_rows, clip_set, _measured_records())
    workers = min(workers, len(pieces) - 1)
    looked_at = run_each(work, pieces, workers=workers, description="looking again", weight=len, unit="clip")
    fresh = np.concatenate([found for _, (found, _) in looked_at])
    mended = (fresh["state"] == USABLE).sum()
    if not mended:
        return records
    logger.info("%s: %d clips can be used that could not before", clip_set.path, mended)
    path, updated = Path(records.filename), np.array(records)
    updated[bad] = fresh
    with suppress(OSError), atomic_open(path) as file:
        file.write(mark + updated.tobytes())
    return updated


def _continued(path: Path, mark: bytes) -> BinaryIO:
    """The file of an interrupted run after its last whole record, or a new one."""
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # another run is at it
        file.close()
        raise
    except OSError:  # some file systems have no locks
        pass
    file.seek(0)
    if file.read(_MARK_BYTES) != mark:
        file.truncate(0)
        file.write(mark)
    whole = (file.seek(0, os.SEEK_END) - _MARK_BYTES) // RECORD.itemsize
    file.truncate(_MARK_BYTES + whole * RECORD.itemsize)
    file.seek(0, os.SEEK_END)
    return file


def _measured_records(*paths: Path) -> np.ndarray:
    """The usable records of files that were opened for another state of the set, in the order of `measured`."""
    found = [np.zeros(0, RECORD)]
    for path in paths:
        with suppress(OSError):
            content = path.read_bytes()
            if content.startswith(_MAGIC) and len(content) >= _MARK_BYTES:
                whole = (len(content) - _MARK_BYTES) // RECORD.itemsize
                records = np.frombuffer(content, RECORD, whole, _MARK_BYTES) if whole else found[0]
                found.append(records[(records["measured"] > 0) & (records["state"] == USABLE)])
    records = np.concatenate(found)
    return records[np.argsort(records["measured"])]


def _chunks(
    clip_set: ClipSet, start: int, workers: int, known: np.ndarray, logs_bad_clips: bool
) -> Iterator[np.ndarray]:
    rows = [range(start + piece.start, start + piece.stop) for piece in chunks(len(clip_set) - start, _CHUNK)]
    # A handful of clips is looked at faster than processes start.
    workers = workers if len(rows) > 1 else min(workers, 0)
    work = partial(_index_rows, clip_set, known)
    for _, (records, reasons) in run_each(
        work, rows, workers=workers, description="looking at clips", weight=len, unit="clip"
    ):
        for reason in reasons if logs_bad_clips else ():
            logger.warning("skipping %s", reason)
        yield records


def _index_rows(clip_set: ClipSet, known: np.ndarray, rows: Sequence[int]) -> tuple[np.ndarray, list[str]]:
    """Records of some rows, and why the first ones cannot be used that are not."""
    records, reasons = np.zeros(len(rows), RECORD), []
    for record, row in zip(records, rows, strict=True):
        name = ""
        record["state"] = BAD_ROW
        try:
            clip = clip_set[row]
            name, record["state"] = f"clip {clip.id}: ", BAD_VIDEO
            record["id"], record["group"] = hash64(clip.id), hash64(clip.group)
            _index_sources(clip, record)
            _index_video(clip_set, row, clip.video, known, record)
            record["state"] = USABLE
        except (ValueError, OSError) as error:
            reasons.append(f"{name}{error}")
    return records, reasons[:_EXAMPLES]


def _index_video(clip_set: ClipSet, row: int, span: VideoSpan, known: np.ndarray, record: np.void) -> None:
    if not _is_told(span) and isinstance(media := clip_set.media(row, span.path), Path):
        measured = np.uint64(hash64(repr((span, *_file_state(media)))))
        record["measured"] = measured
        place = np.searchsorted(known["measured"], measured)
        if place < len(known) and known["measured"][place] == measured:
            for name in ClipFacts._fields:
                record[name] = known[name][place]
            return
    record["width"], record["height"], record["frames"], record["fps"] = measure(clip_set, row, span)


def _index_sources(clip: Clip, record: np.void) -> None:
    found = [source_hash(clip, reference) for subject in clip.subjects for reference in subject.refs]
    sources = [source for source in dict.fromkeys(found) if source[0] is not None][:MAX_SOURCES]
    record["is_free"] = any(known is None for known, _ in found)
    record["source_count"] = len(sources)
    for number, (known, is_group) in enumerate(sources):
        record["sources"][number] = known
        record["source_is_group"] |= is_group << number


def _set_state(clip_set: ClipSet) -> bytes:
    """32 bytes that change with the set: sizes and times of change of the manifest or of the shards."""
    files = [path := clip_set.path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".tar", ".json", ".jsonl"))
    stats = [(file.name, *_file_state(file)) for file in files]
    return hashlib.sha256(json.dumps([len(clip_set), stats]).encode()).digest()


def _log_unusable(clip_set: ClipSet, records: np.ndarray) -> None:
    unusable = np.flatnonzero(records["state"] != USABLE)
    if len(unusable):
        logger.warning(
            "%s: %d of %d clips cannot be used (%d invalid rows), such as %s%s",
            clip_set.path,
            len(unusable),
            len(records),
            (records["state"] == BAD_ROW).sum(),
            "; ".join(clip_set.place(row) for row in unusable[:_EXAMPLES].tolist()),
            f": delete {records.filename} to try again" if isinstance(records, np.memmap) else "",
        )
