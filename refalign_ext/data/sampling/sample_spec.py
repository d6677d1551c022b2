"""The specification of a sample, a pure function of the seed and the position; nothing is decoded here.

Variants of clips and references are numbers. The same number means the same pixels (`refalign_ext.data.pixels`), so with
a finite number of them everything that training can ask for can be computed before it starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from refalign_ext.data.hashing import keyed_generator
from refalign_ext.data.schema import Clip, Reference, Subject
from refalign_ext.request import MAX_REFERENCES

_DRAWS = 1  # sets these random numbers apart from those of order and replacement
_ANY = 2**53  # numbers to draw from where their number is not limited


@dataclass(frozen=True)
class Bucket:
    """A shape of videos: all samples of a batch share one. Pixels and frames."""

    width: int
    height: int
    frames: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width, self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


@dataclass(frozen=True)
class ReferenceSpec:
    """One reference of a sample.

    Attributes:
        subject, reference: positions in the clip's subjects and in that subject's references.
        augmentation: number of the augmented variant; None: the picture as it is.
    """

    subject: int
    reference: int
    augmentation: int | None


@dataclass(frozen=True)
class SampleSpec:
    """Everything that is random about one sample.

    Attributes:
        row: of the clip in its set.
        bucket: its shape.
        clip_variant: number of the part of the clip that is shown.
        prompt: one of its captions.
        references: at least one, in the order in which the model sees them.
    """

    row: int
    bucket: Bucket
    clip_variant: int
    prompt: str
    references: tuple[ReferenceSpec, ...]


@dataclass(frozen=True)
class Sampling:
    """Every setting of what is drawn.

    Attributes:
        buckets: shapes that clips are brought to, one at least.
        fps: frames per second to take; None: by `stride`.
        stride: take every n-th frame; 1 with `fps`.
        cross_pairs: share of samples that prefer references from elsewhere ("cross" or "generated") to those from the
            clip itself. Subjects without the preferred kind take the other.
        reference_dropout: probability with which each reference beyond the first is left out.
        max_references: the most that a sample has.
        augment: whether references from the clip itself are augmented.
        clip_variants: number of parts of each clip that samples show; 0: any.
        reference_variants: number of augmented variants that each reference has; 0: any.
        prompt_alternatives: draw from all captions of a clip instead of taking the first.
        seed: of everything drawn.

    Raises:
        ValueError: naming a setting that is out of range.
    """

    buckets: tuple[Bucket, ...]
    fps: float | None = None
    stride: int = 1
    cross_pairs: float = 0.5
    reference_dropout: float = 0.0
    max_references: int = MAX_REFERENCES
    augment: bool = True
    clip_variants: int = 0
    reference_variants: int = 0
    prompt_alternatives: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.buckets or any(min(b.width, b.height, b.frames) < 1 for b in self.buckets):
            raise ValueError(f"buckets is {self.buckets}: give at least one, all sizes above 0")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps is {self.fps}: it must be above 0")
        if self.stride < 1:
            raise ValueError(f"stride is {self.stride}: it must be at least 1")
        if self.fps is not None and self.stride != 1:
            raise ValueError("fps and stride exclude each other: give one of them")
        for name in ("cross_pairs", "reference_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it is a share, between 0 and 1")
        if not 1 <= self.max_references <= MAX_REFERENCES:
            raise ValueError(
                f"max_references is {self.max_references}: it must lie between 1 and {MAX_REFERENCES}"
            )
        for name in ("clip_variants", "reference_variants", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0")


def draw_sample_spec(
    clip: Clip,
    row: int,
    bucket: Bucket,
    sampling: Sampling,
    position: int,
    *,
    allowed: Callable[[Reference], bool] | None = None,
) -> SampleSpec:
    """Draws everything about the sample at a global position.

    Args:
        allowed: tells which references may be used; None: all.

    Raises:
        ValueError: if the clip has no reference that may be used.
    """
    generator = keyed_generator(sampling.seed, _DRAWS, position)
    clip_variant = int(generator.integers(sampling.clip_variants or _ANY))
    prompts = possible_prompts(clip, sampling)
    prompt = prompts[int(generator.integers(len(prompts)))]
    prefers_other = bool(generator.random() < sampling.cross_pairs)
    references: list[ReferenceSpec] = []
    for index in generator.permutation(len(clip.subjects)).tolist():
        subject = clip.subjects[index]
        candidates = _preferred(subject, prefers_other, allowed)
        # Each subject draws equally often, whatever becomes of the ones before it.
        pick, variant, stays = generator.random(), int(generator.integers(_ANY)), generator.random()
        if not candidates or (references and stays < sampling.reference_dropout):
            continue
        number = candidates[int(pick * len(candidates))]
        augmentation = None
        if is_augmented(subject.refs[number], sampling):
            augmentation = variant % (sampling.reference_variants or _ANY)
        references.append(ReferenceSpec(index, number, augmentation))
    if not references:
        raise ValueError(
            f"clip {clip.id} has no references" + (" on its side of the split" if allowed else "")
        )
    return SampleSpec(row, bucket, clip_variant, prompt, tuple(references[: sampling.max_references]))


def is_augmented(reference: Reference, sampling: Sampling) -> bool:
    """Whether samples show a reference augmented: only those from the clip itself could be copied."""
    return sampling.augment and reference.pair == "regular"


def possible_prompts(clip: Clip, sampling: Sampling) -> tuple[str, ...]:
    """Every caption that samples of a clip may have."""
    return (clip.prompt, *clip.prompt_alt) if sampling.prompt_alternatives else (clip.prompt,)


def possible_references(clip: Clip, sampling: Sampling) -> list[ReferenceSpec]:
    """Every reference that samples of a clip may have, without augmented ones if their number is not limited."""
    found: list[ReferenceSpec] = []
    for index, subject in enumerate(clip.subjects):
        for number, reference in enumerate(subject.refs):
            augmented = is_augmented(reference, sampling)
            variants: Sequence[int | None] = range(sampling.reference_variants) if augmented else (None,)
            found += [ReferenceSpec(index, number, variant) for variant in variants]
    return found


def _preferred(
    subject: Subject, prefers_other: bool, allowed: Callable[[Reference], bool] | None
) -> list[int]:
    usable = [n for n, reference in enumerate(subject.refs) if allowed is None or allowed(reference)]
    others = [n for n in usable if subject.refs[n].pair != "regular"]
    regular = [n for n in usable if subject.refs[n].pair == "regular"]
    return (others or regular) if prefers_other else (regular or others)
