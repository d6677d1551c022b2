"""One entry of an OpenS2V-5M part in its native form (PKU-YuanGroup/OpenS2V-Nexus), as types that msgspec checks.

Its traps: `crop` is [x0, x1, y0, y1]; `face_cut` is half-open and may exceed `num_frames`; subjects are numbered from 1 in
`mask_map` and `mask_annotation` and lie at that number less one in `annotations`; boxes and masks are in pixels of the
cropped frame; scores are absent where a mask is empty; one subject may occur under several names.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

_Number = Annotated[float, msgspec.Meta(gt=-1e9, lt=1e9)]  # more is damage; not NaN either
_Integer = Annotated[int, msgspec.Meta(gt=-(10**9), lt=10**9)]
_Texts = str | list[str] | None


class Resolution(msgspec.Struct):
    """Of the whole frame, in pixels."""

    width: _Integer
    height: _Integer


class Metadata(msgspec.Struct):
    """The clip: its file, its part, its captions and its scores."""

    path: str
    num_frames: _Integer
    resolution: Resolution
    fps: Annotated[float, msgspec.Meta(gt=0, lt=1e9)] | None = None
    crop: tuple[_Integer, _Integer, _Integer, _Integer] | None = None
    face_cut: tuple[_Integer, _Integer] | None = None
    cut: tuple[_Integer, _Integer] | None = None
    face_cap_qwen: _Texts = None
    cap: _Texts = None
    aesthetic: _Number | None = None
    motion: _Number | None = None
    tech: _Number | None = None

    @property
    def captions(self) -> list[str]:
        """All captions without empty ones, the better ones first."""
        groups = (
            [value] if isinstance(value, str) else value or [] for value in (self.face_cap_qwen, self.cap)
        )
        return [text.strip() for group in groups for text in group if text.strip()]


class AnnotatedBox(msgspec.Struct):
    """One subject of the annotated frame."""

    class_name: str
    bbox: tuple[_Number, _Number, _Number, _Number]
    gme_score: _Number | None = None
    aes_score: _Number | None = None


class AnnotatedFrame(msgspec.Struct):
    """The frame that boxes and masks belong to."""

    ann_frame_idx: _Integer
    annotations: Annotated[list[Any], msgspec.Meta(max_length=256)]  # a broken one costs itself only
    box_format: Literal["xyxy"] = "xyxy"
    img_width: _Integer | None = None
    img_height: _Integer | None = None


class Annotation(msgspec.Struct):
    """The annotated frame with its masks, by number, and their names."""

    ann_frame_data: AnnotatedFrame
    mask_map: dict[str, Any]
    mask_annotation: dict[str, Any]


class Entry(msgspec.Struct):
    """One entry."""

    metadata: Metadata
    annotation: Annotation
    word_tags: Any = None
