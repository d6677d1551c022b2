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
SCHEDULES = ("constant", "linear")
PRECISIONS = ("fp32", "bf16")
_LEAST = {
    1: ("batch_size", "accumulation", "steps", "save_every", "keep_last", "log_every", "cache_clips")
    + ("cache_free_clips", "cache_views", "preview_clips"),
    0: ("learning_rate", "muon_learning_rate", "weight_decay", "warmup_steps", "clip_norm", "preview_every")
    + ("seed", "alignment.weight", "alignment.negative_weight"),
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
    """One training run on one device."""

    recipe: str = "paper"
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
    """Samples in one forward pass."""
    accumulation: int = 1
    """Forward passes in one optimizer step. Paper: a global batch of 128."""
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
    """`constant`, or `linear` decay to zero over the last `decay_share` of the run."""
    decay_share: float = 0.4
    """See `schedule`."""
    clip_norm: float = 1.0
    """Gradient norm is clipped to this; 0 turns clipping off."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the DiT, kept in float32; 0: none."""
    precision: str = "bf16"
    """`bf16` (autocast over float32 weights) or `fp32`."""
    gradient_checkpointing: bool = False
    """Recompute block activations in the backward pass."""
    compile: bool = False
    """torch.compile every block."""
    seed: int = 0
    """All randomness of step n depends on this and n alone, so a resumed run equals an uninterrupted one."""
    save_every: int = 500
    """Optimizer steps between checkpoints."""
    keep_last: int = 2
    """Checkpoints kept."""
    preview_every: int = 500
    """Sprite world: optimizer steps between preview pictures; 0: none."""
    preview_clips: int = 48
    """Sprite world: clips that a preview generates and judges with one subject; with two subjects half as many."""
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
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"decay_share is {self.decay_share}: it must lie in (0, 1]")
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}: give a number below 2**63")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for the file beside a checkpoint."""
        return dataclasses.asdict(self)


def paper() -> TrainConfig:
    """The paper's training section, for real weights."""
    return TrainConfig(recipe="paper", task="r2v-1.3B", accumulation=128, gradient_checkpointing=True)


def release() -> TrainConfig:
    """What the official release does where it differs from the paper: timestep grid, weights and alignment gate."""
    return dataclasses.replace(paper(), recipe="release", timesteps="release")


def tiny() -> TrainConfig:
    """The embedded model on the sprite world: the paper's losses with an optimiser for small models."""
    return TrainConfig(
        recipe="tiny",
        task="r2v-tiny",
        from_scratch=True,
        alignment=AlignmentConfig(depth=2, teacher="dinov3-tiny", weight=0.25),
        timesteps="logit_normal_shift2",
        batch_size=8,
        steps=23500,
        optimizer="muon",
        learning_rate=2e-3,
        betas=(0.9, 0.95),
        warmup_steps=100,
        schedule="linear",
        decay_share=0.38,
        ema_decay=0.998,
        save_every=500,
        preview_every=2000,
        log_every=20,
    )


RECIPES = {"paper": paper, "release": release, "tiny": tiny}


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
    for keys, owner in ((nested, AlignmentConfig), (plain, TrainConfig)):
        known = {field.name for field in dataclasses.fields(owner)}
        unknown = sorted(set(keys) - known)
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}: choose one of {', '.join(sorted(known))}")
    alignment = dataclasses.replace(config.alignment, **nested)
    return dataclasses.replace(config, alignment=alignment, **plain)
