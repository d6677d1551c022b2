"""Every setting of a training run, with its source, and the recipes that fill them in.

Recipes are plain functions that return a `TrainConfig`; any field can be overridden on the command line by its name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TIMESTEPS = ("paper", "release", "release_ungated", "logit_normal", "logit_normal_shift4")
TAPS = ("block", "self_attn")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("fp32", "bf16")
DATA_SCHEDULES = ("mixed", "stages")
ACTIVATION_CHECKPOINTING = ("none", "full", "selective")

_LARGEST = 2**31 - 1  # of whole numbers


def setting(
    default: Any, text: str, *, choices: tuple[str, ...] = (), least: float | None = None, share: bool = False
) -> Any:
    """A field: what --help says about it, its values if few, a number's least, whether it lies between 0 and 1."""
    metadata = {"text": text, "choices": choices, "least": least, "share": share}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class AlignmentConfig:
    """Reference alignment (paper eq. 6 to 11)."""

    weight: float = setting(
        1.0, "eta of eq. 11; 0: no alignment, teacher and projectors. Paper: 1.0.", least=0
    )
    negative_weight: float = setting(1.0, "lambda of eq. 10. Paper: 1.0.", least=0)
    margin: float = setting(1.0, "delta of eq. 9. Not in the paper; the release uses 1.0.")
    depth: int = setting(9, "K: the first K blocks are aligned. Paper: 9 (table 4).")
    tap: str = setting(
        "block", "Student features: block (its output, the release) or self_attn (the paper).", choices=TAPS
    )
    teacher: str = setting("dinov3-l", "Name in refalign_ext.teachers. Paper: DINOv3-L.")
    teacher_path: str | None = setting(
        None, "Local folder of the teacher; None: from the hub, or the embedded one for r2v-tiny."
    )
    new_projectors: bool = setting(
        False, "New projectors even where the DiT's checkpoint has some (another teacher or depth)."
    )


@dataclass(frozen=True)
class SamplingConfig:
    """What a sample takes of a clip of `data`."""

    fps: float = setting(0.0, "Frames per second to take; 0: the task's rate. See stride.", least=0)
    stride: int = setting(1, "Take every n-th frame of the file instead; 1: by fps.", least=1)
    bucket_frames: tuple[int, ...] = setting(
        (), "Numbers of frames, such as 81,49: a clip gives the most it has. Empty: the task's number alone."
    )
    bucket_ratios: tuple[float, ...] = setting(
        (),
        "Widths over heights besides the task's own, such as 1,0.5625: a clip goes to the nearest, all of about "
        "the same area. Empty: the task's size.",
    )
    cross_pairs: float = setting(
        0.5, "Share of samples that prefer references from elsewhere to those of the clip itself.", share=True
    )
    reference_dropout: float = setting(
        0.0, "Probability of leaving out each reference of a sample beyond the first.", share=True
    )
    max_references: int = setting(8, "The most references of a sample.", least=1)
    augment: bool = setting(
        True,
        "Rotate, scale, flip, shear, blur and recolour references cut out of the clip itself, as the paper does.",
    )
    clip_variants: int = setting(
        0, "Stretches of a clip that samples show; 0: any, or those of the cache.", least=0
    )
    reference_variants: int = setting(
        0, "Augmented pictures of a reference; 0: any (not cached), or those of the cache.", least=0
    )
    prompt_alternatives: bool = setting(False, "Sample from all captions of a clip instead of the first.")


@dataclass(frozen=True)
class TrainConfig:
    """One training run, on one device or many."""

    recipe: str = setting(
        "paper_stage1",
        "Recipe to start from: tiny (default for r2v-tiny), paper_stage1 (else), paper_stage2 or release.",
    )
    task: str = setting("r2v-tiny", "A reference-to-video task of WAN_CONFIGS.")
    ckpt_dir: str | None = setting(
        None, "Checkpoint folder in upstream's layout; None: the embedded one, for r2v-tiny only."
    )
    dit_ckpt: str | None = setting(
        None, "DiT to start from (file, index or folder); None: the one in ckpt_dir. See from_scratch."
    )
    lora: str | None = setting(
        None, "LoRAs to merge into that DiT before the start: FILE or FILE:SCALE, several with commas."
    )
    from_scratch: bool = setting(False, "Start the DiT from random weights.")
    data: str | None = setting(
        None,
        "Manifest of clips, or a folder of tar shards (docs/data.md); several with commas. None: the sprite "
        "world, for r2v-tiny only.",
    )
    data_mix: tuple[float, ...] = setting((), "Shares of several data, such as 6,4; empty: by their clips.")
    data_schedule: str = setting(
        "mixed",
        "Several data: mixed draws each batch from one of them, stages takes them one after another, each for its "
        "share of the run. Paper: regular pairs, then cross pairs, 6 to 4.",
        choices=DATA_SCHEDULES,
    )
    sampling: SamplingConfig = SamplingConfig()
    cache: str | None = setting(
        None,
        "Folder that `data cache` wrote for data, several with commas; None: where it puts it, if it is there; "
        "off: none. Sprite world: where its clips are kept; None or off: in out.",
    )
    data_workers: int = setting(2, "Processes of each rank that decode clips ahead; 0: none.", least=0)
    max_bad_share: float = setting(
        0.1, "Unusable clips are replaced and logged; more than this share end the run.", share=True
    )
    validation_data: str | None = setting(
        None,
        "Clips for validation, as data; None: by validation_share, or clips that the sprite world keeps back.",
    )
    validation_share: float = setting(
        0.0,
        "Share of the groups of data kept for validation: clips of one source stay together.",
    )
    out: str = setting("outputs/train", "Folder for logs, previews and checkpoints.")
    alignment: AlignmentConfig = AlignmentConfig()
    teacher_input: bool = setting(
        False,
        "Feed the teacher's features of the references to the DiT as well, added to their patch embeddings. "
        "Paper: arm D of table 2, with alignment.weight 0.",
    )
    timesteps: str = setting("paper", "Timestep recipe (refalign_ext.timesteps).", choices=TIMESTEPS)
    drop_text: float = setting(0.1, "Share of samples whose prompt is dropped. Paper: 0.1.", share=True)
    drop_references: float = setting(
        0.1, "Share of samples whose references become zero latents. Paper: 0.1.", share=True
    )
    drop_both: float = setting(0.1, "Share of samples that lose both. Paper: 0.1.", share=True)
    batch_size: int = setting(1, "Samples in one forward pass of one data-parallel group.", least=1)
    global_batch_size: int = setting(
        0, "Samples of an optimizer step over all devices, by accumulation; 0: one pass. Paper: 128.", least=0
    )
    steps: int = setting(3000, "Optimizer steps. Paper: 3000 (1800 in ablations).", least=1)
    optimizer: str = setting(
        "adamw",
        "adamw, or muon (on the blocks' matrices, AdamW elsewhere; for r2v-tiny).",
        choices=OPTIMIZERS,
    )
    learning_rate: float = setting(5e-5, "Of AdamW. Paper: 5e-5.", least=0)
    muon_learning_rate: float = setting(3e-3, "Of Muon, where it is used.", least=0)
    betas: tuple[float, float] = setting((0.9, 0.999), "AdamW. Paper: (0.9, 0.999).")
    weight_decay: float = setting(0.01, "AdamW. Paper: 0.01.", least=0)
    warmup_steps: int = setting(0, "Linear warm-up of the learning rate.", least=0)
    schedule: str = setting(
        "constant",
        "After the warm-up: constant; linear decay to zero over the last decay_share of the run; or cosine to zero.",
        choices=SCHEDULES,
    )
    decay_share: float = setting(0.4, "See schedule.")
    clip_norm: float = setting(1.0, "Gradient norm is clipped to this; 0 turns clipping off.", least=0)
    ema_decay: float = setting(0.0, "Decay of the DiT's exponential moving average, in float32; 0: none.")
    precision: str = setting("bf16", "bf16 (autocast over float32 weights) or fp32.", choices=PRECISIONS)
    activation_checkpointing: str = setting(
        "none",
        "What the backward pass computes again: none, full (every block) or selective (all but attention and every "
        "second matmul of a block).",
        choices=ACTIVATION_CHECKPOINTING,
    )
    compile: bool = setting(False, "torch.compile every block.")
    ulysses_size: int = setting(
        0, "Ranks that share a sample's attention heads; 0: chosen from the ranks and their memory.", least=0
    )
    ring_size: int = setting(
        0, "Ranks that gather a sample's keys and values (beyond what Ulysses divides); 0: chosen.", least=0
    )
    cpu_offload: bool = setting(
        False, "Keep sharded weights, gradients and optimizer state in host memory (several ranks only)."
    )
    t5_cpu: bool = setting(False, "Keep the text encoder on the CPU.")
    lora_rank: int = setting(0, "Train LoRA adapters of this rank; 0: all weights.", least=0)
    lora_alpha: float = setting(0.0, "Adapters are scaled by this over the rank; 0: the rank.", least=0)
    lora_targets: str = setting(
        "", "Layers that get adapters (refalign_ext.lora); empty: attention and feed-forward of every block."
    )
    seed: int = setting(
        0,
        "All randomness of a step depends on this and its number alone, so a resumed run is exact.",
        least=0,
    )
    save_every: int = setting(500, "Optimizer steps between checkpoints.", least=1)
    keep_last: int = setting(2, "Checkpoints kept.", least=1)
    max_skipped_steps: int = setting(
        5,
        "Steps whose loss or gradient is not finite are skipped and written down; so many in a row end the run.",
        least=1,
    )
    spike_factor: float = setting(
        6.0, "Log the samples of a loss so many deviations above the recent mean; 0: never.", least=0
    )
    validate_every: int = setting(500, "Optimizer steps between validation losses; 0: none.", least=0)
    validation_clips: int = setting(
        32, "Clips of a validation loss: always the same, with the same noise and timesteps.", least=1
    )
    wandb: str | None = setting(None, "Also log to this Weights & Biases project.")
    timeout_minutes: float = setting(30.0, "A rank that the others wait for longer than this ends the run.")
    preview_every: int = setting(
        500,
        "Optimizer steps between previews (sprite world: a judged picture; else videos of validation clips); "
        "0: none.",
        least=0,
    )
    preview_clips: int = setting(
        48,
        "Sprite world: clips that a preview generates and judges with one subject, and half as many with two. "
        "Else: at most this many videos.",
        least=1,
    )
    preview_steps: int = setting(0, "Sprite world: sampling steps of a preview; 0: the task's.", least=0)
    log_every: int = setting(10, "Optimizer steps between log entries.", least=1)
    cache_clips: int = setting(6000, "Sprite world: clips rendered and encoded before training.", least=1)
    cache_views: int = setting(24, "Sprite world: the same for reference views of each subject.", least=1)
    cache_free_clips: int = setting(
        6000,
        "Sprite world: the same for clips in free colours, each with two views of its subjects.",
        least=1,
    )
    free_colors: float = setting(
        0.6,
        "Sprite world: share of samples whose subjects have free colours; palette colours alone are learned as a "
        "few classes and not copied.",
        share=True,
    )
    subject_counts: tuple[float, float, float] = setting(
        (0.5, 0.45, 0.05), "Sprite world: shares of steps with one, two and three subjects."
    )
    regular_pairs: float = setting(
        0.0,
        "Sprite world: share of clips whose references are cut out of them, so that both show the subject tilted "
        "alike; the rest are cross pairs.",
        share=True,
    )

    def __post_init__(self) -> None:
        for name, field in setting_fields().items():
            group, _, attribute = name.rpartition(".")
            _check_value(name, getattr(getattr(self, group) if group else self, attribute), field.metadata)
        counts = self.subject_counts
        half_open = "a number from 0 to below 1"
        # Setting, whether its value is possible, what to give.
        for name, possible, remedy in (
            (
                "betas",
                len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
                "0.9,0.999 or alike",
            ),
            ("subject_counts", len(counts) == 3 and min(counts) >= 0 and sum(counts) > 0, "three shares"),
            ("ema_decay", 0 <= self.ema_decay < 1, half_open),
            ("validation_share", 0 <= self.validation_share < 1, half_open),
            ("decay_share", 0 < self.decay_share <= 1, "a number above 0, at most 1"),
            ("timeout_minutes", self.timeout_minutes > 0, "a number above 0"),
            ("seed", self.seed < 2**63, "a number below 2**63"),
            ("learning_rate", self.learning_rate > 0, "a number above 0"),
            ("out", bool(self.out.strip()), "the name of a folder"),
        ):
            if not possible:
                raise ValueError(f"{name} is {getattr(self, name)}: give {remedy}")
        for one, other, clash in (
            ("from_scratch", "dit_ckpt", self.from_scratch and self.dit_ckpt is not None),
            ("lora_rank", "ema_decay", self.lora_rank and self.ema_decay),
            ("sampling.fps", "sampling.stride", self.sampling.fps and self.sampling.stride > 1),
        ):
            if clash:
                raise ValueError(f"{one} and {other} exclude each other: leave one out")
        for name, needed, is_idle in (
            ("lora_targets", "lora_rank", self.lora_targets and not self.lora_rank),
            ("lora_alpha", "lora_rank", self.lora_alpha and not self.lora_rank),
            ("data_mix", "data", self.data_mix and self.data is None),
            ("validation_data", "data", self.validation_data and self.data is None),
        ):
            if is_idle:
                raise ValueError(f"{name} does nothing without {needed}: give that too, or leave it out")
        if self.drop_text + self.drop_references + self.drop_both > 1:
            raise ValueError("drop_text + drop_references + drop_both exceed 1: they are shares of samples")
        if self.alignment.weight and self.alignment.depth < 1:
            raise ValueError(
                "alignment.depth is below 1: set alignment.weight to 0 to train without alignment"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether training looks at the teacher's features at all."""
        return self.alignment.weight > 0 or self.teacher_input

    def accumulation(self, data_size: int) -> int:
        """Forward passes of each of `data_size` groups in an optimizer step; ValueError if the batch does not divide."""
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


# Settings that are a class of their own, written `--alignment.depth` on the command line.
GROUPS = {"alignment": AlignmentConfig, "sampling": SamplingConfig}


def setting_fields() -> dict[str, dataclasses.Field]:
    """Every setting by its name on the command line, nested ones as `alignment.depth`."""
    fields = {field.name: field for field in dataclasses.fields(TrainConfig) if field.name not in GROUPS}
    for group, owner in GROUPS.items():
        fields |= {f"{group}.{field.name}": field for field in dataclasses.fields(owner)}
    return fields


def _check_value(name: str, value: Any, rules: Mapping[str, Any]) -> None:
    """Raises ValueError for a value that `rules`, as `setting` takes them, do not allow."""
    if rules["choices"] and value not in rules["choices"]:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(rules['choices'])}")
    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise ValueError(f"{name} is {value}: give a finite number")
    if any(isinstance(number, int) and number > _LARGEST for number in numbers) and name != "seed":
        raise ValueError(f"{name} is {value}: it must be at most {_LARGEST}")
    if rules["least"] is not None and value < rules["least"]:
        raise ValueError(f"{name} is {value}: it must be at least {rules['least']}")
    if rules["share"] and not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: it is a share, between 0 and 1")


def paper_stage1() -> TrainConfig:
    """The paper's first stage, for real weights and regular pairs: 1800 of the 3000 iterations.

    The paper gives 3000 iterations over both stages in a ratio of 6 to 4, and 1800 for its ablations.
    """
    return TrainConfig(
        recipe="paper_stage1",
        task="r2v-1.3B",
        sampling=SamplingConfig(cross_pairs=0.0),
        global_batch_size=128,
        steps=1800,
        activation_checkpointing="full",
        preview_clips=4,
    )


def paper_stage2() -> TrainConfig:
    """The paper's second stage, on cross pairs, from the weights of the first: the other 1200 iterations."""
    return dataclasses.replace(
        paper_stage1(), recipe="paper_stage2", sampling=SamplingConfig(cross_pairs=1.0), steps=1200
    )


def release() -> TrainConfig:
    """What the official release does where it differs from the paper: timestep grid, weights and alignment gate."""
    return dataclasses.replace(paper_stage1(), recipe="release", timesteps="release")


def tiny() -> TrainConfig:
    """The embedded model on the sprite world: the paper's losses with an optimiser for small models."""
    return TrainConfig(
        recipe="tiny",
        task="r2v-tiny",
        from_scratch=True,
        alignment=AlignmentConfig(depth=3, teacher="dinov3-tiny", weight=0.5),
        timesteps="logit_normal_shift4",
        batch_size=8,
        steps=12000,
        optimizer="muon",
        learning_rate=2e-3,
        betas=(0.9, 0.95),
        warmup_steps=100,
        schedule="linear",
        decay_share=0.5,
        ema_decay=0.998,
        save_every=500,
        preview_every=2000,
        validate_every=2000,
        log_every=20,
    )


RECIPES = {make.__name__: make for make in (paper_stage1, paper_stage2, release, tiny)}


def recipe(name: str) -> TrainConfig:
    """The recipe called `name`; ValueError that lists the known names otherwise."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()


def configure(recipe_name: str | None, overrides: dict[str, Any]) -> TrainConfig:
    """A recipe, or the usual one of the task (`tiny` for the default task), with fields replaced, or a ValueError."""
    usual = "tiny" if overrides.get("task", TrainConfig.task) == TrainConfig.task else "paper_stage1"
    return with_overrides(recipe(recipe_name or usual), overrides)


def with_overrides(config: TrainConfig, overrides: dict[str, Any]) -> TrainConfig:
    """`config` with fields replaced, nested ones by names like `alignment.depth`; ValueError for what cannot be."""
    plain: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for key, value in overrides.items():
        group, _, name = key.rpartition(".")
        if key not in setting_fields():
            raise ValueError(f"unknown setting {key!r}: choose one of {', '.join(sorted(setting_fields()))}")
        (nested[group] if group else plain)[name] = value
    if plain.get("dit_ckpt") is not None:
        plain.setdefault("from_scratch", False)  # naming weights means starting from them
    if plain.get("lora_rank"):
        plain.setdefault("from_scratch", False)  # so does adapting them
        plain.setdefault("ema_decay", 0.0)
    plain |= {group: dataclasses.replace(getattr(config, group), **nested[group]) for group in GROUPS}
    return dataclasses.replace(config, **plain)
