"""The second pass over OpenS2V-5M: staged clips with their own and with other clips' references."""

from __future__ import annotations

import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from refalign_ext.data.conversion_report import ConversionReport, Unusable
from refalign_ext.data.convert.opens2v_entry import unpack_record
from refalign_ext.data.convert.opens2v_pairs import CrossPair, cluster_of, pairs_of
from refalign_ext.data.convert.selection import Selection
from refalign_ext.data.schema import Clip, parse

_CACHED_RECORDS = 64  # clips of a cluster lie near each other

_Record = dict[str, Any]  # as `EntryReader` makes them
_Reference = dict[str, Any]  # as in the manifest's lines


class ClipJoiner:
    """Makes clips of staged parts, by the names of their folders, and of what `stage_pairs` made, if there are pairs.

    Paths are made relative to the manifest's folder `root`; the references that are dropped are counted in `report`.
    """

    def __init__(
        self,
        parts: dict[str, sqlite3.Connection],
        pairs: sqlite3.Connection | None,
        root: Path,
        videos: Path,
        backgrounds: Path | None,
        selection: Selection,
        check_videos: bool,
        report: ConversionReport,
    ) -> None:
        self.parts, self.pairs, self.root = parts, pairs, root
        self.videos, self.backgrounds, self.check_videos = videos, backgrounds, check_videos
        self.selection, self.report = selection, report
        self._record = lru_cache(_CACHED_RECORDS)(self._find_record)

    def rows(self) -> Iterator[tuple[str, tuple[str, str, _Record]]]:
        """(id, (part, key, record)) of the clips that are kept, in the order of the parts and their entries."""
        from tqdm import tqdm

        counts = [part.execute("SELECT count(*) FROM entry").fetchone()[0] for part in self.parts.values()]
        with tqdm(total=sum(counts), desc="clips", unit="clip", dynamic_ncols=True, disable=None) as bar:
            for part, staged in self.parts.items():
                for key, data in staged.execute("SELECT key, record FROM entry ORDER BY position"):
                    bar.update()
                    record = unpack_record(data)
                    if record["reason"] is None:
                        yield f"{part}/{key}", (part, key, record)

    def clip(self, row: tuple[str, str, _Record]) -> Clip:
        """A row as a clip.

        Raises:
            Unusable: if there is no video, or no reference.
        """
        part, key, record = row
        identity, line = f"{part}/{key}", record["clip"]
        video = self._located(part, line["video"], "video_missing")
        cross = self._cross_references(identity, key, record)
        for subject in line["subjects"]:
            subject["refs"] = [reference | {"video": video} for reference in subject["refs"]]
            subject["refs"] += cross[subject["subject_id"]]
        subjects = self._largest(identity, line["subjects"], record["areas"])
        if not subjects:
            raise Unusable("no_references")
        subjects += self._background(part, key, record["background"])
        line |= {"id": identity, "group_id": self._group(part, key), "subjects": subjects}
        line["video"] = video | {"fps": record["fps"]}
        try:
            return parse(line, "")
        except ValueError as error:
            raise Unusable("bad_entry", error) from None

    def _largest(
        self, identity: str, subjects: list[dict[str, Any]], areas: dict[str, float]
    ) -> list[dict[str, Any]]:
        """Subjects that have a reference, of these the ones with the largest pictures, in the order of the entry."""
        subjects = [subject for subject in subjects if subject["refs"]]
        ranked = sorted(subjects, key=lambda subject: -areas[subject["subject_id"]])
        kept = {subject["subject_id"] for subject in ranked[: self.selection.max_references]}
        for subject in subjects:
            if subject["subject_id"] not in kept:
                what = f"{identity}, {subject['subject_id']}"
                self.report.drop("references", "beyond_largest", what, len(subject["refs"]))
        return [subject for subject in subjects if subject["subject_id"] in kept]

    def _cross_references(self, identity: str, key: str, record: _Record) -> dict[str, list[_Reference]]:
        """Subject -> its references in other clips, the most similar first."""
        cross: dict[str, dict[tuple[str, str], _Reference]] = defaultdict(dict)
        for pair in pairs_of(self.pairs, (identity, key)) if self.pairs else ():
            try:
                subject = record["ids"].get(pair.subject)
                source, reference = self._from_other_clip(identity, pair)
                if subject is None:
                    raise Unusable("cross_thing_missing")
                if source in cross[subject]:
                    raise Unusable("cross_duplicate")
                cross[subject][source] = reference
            except Unusable as problem:
                self.report.drop("references", problem.reason, f"{identity} from {pair.source}")
        kept: dict[str, list[_Reference]] = defaultdict(list)
        for subject, others in cross.items():
            kept[subject] = list(others.values())[: self.selection.max_cross]
            beyond = len(others) - len(kept[subject])
            self.report.drop("references", "beyond_max_cross", f"{identity}, {subject}", beyond)
        return kept

    def _from_other_clip(self, identity: str, pair: CrossPair) -> tuple[tuple[str, str], _Reference]:
        """(which subject of which clip, the reference) of a pair."""
        found = self._record(pair.source)
        if found is None:
            raise Unusable("cross_clip_missing")
        part, key, record = found
        source, number = f"{part}/{key}", record["ids"].get(pair.source_subject)
        if source == identity:
            raise Unusable("cross_self")
        subjects = [item for item in record["clip"]["subjects"] if item["subject_id"] == number]
        if not subjects:
            raise Unusable("cross_thing_missing")
        if not subjects[0]["refs"]:
            raise Unusable("cross_unfit")
        added = {
            "pair": "cross",
            "video": self._located(part, record["clip"]["video"], "cross_video_missing"),
            "scores": subjects[0]["refs"][0]["scores"] | {"sim": pair.similarity},
            "source_id": source,
            "source_group": self._group(part, key),
        }
        return (source, number), subjects[0]["refs"][0] | added

    def _located(self, part: str, video: dict[str, Any], reason: str) -> dict[str, Any]:
        """A staged video with its path below the manifest's folder."""
        path = self.videos / part / video["path"]
        if self.check_videos and not path.is_file():
            raise Unusable(reason, video["path"])
        return video | {"path": os.path.relpath(path, self.root)}

    def _background(self, part: str, key: str, phrase: str | None) -> list[dict[str, Any]]:
        if self.backgrounds is None:
            return []
        path = self.backgrounds / part / f"{key}.png"
        if not path.is_file():
            self.report.drop("references", "background_missing", f"{part}/{key}.png")
            return []
        reference = {"pair": "regular", "image": os.path.relpath(path, self.root), "bg": "raw"}
        subject = {"subject_id": "background", "phrase": phrase, "kind": "background"}
        return [subject | {"refs": [reference]}]

    def _group(self, part: str, key: str) -> str:
        """The cluster; without one what the clip was cut from, which is also how the data set names its clusters."""
        cluster = cluster_of(self.pairs, (f"{part}/{key}", key)) if self.pairs else None
        return cluster or key.split("_segment" if "_segment" in key else "_part")[0] or key

    def _find_record(self, name: str) -> tuple[str, str, _Record] | None:
        """(part, key, record) of a clip that a pair names with its part or without it."""
        part, _, key = name.partition("/")
        candidates = [(part, key)] if part in self.parts else [(other, name) for other in self.parts]
        for part, key in candidates:
            row = self.parts[part].execute("SELECT record FROM entry WHERE key = ?", (key,)).fetchone()
            if row is not None:
                return part, key, unpack_record(row[0])
        return None
