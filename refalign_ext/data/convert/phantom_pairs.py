"""The cells `cross_pair` of Phantom-Data: where a phrase's subject is seen, in the clip itself and in other clips.

    {phrase: {"obj_from_tgt_video": [{"vid", "frame_idx", "bbox_loc": [x0, y0, x1, y1], "bbox_cls"}],
              "refer_result": [[{"vid", "frame_idx", "bbox_loc": [[x0, y0, x1, y1]], "bbox_cls", "scores": [s]}]]}}

The cell is JSON in a string, frames are shares of the clip's frames, sometimes as text, and only the boxes of references
are nested.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import msgspec

from refalign_ext.data.boxes import Box

_Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
_Score = Annotated[float, msgspec.Meta(gt=-1e12, lt=1e12)]
_SAME_IOU = 0.5  # overlap from which two boxes of one frame are one subject


class Detection(NamedTuple):
    """A subject in a frame of a clip.

    Attributes:
        vid: the clip; frame_frac: the frame, a share in [0, 1) of its frames.
        box: in pixels of "long768", see `refalign_ext.data.boxes`.
        cls: the detector's name of what it is; score: similarity to the subject.
    """

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
    """Where a phrase's subject is seen, in the clip itself and as references; or why that cannot be used."""

    phrase: str
    targets: list[Detection | str]
    references: list[Detection | str]


def parse_cross_pair(cell: object) -> list[PhraseDetections]:
    """What a cell says, phrase by phrase.

    Raises:
        ValueError: if the cell is not JSON with an object of phrases.
    """
    if not isinstance(cell, str):
        raise ValueError("expected a text with JSON")
    try:
        phrases = json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(phrases, dict):
        raise ValueError("expected an object of phrases")
    found = []
    for phrase, entry in phrases.items():
        if isinstance(entry, dict):
            targets = [
                detection
                for item in _flat(entry.get("obj_from_tgt_video"))
                for detection in _detections(item, [item.get("bbox_loc")])
            ]
            references = [
                detection
                for item in _flat(entry.get("refer_result"))
                for detection in _detections(item, item.get("bbox_loc"))
            ]
            found.append(PhraseDetections(phrase, targets, references))
    return found


def _flat(groups: object) -> Iterator[dict[str, Any]]:
    """The items of a list, or of lists in it."""
    for group in groups if isinstance(groups, list) else []:
        for item in group if isinstance(group, list) else [group]:
            if isinstance(item, dict):
                yield item


def _detections(item: dict[str, Any], boxes: object) -> list[Detection | str]:
    vid, cls = item.get("vid"), item.get("bbox_cls")
    if not isinstance(vid, str) or not vid.strip():
        return ["no_vid"]
    share = convert_or_none(item.get("frame_idx"), _Share)
    if share is None:
        return ["frame_not_a_share"]
    checked = convert_or_none(boxes, list[tuple[float, float, float, float]])
    if not checked:
        return ["no_box"]
    name = cls.strip() or None if isinstance(cls, str) else None
    scores = convert_or_none(item.get("scores"), list[_Score]) or []
    scores += [None] * (len(checked) - len(scores))
    return [Detection(vid, share, box, name, score) for box, score in zip(checked, scores)]


def convert_or_none(value: object, kind: Any) -> Any:
    """The value as that type, numbers also from text; None if it is none."""
    try:
        return msgspec.convert(value, kind, strict=False)
    except (msgspec.ValidationError, UnicodeEncodeError):  # half a surrogate pair
        return None
