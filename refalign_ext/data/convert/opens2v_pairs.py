"""OpenS2V-5M's cross pairs, in both directions, and its clusters, staged so that they can be asked for clip by clip.

The folder has `cluster_videos.json`, `{cluster: ["<part>/<key>", ...]}`, and for each cluster a list (or, all in one file,
an object of lists) of `{"cur_id", "aft_id", "cur_class_id", "aft_class_id", "cur_class_name", "aft_class_name",
"text_similarity", "image_similarity", ...}`. Things are numbered from 1; older files name them only.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refalign_ext.data.conversion_report import Report
from refalign_ext.data.convert.opens2v_stream import Incomplete, entries
from refalign_ext.data.convert.selection import Selection
from refalign_ext.data.convert.staging import fingerprint, is_staged, staging

_VERSION = 2
_LARGEST = 1e6  # no similarity comes near
_TABLES = """
    CREATE TABLE pair (clip TEXT, number INTEGER, name TEXT, source TEXT, source_number INTEGER, source_name TEXT,
                       likeness REAL);
    CREATE TABLE member (clip TEXT, cluster TEXT);
    CREATE TABLE merged (cluster TEXT PRIMARY KEY, root TEXT) WITHOUT ROWID;
"""
_INDICES = """
    CREATE INDEX pair_by_clip ON pair (clip);
    CREATE INDEX member_by_clip ON member (clip, cluster);
"""


@dataclass(frozen=True)
class Pair:
    """A thing of a clip and the thing of another clip that shows the same; numbers are from 1, None if not given."""

    number: int | None
    name: str | None
    source: str
    source_number: int | None
    source_name: str | None
    likeness: float | None


def stage_pairs(folder: Path, target: Path, selection: Selection) -> None:
    """Stages all pairs of a folder, those of dissimilar things and of clips with themselves left out.

    Raises:
        ValueError: if the folder has no JSON files; OSError: if the staged file cannot be written.
    """
    from tqdm import tqdm

    files = sorted(folder.rglob("*.json"))
    if not files:
        raise ValueError(f"--cross_pairs {folder}: no *.json files there")
    settings = {
        "version": _VERSION,
        "text": selection.min_text_similarity,
        "image": selection.min_image_similarity,
    }
    mark = fingerprint(settings, files)
    if is_staged(target, mark):
        return
    report = Report()
    with staging(target, mark, _TABLES, report) as staged:
        for path in tqdm(files, desc="cross pairs", unit="file", dynamic_ncols=True, disable=None):
            name = str(path.relative_to(folder))
            try:
                for key, value in entries(path):
                    _add(staged, key, value, f"{name}, {key}", selection, report)
            except Incomplete as error:
                report.incomplete[name] = str(error)
        staged.executescript(_INDICES)
        _merge_clusters(staged)


def pairs_of(staged: sqlite3.Connection, names: tuple[str, ...]) -> list[Pair]:
    """The pairs of a clip under any of its names, as they stand in the files."""
    query = "SELECT number, name, source, source_number, source_name, likeness FROM pair WHERE clip = ? ORDER BY rowid"
    return [Pair(*row) for name in names for row in staged.execute(query, (name,))]


def cluster_of(staged: sqlite3.Connection, names: tuple[str, ...]) -> str | None:
    """The cluster of a clip; clusters that share a clip are one, named by the first of their names."""
    query = (
        "SELECT coalesce(root, member.cluster) FROM member LEFT JOIN merged ON merged.cluster = member.cluster "
        "WHERE clip = ? ORDER BY member.cluster LIMIT 1"
    )
    rows = [row[0] for name in names for row in staged.execute(query, (name,))]
    return min(rows, default=None)


def _add(
    staged: sqlite3.Connection, key: str, value: object, place: str, selection: Selection, report: Report
) -> None:
    items = value if isinstance(value, list) else [value]
    members = [(item, key) for item in items if isinstance(item, str) and key.strip()]
    staged.executemany("INSERT INTO member VALUES (?, ?)", members)
    for item in items:
        if not isinstance(item, str):
            rows = list(_directions(item, place, selection, report))
            staged.executemany("INSERT INTO pair VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


def _directions(item: object, place: str, selection: Selection, report: Report) -> Iterator[tuple[Any, ...]]:
    """The two rows of a pair; what is dropped counts twice as well."""
    names = [item.get(f"{end}_id") for end in ("cur", "aft")] if isinstance(item, dict) else [None, None]
    if not all(isinstance(name, str) and name for name in names):
        report.drop("references", "cross_broken", f"{place}: cur_id or aft_id is not a text", 2)
        return
    what = f"{place}: {names[0]} and {names[1]}"
    numbers = [item.get(f"{end}_class_id") for end in ("cur", "aft")]
    numbers = [
        int(number) if isinstance(number, str) and number.isdigit() and len(number) < 5 else number
        for number in numbers
    ]
    classes = [item.get(f"{end}_class_name") for end in ("cur", "aft")]
    scores = [item.get(f"{kind}_similarity") for kind in ("text", "image")]
    is_sound = (
        all(number is None or (type(number) is int and 0 <= number < 1 << 31) for number in numbers)
        and all(name is None or isinstance(name, str) for name in classes)
        and all(number is not None or name is not None for number, name in zip(numbers, classes))
        and all(score is None or (type(score) in (int, float) and abs(score) < _LARGEST) for score in scores)
    )
    if not is_sound:
        report.drop("references", "cross_broken", f"{what}: a class or a similarity has the wrong type", 2)
        return
    problem = "cross_self" if names[0] == names[1] else selection.pair_problem(*scores)
    if problem:
        report.drop("references", problem, what, 2)
        return
    ends = list(zip(names, numbers, classes))
    for here, there in (ends, ends[::-1]):
        yield (*here, *there, scores[1])


def _merge_clusters(staged: sqlite3.Connection) -> None:
    """Finds clusters that share a clip: memory grows with the number of these only."""
    roots: dict[str, str] = {}

    def root(cluster: str) -> str:
        while roots.setdefault(cluster, cluster) != cluster:
            roots[cluster] = roots[roots[cluster]]
            cluster = roots[cluster]
        return cluster

    shared = (
        "SELECT DISTINCT first.cluster, second.cluster FROM member AS first JOIN member AS second "
        "ON first.clip = second.clip AND first.cluster < second.cluster"
    )
    for first, second in staged.execute(shared):
        ends = sorted((root(first), root(second)))
        roots[ends[1]] = ends[0]
    staged.executemany("INSERT INTO merged VALUES (?, ?)", [(name, root(name)) for name in sorted(roots)])
