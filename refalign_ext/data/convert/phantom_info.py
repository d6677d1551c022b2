"""What Phantom-Data's meta info says about each clip, staged on disk: references point into any other clip."""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refalign_ext.data.conversion_report import Report
from refalign_ext.data.convert.staging import fingerprint, is_staged, staging
from refalign_ext.data.schema import ClipScores

if TYPE_CHECKING:
    import pyarrow.parquet

# Accepted names of columns, the first that there is being taken; upper and lower case are the same.
COLUMNS: dict[str, tuple[str, ...]] = {
    "vid": ("vid", "video_id", "clip_id", "videoid"),
    "fps": ("fps", "frame_rate", "framerate", "video_fps"),
    "frames": ("num_frames", "frames", "frame_count", "frame_num", "n_frames", "nframes", "total_frames"),
    "duration": ("duration", "duration_s", "duration_sec", "seconds"),
    "width": ("width", "w", "video_width", "frame_width"),
    "height": ("height", "h", "video_height", "frame_height"),
    "resolution": ("resolution", "size"),
    "aesthetic": ("aesthetic_score", "aesthetic", "aesthetics", "aes_score", "aes"),
    "motion": ("motion_score", "motion"),
    "tech": ("clarity_score", "clarity", "tech_score", "tech", "technical"),
}
_TABLES = "CREATE TABLE info (vid TEXT, fps REAL, frames INTEGER, width INTEGER, height INTEGER, aesthetic, motion, tech)"
_BATCH_ROWS = 512
_REMEMBERED = 4096  # clips: pairs of neighbouring rows name the same ones
_VID = re.compile(r"(?P<uuid>.+)_(?P<start>\d+(?:\.\d+)?)_(?P<end>\d+(?:\.\d+)?)")
_RESOLUTION = re.compile(r"\s*(\d+)\s*[xX*]\s*(\d+)\s*")
_LARGEST = 1e9  # frames, pixels or seconds; more is damage


@dataclass(frozen=True)
class ClipInfo:
    """One clip: frames per second, number of frames, (width, height) in pixels and the scores of Koala-36M."""

    fps: float
    frames: int
    size: tuple[int, int]
    scores: ClipScores


@dataclass(frozen=True)
class ClipName:
    """The parts of a clip's `vid`, `<uuid>_<start>_<end>` in seconds of the source video `uuid`."""

    uuid: str
    start: str
    end: str

    @classmethod
    def parse(cls, vid: str) -> ClipName | None:
        """The parts; None for other names. A uuid may hold "_" and "-": the last two numbers are the times."""
        match = _VID.fullmatch(vid)
        return None if match is None else cls(match["uuid"], match["start"], match["end"])

    @property
    def seconds(self) -> float:
        """How long the clip is."""
        return float(self.end) - float(self.start)


class InfoStore:
    """Looks clips up in a file that `stage_info` made."""

    def __init__(self, path: Path) -> None:
        self._store = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        self._remembered = lru_cache(_REMEMBERED)(self._read)

    def get(self, vid: str) -> ClipInfo | None:
        """What is known about a clip; None if it is not enough."""
        return self._remembered(vid)

    def _read(self, vid: str) -> ClipInfo | None:
        row = self._store.execute(
            "SELECT fps, frames, width, height, aesthetic, motion, tech FROM info WHERE vid = ? LIMIT 1",
            (vid,),
        ).fetchone()
        if row is None or None in row[:4]:
            return None
        return ClipInfo(row[0], row[1], (row[2], row[3]), ClipScores(*row[4:]))

    def close(self) -> None:
        """Closes the file."""
        self._store.close()


def stage_info(parquet: Path, folder: Path) -> Path:
    """Copies what is needed of the meta info into an indexed file in `folder`, unless it is there; returns the file.

    Processes that do this at once do it twice, and none disturbs another.

    Raises:
        ValueError: if the file is no parquet or lacks columns.
        OSError: if the file cannot be written.
    """
    with open_parquet(parquet) as file:
        columns = find_columns(parquet, file.schema_arrow.names, COLUMNS)
        _check_columns(parquet, columns, file.schema_arrow.names)
        mark = fingerprint({"columns": columns, "format": 1}, [parquet])
        target = folder / f"info-{mark[:12]}.sqlite"
        if is_staged(target, mark):
            return target
        folder.mkdir(exist_ok=True)
        with staging(target, mark, _TABLES, Report(), alone=False) as store:
            for batch in batches(parquet, file, list(columns.values()), "reading the meta info"):
                rows = (_values(dict(zip(columns, cells))) for cells in zip(*batch.values()))
                store.executemany("INSERT INTO info VALUES (?,?,?,?,?,?,?,?)", rows)
            # Sorting once at the end is far quicker than keeping names that come in any order sorted.
            store.execute("CREATE INDEX by_vid ON info (vid)")
    return target


def open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """A parquet file that is read through a small buffer, not a row group at a time: one may hold all rows.

    Raises:
        ValueError: if it is none.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a parquet file that can be read ({_first_line(error)})") from None


def batches(
    path: Path,
    file: pyarrow.parquet.ParquetFile,
    columns: Sequence[str],
    description: str = "",
    rows: range | None = None,
) -> Iterator[dict[str, list[Any]]]:
    """The given columns in small batches; `rows`: of these rows alone. A description means a progress bar.

    Raises:
        ValueError: if the file is damaged.
    """
    import pyarrow
    from tqdm import tqdm

    groups, start = [], 0  # row groups that hold wanted rows, and the number of the first row in them
    wanted = range(file.metadata.num_rows) if rows is None else rows
    for number in range(file.metadata.num_row_groups):
        end = start + file.metadata.row_group(number).num_rows
        if wanted.start < end and start < wanted.stop:
            groups.append((number, start))
        start = end
    position = groups[0][1] if groups else 0
    bar = tqdm(
        total=len(wanted),
        desc=description,
        unit="row",
        dynamic_ncols=True,
        disable=None if description else True,
    )
    try:
        with bar:
            for batch in file.iter_batches(
                _BATCH_ROWS, [number for number, _ in groups], columns, use_threads=False
            ):
                first, position = position, position + batch.num_rows
                if position <= wanted.start:
                    continue
                part = batch.slice(
                    max(0, wanted.start - first), min(wanted.stop, position) - max(wanted.start, first)
                )
                bar.update(part.num_rows)
                yield part.to_pydict()
                if position >= wanted.stop:
                    return
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged after row {position} ({_first_line(error)})") from None


def find_columns(
    path: Path, names: Sequence[str], known: Mapping[str, Sequence[str]], needed: Sequence[str] = ("vid",)
) -> dict[str, str]:
    """What is known -> the file's own name of that column, for those that there are.

    Raises:
        ValueError: if a needed one is missing.
    """
    by_lower = {name.lower(): name for name in reversed(names)}
    found = {}
    for key, aliases in known.items():
        name = next((by_lower[alias] for alias in aliases if alias in by_lower), None)
        if name is not None:
            found[key] = name
        elif key in needed:
            raise ValueError(f"{path}: no column {' or '.join(aliases)}; it has {', '.join(names)}")
    return found


def _check_columns(path: Path, columns: Mapping[str, str], names: Sequence[str]) -> None:
    has = ", ".join(names)
    if "resolution" not in columns and not {"width", "height"} <= columns.keys():
        raise ValueError(f"{path}: no columns width and height, which boxes need; it has {has}")
    if not {"fps", "frames"} & columns.keys():
        accepted = ", ".join(COLUMNS["fps"] + COLUMNS["frames"])
        raise ValueError(
            f"{path}: no column for the frame rate or the number of frames ({accepted}); it has {has}"
        )


def _values(cells: Mapping[str, Any]) -> tuple[Any, ...]:
    """One row of the staged table; what is missing or cannot be is NULL."""
    vid = cells["vid"] if isinstance(cells["vid"], str) else None
    name = None if vid is None else ClipName.parse(vid)
    fps, frames = _number(cells.get("fps")), _number(cells.get("frames"))
    seconds = _number(cells.get("duration")) or (name.seconds if name and name.seconds > 0 else None)
    if seconds:
        fps = fps or (frames / seconds if frames else None)
        frames = frames or (round(fps * seconds) if fps else None)
    width, height = _size(cells)
    whole = [None if value is None or value < 1 else int(value) for value in (frames, width, height)]
    return vid, fps, *whole, *(_number(cells.get(key), -_LARGEST) for key in ("aesthetic", "motion", "tech"))


def _size(cells: Mapping[str, Any]) -> tuple[float | None, float | None]:
    width, height = _number(cells.get("width")), _number(cells.get("height"))
    resolution = cells.get("resolution")
    if (width is None or height is None) and isinstance(resolution, dict):
        return _number(resolution.get("width")), _number(resolution.get("height"))
    if (width is None or height is None) and isinstance(resolution, str):
        match = _RESOLUTION.fullmatch(resolution)
        return (float(match[1]), float(match[2])) if match else (None, None)
    return width, height


def _number(value: Any, above: float = 0.0) -> float | None:
    """A finite number above a limit, also from text; else None."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and above < number < _LARGEST else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
