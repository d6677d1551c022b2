"""The plan of a run on its ranks, for training and generation alike: who holds what, memory, bytes moved, operations.

Everything follows from sizes, so a plan for 64 devices is made in milliseconds on a machine without any. Memory is an
estimate (`refalign_ext.planning.memory` says of what); a run is refused only if the estimate leaves less than a tenth
of the device free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refalign_ext.backbone import latent_shape
from refalign_ext.distributed.sizes import ParallelSizes
from refalign_ext.planning.flops import ModelShape, StepFlops
from refalign_ext.tasks import TASKS

if TYPE_CHECKING:
    from easydict import EasyDict

ASSUMED_MEMORY = 80 * 10**9
"""Bytes of device memory that a plan for real weights assumes where no GPU is at hand."""
USABLE = 0.9
"""Share of the device's memory that an estimate may fill: fragmentation and communication buffers take the rest."""
_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """One run on all its ranks. Sizes are bytes, tokens are those of one sample.

    Attributes:
        title, facts: what runs, and the table's lines on it as (label, text).
        task: name in WAN_CONFIGS.
        sizes: how the ranks are divided; in generation `data` are the branches of the guidance.
        tokens_per_rank: of one sample, on each rank, padding included.
        samples_per_step: in one optimizer step over all ranks.
        trained_parameters: those that get gradients, projectors included (0 in generation).
        device, host: memory of one rank by item.
        traffic: what one rank receives in an optimizer step (a denoising step in generation) by item.
        flops: of one sample.
        device_memory: of one device; None: unknown and not checked.
        notes: what the reader should know, one sentence each.
        suggestions: settings that would make it fit, most convenient first; empty if it fits.
    """

    title: str
    task: str
    facts: tuple[tuple[str, str], ...]
    sizes: ParallelSizes
    tokens_per_rank: int
    samples_per_step: int
    trained_parameters: int
    device: Mapping[str, int]
    host: Mapping[str, int]
    traffic: Mapping[str, int]
    flops: StepFlops
    device_memory: int | None
    notes: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()

    @property
    def device_total(self) -> int:
        """Estimated memory of one device."""
        return sum(self.device.values())

    @property
    def fits(self) -> bool:
        """True unless the estimate exceeds the usable part of a known device memory."""
        return self.device_memory is None or self.device_total <= USABLE * self.device_memory

    def require_fit(self) -> None:
        """Refuse to start what would run out of memory."""
        if self.fits:
            return
        remedy = f"; use {', or '.join(self.suggestions)}" if self.suggestions else ""
        raise ValueError(
            f"{self.task} does not fit on {count_of(self.sizes.world, 'device')}: it needs about "
            f"{self.device_total / _GIB:.0f} GiB on each, and {USABLE * self.device_memory / _GIB:.0f} GiB "
            f"({USABLE:.0%} of {self.device_memory / _GIB:.0f}) are usable{remedy}"
        )


def memory_to_plan_with(task: str, device_memory: int | None) -> tuple[int | None, tuple[str, ...]]:
    """(bytes of one device to plan with or None, notes on them).

    Without a GPU (`device_memory` None) ASSUMED_MEMORY is taken for real tasks; the embedded tiny one is not checked.
    """
    if device_memory is not None or TASKS[task].bundled is not None:
        return device_memory, ()
    note = f"no GPU seen: {ASSUMED_MEMORY // 10**9} GB of memory on each device are assumed"
    return ASSUMED_MEMORY, (note,)


def token_counts(config: EasyDict, size: tuple[int, int], frame_num: int, references: int) -> tuple[int, int]:
    """(video tokens, reference tokens) of a sample; `config` is the task's entry of WAN_CONFIGS."""
    _, frames, height, width = latent_shape(size, frame_num, config)
    per_frame = (height // config.patch_size[1]) * (width // config.patch_size[2])
    return frames // config.patch_size[0] * per_frame, references * per_frame


def model_facts(
    shape: ModelShape,
    size: tuple[int, int],
    frame_num: int,
    references: int,
    tokens: tuple[int, int],
    held: int,
) -> tuple[tuple[str, str], ...]:
    """The table's lines on the transformer, and on a sample and its (video, reference) tokens."""
    model = f"{parameter_count(shape.parameters)} parameters, {shape.num_layers} blocks of width {shape.dim}"
    sample = f"{size[0]}x{size[1]}, {frame_num} frames, {count_of(references, 'reference')}"
    return (
        ("model", f"{model}, {shape.num_heads} heads"),
        ("sample", f"{sample}: {tokens[0]:,} + {tokens[1]:,} tokens, {held:,} on each rank"),
    )


def parameter_count(count: int) -> str:
    """A number of parameters in words."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def count_of(number: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
