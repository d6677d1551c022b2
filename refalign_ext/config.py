"""Every setting of a training run, with its source, and the recipes that fill them in.

Recipes are plain functions that return a `TrainConfig`; any field can be overridden on the command line by its name.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

TIMESTEPS = ("paper", "release", "logit_normal", "logit_normal_shift2")
TAPS = ("block", "self_attn")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("fp32", "bf16")
ACTIVATION_CHECKPOINTING = ("none", "full", "selective")
_LEAST = {
    1: ("batch_size", "steps", "save_every", "keep_last", "log_every", "cache_clips", "max_skipped_steps")
    + ("cache_free_clips", "cache_views", "preview_clips", "validation_clips"),
    0: ("learning_rate", "muon_learning_rate", "weight_decay", "warmup_steps", "clip_norm", "preview_every")
    + (
        "seed",
        "alignment.weight",
        "alignment.negative_weight",
        "global_batch_size",
        "ulysses_size",
        "ring_size",
    )
    + ("lora_rank", "lora_alpha", "validate_every", "spike_factor"),
}


@dataclass(frozen=True)
class AlignmentConfig:
    """Reference alignment (paper eq. 6 to 11)."""

    weight: float = 1.0
    """eta of eq. 11; 0 trains without reference alignment, teacher and projectors. Paper: 1.0."""
    negative_weight: float = 1.0
    """lambda of eq. 10. Paper: 1.0."""
    margin: float = 1.0
    """delta of eq. 9. Not in the paper; the release uses 1.0."""
    depth: int = 9
    """K: the first K blocks are aligned. Paper: 9 (table 4)."""
    tap: str = "block"
    """Where student features are taken: `block` (output of the block, the release) or `self_attn` (paper's wording)."""
    teacher: str = "dinov3-l"
    """Name in `refalign_ext.teachers`. Paper: DINOv3-L."""
    teacher_path: str | None = None
    """Local folder with the teacher's weights; None uses the hub's name (or the embedded teacher for r2v-tiny)."""
    new_projectors: bool = False
    """Start with new projectors even where the DiT's checkpoint has some (another teacher or depth)."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run, on one device or many."""

    recipe: str = "paper_stage1"
    """Name of the recipe that this configuration started from."""
    task: str = "r2v-tiny"
    """A reference-to-video task of WAN_CONFIGS."""
    ckpt_dir: str | None = None
    """Checkpoint folder in upstream's layout (VAE, text encoder, DiT); None: the embedded one, for r2v-tiny only."""
    dit_ckpt: str | None = None
    """DiT to start from (file, index or folder); None: the one in ckpt_dir, or a fresh one with `from_scratch`."""
    from_scratch: bool = False
    """Start the DiT from random weights."""
    data: str | None = None
    """Manifest (JSON lines) of clips; None: the sprite world, for r2v-tiny only."""
    validation_data: str | None = None
    """Manifest of clips for validation; None: clips of the sprite world that training does not see, or none."""
    out: str = "outputs/train"
    """Folder for logs, previews and checkpoints."""
    alignment: AlignmentConfig = AlignmentConfig()
    timesteps: str = "paper"
    """Timestep sampling and weighting by name: `paper`, `release`, `logit_normal` or `logit_normal_shift2`."""
    drop_text: float = 0.1
    """Share of samples whose prompt is dropped. Paper: 0.1."""
    drop_references: float = 0.1
    """Share of samples whose references become zero latents. Paper: 0.1."""
    drop_both: float = 0.1
    """Share of samples that lose both. Paper: 0.1."""
    batch_size: int = 1
    """Samples in one forward pass of one data-parallel group."""
    global_batch_size: int = 0
    """Samples in one optimizer step over all devices; what does not run at once is accumulated. 0: what runs at once.
    Paper: 128."""
    steps: int = 3000
    """Optimizer steps. Paper: 3000 (1800 in ablations)."""
    optimizer: str = "adamw"
    """`adamw`, or `muon` (Muon on the blocks' matrices, AdamW elsewhere; learns fastest on the tiny model)."""
    learning_rate: float = 5e-5
    """Of AdamW. Paper: 5e-5."""
    muon_learning_rate: float = 3e-3
    """Of Muon, where it is used."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW. Paper: (0.9, 0.999)."""
    weight_decay: float = 0.01
    """AdamW. Paper: 0.01."""
    warmup_steps: int = 0
    """Linear warm-up of the learning rate."""
    schedule: str = "constant"
    """After the warm-up: `constant`; `linear` decay to zero over the last `decay_share` of the run; or `cosine` from the
    warm-up to the end."""
    decay_share: float = 0.4
    """See `schedule`."""
    clip_norm: float = 1.0
    """Gradient norm is clipped to this; 0 turns clipping off."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the DiT, kept in float32; 0: none."""
    precision: str = "bf16"
    """`bf16` (autocast over float32 weights) or `fp32`."""
    activation_checkpointing: str = "none"
    """What the backward pass computes again instead of keeping it: `none`, `full` (every block) or `selective` (all but
    attention and every second matmul of a block)."""
    compile: bool = False
    """torch.compile every block."""
    ulysses_size: int = 0
    """Ranks among which a sample's attention heads are divided; 0: chosen from the ranks and their memory."""
    ring_size: int = 0
    """Ranks among which a sample's keys and values are gathered (for heads that Ulysses cannot divide further);
    0: chosen."""
    cpu_offload: bool = False
    """Keep sharded weights, gradients and optimizer state in host memory (several ranks only)."""
    t5_cpu: bool = False
    """Keep the text encoder on the CPU."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank instead of all weights; 0: all weights."""
    lora_alpha: float = 0.0
    """Adapters are scaled by this over the rank; 0: the rank itself."""
    lora_targets: str = ""
    """Which layers get adapters, as in `refalign_ext.lora`; empty: attention and feed-forward of every block."""
    seed: int = 0
    """All randomness of step n depends on this and n alone, so a resumed run equals an uninterrupted one."""
    save_every: int = 500
    """Optimizer steps between checkpoints."""
    keep_last: int = 2
    """Checkpoints kept."""
    max_skipped_steps: int = 5
    """A step whose loss or gradient is not finite is skipped and written down; this many in a row end the run."""
    spike_factor: float = 6.0
    """Log the samples of a step whose loss lies this many deviations above the mean of late ones; 0: never."""
    validate_every: int = 500
    """Optimizer steps between validation losses, where there are clips for it; 0: none."""
    validation_clips: int = 32
    """Clips of a validation loss: always the same, with the same noise and timesteps."""
    wandb: str | None = None
    """Also log to this Weights & Biases project."""
    timeout_minutes: float = 30.0
    """A rank that the others wait for longer than this ends the run."""
    preview_every: int = 500
    """Optimizer steps between previews (sprite world: a judged picture; else videos of validation clips); 0: none."""
    preview_clips: int = 48
    """Sprite world: clips that a preview generates and judges with one subject, and half as many with two. Else: at
    most this many videos."""
    log_every: int = 10
    """Optimizer steps between log entries."""
    cache_clips: int = 10000
    """Sprite world: clips rendered and encoded once, before training."""
    cache_views: int = 40
    """Sprite world: reference views of each subject, rendered and encoded once."""
    cache_free_clips: int = 8000
    """Sprite world: the same for clips in free colours, each with two views of its own subjects."""
    free_colors: float = 0.6
    """Sprite world: share of samples whose subjects have free colours; palette colours alone are learned as a few
    classes and not copied."""
    subject_counts: tuple[float, float, float] = (0.85, 0.12, 0.03)
    """Sprite world: shares of steps with one, two and three subjects."""
    regular_pairs: float = 0.2
    """Sprite world: share of samples whose references are cut from the clip itself (the rest are cross pairs)."""

    def __post_init__(self) -> None:
        choices = {
            "timesteps": (self.timesteps, TIMESTEPS),
            "alignment.tap": (self.alignment.tap, TAPS),
            "optimizer": (self.optimizer, OPTIMIZERS),
            "schedule": (self.schedule, SCHEDULES),
            "precision": (self.precision, PRECISIONS),
            "activation_checkpointing": (self.activation_checkpointing, ACTIVATION_CHECKPOINTING),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}: choose one of {', '.join(allowed)}")
        self._check_numbers()
        shares = (self.drop_text, self.drop_references, self.drop_both)
        if sum(shares) > 1:
            raise ValueError(
                "drop_text + drop_references + drop_both exceed 1: they are shares of the samples"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}: give two numbers in [0, 1), such as 0.9,0.999")
        if len(self.subject_counts) != 3 or min(self.subject_counts) < 0 or not sum(self.subject_counts):
            raise ValueError(
                f"subject_counts is {self.subject_counts}: give three shares, such as 0.7,0.25,0.05"
            )
        if self.from_scratch and self.dit_ckpt is not None:
            raise ValueError("from_scratch and dit_ckpt exclude each other: leave one out")

    def _check_numbers(self) -> None:
        values = {f"alignment.{name}": value for name, value in vars(self.alignment).items()} | vars(self)
        for name, value in values.items():
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise ValueError(f"{name} is {value}: give a finite number")
        for least, names in _LEAST.items():
            for name in names:
                if values[name] < least:
                    raise ValueError(f"{name} is {values[name]}: it must be at least {least}")
        for name in ("drop_text", "drop_references", "drop_both", "regular_pairs", "free_colors"):
            if not 0 <= values[name] <= 1:
                raise ValueError(f"{name} is {values[name]}: it is a share, between 0 and 1")
        if self.alignment.weight and self.alignment.depth < 1:
            raise ValueError(
                "alignment.depth is below 1: set alignment.weight to 0 to train without alignment"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}: it must lie in [0, 1)")
        if not self.timeout_minutes > 0:
            raise ValueError(f"timeout_minutes is {self.timeout_minutes}: it must be more than 0")
        if self.lora_rank and self.ema_decay:
            raise ValueError("lora_rank and ema_decay exclude each other: adapters have no moving average")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"decay_share is {self.decay_share}: it must lie in (0, 1]")
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}: give a number below 2**63")

    def accumulation(self, data_size: int) -> int:
        """Forward passes of each of `data_size` data-parallel groups in one optimizer step.

        Raises:
            ValueError: if the global batch does not divide, with the nearest ones that do.
        """
        at_once = self.batch_size * data_size
        if self.global_batch_size % at_once:
            below = self.global_batch_size // at_once * at_once
            near = " or ".join(str(n) for n in (below, below + at_once) if n)
            raise ValueError(
                f"global_batch_size is {self.global_batch_size}: {data_size} data-parallel groups run {at_once} samples at "
                f"once (batch_size {self.batch_size}); give a multiple of it, such as {near}"
            )
        return max(1, self.global_batch_size // at_once)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for the file beside a checkpoint."""
        return dataclasses.asdict(self)


def paper_stage1() -> TrainConfig:
    """The paper's first stage, for real weights and regular pairs: 1800 of the 3000 iterations.

    The paper gives 3000 iterations over both stages in a ratio of 6 to 4, and 1800 for its ablations.
    """
    return TrainConfig(
        recipe="paper_stage1",
        task="r2v-1.3B",
        global_batch_size=128,
        steps=1800,
        activation_checkpointing="full",
        preview_clips=4,
    )


def paper_stage2() -> TrainConfig:
    """The paper's second stage, on cross pairs, from the weights of the first: the other 1200 iterations."""
    return dataclasses.replace(paper_stage1(), recipe="paper_stage2", steps=1200)


def release() -> TrainConfig:
    """What the official release does where it differs from the paper: timestep grid, weights and alignment gate."""
    return dataclasses.replace(paper_stage1(), recipe="release", timesteps="release")


def tiny() -> TrainConfig:
    """The embedded model on the sprite world: the paper's losses with an optimiser for small models."""
    return TrainConfig(
        recipe="tiny",
        task="r2v-tiny",
        from_scratch=True,
        alignment=AlignmentConfig(depth=2, teacher="dinov3-tiny", weight=0.25),
        timesteps="logit_normal_shift2",
        batch_size=8,
        steps=44000,
        optimizer="muon",
        learning_rate=2e-3,
        betas=(0.9, 0.95),
        warmup_steps=100,
        schedule="linear",
        decay_share=0.72,
        ema_decay=0.998,
        save_every=500,
        preview_every=2000,
        validate_every=2000,
        log_every=20,
    )


RECIPES = {
    "paper_stage1": paper_stage1,
    "paper_stage2": paper_stage2,
    "release": release,
    "tiny": tiny,
}


def recipe(name: str) -> TrainConfig:
    """The recipe called `name`.

    Raises:
        ValueError: listing the known names.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()


def with_overrides(config: TrainConfig, overrides: dict[str, Any]) -> TrainConfig:
    """`config` with fields replaced; `alignment.x` names a nested field.

    Raises:
        ValueError: for a field that does not exist or a value that does not validate.
    """
    nested = {
        key.removeprefix("alignment."): value
        for key, value in overrides.items()
        if key.startswith("alignment.")
    }
    plain = {key: value for key, value in overrides.items() if not key.startswith("alignment.")}
    if plain.get("dit_ckpt") is not None:
        plain.setdefault("from_scratch", False)  # naming weights means starting from them
    if plain.get("lora_rank"):
        plain.setdefault("from_scratch", False)  # so does adapting them
        plain.setdefault("ema_decay", 0.0)
    for keys, owner in ((nested, AlignmentConfig), (plain, TrainConfig)):
        known = {field.name for field in dataclasses.fields(owner)}
        unknown = sorted(set(keys) - known)
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}: choose one of {', '.join(sorted(known))}")
    alignment = dataclasses.replace(config.alignment, **nested)
    return dataclasses.replace(config, alignment=alignment, **plain)
