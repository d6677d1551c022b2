"""The specification of a sample, a pure function of the seed and the position; nothing is decoded here.

Variants of clips and references are numbers. The same number means the same pixels (`refalign_ext.data.pixels`), so with
a finite number of them everything that training can ask for can be computed before it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from refalign_ext.data.hashing import keyed_generator
from refalign_ext.data.schema import Clip, Reference
from refalign_ext.request import MAX_REFERENCES

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


@dataclass(frozen=True)
class ReferenceSpec:
    """One reference of a sample: reference number `reference` of the clip's subject number `subject`.

    `augmentation` is the number of the augmented variant; None: the picture as it is.
    """

    subject: int
    reference: int
    augmentation: int | None


@dataclass(frozen=True)
class SampleSpec:
    """Everything that is random about one sample: which part of the clip is shown as what, with which references.

    There is at least one of these; the model sees them in this order.
    """

    row: int
    bucket: Bucket
    clip_variant: int
    prompt: str
    references: tuple[ReferenceSpec, ...]


@dataclass(frozen=True)
class Sampling:
    """Every setting of what is drawn; see `refalign_ext.config.SamplingConfig`.

    Attributes:
        buckets: shapes that clips are brought to, one at least.
        fps: frames per second to take; None: every `stride`-th frame.
        cross_pairs: share of samples that prefer references from elsewhere ("cross" or "generated") to those from the
            clip itself. Subjects without the preferred kind take the other.
        reference_dropout: probability with which each reference beyond the first is left out.
        augment: whether references from the clip itself are augmented.
        clip_variants, reference_variants: number of parts of each clip, and of augmentations of each reference, that
            samples show; 0: any.
        seed: of everything drawn.

    Raises:
        ValueError: for too many references.
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
        assert self.buckets and (self.fps is None or self.stride == 1)
        if not 1 <= self.max_references <= MAX_REFERENCES:
            raise ValueError(
                f"max_references is {self.max_references}: it must lie between 1 and {MAX_REFERENCES}"
            )


def draw_sample_spec(
    clip: Clip,
    row: int,
    bucket: Bucket,
    sampling: Sampling,
    position: int,
    *,
    allowed: Callable[[Reference], bool] | None = None,
) -> SampleSpec:
    """Draws everything about the sample at a global position; `allowed` tells which references may be used.

    Raises:
        ValueError: if the clip has no reference that may be used.
    """
    generator = keyed_generator(sampling.seed, 1, position)  # 1: other draws than those of order and pixels
    clip_variant = int(generator.integers(sampling.clip_variants or _ANY))
    prompts = possible_prompts(clip, sampling)
    prompt = prompts[int(generator.integers(len(prompts)))]
    prefers_own = bool(generator.random() >= sampling.cross_pairs)
    references: list[ReferenceSpec] = []
    for index in generator.permutation(len(clip.subjects)).tolist():
        refs = clip.subjects[index].refs
        usable = [number for number, one in enumerate(refs) if allowed is None or allowed(one)]
        candidates = [n for n in usable if (refs[n].pair == "regular") == prefers_own] or usable
        # Each subject draws equally often, whatever becomes of the ones before it.
        pick, variant, stays = generator.random(), int(generator.integers(_ANY)), generator.random()
        if not candidates or (references and stays < sampling.reference_dropout):
            continue
        number = candidates[int(pick * len(candidates))]
        augmentation = None
        if _is_augmented(refs[number], sampling):
            augmentation = variant % (sampling.reference_variants or _ANY)
        references.append(ReferenceSpec(index, number, augmentation))
    if not references:
        side = " on its side of the split" if allowed else ""
        raise ValueError(f"clip {clip.id} has no references{side}")
    return SampleSpec(row, bucket, clip_variant, prompt, tuple(references[: sampling.max_references]))


def _is_augmented(reference: Reference, sampling: Sampling) -> bool:
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
            augmented = _is_augmented(reference, sampling)
            variants: Sequence[int | None] = range(sampling.reference_variants) if augmented else (None,)
            found += [ReferenceSpec(index, number, variant) for variant in variants]
    return found
