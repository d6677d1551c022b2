"""What is known about every clip of a set before training: its size, length and group, kept in a file beside the set.

Where a manifest does not say how large, long or fast a clip is, the file is asked, once. A record has a fixed size, so
the survey of a million clips is 72 MB on disk, is mapped and not read, and goes on where it was interrupted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.decoding import probe
from refalign_ext.data.materialise.reference import span_arguments
from refalign_ext.data.sampling.split import digest, source_digest
from refalign_ext.data.schema import Clip, VideoSpan
from refalign_ext.data.work import run_each

logger = logging.getLogger(__name__)

USABLE, BAD_ROW, BAD_VIDEO = range(3)
REASONS = {BAD_ROW: "invalid row", BAD_VIDEO: "unreadable video"}
MOST_SOURCES = 4  # of a clip's references; more are not looked at where clips are split
RECORD = np.dtype(
    [
        ("id", "<u8"),  # digests
        ("group", "<u8"),
        ("sources", "<u8", (MOST_SOURCES,)),  # where references come from; with a free one they do not matter
        ("width", "<i4"),  # pixels, after the crop
        ("height", "<i4"),
        ("frames", "<i4"),  # of the span
        ("fps", "<f4"),
        ("state", "u1"),
        ("is_free", "u1"),  # whether some reference is of the clip's own group
        ("source_count", "u1"),
        ("source_is_group", "u1"),  # a bit for each
        ("spare", "u1", (4,)),
    ]
)
_MAGIC = b"RASURV1\n"
_LARGEST = 2**31 - 1  # that a record holds
_CHUNK = 512
_NAMED = 20  # of a chunk
_EXAMPLES = 5


def survey(clip_set: ClipSet, *, workers: int = 0, elsewhere: Path | None = None) -> np.ndarray:
    """Records [rows] of `RECORD`; rows that cannot be used are logged, the first few by name.

    They are kept in a file and used again until the set changes, in memory if none can be written.

    Args:
        elsewhere: folder for the file if it cannot be written beside the set.

    Raises:
        ValueError: if the set has no rows.
    """
    if not len(clip_set):
        raise ValueError(f"{clip_set.path} has no clips")
    paths, mark = survey_paths(clip_set, elsewhere), _MAGIC + _fingerprint(clip_set)
    kept = (_opened(path, mark, len(clip_set)) for path in paths)
    found = next((records for records in kept if records is not None), None)
    if found is None:
        found = _made(clip_set, paths, mark, workers)
    _tell(clip_set, found)
    return found


def survey_paths(clip_set: ClipSet, elsewhere: Path | None = None) -> list[Path]:
    """Where the survey of a set may be kept, the preferred place first."""
    path = clip_set.path
    paths = [path / "survey.bin" if path.is_dir() else path.with_name(path.name + ".survey")]
    if elsewhere is not None:
        paths.append(elsewhere / f"{digest(str(path.absolute())):016x}.survey")
    return paths


def forget_survey(clip_set: ClipSet, elsewhere: Path | None = None) -> None:
    """Has clips looked at again next time: a folder that was not mounted then may be there now."""
    for path in survey_paths(clip_set, elsewhere):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _opened(path: Path, mark: bytes, rows: int) -> np.ndarray | None:
    try:
        with path.open("rb") as file:
            is_right = file.read(len(mark)) == mark
        if is_right and path.stat().st_size == len(mark) + rows * RECORD.itemsize:
            return np.memmap(path, RECORD, "r", offset=len(mark), shape=(rows,))
    except OSError:
        pass
    return None


def _made(clip_set: ClipSet, paths: Sequence[Path], mark: bytes, workers: int) -> np.ndarray:
    for path in paths:
        aside = path.with_name(path.name + ".part")
        try:
            if path != paths[0]:
                path.parent.mkdir(parents=True, exist_ok=True)
            file = _continued(aside, mark)
            break
        except OSError as error:
            reason = error
    else:
        logger.warning("%s cannot be kept (%s): clips will be looked at again next time", path, reason)
        return np.concatenate(list(_chunks(clip_set, 0, workers)))
    with file:
        done = (file.tell() - len(mark)) // RECORD.itemsize
        for records in _chunks(clip_set, done, workers):
            file.write(records.tobytes())
            file.flush()
        os.fsync(file.fileno())
        with suppress(FileNotFoundError):  # another run was a moment earlier
            os.replace(aside, path)
    found = _opened(path, mark, len(clip_set))
    if found is None:
        raise ValueError(f"{clip_set.path} was changed while its clips were looked at: start again")
    return found


def _continued(path: Path, mark: bytes) -> BinaryIO:
    """The file of an interrupted survey after its last whole record, or a new one."""
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # another run is at it
        file.close()
        raise
    except OSError:  # some file systems have no locks
        pass
    file.seek(0)
    if file.read(len(mark)) != mark:
        file.truncate(0)
        file.write(mark)
    else:
        whole = (os.fstat(file.fileno()).st_size - len(mark)) // RECORD.itemsize
        file.truncate(len(mark) + whole * RECORD.itemsize)
    file.seek(0, os.SEEK_END)
    return file


def _chunks(clip_set: ClipSet, start: int, workers: int) -> Iterator[np.ndarray]:
    ranges = [range(at, min(at + _CHUNK, len(clip_set))) for at in range(start, len(clip_set), _CHUNK)]
    # A handful of clips is looked at faster than processes start.
    workers = workers if len(clip_set) - start > 64 else 0
    for _, (records, reasons) in run_each(
        partial(_look, clip_set),
        ranges,
        workers=workers,
        description="looking at clips",
        weight=len,
        unit="clip",
    ):
        for name, reason in reasons:
            logger.warning("skipping %s", reason if reason.startswith(name) else f"clip {name}: {reason}")
        yield records


def _look(clip_set: ClipSet, rows: range) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Records of some rows, and (clip, reason) of the first that cannot be used."""
    records, reasons = np.zeros(len(rows), RECORD), []
    for record, row in zip(records, rows, strict=True):
        name = clip_set.place(row)
        record["state"] = BAD_ROW
        try:
            clip = clip_set[row]
            name, record["state"] = clip.id, BAD_VIDEO
            record["id"], record["group"] = digest(clip.id), digest(clip.group)
            _look_at_sources(clip, record)
            width, height, frames, fps = measure(clip_set, row, clip.video)
            record["width"], record["height"], record["frames"], record["fps"] = width, height, frames, fps
            record["state"] = USABLE
        except (ValueError, OSError) as error:
            if len(reasons) < _NAMED:
                reasons.append((name, str(error)))
    return records, reasons


def _look_at_sources(clip: Clip, record: np.void) -> None:
    sources: list[tuple[int, bool]] = []
    for subject in clip.subjects:
        for reference in subject.refs:
            known, is_group = source_digest(clip, reference)
            if known is None:
                record["is_free"] = 1
            elif (known, is_group) not in sources and len(sources) < MOST_SOURCES:
                sources.append((known, is_group))
    record["source_count"] = len(sources)
    for number, (known, is_group) in enumerate(sources):
        record["sources"][number] = known
        record["source_is_group"] |= is_group << number


def measure(clip_set: ClipSet, row: int, span: VideoSpan) -> tuple[int, int, int, float]:
    """(width, height, frames, fps) of a span, width and height after its crop.

    The file is only read where the manifest does not say.

    Raises:
        ValueError: if it has to be read and cannot be.
    """
    width, height, fps, total = span.width, span.height, span.fps, None
    in_seconds = span.start_s is not None or span.end_s is not None
    ends = span.end_frame is not None or span.end_s is not None
    if None in (width, height, fps) or not ends:
        info = probe(clip_set.media(row, span.path))
        width, height, fps, total = info.width, info.height, fps or info.fps, info.frames
    if in_seconds:
        start = math.ceil((span.start_s or 0.0) * fps - 0.01)
        end = total if span.end_s is None else math.ceil(span.end_s * fps - 0.01)
    else:
        start, end = span.start_frame or 0, total if span.end_frame is None else span.end_frame
    if total is not None and end > total:
        if end - total > span_arguments(span)["end_tolerance"]:
            raise ValueError(f"{span.path}: the span ends at frame {end}, the file has {total}")
        end = total
    if end <= start:
        raise ValueError(f"{span.path}: the span from frame {start} to {end} is empty")
    if span.crop_xyxy is not None:
        left, top, right, bottom = span.crop_xyxy
        width, height = right - left, bottom - top
    if max(width, height, end - start) > _LARGEST:
        raise ValueError(f"{span.path}: {end - start} frames of {width}x{height} pixels are in no video")
    return width, height, end - start, float(fps)


def _fingerprint(clip_set: ClipSet) -> bytes:
    """32 bytes that change with the set: sizes and times of change of the manifest or of the shards."""
    path = clip_set.path
    files: Sequence[Path] = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".tar", ".json", ".jsonl"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([len(clip_set), stats]).encode()).digest()


def _tell(clip_set: ClipSet, records: np.ndarray) -> None:
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
