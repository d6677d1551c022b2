"""The cells `cross_pair` of Phantom-Data: where a phrase's subject is seen, in the clip itself and in other clips.

    {phrase: {"obj_from_tgt_video": [{"vid", "frame_idx", "bbox_loc": [x0, y0, x1, y1], "bbox_cls"}],
              "refer_result": [[{"vid", "frame_idx", "bbox_loc": [[x0, y0, x1, y1]], "bbox_cls", "scores"}]]}}

As they are published, the cell is JSON in a string, frames are shares of the clip's frames, sometimes as text, and only
the boxes of references are nested. Lists that are nested more or less than this are read as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from refalign_ext.data.boxes import Box

TARGET, REFERENCES = "obj_from_tgt_video", "refer_result"
_MAX_DEPTH = 4  # of lists within each other
_SCORES = ("image_similarity", "similarity", "sim", "score")


@dataclass(frozen=True)
class Sighting:
    """A subject in a frame of a clip.

    Attributes:
        vid: the clip; frame_frac: the frame, a share in [0, 1) of its frames.
        box: in pixels of "long768", see `refalign_ext.data.boxes`.
        cls: the detector's name of what it is; score: likeness to the subject.
    """

    vid: str
    frame_frac: float
    box: Box
    cls: str | None = None
    score: float | None = None


def phrases_of(cell: object) -> dict[str, dict[str, Any]]:
    """Phrase -> its entry.

    Raises:
        ValueError: if the cell is not JSON with such entries.
    """
    for _ in range(2):  # JSON in JSON occurs where tables were written twice
        if isinstance(cell, (str, bytes)):
            try:
                cell = json.loads(cell)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"not JSON: {error}") from None
    if isinstance(cell, list) and all(isinstance(item, (list, tuple)) and len(item) == 2 for item in cell):
        cell = {key: value for key, value in cell if isinstance(key, str)}  # a map of arrow
    if not isinstance(cell, dict):
        raise ValueError("expected an object of phrases")
    # Columns of structs give every row the phrases of all rows, with nothing in them.
    return {phrase: entry for phrase, entry in cell.items() if isinstance(entry, dict)}


def sightings(entry: dict[str, Any], key: str, own_vid: str) -> Iterator[Sighting | str]:
    """What stands under `TARGET` or `REFERENCES`, or why it cannot be used; `own_vid` where a target has no vid."""
    for item in _objects(entry.get(key), 0):
        vid = item.get("vid", item.get("video_id"))
        if vid is None and key == TARGET:
            vid = own_vid
        if not isinstance(vid, str) or not vid.strip():
            yield "no_vid"
            continue
        share = _float(item.get("frame_idx"))
        if share is None or not 0 <= share < 1:
            yield "frame_not_a_share"
            continue
        cls, scores = _texts(item.get("bbox_cls")), item.get("scores", item.get("score"))
        boxes = list(_boxes(item.get("bbox_loc"), 0))
        if not boxes:
            yield "no_box"
        for number, box in enumerate(boxes):
            name = cls[min(number, len(cls) - 1)] if cls else None
            yield Sighting(vid, share, box, name, _score(scores, number if len(boxes) > 1 else 0))


def _objects(value: Any, depth: int) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    elif isinstance(value, list) and depth < _MAX_DEPTH:
        for item in value:
            yield from _objects(item, depth + 1)


def _boxes(value: Any, depth: int) -> Iterator[Box]:
    if not isinstance(value, (list, tuple)) or depth > _MAX_DEPTH:
        return
    numbers = [_float(item, finite=False) for item in value]
    if len(value) == 4 and None not in numbers:
        yield tuple(numbers)
    else:
        for item in value:
            yield from _boxes(item, depth + 1)


def _texts(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [str(item).strip() for item in items if isinstance(item, (str, int)) and str(item).strip()]


def _score(value: Any, number: int) -> float | None:
    """The score of box `number`; of an object with several the likeness."""
    if isinstance(value, dict):
        value = next((value[key] for key in _SCORES if key in value), next(iter(value.values()), None))
    if isinstance(value, list):
        return _score(value[min(number, len(value) - 1)], 0) if value else None
    return _float(value)


def _float(value: Any, finite: bool = True) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if not finite or (math.isfinite(number) and abs(number) < 1e12) else None
