"""One row of Phantom-Data as a clip of the manifest."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refalign_ext.data.boxes import BoxProblem, box_in_frame
from refalign_ext.data.conversion_report import ConversionReport, Unusable
from refalign_ext.data.convert.phantom_lookup import ClipInfo, ClipLookup, ClipName
from refalign_ext.data.convert.phantom_pairs import Detection, PhraseDetections, parse_cross_pair
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


@dataclass(frozen=True)
class RowRules:
    """How rows become clips; see `convert_phantom`. `videos` is relative to the manifest's folder `root`."""

    root: Path
    videos: str
    video_name: str
    regular: bool
    only_existing: bool
    length: Length
    selection: Selection


class ClipBuilder:
    """Makes clips of rows; references that cannot be used are counted in `report`."""

    def __init__(self, rules: RowRules, lookup: ClipLookup, report: ConversionReport) -> None:
        self.rules, self.lookup, self.report = rules, lookup, report

    def clip(self, row: tuple[Any, Any, Any]) -> Clip:
        """The clip of one row (vid, caption, cross_pair).

        Raises:
            Unusable: if there is none.
        """
        vid, caption, cell = row
        if not isinstance(vid, str) or not vid.strip():
            raise Unusable("no_vid")
        if not isinstance(caption, str) or not caption.strip():
            raise Unusable("no_prompt")
        info = self._info(vid)
        problem = self.rules.selection.clip_problem(info.frames, info.scores)
        if problem or not self.rules.length.fits(info.frames, info.fps):
            raise Unusable(problem or "too_short")
        video = self._video(vid, info)
        subjects = self._subjects(vid, parse_cross_pair(cell, vid, self.report))
        if not subjects:
            raise Unusable("no_reference")
        return Clip(
            id=vid,
            source="phantom",
            video=replace(video, start_frame=0, end_frame=info.frames),
            prompt=caption.strip(),
            subjects=tuple(subjects),
            group_id=ClipName.parse(vid).uuid,
            scores=info.scores,
        )

    def _info(self, vid: str) -> ClipInfo:
        info = self.lookup.info(vid)
        if info is None:
            raise Unusable("not_in_meta_info")
        return info

    def _video(self, vid: str, info: ClipInfo) -> VideoSpan:
        """The whole video of a clip."""
        name = ClipName.parse(vid)
        if name is None:
            raise Unusable("vid_without_times")
        parts = {"vid": vid} | name._asdict()
        file_name = re.sub(r"\{(\w+)\}", lambda match: parts[match[1]], self.rules.video_name)
        path = "/".join(filter(None, (self.rules.videos, file_name)))
        # A name that climbs would leave the folder of the videos even where it stays below the manifest's.
        if relative_path_problem(path) or ".." in re.split(r"[/\\]", path):
            raise Unusable("vid_not_a_file_name")
        if self.rules.only_existing and not (self.rules.root / path).is_file():
            raise Unusable("video_absent")
        return VideoSpan(path, fps=info.fps, width=info.size[0], height=info.size[1])

    def _subjects(self, vid: str, phrases: list[PhraseDetections]) -> list[Subject]:
        """The subjects with references, of these the ones with the largest pictures."""
        listed = len(phrases)
        for phrase, here, there in self.lookup.reverse_pairs(vid):
            same = [entry for entry in phrases if any(item.is_same(here) for item in entry.targets)]
            if not same:
                phrases.append(PhraseDetections(phrase, [here], [there]))
            elif there[:3] not in {item[:3] for item in same[0].references}:
                same[0].references.append(there)
        found = []  # (area, subject)
        for number, entry in enumerate(phrases, 1):
            area, subject = self._subject(vid, str(number), entry)
            # Without a cross reference a reverse pair has nothing to say.
            if subject.refs and (number <= listed or any(ref.pair == "cross" for ref in subject.refs)):
                found.append((area, subject))
        # The sort keeps equal ones in their order.
        ranked = [subject for _, subject in sorted(found, key=lambda item: -item[0])]
        kept = ranked[: self.rules.selection.max_references]
        dropped = sum(len(subject.refs) for subject in ranked[len(kept) :])
        self.report.drop("references", "too_many_subjects", vid, dropped)
        return sorted(kept, key=lambda subject: int(subject.subject_id))

    def _subject(self, vid: str, number: str, entry: PhraseDetections) -> tuple[float, Subject]:
        """(share of the frame, a subject with the references that the rules keep)."""
        own = self._usable(vid, (item for item in entry.targets if item.vid == vid))
        referred = self._usable(vid, entry.references)
        candidates = list(own) if self.rules.regular else []
        for item, reference in referred:
            if item.vid == vid and any(item.is_same(target) for target, _ in own):
                self.report.drop("references", "is_the_subject_itself", vid)
            else:
                candidates.append((item, reference))
        selection, kept = self.rules.selection, dict[Any, Reference]()
        for item, reference in candidates:
            problem = selection.reference_problem(reference.scores)
            if problem is None and reference.pair == "cross":
                problem = selection.pair_problem(None, item.score)
            if problem is None and item[:3] in kept:
                problem = "listed_twice"
            if problem:
                self.report.drop("references", problem, vid)
            else:
                kept[item[:3]] = reference
        cross = [ref for ref in kept.values() if ref.pair == "cross"]
        best = sorted(cross, key=lambda ref: -(ref.scores.sim or 0))[: selection.max_cross]
        self.report.drop("references", "too_many_cross", vid, len(cross) - len(best))
        regular = [ref for ref in kept.values() if ref.pair == "regular"]
        cls = next((item.cls for item, _ in own + referred if item.cls), None)
        kinds = [kind_of_class(text) for text in (cls, entry.phrase) if text]
        target = None
        if own:
            shown = own[0][0]
            target = Target(frame_frac=shown.frame_frac, bbox_xyxy=shown.box, box_space=_SPACE)
        subject = Subject(
            subject_id=number,
            phrase=entry.phrase if entry.phrase.strip() else None,
            cls=cls,
            kind=next((kind for kind in kinds if kind != "object"), "object"),
            target=target,
            refs=(*regular, *(ref for ref in cross if ref in best)),
        )
        areas = [reference.scores.area_ratio for _, reference in own[:1] or referred]
        return max(areas, default=0.0), subject

    def _usable(self, vid: str, detections: Iterable[Detection]) -> list[tuple[Detection, Reference]]:
        """Detections as references of the clip `vid`."""
        usable = []
        for item in detections:
            try:
                usable.append((item, self._reference(vid, item)))
            except Unusable as problem:
                self.report.drop("references", problem.reason, vid)
        return usable

    def _reference(self, vid: str, item: Detection) -> Reference:
        info = self._info(item.vid)
        box = box_in_frame(item.box, _SPACE, info.size)
        if isinstance(box, BoxProblem):
            raise Unusable(box.value)
        area = (box[2] - box[0]) * (box[3] - box[1]) / (info.size[0] * info.size[1])
        return Reference(
            pair="regular" if item.vid == vid else "cross",
            video=self._video(item.vid, info),
            frame_frac=item.frame_frac,
            bbox_xyxy=item.box,
            box_space=_SPACE,
            bg="raw",
            scores=ReferenceScores(sim=item.score, area_ratio=round(area, 6)),
            source_id=item.vid,
            source_group=ClipName.parse(item.vid).uuid,
        )
