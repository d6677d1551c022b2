"""One row of Phantom-Data as a clip of the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refalign_ext.data.boxes import BoxProblem, box_in_frame
from refalign_ext.data.conversion_report import Report
from refalign_ext.data.convert.phantom_info import ClipInfo, ClipName, InfoStore
from refalign_ext.data.convert.phantom_pairs import REFERENCES, TARGET, Sighting, phrases_of, sightings
from refalign_ext.data.convert.selection import Selection, kind_of_class
from refalign_ext.data.length import Length
from refalign_ext.data.schema import (
    Clip,
    Reference,
    ReferenceScores,
    Subject,
    Target,
    VideoSpan,
    relative_path_problem,
)

_SPACE = "long768"
_SAME = 0.5  # overlap from which two boxes of one frame are one thing


@dataclass(frozen=True)
class RowRules:
    """How rows become clips.

    Attributes:
        root: the manifest's folder; videos: the folder of the videos, relative to it ("" for the same).
        video_name: the name of a video there, with {vid}, {uuid}, {start} and {end}.
        regular: whether boxes in the clip itself become regular references.
        only_existing: whether clips and references are dropped whose video is not there.
        length, selection: what is long and good enough.
    """

    root: Path
    videos: str
    video_name: str
    regular: bool
    only_existing: bool
    length: Length
    selection: Selection


@dataclass(frozen=True)
class Other:
    """A pair listed by another clip: `here` is where its reference is seen in this clip, `there` its own subject."""

    phrase: str
    here: Sighting
    there: Sighting


@dataclass(frozen=True)
class _Placed:
    """A sighting that can be used: its video, the group of that, and the share of the frame that the box takes."""

    seen: Sighting
    video: VideoSpan
    group: str
    area_ratio: float


class RowConverter:
    """Makes clips of rows; what cannot be used is counted in `report`."""

    def __init__(self, rules: RowRules, infos: InfoStore, report: Report) -> None:
        self.rules, self.infos, self.report = rules, infos, report

    def clip(self, vid: Any, caption: Any, cell: Any, others: Iterable[Other] = ()) -> Clip | None:
        """The clip of one row; None, and counted, if there is none. `others`: pairs that point to it from elsewhere."""
        if not isinstance(vid, str) or not vid.strip():
            return self._dropped("no_vid", str(vid))
        if not isinstance(caption, str) or not caption.strip():
            return self._dropped("no_prompt", vid)
        info = self.infos.get(vid)
        if info is None:
            return self._dropped("not_in_meta_info", vid)
        problem = self.rules.selection.clip_problem(info.frames, info.scores)
        if problem is None and not self.rules.length.fits(info.frames, info.fps):
            problem = "too_short"
        span = problem or self._video(vid, info)
        if isinstance(span, str):
            return self._dropped(span, vid)
        try:
            entries = phrases_of(cell)
            subjects = self._subjects(vid, entries, others)
        except (ValueError, RecursionError) as error:
            return self._dropped("cross_pair_not_readable", f"{vid} ({error})")
        if not subjects:
            return self._dropped("no_reference", vid)
        return Clip(
            id=vid,
            source="phantom",
            video=replace(span, start_frame=0, end_frame=info.frames),
            prompt=caption.strip(),
            subjects=tuple(subjects),
            group_id=_group(vid),
            scores=info.scores,
        )

    def _dropped(self, reason: str, name: str) -> None:
        self.report.drop("clips", reason, name)

    def _video(self, vid: str, info: ClipInfo) -> VideoSpan | str:
        """The whole video of a clip, or why there is none."""
        name = ClipName.parse(vid)
        if name is None:
            return "vid_without_times"
        parts = {"vid": vid, "uuid": name.uuid, "start": name.start, "end": name.end}
        path = "/".join(filter(None, (self.rules.videos, self.rules.video_name.format_map(parts))))
        # A name that climbs would leave the folder of the videos even where it stays below the manifest's.
        if relative_path_problem(path) or ".." in path.replace("\\", "/").split("/"):
            return "vid_not_a_file_name"
        if self.rules.only_existing and not (self.rules.root / path).is_file():
            return "video_absent"
        return VideoSpan(path, fps=info.fps, width=info.size[0], height=info.size[1])

    def _subjects(
        self, vid: str, entries: Mapping[str, dict[str, Any]], others: Iterable[Other]
    ) -> list[Subject]:
        found: list[tuple[float, Subject]] = []  # the subject's area
        for number, (phrase, entry) in enumerate(entries.items(), 1):
            targets = self._placed(vid, sightings(entry, TARGET, vid), "target_")
            seen = self._placed(vid, sightings(entry, REFERENCES, vid), "")
            subject = self._subject(vid, str(number), phrase, targets, seen)
            if subject is not None:
                found.append(subject)
        found = self._with_others(vid, found, others)
        # The sort keeps equal ones in their order.
        ranked = sorted(range(len(found)), key=lambda index: -found[index][0])
        kept = sorted(ranked[: self.rules.selection.max_references])
        dropped = sum(len(found[index][1].refs) for index in set(ranked) - set(kept))
        self.report.drop("references", "too_many_subjects", vid, dropped)
        return [found[index][1] for index in kept]

    def _placed(self, vid: str, seen: Iterable[Sighting | str], prefix: str) -> list[_Placed]:
        """Those sightings that can be used; `prefix` goes before the reasons of the others."""
        placed = []
        for item in seen:
            result = item if isinstance(item, str) else self._place(item)
            if isinstance(result, str):
                self.report.drop("references", prefix + result, vid)
            else:
                placed.append(result)
        return placed

    def _place(self, seen: Sighting) -> _Placed | str:
        info = self.infos.get(seen.vid)
        if info is None:
            return "not_in_meta_info"
        box = box_in_frame(seen.box, _SPACE, info.size)
        if isinstance(box, BoxProblem):
            return box.value
        video = self._video(seen.vid, info)
        if isinstance(video, str):
            return video
        area = (box[2] - box[0]) * (box[3] - box[1]) / (info.size[0] * info.size[1])
        return _Placed(seen, video, _group(seen.vid), area)

    def _subject(
        self, vid: str, number: str, phrase: str, targets: list[_Placed], seen: list[_Placed]
    ) -> tuple[float, Subject] | None:
        """A subject with its area, or None if it has no reference."""
        own = [item for item in targets if item.seen.vid == vid]
        self.report.drop("references", "target_in_another_clip", vid, len(targets) - len(own))
        regular = list(own) if self.rules.regular else []
        cross = []
        for item in seen:
            if item.seen.vid != vid:
                cross.append(item)
            elif any(_is_same(item.seen, other.seen) for other in own):
                self.report.drop("references", "is_the_subject_itself", vid)
            else:
                regular.append(item)
        refs = self._chosen(vid, regular, "regular") + self._chosen(vid, cross, "cross")
        if not refs:
            return None
        cls = next((item.seen.cls for item in own + seen if item.seen.cls), None)
        target = own[0].seen if own else None
        subject = Subject(
            subject_id=number,
            phrase=phrase if phrase.strip() else None,
            cls=cls,
            kind=_kind(cls, phrase),
            target=None
            if target is None
            else Target(frame_frac=target.frame_frac, bbox_xyxy=target.box, box_space=_SPACE),
            refs=tuple(refs),
        )
        return (own[0].area_ratio if own else max(item.area_ratio for item in seen)), subject

    def _chosen(self, vid: str, placed: list[_Placed], pair: str) -> list[Reference]:
        selection, kept, known = self.rules.selection, [], set()
        for item in placed:
            scores = ReferenceScores(sim=item.seen.score, area_ratio=round(item.area_ratio, 6))
            problem = selection.reference_problem(scores)
            if problem is None and pair == "cross":
                problem = selection.pair_problem(None, item.seen.score)
            key = (item.seen.vid, item.seen.frame_frac, item.seen.box)
            if problem is None and key in known:
                problem = "listed_twice"
            if problem is not None:
                self.report.drop("references", problem, vid)
                continue
            known.add(key)
            kept.append(
                Reference(
                    pair=pair,
                    video=item.video,
                    frame_frac=item.seen.frame_frac,
                    bbox_xyxy=item.seen.box,
                    box_space=_SPACE,
                    bg="raw",
                    scores=scores,
                    source_id=item.seen.vid,
                    source_group=item.group,
                )
            )
        if pair == "cross" and selection.max_cross is not None:
            best = sorted(range(len(kept)), key=lambda index: -(kept[index].scores.sim or 0))[
                : selection.max_cross
            ]
            self.report.drop("references", "too_many_cross", vid, len(kept) - len(best))
            kept = [kept[index] for index in sorted(best)]
        return kept

    def _with_others(
        self, vid: str, found: list[tuple[float, Subject]], others: Iterable[Other]
    ) -> list[tuple[float, Subject]]:
        """Adds pairs that other clips list: to the subject that is seen at the same place, else as one of its own."""
        for other in others:
            here = self._place(other.here)
            if isinstance(here, str):
                continue  # counted with the clip that lists it
            refs = self._chosen(vid, self._placed(vid, [other.there], "other_way_"), "cross")
            place = next((i for i, (_, subject) in enumerate(found) if _is_at(subject, other.here)), None)
            if place is None:
                regular = self._chosen(vid, [here], "regular") if self.rules.regular else []
                if refs:
                    number = str(1 + max((int(subject.subject_id) for _, subject in found), default=0))
                    cls = here.seen.cls
                    target = Target(
                        frame_frac=here.seen.frame_frac, bbox_xyxy=here.seen.box, box_space=_SPACE
                    )
                    subject = Subject(
                        number, other.phrase, cls, _kind(cls, other.phrase), target, (*regular, *refs)
                    )
                    found.append((here.area_ratio, subject))
                continue
            area, subject = found[place]
            known = {(item.source_id, item.frame_frac, item.bbox_xyxy) for item in subject.refs}
            new_refs = [
                item for item in refs if (item.source_id, item.frame_frac, item.bbox_xyxy) not in known
            ]
            crossing = sum(item.pair == "cross" for item in subject.refs)
            limit = self.rules.selection.max_cross
            room = len(new_refs) if limit is None else max(0, limit - crossing)
            found[place] = (area, replace(subject, refs=(*subject.refs, *new_refs[:room])))
        return found


def _group(vid: str) -> str:
    name = ClipName.parse(vid)
    return vid if name is None else name.uuid


def _kind(cls: str | None, phrase: str) -> str:
    kinds = [kind_of_class(text) for text in (cls, phrase) if text]
    return next((kind for kind in kinds if kind != "object"), "object")


def _is_at(subject: Subject, seen: Sighting) -> bool:
    target = subject.target
    if target is None or target.bbox_xyxy is None:
        return False
    return _is_same(Sighting(seen.vid, target.frame_frac, target.bbox_xyxy), seen)


def _is_same(first: Sighting, second: Sighting) -> bool:
    """Whether two sightings of one clip show one thing in one frame."""
    if abs(first.frame_frac - second.frame_frac) > 1e-6:
        return False
    (a0, b0, a1, b1), (c0, d0, c1, d1) = first.box, second.box
    inner = max(0.0, min(a1, c1) - max(a0, c0)) * max(0.0, min(b1, d1) - max(b0, d0))
    union = (a1 - a0) * (b1 - b0) + (c1 - c0) * (d1 - d0) - inner
    return union > 0 and inner / union >= _SAME
