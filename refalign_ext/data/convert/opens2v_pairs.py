"""OpenS2V-5M's cross pairs, in both directions, and its clusters, staged so that they can be looked up clip by clip.

The folder has `cluster_videos.json`, `{cluster: ["<part>/<key>", ...]}`, and for each cluster a list (or, all in one file,
an object of lists) of `{"cur_id", "aft_id", "cur_class_id", "aft_class_id", "cur_class_name", "aft_class_name",
"text_similarity", "image_similarity", ...}`. Subjects are numbered from 1.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.convert.json_stream import IncompleteFile, read_entries
from refalign_ext.data.convert.selection import Selection
from refalign_ext.data.convert.staging import fingerprint, is_staged, staging

_VERSION = 3
_TABLES = """
    CREATE TABLE pair (clip TEXT, number INTEGER, name TEXT, source TEXT, source_number INTEGER, source_name TEXT,
                       similarity REAL);
    CREATE TABLE member (clip TEXT, cluster TEXT);
    CREATE TABLE merged (cluster TEXT PRIMARY KEY, root TEXT) WITHOUT ROWID;
"""
_INDICES = """
    CREATE INDEX pair_by_clip ON pair (clip);
    CREATE INDEX member_by_clip ON member (clip, cluster);
"""
_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Similarity = Annotated[float, msgspec.Meta(gt=-1e6, lt=1e6)]
_Text = Annotated[str, msgspec.Meta(min_length=1)]


class _NativePair(msgspec.Struct):
    cur_id: _Text
    aft_id: _Text
    cur_class_id: _Number
    aft_class_id: _Number
    cur_class_name: str
    aft_class_name: str
    text_similarity: _Similarity | None = None
    image_similarity: _Similarity | None = None


@dataclass(frozen=True)
class CrossPair:
    """A subject of a clip, and a subject of the clip `source` that shows the same; numbers are from 1."""

    number: int
    name: str
    source: str
    source_number: int
    source_name: str
    similarity: float | None


def stage_pairs(folder: Path, target: Path, selection: Selection) -> None:
    """Stages all pairs of a folder, those of dissimilar subjects and of clips with themselves left out.

    Raises:
        ValueError: if the folder has no JSON files; OSError: if the staged file cannot be written.
    """
    from tqdm import tqdm

    files = sorted(folder.rglob("*.json"))
    if not files:
        raise ValueError(f"--cross_pairs {folder}: no *.json files there")
    rules = {"text": selection.min_text_similarity, "image": selection.min_image_similarity}
    mark = fingerprint({"version": _VERSION} | rules, files)
    if is_staged(target, mark):
        return
    report = ConversionReport()
    with staging(target, mark, _TABLES, report) as staged:
        for path in tqdm(files, desc="cross pairs", unit="file", dynamic_ncols=True, disable=None):
            name = str(path.relative_to(folder))
            try:
                for key, value in read_entries(path):
                    for item in value if isinstance(value, list) else [value]:
                        if isinstance(item, str) and item.isprintable() and key.strip() and key.isprintable():
                            staged.execute("INSERT INTO member VALUES (?, ?)", (item, key))
                        elif not isinstance(item, str):
                            rows = _directions(item, f"{name}, {key}", selection, report)
                            staged.executemany("INSERT INTO pair VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            except IncompleteFile as error:
                report.incomplete[name] = str(error)
        staged.executescript(_INDICES)
        _merge_clusters(staged)


def pairs_of(staged: sqlite3.Connection, names: tuple[str, ...]) -> list[CrossPair]:
    """The pairs of a clip under any of its names, as they stand in the files."""
    query = "SELECT number, name, source, source_number, source_name, similarity FROM pair WHERE clip = ? ORDER BY rowid"
    return [CrossPair(*row) for name in names for row in staged.execute(query, (name,))]


def cluster_of(staged: sqlite3.Connection, names: tuple[str, ...]) -> str | None:
    """The cluster of a clip; clusters that share a clip are one, named by the first of their names."""
    query = (
        "SELECT coalesce(root, member.cluster) FROM member LEFT JOIN merged ON merged.cluster = member.cluster "
        "WHERE clip = ? ORDER BY member.cluster LIMIT 1"
    )
    return min((row[0] for name in names for row in staged.execute(query, (name,))), default=None)


def _directions(
    item: object, place: str, selection: Selection, report: ConversionReport
) -> Iterator[tuple[Any, ...]]:
    """The two rows of a pair; what is dropped counts twice as well."""
    try:
        pair = msgspec.convert(
            item, _NativePair, strict=False
        )  # numbers may be texts, as the keys of masks are
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # half a surrogate pair
        report.drop("references", "cross_broken", f"{place}: {error}", 2)
        return
    here = (pair.cur_id, pair.cur_class_id, pair.cur_class_name)
    there = (pair.aft_id, pair.aft_class_id, pair.aft_class_name)
    # Half of a surrogate pair, which JSON can name, is no text for sqlite.
    if not all(part.isprintable() for part in (*here, *there) if isinstance(part, str)):
        problem = "cross_broken"
    elif pair.cur_id == pair.aft_id:
        problem = "cross_self"
    else:
        problem = selection.pair_problem(pair.text_similarity, pair.image_similarity)
    if problem:
        report.drop("references", problem, f"{place}: {pair.cur_id} and {pair.aft_id}", 2)
        return
    yield (*here, *there, pair.image_similarity)
    yield (*there, *here, pair.image_similarity)


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
