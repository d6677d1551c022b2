"""The second pass over OpenS2V-5M: staged clips with their own and with other clips' references, as manifest lines."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.convert.opens2v_entry import unpack_record
from refalign_ext.data.convert.opens2v_pairs import CrossPair, cluster_of, pairs_of
from refalign_ext.data.convert.selection import Selection
from refalign_ext.data.manifest_file import MAX_ROW_BYTES
from refalign_ext.data.schema import Clip, parse

_CACHED_RECORDS = 64  # clips of a cluster lie near each other

_Record = dict[str, Any]  # as `read_entry` makes them
_Reference = dict[str, Any]  # as in the manifest's lines


class ClipJoiner:
    """Makes the manifest's lines of staged parts and pairs, in the order of the parts and their entries.

    Args:
        parts: name of a part, such as "total_part1", which is that of its folders too -> its staged file.
        pairs: what `stage_pairs` made, or None for regular pairs only.
        root: the manifest's folder; videos, backgrounds: folders inside of it, the latter may be None.
        check_videos: drop clips and references whose video does not exist.
        report: is told of everything that is kept or dropped here.
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
        self._video_path = lru_cache(4096)(self._find_video)
        self._record = lru_cache(_CACHED_RECORDS)(self._find_record)

    def clips(self) -> Iterator[Clip]:
        """All lines, one at a time."""
        from tqdm import tqdm

        counts = [part.execute("SELECT count(*) FROM entry").fetchone()[0] for part in self.parts.values()]
        pairs_found = 0
        with tqdm(total=sum(counts), desc="clips", unit="clip", dynamic_ncols=True, disable=None) as bar:
            for part, staged in self.parts.items():
                for key, data in staged.execute("SELECT key, record FROM entry ORDER BY position"):
                    bar.update()
                    names = (f"{part}/{key}", key)
                    pairs = [] if self.pairs is None else pairs_of(self.pairs, names)
                    pairs_found += len(pairs)
                    clip = self._clip(part, key, unpack_record(data), pairs)
                    if clip is not None:
                        yield clip
        if self.pairs is not None:
            rest = self.pairs.execute("SELECT count(*) FROM pair").fetchone()[0] - pairs_found
            what = "clips that are in none of the parts"
            self.report.drop("references", "cross_clip_missing", what, max(rest, 0))

    def _clip(self, part: str, key: str, record: _Record, pairs: list[CrossPair]) -> Clip | None:
        identity, line, drop = f"{part}/{key}", record["clip"], self.report.drop
        if record["reason"] is None and self._video_path(part, line["video"]["path"]) is None:
            drop("clips", "video_missing", f"{identity}: {line['video']['path']}")
            record["reason"] = "video_missing"
        if record["reason"] is not None:
            unfit = record["unfit"] if line else {}
            usable = len(line["subjects"]) - len(unfit) if line else 0
            drop("references", "clip_dropped", identity, usable + len(pairs))
            for number, reason in unfit.items():
                drop("references", reason, f"{identity}, {number}")
            return None
        references = self._references(part, identity, record, pairs)
        subjects = [
            subject | {"refs": references[subject["subject_id"]]}
            for subject in self._largest(line["subjects"], references, identity)
        ]
        if not subjects:
            drop("clips", "no_references", identity)
            return None
        line |= {
            "id": identity,
            "group_id": self._group(part, key),
            "video": line["video"] | {"path": self._video_path(part, line["video"]["path"])},
            "subjects": subjects + self._background(part, key, record["background"]),
        }
        count = sum(len(subject["refs"]) for subject in line["subjects"])
        try:
            clip = parse(line, identity)
        except ValueError as error:
            drop("clips", "bad_entry", str(error))
            drop("references", "clip_dropped", identity, count)
            return None
        self.report.keep("clips")
        self.report.keep("references", count)
        return clip

    def _largest(
        self, subjects: list[dict[str, Any]], references: dict[str, list[_Reference]], identity: str
    ) -> list[dict[str, Any]]:
        """Subjects that have a reference, of these the ones with the largest pictures, in the order of the entry."""
        subjects = [subject for subject in subjects if references[subject["subject_id"]]]
        ranked = sorted(subjects, key=lambda subject: -subject["refs"][0]["scores"]["area_ratio"])
        for subject in ranked[self.selection.max_references :] if self.selection.max_references else ():
            number = subject["subject_id"]
            self.report.drop("references", "beyond_largest", f"{identity}, {number}", len(references[number]))
            subjects.remove(subject)
        return subjects

    def _references(
        self, part: str, identity: str, record: _Record, pairs: list[CrossPair]
    ) -> dict[str, list[_Reference]]:
        """The references of each subject of a clip: its own first, then those of other clips, the most similar first."""
        found: dict[str, list[_Reference]] = {}
        for subject in record["clip"]["subjects"]:
            number, reason = subject["subject_id"], record["unfit"].get(subject["subject_id"])
            found[number] = [] if reason else [self._with_video_path(part, subject["refs"][0])]
            if reason:
                self.report.drop("references", reason, f"{identity}, {number}: {subject['cls']}")
        cross: dict[
            str, dict[tuple[str, str], _Reference]
        ] = {}  # subject -> (clip, its subject) -> reference
        for pair in sorted(pairs, key=lambda pair: -(pair.similarity or 0)):
            what = f"{identity} from {pair.source}"
            number = _subject_id(record, pair.number, pair.name)
            if number is None:
                self.report.drop("references", "cross_thing_missing", f"{what}: {pair.name} {pair.number}")
                continue
            problem, source, reference = self._from_other_clip(identity, pair)
            if problem is None and source in cross.setdefault(number, {}):
                problem = "cross_duplicate"
            if problem:
                self.report.drop("references", problem, what)
            else:
                cross[number][source] = reference
        limit, room = self.selection.max_cross, MAX_ROW_BYTES // 4
        for number, others in cross.items():
            taken = 0
            for reference in others.values():
                size = len(reference["mask_rle"]["counts"])
                if size > room or (limit is not None and taken >= limit):
                    self.report.drop("references", "beyond_max_cross", f"{identity}, {number}")
                    continue
                room, taken = room - size, taken + 1
                found[number].append(reference)
        return found

    def _from_other_clip(
        self, identity: str, pair: CrossPair
    ) -> tuple[str | None, tuple[str, str], _Reference]:
        """(why not, which subject of which clip, the reference) of a pair."""
        nothing = ("", ""), {}
        found = self._record(pair.source)
        if found is None:
            return "cross_clip_missing", *nothing
        part, key, record = found
        source = f"{part}/{key}"
        if source == identity:
            return "cross_self", *nothing
        number = _subject_id(record, pair.source_number, pair.source_name)
        if number is None:
            return "cross_thing_missing", *nothing
        if number in record["unfit"]:
            return f"cross_{record['unfit'][number]}", *nothing
        subject = next(item for item in record["clip"]["subjects"] if item["subject_id"] == number)
        reference = self._with_video_path(part, subject["refs"][0])
        if reference is None:
            return "cross_video_missing", *nothing
        scores = reference["scores"] | ({} if pair.similarity is None else {"sim": pair.similarity})
        added = {
            "pair": "cross",
            "scores": scores,
            "source_id": source,
            "source_group": self._group(part, key),
        }
        return None, (source, number), reference | added

    def _with_video_path(self, part: str, reference: _Reference) -> _Reference | None:
        """A staged reference with its video's path below the manifest's folder; None if there is no such video."""
        path = self._video_path(part, reference["video"]["path"])
        return None if path is None else reference | {"video": reference["video"] | {"path": path}}

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
        cluster = None if self.pairs is None else cluster_of(self.pairs, (f"{part}/{key}", key))
        source = key.split("_segment")[0]
        return cluster or (source if source != key else key.split("_part")[0]) or key

    def _find_record(self, name: str) -> tuple[str, str, _Record] | None:
        """(part, key, record) of a clip that a pair names with its part or without it."""
        part, _, key = name.partition("/")
        candidates = [(part, key)] if part in self.parts else [(other, name) for other in self.parts]
        for part, key in candidates:
            row = self.parts[part].execute("SELECT record FROM entry WHERE key = ?", (key,)).fetchone()
            if row is not None:
                return part, key, unpack_record(row[0])
        return None

    def _find_video(self, part: str, path: str) -> str | None:
        """A video's path relative to the manifest's folder; None if there is none and that matters."""
        candidates = (self.videos / part / path, self.videos / path)
        existing = next((path for path in candidates if path.is_file()), None)
        found = existing if self.check_videos else existing or candidates[0]
        return None if found is None else os.path.relpath(found, self.root)


def _subject_id(record: _Record, number: int, name: str) -> str | None:
    """Which of a clip's subjects a pair means; a duplicate is the subject that stands for it."""
    key = str(number)
    if not record["clip"] or record["names"].get(key) != name:
        return None
    return record["aliases"].get(key, key)
