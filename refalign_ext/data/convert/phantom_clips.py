"""One row of Phantom-Data as a clip of the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from refalign_ext.data.boxes import BoxProblem, box_in_frame
from refalign_ext.data.conversion_report import ConversionReport
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
    """How rows become clips; see `convert_phantom`.

    Attributes:
        root: the manifest's folder; videos: the folder of the videos, relative to it ("" for the same).
    """

    root: Path
    videos: str
    video_name: str
    regular: bool
    only_existing: bool
    length: Length
    selection: Selection


class _UsableDetection(NamedTuple):
    """A detection whose video is known; `area_ratio` is the share of the frame that its box takes."""

    detection: Detection
    video: VideoSpan
    group: str
    area_ratio: float


class ClipBuilder:
    """Makes clips of rows; what cannot be used is counted in `report`."""

    def __init__(self, rules: RowRules, lookup: ClipLookup, report: ConversionReport) -> None:
        self.rules, self.lookup, self.report = rules, lookup, report

    def clip(self, vid: Any, caption: Any, cell: Any) -> Clip | None:
        """The clip of one row; None, and counted, if there is none."""
        if not isinstance(vid, str) or not vid.strip():
            return self._dropped("no_vid", str(vid))
        if not isinstance(caption, str) or not caption.strip():
            return self._dropped("no_prompt", vid)
        info = self.lookup.info(vid)
        if info is None:
            return self._dropped("not_in_meta_info", vid)
        problem = self.rules.selection.clip_problem(info.frames, info.scores)
        if problem is None and not self.rules.length.fits(info.frames, info.fps):
            problem = "too_short"
        video = problem or self._video(vid, info)
        if isinstance(video, str):
            return self._dropped(video, vid)
        try:
            subjects = self._subjects(vid, parse_cross_pair(cell))
        except ValueError as error:
            return self._dropped("cross_pair_not_readable", f"{vid} ({error})")
        if not subjects:
            return self._dropped("no_reference", vid)
        return Clip(
            id=vid,
            source="phantom",
            video=replace(video, start_frame=0, end_frame=info.frames),
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
        file_name = self.rules.video_name.format(vid=vid, **name._asdict())
        path = "/".join(filter(None, (self.rules.videos, file_name)))
        # A name that climbs would leave the folder of the videos even where it stays below the manifest's.
        if relative_path_problem(path) or ".." in path.replace("\\", "/").split("/"):
            return "vid_not_a_file_name"
        if self.rules.only_existing and not (self.rules.root / path).is_file():
            return "video_absent"
        return VideoSpan(path, fps=info.fps, width=info.size[0], height=info.size[1])

    def _subjects(self, vid: str, phrases: list[PhraseDetections]) -> list[Subject]:
        """The subjects with references, of these the ones with the largest pictures."""
        listed = len(phrases)
        for pair in self.lookup.reverse_pairs(vid):
            self._add_reverse_pair(phrases, pair.phrase, pair.here, pair.there)
        found = []  # (area, subject)
        for number, entry in enumerate(phrases, 1):
            targets = self._usable(vid, entry.targets, "target_")
            references = self._usable(vid, entry.references, "")
            subject = self._subject(vid, str(number), entry.phrase, targets, references)
            if subject is None or (number > listed and all(ref.pair == "regular" for ref in subject.refs)):
                continue  # nothing to show, or not the side of a pair that another clip lists it for
            own = [item.area_ratio for item in targets if item.detection.vid == vid]
            found.append((own[0] if own else max(item.area_ratio for item in references), subject))
        # The sort keeps equal ones in their order.
        ranked = [subject for _, subject in sorted(found, key=lambda item: -item[0])]
        kept = ranked[: self.rules.selection.max_references]
        dropped = sum(len(subject.refs) for subject in ranked[len(kept) :])
        self.report.drop("references", "too_many_subjects", vid, dropped)
        return sorted(kept, key=lambda subject: int(subject.subject_id))

    def _add_reverse_pair(
        self, phrases: list[PhraseDetections], phrase: str, here: Detection, there: Detection
    ) -> None:
        """Adds a pair that another clip lists to what is seen at the same place, else as a subject of its own."""
        # What cannot be used is counted with the clip that lists it.
        if isinstance(self._located(here), str) or isinstance(self._located(there), str):
            return
        for entry in phrases:
            if any(isinstance(item, Detection) and item.is_same(here) for item in entry.targets):
                known = [item[:3] for item in entry.references if isinstance(item, Detection)]
                if there[:3] not in known:
                    entry.references.append(there)
                return
        phrases.append(PhraseDetections(phrase, [here], [there]))

    def _usable(self, vid: str, detections: Iterable[Detection | str], prefix: str) -> list[_UsableDetection]:
        """Those detections that can be used; `prefix` goes before the reasons of the others."""
        usable = []
        for item in detections:
            result = item if isinstance(item, str) else self._located(item)
            if isinstance(result, str):
                self.report.drop("references", prefix + result, vid)
            else:
                usable.append(result)
        return usable

    def _located(self, detection: Detection) -> _UsableDetection | str:
        info = self.lookup.info(detection.vid)
        if info is None:
            return "not_in_meta_info"
        box = box_in_frame(detection.box, _SPACE, info.size)
        if isinstance(box, BoxProblem):
            return box.value
        video = self._video(detection.vid, info)
        if isinstance(video, str):
            return video
        area = (box[2] - box[0]) * (box[3] - box[1]) / (info.size[0] * info.size[1])
        return _UsableDetection(detection, video, _group(detection.vid), area)

    def _subject(
        self,
        vid: str,
        number: str,
        phrase: str,
        targets: Sequence[_UsableDetection],
        references: Sequence[_UsableDetection],
    ) -> Subject | None:
        """A subject with its references; None if it has none."""
        own = [item for item in targets if item.detection.vid == vid]
        self.report.drop("references", "target_in_another_clip", vid, len(targets) - len(own))
        regular = list(own) if self.rules.regular else []
        cross = []
        for item in references:
            if item.detection.vid != vid:
                cross.append(item)
            elif any(item.detection.is_same(other.detection) for other in own):
                self.report.drop("references", "is_the_subject_itself", vid)
            else:
                regular.append(item)
        refs = self._chosen(vid, regular, "regular") + self._chosen(vid, cross, "cross")
        if not refs:
            return None
        cls = next((item.detection.cls for item in (*own, *references) if item.detection.cls), None)
        kinds = [kind_of_class(text) for text in (cls, phrase) if text]
        target = None
        if own:
            shown = own[0].detection
            target = Target(frame_frac=shown.frame_frac, bbox_xyxy=shown.box, box_space=_SPACE)
        return Subject(
            subject_id=number,
            phrase=phrase if phrase.strip() else None,
            cls=cls,
            kind=next((kind for kind in kinds if kind != "object"), "object"),
            target=target,
            refs=tuple(refs),
        )

    def _chosen(self, vid: str, usable: list[_UsableDetection], pair: str) -> list[Reference]:
        """The references that the rules keep of these, in their order."""
        selection, kept = self.rules.selection, {}
        for detection, video, group, area_ratio in usable:
            scores = ReferenceScores(sim=detection.score, area_ratio=round(area_ratio, 6))
            problem = selection.reference_problem(scores)
            if problem is None and pair == "cross":
                problem = selection.pair_problem(None, detection.score)
            if problem is None and detection[:3] in kept:
                problem = "listed_twice"
            if problem is not None:
                self.report.drop("references", problem, vid)
                continue
            kept[detection[:3]] = Reference(
                pair=pair,
                video=video,
                frame_frac=detection.frame_frac,
                bbox_xyxy=detection.box,
                box_space=_SPACE,
                bg="raw",
                scores=scores,
                source_id=detection.vid,
                source_group=group,
            )
        limit = selection.max_cross if pair == "cross" else None
        ranked = sorted(kept, key=lambda key: -(kept[key].scores.sim or 0))[:limit]
        self.report.drop("references", "too_many_cross", vid, len(kept) - len(ranked))
        return [kept[key] for key in kept if key in set(ranked)]


def _group(vid: str) -> str:
    name = ClipName.parse(vid)
    return vid if name is None else name.uuid
