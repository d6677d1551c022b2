"""The second pass over OpenS2V-5M: staged clips with their own and with other clips' references, as manifest lines."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from refalign_ext.data.conversion_report import Report
from refalign_ext.data.convert.opens2v_pairs import Pair, cluster_of, pairs_of
from refalign_ext.data.convert.opens2v_record import unpack
from refalign_ext.data.convert.selection import Selection
from refalign_ext.data.manifest_file import MAX_ROW_BYTES
from refalign_ext.data.schema import Clip, parse

_NEIGHBOURS = 64  # clips of a cluster lie near each other: their lines are kept for that long


@dataclass(frozen=True)
class Part:
    """One staged part: its name, such as "total_part1", which is that of its folders too, and its open file."""

    name: str
    staged: sqlite3.Connection


class Join:
    """Makes the manifest's lines of staged parts and pairs, in the order of the parts and their entries.

    Args:
        root: the manifest's folder; videos, backgrounds: folders inside of it, the latter may be None.
        pairs: what `stage_pairs` made, or None for regular pairs only.
        check_videos: drop clips and references whose video does not exist.
        report: is told of everything that is kept or dropped here.
    """

    def __init__(
        self,
        parts: list[Part],
        pairs: sqlite3.Connection | None,
        root: Path,
        videos: Path,
        backgrounds: Path | None,
        selection: Selection,
        check_videos: bool,
        report: Report,
    ) -> None:
        self.parts = {part.name: part for part in parts}
        self.pairs, self.root, self.videos, self.backgrounds = pairs, root, videos, backgrounds
        self.selection, self.check_videos, self.report = selection, check_videos, report
        self._find_video = lru_cache(4096)(self._look_for_video)
        self._record = lru_cache(_NEIGHBOURS)(self._read_record)

    def clips(self) -> Iterator[Clip]:
        """All lines, one at a time."""
        from tqdm import tqdm

        counts = [
            part.staged.execute("SELECT count(*) FROM entry").fetchone()[0] for part in self.parts.values()
        ]
        asked = 0
        with tqdm(total=sum(counts), desc="clips", unit="clip", dynamic_ncols=True, disable=None) as bar:
            for part in self.parts.values():
                for key, data in part.staged.execute("SELECT key, record FROM entry ORDER BY position"):
                    bar.update()
                    names = (f"{part.name}/{key}", key)
                    pairs = [] if self.pairs is None else pairs_of(self.pairs, names)
                    asked += len(pairs)
                    clip = self._clip(part, key, unpack(data), pairs)
                    if clip is not None:
                        yield clip
        if self.pairs is not None:
            rest = self.pairs.execute("SELECT count(*) FROM pair").fetchone()[0] - asked
            self.report.drop(
                "references", "cross_clip_missing", "clips that are in none of the parts", max(rest, 0)
            )

    def _clip(self, part: Part, key: str, record: dict[str, Any], pairs: list[Pair]) -> Clip | None:
        identity, line, drop = f"{part.name}/{key}", record["clip"], self.report.drop
        if record["reason"] is None and self._find_video(part.name, line["video"]["path"]) is None:
            drop("clips", "video_missing", f"{identity}: {line['video']['path']}")
            record["reason"] = "video_missing"
        if record["reason"] is not None:
            usable = len(line["subjects"]) - len(record["unfit"]) if line else 0
            drop("references", "clip_dropped", identity, usable + len(pairs))
            for number, reason in record["unfit"].items() if line else ():
                drop("references", reason, f"{identity}, {number}")
            return None
        references = self._references(part, identity, record, pairs)
        subjects = []
        for subject in self._largest(line["subjects"], references, identity):
            subjects.append(subject | {"refs": references[subject["subject_id"]]})
        if not subjects:
            drop("clips", "no_references", identity)
            return None
        background = self._background(part, key, record)
        line |= {
            "id": identity,
            "group_id": self._group(part.name, key),
            "video": line["video"] | {"path": self._find_video(part.name, line["video"]["path"])},
            "subjects": subjects + background,
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
        self, subjects: list[dict[str, Any]], references: dict[str, list[Any]], identity: str
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
        self, part: Part, identity: str, record: dict[str, Any], pairs: list[Pair]
    ) -> dict[str, list[dict[str, Any]]]:
        """The references of each thing of a clip: its own first, then those of other clips, the likest first."""
        found: dict[str, list[dict[str, Any]]] = {}
        for subject in record["clip"]["subjects"]:
            number, reason = subject["subject_id"], record["unfit"].get(subject["subject_id"])
            found[number] = [] if reason else [self._placed(part.name, subject["refs"][0])]
            if reason:
                self.report.drop("references", reason, f"{identity}, {number}: {subject['cls']}")
        cross: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
        for pair in sorted(pairs, key=lambda pair: -(pair.likeness or 0)):
            what = f"{identity} from {pair.source}"
            number = _resolve(record, pair.number, pair.name)
            if number is None:
                self.report.drop("references", "cross_thing_missing", f"{what}: {pair.name} {pair.number}")
                continue
            problem, place, reference = self._from_other_clip(identity, pair)
            if problem:
                self.report.drop("references", problem, what)
            elif place in cross.setdefault(number, {}):
                self.report.drop("references", "cross_duplicate", what)
            else:
                cross[number][place] = reference
        room = MAX_ROW_BYTES // 4
        for number, others in cross.items():
            for reference in others.values():
                size = len(reference["mask_rle"]["counts"])
                limit = self.selection.max_cross
                has = sum(other["pair"] == "cross" for other in found[number])
                if (limit is not None and has >= limit) or size > room:
                    self.report.drop("references", "beyond_max_cross", f"{identity}, {number}")
                    continue
                room -= size
                found[number].append(reference)
        return found

    def _from_other_clip(
        self, identity: str, pair: Pair
    ) -> tuple[str | None, tuple[str, str], dict[str, Any]]:
        """(why not, which thing of which clip, the reference) of a pair."""
        where = self._locate(pair.source)
        if where is None:
            return "cross_clip_missing", ("", ""), {}
        name, key = where
        if f"{name}/{key}" == identity:
            return "cross_self", ("", ""), {}
        record = self._record(name, key)
        number = _resolve(record, pair.source_number, pair.source_name)
        if number is None:
            return "cross_thing_missing", ("", ""), {}
        if number in record["unfit"]:
            return f"cross_{record['unfit'][number]}", ("", ""), {}
        thing = next(item for item in record["clip"]["subjects"] if item["subject_id"] == number)
        reference = self._placed(name, thing["refs"][0])
        if reference is None:
            return "cross_video_missing", ("", ""), {}
        scores = reference["scores"] | ({} if pair.likeness is None else {"sim": pair.likeness})
        added = {"pair": "cross", "scores": scores, "source_id": f"{name}/{key}"}
        return None, (f"{name}/{key}", number), reference | added | {"source_group": self._group(name, key)}

    def _placed(self, part: str, reference: dict[str, Any]) -> dict[str, Any] | None:
        """A staged reference with its video's place below the manifest's folder; None if there is no such video."""
        path = self._find_video(part, reference["video"]["path"])
        return None if path is None else reference | {"video": reference["video"] | {"path": path}}

    def _background(self, part: Part, key: str, record: dict[str, Any]) -> list[dict[str, Any]]:
        if self.backgrounds is None:
            return []
        for path in (self.backgrounds / part.name / f"{key}.png", self.backgrounds / f"{key}.png"):
            if path.is_file():
                reference = {"pair": "regular", "image": os.path.relpath(path, self.root), "bg": "raw"}
                subject = {"subject_id": "background", "phrase": record["background"], "kind": "background"}
                return [subject | {"refs": [reference]}]
        self.report.drop("references", "background_missing", f"{part.name}/{key}.png")
        return []

    def _group(self, part: str, key: str) -> str:
        """The cluster; without one what the clip was cut from, which is also how the data set names its clusters."""
        cluster = None if self.pairs is None else cluster_of(self.pairs, (f"{part}/{key}", key))
        source = key.split("_segment")[0]
        return cluster or (source if source != key else key.split("_part")[0]) or key

    def _locate(self, name: str) -> tuple[str, str] | None:
        """(part, key) of a clip that a pair names with its part or without it."""
        part, _, key = name.partition("/")
        places = [(part, key)] if part in self.parts else [(other, name) for other in self.parts]
        for place in places:
            query = "SELECT 1 FROM entry WHERE key = ?"
            if self.parts[place[0]].staged.execute(query, (place[1],)).fetchone():
                return place
        return None

    def _read_record(self, part: str, key: str) -> dict[str, Any]:
        query = "SELECT record FROM entry WHERE key = ?"
        return unpack(self.parts[part].staged.execute(query, (key,)).fetchone()[0])

    def _look_for_video(self, part: str, path: str) -> str | None:
        """A video's path relative to the manifest's folder; None if there is none and that matters."""
        places = (self.videos / part / path, self.videos / path)
        found = next((place for place in places if place.is_file()), None if self.check_videos else places[0])
        return None if found is None else os.path.relpath(found, self.root)


def _resolve(record: dict[str, Any], number: int | None, name: str | None) -> str | None:
    """Which of a clip's things a pair means; duplicates are the thing that stands for them.

    A number that belongs to another name is not believed: the name decides, if it says which.
    """
    if not record["clip"]:
        return None
    names, aliases = record["names"], record["aliases"]
    if number is not None and str(number) in names and name in (None, names[str(number)]):
        return aliases.get(str(number), str(number))
    same = {aliases.get(key, key) for key, other in names.items() if other == name}
    return same.pop() if len(same) == 1 else None
