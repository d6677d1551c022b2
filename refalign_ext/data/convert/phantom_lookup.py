"""What Phantom-Data's files say about any clip, staged on disk: references point into clips all over the data set."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from refalign_ext.data.conversion_report import ConversionReport, Unusable
from refalign_ext.data.convert.parquet import find_columns, read_rows
from refalign_ext.data.convert.phantom_pairs import Detection, parse_cross_pair
from refalign_ext.data.convert.rows import Number, converted
from refalign_ext.data.convert.staging import fingerprint, staged_report, staging
from refalign_ext.data.schema import ClipScores

MAX_REVERSE_PAIRS = 64  # that one clip is given
_TABLES = "CREATE TABLE info (vid TEXT, info TEXT); CREATE TABLE reverse_pair (vid TEXT, pair TEXT);"
# Sorting once at the end is far quicker than keeping names that come in any order sorted.
_INDICES = "CREATE INDEX info_by_vid ON info (vid); CREATE INDEX reverse_pair_by_vid ON reverse_pair (vid);"
_CACHED_CLIPS = 4096  # pairs of neighbouring rows name the same ones
_VID = re.compile(r"(?P<uuid>.+)_(?P<start>\d+(?:\.\d+)?)_(?P<end>\d+(?:\.\d+)?)")
_Count = Annotated[float, msgspec.Meta(ge=1, lt=1e9)]


class ClipName(NamedTuple):
    """The parts of a clip's `vid`, `<uuid>_<start>_<end>` in seconds of the source video `uuid`."""

    uuid: str
    start: str
    end: str

    @classmethod
    def parse(cls, vid: str) -> ClipName | None:
        """The parts; None for other names. A uuid may hold "_" and "-": the last two numbers are the times."""
        match = _VID.fullmatch(vid)
        return None if match is None else cls(**match.groupdict())


class _NativeInfo(msgspec.Struct):
    width: _Count
    height: _Count
    fps: Annotated[float, msgspec.Meta(gt=0, lt=1e9)] | None = None
    num_frames: _Count | None = None
    aesthetic_score: Number | None = None
    motion_score: Number | None = None
    clarity_score: Number | None = None


class ClipInfo(NamedTuple):
    """One clip: frames per second, number of frames, (width, height) in pixels and the scores of Koala-36M."""

    fps: float
    frames: int
    size: tuple[int, int]
    scores: ClipScores


class ClipLookup:
    """Looks clips up in an open file that `stage_lookup` made."""

    def __init__(self, staged: sqlite3.Connection) -> None:
        self._staged = staged
        self.info = lru_cache(_CACHED_CLIPS)(self._read_info)

    def _read_info(self, vid: str) -> ClipInfo | None:
        """What is known about a clip; None if it is not enough."""
        row = self._staged.execute("SELECT info FROM info WHERE vid = ? LIMIT 1", (vid,)).fetchone()
        return None if row is None else msgspec.convert(json.loads(row[0]), ClipInfo)

    def reverse_pairs(self, vid: str) -> list[tuple[str, Detection, Detection]]:
        """(phrase, where in this clip, where in theirs) of other clips' pairs whose reference lies in this clip."""
        query = "SELECT pair FROM reverse_pair WHERE vid = ? ORDER BY rowid LIMIT ?"
        rows = self._staged.execute(query, (vid, MAX_REVERSE_PAIRS))
        return [msgspec.convert(json.loads(text), tuple[str, Detection, Detection]) for (text,) in rows]


def stage_lookup(pairs: Path, columns: list[str], info: Path, folder: Path, both_ways: bool) -> Path:
    """Copies what `ClipLookup` needs into an indexed file in `folder`, unless it is there; returns the file.

    Processes that do this at once do it twice, and none disturbs another.

    Raises:
        ValueError: if the file `info` is no parquet or lacks columns; OSError: if the staged file cannot be written.
    """
    from tqdm import tqdm

    needed = [("vid", "video_id"), ("width",), ("height",), ("fps", "num_frames")]
    (vid_column, *_), names, count = find_columns(info, *needed)
    keys = [name for name in _NativeInfo.__struct_fields__ if name in names]
    mark = fingerprint({"both_ways": both_ways, "format": 3}, [info, pairs])
    target = folder / f"lookup-{mark[:12]}.sqlite"
    if staged_report(target, mark):
        return target
    folder.mkdir(exist_ok=True)
    with staging(target, mark, _TABLES, ConversionReport(), exclusive=False) as staged:
        rows = read_rows(info, [vid_column, *keys], range(count))
        for _, (vid, *values) in tqdm(rows, "meta info", count, unit="row", dynamic_ncols=True, disable=None):
            # What is not known may be NaN.
            row = _clip_info(vid, {key: value for key, value in zip(keys, values) if value == value})
            if row is not None:
                staged.execute("INSERT INTO info VALUES (?, ?)", (vid, json.dumps(row)))
        count = find_columns(pairs)[2] if both_ways else 0
        for _, (vid, cell) in read_rows(pairs, columns, range(count)):
            staged.executemany("INSERT INTO reverse_pair VALUES (?, ?)", _reverse_pairs(vid, cell))
        staged.executescript(_INDICES)
    return target


def _clip_info(vid: Any, values: dict[str, Any]) -> tuple[Any, ...] | None:
    """The fields of a `ClipInfo`; None if they are not known. Rate or frames alone do, with the length in the name."""
    try:
        native = converted(values, _NativeInfo, "")
    except Unusable:
        return None
    name = ClipName.parse(vid) if isinstance(vid, str) else None
    seconds = float(name.end) - float(name.start) if name else 0.0
    frames = native.num_frames or round((native.fps or 0) * seconds)
    fps = native.fps or (frames / seconds if seconds > 0 else 0)
    if not (fps > 0 and frames >= 1):
        return None
    scores = {
        "aesthetic": native.aesthetic_score,
        "motion": native.motion_score,
        "tech": native.clarity_score,
    }
    return fps, int(frames), (int(native.width), int(native.height)), scores


def _reverse_pairs(vid: Any, cell: Any) -> Iterator[tuple[str, str]]:
    """The rows of the staged table; what cannot be used is counted when the clip itself is converted."""
    try:
        phrases = parse_cross_pair(cell, "", ConversionReport())
    except Unusable:
        return
    for entry in phrases:
        own = [item for item in entry.targets if item.vid == vid]
        for item in entry.references if own and entry.phrase.strip() else ():
            if item.vid != vid:
                yield item.vid, json.dumps((entry.phrase, item, own[0]._replace(score=item.score)))
