"""Which clips and references a conversion keeps: RefAlign's own rules as defaults, each with a switch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refalign_ext.data.schema import ClipScores, ReferenceScores

OVERFLOW = ("drop", "clamp")
_CLIP_SCORES = ("aesthetic", "motion", "tech")

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

    def clip_problem(self, frames: int, scores: ClipScores) -> str | None:
        """Under which reason a clip of so many frames is dropped; None if it is kept."""
        if self.min_frames is not None and frames < self.min_frames:
            return "too_short"
        low = [
            name
            for name in _CLIP_SCORES
            if _is_below(getattr(scores, name), getattr(self, f"min_clip_{name}"))
        ]
        return f"clip_{low[0]}_low" if low else None

    def reference_problem(self, scores: ReferenceScores) -> str | None:
        """Under which reason a reference is dropped; None if it is kept."""
        if _is_below(scores.area_ratio, self.min_area_ratio):
            return "area_small"
        rules = [(scores.aes, self.min_aesthetic), (scores.gme, self.min_gme)]
        judged = [score < least for score, least in rules if score is not None and least is not None]
        return "quality_low" if judged and all(judged) else None

    def pair_problem(self, text: float | None, image: float | None) -> str | None:
        """Under which reason a cross pair with these similarities is dropped; None if it is kept."""
        if _is_below(text, self.min_text_similarity):
            return "cross_text_low"
        is_judged = image is not None and self.min_image_similarity is not None
        return "cross_image_low" if is_judged and image <= self.min_image_similarity else None


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
