"""Pairs of Phantom-Data seen from the clip that the reference lies in, staged on disk."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from refalign_ext.data.conversion_report import Report
from refalign_ext.data.convert.phantom_info import batches, open_parquet
from refalign_ext.data.convert.phantom_pairs import REFERENCES, TARGET, Sighting, phrases_of, sightings
from refalign_ext.data.convert.phantom_rows import Other
from refalign_ext.data.convert.staging import fingerprint, is_staged, staging

MAX_OTHERS = 64  # pairs that one clip is given from elsewhere
_SIDE = ("vid", "frame_frac", "x0", "y0", "x1", "y1", "cls")
_COLUMNS = [f"{side}_{name}" for side in ("here", "there") for name in _SIDE]
_TABLES = f"CREATE TABLE others (phrase TEXT, score REAL, {', '.join(_COLUMNS)})"


class OthersStore:
    """Looks up the pairs that point to a clip; without a file there are none."""

    def __init__(self, path: Path | None) -> None:
        uri = None if path is None else f"{path.absolute().as_uri()}?mode=ro"
        self._store = None if uri is None else sqlite3.connect(uri, uri=True)

    def get(self, vid: Any) -> list[Other]:
        """The pairs of other clips whose reference lies in clip `vid`, in the order of the rows."""
        if self._store is None or not isinstance(vid, str):
            return []
        rows = self._store.execute(
            f"SELECT phrase, score, {', '.join(_COLUMNS)} FROM others WHERE here_vid = ? ORDER BY rowid LIMIT {MAX_OTHERS}",
            (vid,),
        )
        return [
            Other(phrase, _sighting(side[:7], score), _sighting(side[7:], score))
            for phrase, score, *side in rows
        ]

    def __enter__(self) -> OthersStore:
        return self

    def __exit__(self, *_: object) -> None:
        if self._store is not None:
            self._store.close()


def stage_others(pairs: Path, columns: Mapping[str, str], folder: Path) -> Path:
    """Copies every pair of two clips into an indexed file in `folder`, unless it is there; returns the file.

    Raises:
        ValueError: if the parquet is damaged.
        OSError: if the file cannot be written.
    """
    mark = fingerprint({"columns": dict(columns), "others": 1}, [pairs])
    target = folder / f"others-{mark[:12]}.sqlite"
    if is_staged(target, mark):
        return target
    marks = ", ".join("?" * (2 + len(_COLUMNS)))
    with staging(target, mark, _TABLES, Report(), alone=False) as store, open_parquet(pairs) as file:
        names = [columns["vid"], columns["pairs"]]
        for batch in batches(pairs, file, names, "reading pairs the other way"):
            for vid, cell in zip(*(batch[name] for name in names)):
                store.executemany(f"INSERT INTO others VALUES ({marks})", _pairs(vid, cell))
        store.execute("CREATE INDEX by_here ON others (here_vid)")
    return target


def _pairs(vid: Any, cell: Any) -> Iterator[tuple[Any, ...]]:
    """The rows of the staged file; what cannot be used is counted when the clip itself is converted."""
    if not isinstance(vid, str):
        return
    try:
        for phrase, entry in phrases_of(cell).items():
            own = [item for item in _usable(sightings(entry, TARGET, vid)) if item.vid == vid]
            for item in _usable(sightings(entry, REFERENCES, vid)):
                is_pair = own and item.vid != vid and phrase.strip()
                if is_pair and _is_text(phrase, item.vid, item.cls, own[0].cls):
                    yield phrase, item.score, *_cells(item), *_cells(own[0])
    except (ValueError, RecursionError):
        return


def _usable(found: Iterable[Sighting | str]) -> Iterator[Sighting]:
    # NaN would come back from sqlite as nothing.
    return (item for item in found if isinstance(item, Sighting) and all(map(math.isfinite, item.box)))


def _is_text(*values: str | None) -> bool:
    """Whether sqlite takes them: half of a surrogate pair, which JSON can name, is no text."""
    try:
        "".join(filter(None, values)).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _cells(seen: Sighting) -> tuple[Any, ...]:
    return seen.vid, seen.frame_frac, *seen.box, seen.cls


def _sighting(cells: list[Any], score: float | None) -> Sighting:
    vid, frame_frac, *box, cls = cells
    return Sighting(vid, frame_frac, tuple(box), cls, score)
