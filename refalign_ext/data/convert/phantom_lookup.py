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

from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.convert.parquet import find_columns, open_parquet, read_rows
from refalign_ext.data.convert.phantom_pairs import Detection, convert_or_none, parse_cross_pair
from refalign_ext.data.convert.staging import fingerprint, is_staged, staging
from refalign_ext.data.schema import ClipScores

MAX_REVERSE_PAIRS = 64  # that one clip is given
_OPTIONAL = ("fps", "num_frames", "aesthetic_score", "motion_score", "clarity_score")
_TABLES = """
    CREATE TABLE info (vid TEXT, fps REAL, frames INTEGER, width INTEGER, height INTEGER, aesthetic, motion, tech);
    CREATE TABLE reverse_pair (vid TEXT, pair TEXT);
"""
_INDICES = """
    CREATE INDEX info_by_vid ON info (vid);
    CREATE INDEX reverse_pair_by_vid ON reverse_pair (vid);
"""
_CACHED_CLIPS = 4096  # pairs of neighbouring rows name the same ones
_VID = re.compile(r"(?P<uuid>.+)_(?P<start>\d+(?:\.\d+)?)_(?P<end>\d+(?:\.\d+)?)")
_Rate = Annotated[float, msgspec.Meta(gt=0, lt=1e9)]
_Count = Annotated[float, msgspec.Meta(ge=1, lt=1e9)]
_Score = Annotated[float, msgspec.Meta(gt=-1e9, lt=1e9)]


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

    @property
    def seconds(self) -> float:
        """How long the clip is."""
        return float(self.end) - float(self.start)


class ClipInfo(NamedTuple):
    """One clip: frames per second, number of frames, (width, height) in pixels and the scores of Koala-36M."""

    fps: float
    frames: int
    size: tuple[int, int]
    scores: ClipScores


class ReversePair(NamedTuple):
    """A pair that another clip lists: `here` is its reference, in this clip; `there` its own subject, in that one."""

    phrase: str
    here: Detection
    there: Detection


class ClipLookup:
    """Looks clips up in an open file that `stage_lookup` made."""

    def __init__(self, staged: sqlite3.Connection) -> None:
        self._staged = staged
        self.info = lru_cache(_CACHED_CLIPS)(self._read_info)

    def _read_info(self, vid: str) -> ClipInfo | None:
        """What is known about a clip; None if it is not enough."""
        query = "SELECT fps, frames, width, height, aesthetic, motion, tech FROM info WHERE vid = ? LIMIT 1"
        row = self._staged.execute(query, (vid,)).fetchone()
        if row is None or None in row[:4]:
            return None
        fps, frames, width, height, *scores = row
        return ClipInfo(fps, frames, (width, height), ClipScores(*scores))

    def reverse_pairs(self, vid: str) -> list[ReversePair]:
        """The pairs of other clips whose reference lies in this clip, in the order of the rows."""
        query = "SELECT pair FROM reverse_pair WHERE vid = ? ORDER BY rowid LIMIT ?"
        rows = self._staged.execute(query, (vid, MAX_REVERSE_PAIRS))
        return [msgspec.convert(json.loads(text), ReversePair) for (text,) in rows]


def stage_lookup(pairs: Path, columns: list[str], info: Path, folder: Path, both_ways: bool) -> Path:
    """Copies what `ClipLookup` needs into an indexed file in `folder`, unless it is there; returns the file.

    Processes that do this at once do it twice, and none disturbs another.

    Args:
        columns: of the parquet `pairs`: the clip's name, and the cross pairs.
        both_ways: whether reverse pairs are needed.

    Raises:
        ValueError: if the file `info` is no parquet or lacks columns; OSError: if the staged file cannot be written.
    """
    from tqdm import tqdm

    *needed, _ = find_columns(info, ("vid", "video_id"), ("width",), ("height",), ("fps", "num_frames"))
    with open_parquet(info) as file:
        optional = [name for name in _OPTIONAL if name in file.schema_arrow.names]
        count = file.metadata.num_rows
    mark = fingerprint({"both_ways": both_ways, "format": 2}, [info, pairs])
    target = folder / f"lookup-{mark[:12]}.sqlite"
    if is_staged(target, mark):
        return target
    folder.mkdir(exist_ok=True)
    with staging(target, mark, _TABLES, ConversionReport(), exclusive=False) as staged:
        rows = read_rows(info, [*needed, *optional])
        for _, values in tqdm(rows, "meta info", count, unit="row", dynamic_ncols=True, disable=None):
            row = _info_row(*values[:3], dict(zip(optional, values[3:])))
            staged.execute("INSERT INTO info VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        for _, (vid, cell) in read_rows(pairs, columns) if both_ways else ():
            staged.executemany("INSERT INTO reverse_pair VALUES (?, ?)", _reverse_pairs(vid, cell))
        # Sorting once at the end is far quicker than keeping names that come in any order sorted.
        staged.executescript(_INDICES)
    return target


def _info_row(vid: Any, width: Any, height: Any, optional: dict[str, Any]) -> tuple[Any, ...]:
    """One row of the staged table; what is missing or cannot be is NULL."""
    vid = vid if isinstance(vid, str) else ""
    fps = convert_or_none(optional.get("fps"), _Rate)
    frames, width, height = (
        convert_or_none(value, _Count) for value in (optional.get("num_frames"), width, height)
    )
    name = ClipName.parse(vid)
    if name is not None and name.seconds > 0:
        fps = fps or (frames / name.seconds if frames else None)
        frames = frames or (round(fps * name.seconds) if fps else None)
    whole = [None if value is None else int(value) for value in (frames, width, height)]
    return vid, fps, *whole, *(convert_or_none(optional.get(key), _Score) for key in _OPTIONAL[2:])


def _reverse_pairs(vid: Any, cell: Any) -> Iterator[tuple[str, str]]:
    """The rows of the staged table; what cannot be used is counted when the clip itself is converted."""
    try:
        phrases = parse_cross_pair(cell)
    except ValueError:
        return
    for entry in phrases:
        own = [item for item in entry.targets if isinstance(item, Detection) and item.vid == vid]
        for item in entry.references if own and entry.phrase.strip() else ():
            if isinstance(item, str) or item.vid == vid:
                continue
            there = own[0]._replace(score=item.score)
            pair = json.dumps((entry.phrase, item, there), ensure_ascii=False)
            try:
                pair.encode()
            except UnicodeEncodeError:  # half of a surrogate pair, which JSON can name
                continue
            yield item.vid, pair
