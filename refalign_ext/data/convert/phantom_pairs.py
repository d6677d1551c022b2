"""The cells `cross_pair` of Phantom-Data: where a phrase's subject is seen, in the clip itself and in other clips.

    {phrase: {"obj_from_tgt_video": [{"vid", "frame_idx", "bbox_loc": [x0, y0, x1, y1], "bbox_cls"}],
              "refer_result": [[{"vid", "frame_idx", "bbox_loc": [[x0, y0, x1, y1]], "bbox_cls", "scores": [s]}]]}}

The cell is JSON in a string, frames are shares of the clip's frames, sometimes as text, and only the boxes of references
are nested.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Annotated, Any, NamedTuple

import msgspec

from refalign_ext.data.boxes import Box
from refalign_ext.data.conversion_report import ConversionReport, Unusable
from refalign_ext.data.convert.rows import Number, Text, converted

_SAME_IOU = 0.5  # overlap from which two boxes of one frame are one subject


class _Seen(msgspec.Struct):
    vid: Text
    frame_idx: Annotated[float, msgspec.Meta(ge=0, lt=1)]
    bbox_loc: Box
    bbox_cls: str | None = None
    scores: list[Number | None] = []


class _Referred(_Seen):
    bbox_loc: Annotated[list[Box], msgspec.Meta(min_length=1)]


class _Phrase(msgspec.Struct):
    obj_from_tgt_video: list[Any] | None = None
    refer_result: list[list[Any]] | None = None


class Detection(NamedTuple):
    """A subject in a frame, a share in [0, 1) of its clip's; the box is in pixels of "long768", the score a similarity."""

    vid: str
    frame_frac: float
    box: Box
    cls: str | None = None
    score: float | None = None

    def is_same(self, other: Detection) -> bool:
        """Whether another detection in this clip shows the same subject in the same frame."""
        if abs(self.frame_frac - other.frame_frac) > 1e-6:
            return False
        (a0, b0, a1, b1), (c0, d0, c1, d1) = self.box, other.box
        inner = max(0.0, min(a1, c1) - max(a0, c0)) * max(0.0, min(b1, d1) - max(b0, d0))
        union = (a1 - a0) * (b1 - b0) + (c1 - c0) * (d1 - d0) - inner
        return union > 0 and inner / union >= _SAME_IOU


@dataclass
class PhraseDetections:
    """Where a phrase's subject is seen, in the clip itself and as references."""

    phrase: str
    targets: list[Detection]
    references: list[Detection]


def parse_cross_pair(cell: object, vid: str, report: ConversionReport) -> list[PhraseDetections]:
    """What a cell of the clip `vid` says, phrase by phrase; detections that are not well-formed are counted.

    Raises:
        Unusable: if the cell is not JSON with an object of phrases.
    """
    try:
        phrases = json.loads(cell)
    except (TypeError, ValueError, RecursionError) as error:
        raise Unusable("cross_pair_not_readable", error) from None
    found = []
    for phrase, entry in converted(phrases, dict[str, _Phrase], "cross_pair_not_readable").items():
        targets = list(_detections(entry.obj_from_tgt_video or (), _Seen, vid, report))
        referred = chain.from_iterable(entry.refer_result or ())
        found.append(PhraseDetections(phrase, targets, list(_detections(referred, _Referred, vid, report))))
    return found


def _detections(items: Iterable[Any], kind: type, vid: str, report: ConversionReport) -> Iterator[Detection]:
    for item in items:
        try:
            native = converted(item, kind, "detection_not_valid")
        except Unusable as problem:
            report.drop("references", problem.reason, f"{vid}: {problem}")
            continue
        boxes = native.bbox_loc if kind is _Referred else [native.bbox_loc]
        name = (native.bbox_cls or "").strip() or None
        for box, score in zip_longest(boxes, native.scores[: len(boxes)]):
            yield Detection(native.vid, native.frame_idx, box, name, score)
