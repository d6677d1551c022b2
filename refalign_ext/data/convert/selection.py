"""Which clips and references a conversion keeps: RefAlign's own rules as defaults, each with a switch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refalign_ext.data.conversion_report import Unusable

if TYPE_CHECKING:
    from refalign_ext.data.schema import ClipScores, ReferenceScores

OVERFLOW = ("drop", "clamp")

_HUMANS = """
    actor actress adult athlete audience baby boy bride chef child children couple crowd dancer doctor driver elder family
    father female gentleman girl groom guy human individual infant kid kids ladies lady male man men mother musician nurse
    officer people performer person persons player singer soldier speaker student teacher teenager toddler woman women
    worker
"""
_HUMAN_WORDS = frozenset(_HUMANS.split())
_FACE_WORDS = frozenset({"face", "faces", "head", "heads"})
_ENDING_WORDS = frozenset({"of", "with", "in", "on", "for", "wearing"})  # what follows describes


@dataclass(frozen=True)
class Selection:
    """What is kept; None switches a rule off. A score that a data set does not give is not judged.

    Attributes:
        min_aesthetic, min_gme: a reference is kept if its aesthetic score or its text match (gme) reaches its limit.
        min_area_ratio: least share of the frame that a reference's box takes.
        max_references: of a clip's subjects, so many with the largest boxes are kept; a background is not counted.
        max_cross: of a subject's cross references, the most similar ones are kept.
        max_mask_iou: from this overlap on, two masks of a frame are one thing under two names; the better is kept.
        min_text_similarity, min_image_similarity: cross pairs below are dropped (the image's must be above).
        min_frames: least length of a clip in frames.
        min_clip_aesthetic, min_clip_motion, min_clip_tech: least scores of a clip.
        overflow: what to do with a box that protrudes from its frame by more than rounding: "drop" or "clamp".

    Raises:
        ValueError: naming the flag with a value that cannot be.
    """

    min_aesthetic: float | None = 4.5
    min_gme: float | None = 0.6
    min_area_ratio: float | None = 0.1
    max_references: int | None = 3
    max_cross: int | None = 8
    max_mask_iou: float | None = 0.8
    min_text_similarity: float | None = 0.6
    min_image_similarity: float | None = 0.6
    min_frames: int | None = 80 * 3 + 1  # 81 frames at stride 3
    min_clip_aesthetic: float | None = None
    min_clip_motion: float | None = None
    min_clip_tech: float | None = None
    overflow: str = "drop"

    def __post_init__(self) -> None:
        if self.overflow not in OVERFLOW:
            raise ValueError(f"--overflow {self.overflow}: choose one of {', '.join(OVERFLOW)}")
        least = {"max_references": 1, "max_cross": 0, "min_frames": 1, "max_mask_iou": 0.01}
        for name, value in vars(self).items():
            lowest = least.get(name, -1e9)
            if isinstance(value, (int, float)) and not lowest <= value < math.inf:
                raise ValueError(f"--{name} {value}: expected a number of at least {lowest:g}")

    def check_clip(self, frames: int, scores: ClipScores) -> None:
        """Raises `Unusable` for a clip that is not kept."""
        if self.min_frames is not None and frames < self.min_frames:
            raise Unusable("too_short")
        for name in ("aesthetic", "motion", "tech"):
            if _is_below(getattr(scores, name), getattr(self, f"min_clip_{name}")):
                raise Unusable(f"clip_{name}_low")

    def check_reference(self, scores: ReferenceScores) -> None:
        """Raises `Unusable` for a reference that is not kept."""
        if _is_below(scores.area_ratio, self.min_area_ratio):
            raise Unusable("area_small")
        rules = [(scores.aes, self.min_aesthetic), (scores.gme, self.min_gme)]
        judged = [score < least for score, least in rules if score is not None and least is not None]
        if judged and all(judged):
            raise Unusable("quality_low")

    def check_pair(self, text: float | None, image: float | None) -> None:
        """Raises `Unusable` for a cross pair whose similarities are too low."""
        if _is_below(text, self.min_text_similarity):
            raise Unusable("cross_text_low")
        if None not in (image, self.min_image_similarity) and image <= self.min_image_similarity:
            raise Unusable("cross_image_low")


OPENS2V_SELECTION = Selection()
# Areas as RefAlign selects them. What its similarities are measured with is not published, so no limit is set.
PHANTOM_SELECTION = Selection(min_frames=None, min_image_similarity=None)
FOLDER_SELECTION = Selection(min_frames=None, min_area_ratio=None, max_references=None)


def kind_of_class(name: str) -> str:
    """ "face", "human" or "object" for the name of a class: "young woman" is human, "human head" a face.

    The last word before "in", "with" and the like decides, so what only describes does not ("baby stroller").
    """
    last = ""
    for word in name.lower().replace("-", " ").split():
        if last and word in _ENDING_WORDS:
            break
        last = word
    if last in _FACE_WORDS:
        return "face"
    return "human" if last in _HUMAN_WORDS else "object"


def _is_below(score: float | None, least: float | None) -> bool:
    return score is not None and least is not None and score < least
