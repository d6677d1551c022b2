"""OpenS2V-5M's cross pairs, in both directions, and its clusters, staged so that they can be looked up clip by clip.

The folder has `cluster_videos.json`, `{cluster: ["<part>/<key>", ...]}`, and for each cluster a list of `{"cur_id",
"aft_id", "cur_class_id", "aft_class_id", "cur_class_name", "aft_class_name", "text_similarity", "image_similarity", ...}`.
Subjects are numbered from 1.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from refalign_ext.data.conversion_report import ConversionReport, Unusable
from refalign_ext.data.convert.json_stream import IncompleteFile, read_entries
from refalign_ext.data.convert.rows import Number, Text, converted
from refalign_ext.data.convert.selection import Selection
from refalign_ext.data.convert.staging import fingerprint, staged_report, staging

_VERSION = 4
_TABLES = """
    CREATE TABLE pair (clip TEXT, subject TEXT, source TEXT, source_subject TEXT, similarity REAL);
    CREATE TABLE member (clip TEXT, cluster TEXT);
    CREATE TABLE merged (cluster TEXT PRIMARY KEY, root TEXT) WITHOUT ROWID;
"""
_INDICES = """
    CREATE INDEX pair_by_clip ON pair (clip);
    CREATE INDEX member_by_clip ON member (clip, cluster);
"""
_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class _NativePair(msgspec.Struct):
    cur_id: Text
    aft_id: Text
    cur_class_id: _Number
    aft_class_id: _Number
    cur_class_name: Text
    aft_class_name: Text
    text_similarity: Number | None = None
    image_similarity: Number | None = None


class CrossPair(NamedTuple):
    """A subject of the clip `clip`, by number and name, and one of the clip `source` that shows the same."""

    clip: str
    subject: str
    source: str
    source_subject: str
    similarity: float | None


def stage_pairs(folder: Path, target: Path, selection: Selection) -> ConversionReport:
    """Stages all pairs of a folder, those of dissimilar subjects and of clips with themselves left out and counted.

    Raises:
        ValueError: if the folder has no JSON files; OSError: if the staged file cannot be written.
    """
    from tqdm import tqdm

    files = sorted(folder.rglob("*.json"))
    if not files:
        raise ValueError(f"--cross_pairs {folder}: no *.json files there")
    rules = {"text": selection.min_text_similarity, "image": selection.min_image_similarity}
    mark = fingerprint({"version": _VERSION} | rules, files)
    if report := staged_report(target, mark):
        return report
    report = ConversionReport()
    with staging(target, mark, _TABLES, report) as staged:
        for path in tqdm(files, desc="cross pairs", unit="file", dynamic_ncols=True, disable=None):
            name = str(path.relative_to(folder))
            try:
                for key, value in read_entries(path):
                    if isinstance(value, list):
                        members = [(item, key) for item in value if _is_text(item) and _is_text(key)]
                        staged.executemany("INSERT INTO member VALUES (?, ?)", members)
                        continue
                    try:
                        pairs = list(_directions(value, selection))
                        staged.executemany("INSERT INTO pair VALUES (?, ?, ?, ?, ?)", pairs)
                    except Unusable as problem:
                        report.drop("references", problem.reason, f"{name}, {key}: {problem}", 2)
            except IncompleteFile as error:
                report.incomplete[name] = str(error)
        staged.executescript(_INDICES)
        _merge_clusters(staged)
    return report


def pairs_of(staged: sqlite3.Connection, names: tuple[str, str]) -> list[CrossPair]:
    """The pairs of a clip under either of its names, the most similar first."""
    query = "SELECT * FROM pair WHERE clip IN (?, ?) ORDER BY ifnull(similarity, 0) DESC, rowid"
    return [CrossPair(*row) for row in staged.execute(query, names)]


def cluster_of(staged: sqlite3.Connection, names: tuple[str, str]) -> str | None:
    """The cluster of a clip; clusters that share a clip are one, named by the first of their names."""
    query = (
        "SELECT min(coalesce(root, member.cluster)) FROM member LEFT JOIN merged ON merged.cluster = member.cluster "
        "WHERE clip IN (?, ?)"
    )
    return staged.execute(query, names).fetchone()[0]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and bool(value.strip())


def _directions(item: object, selection: Selection) -> Iterator[CrossPair]:
    pair = converted(item, _NativePair, "cross_broken")
    problem = selection.pair_problem(pair.text_similarity, pair.image_similarity)
    if pair.cur_id == pair.aft_id:
        problem = "cross_self"
    if problem:
        raise Unusable(problem, f"{pair.cur_id} and {pair.aft_id}")
    here = (pair.cur_id, f"{pair.cur_class_id} {pair.cur_class_name.strip()}")
    there = (pair.aft_id, f"{pair.aft_class_id} {pair.aft_class_name.strip()}")
    yield CrossPair(*here, *there, pair.image_similarity)
    yield CrossPair(*there, *here, pair.image_similarity)


def _merge_clusters(staged: sqlite3.Connection) -> None:
    """Finds clusters that share a clip: memory grows with the number of these only."""
    roots: dict[str, str] = {}

    def root(cluster: str) -> str:
        while roots.setdefault(cluster, cluster) != cluster:
            roots[cluster] = cluster = roots[roots[cluster]]
        return cluster

    shared = (
        "SELECT DISTINCT first.cluster, second.cluster FROM member AS first JOIN member AS second "
        "ON first.clip = second.clip AND first.cluster < second.cluster"
    )
    for first, second in staged.execute(shared):
        ends = sorted((root(first), root(second)))
        roots[ends[1]] = ends[0]
    staged.executemany("INSERT INTO merged VALUES (?, ?)", [(name, root(name)) for name in sorted(roots)])
