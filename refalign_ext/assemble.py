"""Build a `Trainer` from a configuration: load the frozen parts, make or load the DiT, open the data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refalign_ext.backbone import (
    WAN_CONFIGS,
    ReferenceBackbone,
    T5EncoderModel,
    WanModel,
    WanVAE,
    build_dit,
    dit_arguments,
    file_sha256,
    require_files,
    required_files,
)
from refalign_ext.config import TrainConfig
from refalign_ext.data.batch import Source
from refalign_ext.data.manifest import ManifestSource, Row, read_manifest
from refalign_ext.distributed.adapted import EMBEDDED
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import parallelize
from refalign_ext.distributed.reading import read_any_dit
from refalign_ext.lora import TARGETS, add_lora
from refalign_ext.projectors import ReferenceProjectors, projectors_from_tensors
from refalign_ext.sprites.dataset import MixedSprites, SpriteSettings, SpriteSource
from refalign_ext.teachers import Teacher, load_teacher
from refalign_ext.trainer import Trainer

if TYPE_CHECKING:
    from easydict import EasyDict

# Shares of cached sprite clips with one, two and three subjects; which ones a step draws is a setting.
CACHED_COUNTS = (0.7, 0.25, 0.05)


def task_config(config: TrainConfig) -> EasyDict:
    """The task's entry of WAN_CONFIGS.

    Raises:
        ValueError: for a task that is not reference-to-video.
    """
    known = [name for name in WAN_CONFIGS if name.startswith("r2v-")]
    if config.task not in known:
        raise ValueError(
            f"--task {config.task}: training is for reference-to-video: choose one of {', '.join(known)}"
        )
    return WAN_CONFIGS[config.task]


def checkpoint_folder(config: TrainConfig) -> Path:
    """Where the frozen parts lie.

    Raises:
        ValueError: if files are missing (all are listed) or no folder is given.
    """
    if config.ckpt_dir is None and config.task != "r2v-tiny":
        raise ValueError(
            f"--task {config.task} needs --ckpt_dir FOLDER with the Wan2.1 checkpoint (docs/real_weights.md)"
        )
    folder = EMBEDDED if config.ckpt_dir is None else Path(config.ckpt_dir)
    needs_dit = not config.from_scratch and config.dit_ckpt is None
    require_files(folder, required_files(folder, task_config(config), dit=needs_dit))
    return folder


def assemble(config: TrainConfig, parallel: Parallel) -> Trainer:
    """Everything a run needs, on this rank. Nothing is written: that begins with `Source.prepare`.

    Raises:
        ValueError: for missing or unfitting files and settings, named one by one.
    """
    task, folder, device = task_config(config), checkpoint_folder(config), parallel.device
    if config.data is None and config.task != "r2v-tiny":
        raise ValueError(f"--task {config.task} needs --data MANIFEST.jsonl (docs/training.md shows a line)")
    if config.recipe == "paper_stage2" and config.dit_ckpt is None:
        raise ValueError(
            "--recipe paper_stage2 goes on from the first stage: name its result with --dit_ckpt"
        )
    if config.lora_rank and config.from_scratch:
        raise ValueError("--lora_rank adapts weights that exist: leave --from_scratch out")
    rows = None if config.data is None else read_manifest(Path(config.data))
    validation_rows = None if config.validation_data is None else read_manifest(Path(config.validation_data))
    teacher = None
    if config.alignment.weight:
        path = _teacher_folder(config, task, folder)
        teacher = load_teacher(config.alignment.teacher, path, device=device)
    vae = WanVAE(vae_pth=folder / task.vae_checkpoint, device=device, config=task.vae)
    model, projectors = _trained_parts(config, task, folder, teacher, parallel)
    if config.lora_rank:
        alpha = config.lora_alpha or float(config.lora_rank)
        add_lora(model, config.lora_rank, alpha, config.lora_targets or TARGETS, seed=config.seed)
    backbone = ReferenceBackbone(model.train())
    trained = parallelize(backbone, projectors, parallel, config)

    def from_manifest(rows: list[Row]) -> Source:
        features = _on_grid(teacher, task)
        return ManifestSource(rows, task.size, task.frame_num, vae.encode, features, config.seed)

    source, validation = None, None
    if rows is None:
        source, validation = _sprites(config, task, folder, vae, teacher)
    else:
        source = from_manifest(rows)
        validation = None if validation_rows is None else from_manifest(validation_rows)
    encode_text = text_encoder(folder, task, torch.device("cpu") if config.t5_cpu else device, device)
    return Trainer(config, backbone, trained, source, encode_text, parallel, validation)


def text_encoder(
    folder: Path, task: EasyDict, device: torch.device, target: torch.device
) -> Callable[[Sequence[str]], list[Tensor]]:
    """Prompts to features on `target`, remembering the prompts it has seen: captions repeat, and the encoder is frozen.

    Args:
        device: where the encoder works.
    """
    encoder = T5EncoderModel(
        text_len=task.text_len,
        dtype=task.t5_dtype,
        device=device,
        checkpoint_path=folder / task.t5_checkpoint,
        tokenizer_path=folder / task.t5_tokenizer,
        config=task.t5,
    )

    @lru_cache(maxsize=20000)
    def encode_one(prompt: str) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            return encoder([prompt], device)[0].float().cpu()

    return lambda prompts: [encode_one(prompt).to(target) for prompt in prompts]


def _trained_parts(
    config: TrainConfig, task: EasyDict, folder: Path, teacher: Teacher | None, parallel: Parallel
) -> tuple[torch.nn.Module, ReferenceProjectors | None]:
    saved_projectors = {}
    if config.from_scratch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = WanModel(**dit_arguments(task))
    else:
        checkpoint = read_any_dit(Path(config.dit_ckpt) if config.dit_ckpt else folder)
        saved_projectors = checkpoint.projectors
        # Several ranks leave the weights in the file: sharding reads each rank's part and makes float32 of it.
        dtype = None
        if parallel.is_alone:
            frozen_half = config.lora_rank and config.precision == "bf16"
            dtype = torch.bfloat16 if frozen_half else torch.float32
        model = build_dit(checkpoint, task, source=str(config.dit_ckpt or folder), device="cpu", dtype=dtype)
    depth = config.alignment.depth
    if teacher is not None and depth > len(model.blocks):
        raise ValueError(f"--alignment.depth {depth}: {config.task} has {len(model.blocks)} blocks")
    projectors = None
    if teacher is not None and saved_projectors and not config.alignment.new_projectors:
        projectors = projectors_from_tensors(
            saved_projectors, student_dim=model.dim, teacher_dim=teacher.dim, depth=depth, source="--dit_ckpt"
        )
    elif teacher is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 1)
            projectors = ReferenceProjectors(model.dim, teacher.dim, depth)
    if parallel.is_alone:
        model.to(parallel.device)
    return model, None if projectors is None else projectors.to(parallel.device, torch.float32)


def _teacher_folder(config: TrainConfig, task: EasyDict, folder: Path) -> Path | None:
    """The teacher's local folder; None: it comes from the hub."""
    alignment = config.alignment
    if alignment.teacher_path is not None:
        return Path(alignment.teacher_path)
    is_own = alignment.teacher == task.get("teacher") and "teacher_folder" in task
    return folder / task.teacher_folder if is_own else None


def _on_grid(teacher: Teacher | None, task: EasyDict) -> Callable[[Tensor], Tensor] | None:
    if teacher is None:
        return None
    stride = (task.vae_stride[1] * task.patch_size[1], task.vae_stride[2] * task.patch_size[2])
    return lambda images: teacher(images, (images.shape[-2] // stride[0], images.shape[-1] // stride[1]))


def _sprites(
    config: TrainConfig, task: EasyDict, folder: Path, vae: WanVAE, teacher: Teacher | None
) -> tuple[Source, Source | None]:
    """Training clips, and validation clips of subjects that training never shows."""
    from refalign_ext.sprites.vae_onepass import encode_latents, lay_channels_last

    lay_channels_last(vae.model)

    def encode(videos: Tensor) -> Tensor:
        return encode_latents(vae, videos).cpu()

    settings = SpriteSettings(
        clips=config.cache_clips,
        views=config.cache_views,
        frames=task.frame_num,
        height=task.size[1],
        width=task.size[0],
        regular_pairs=config.regular_pairs,
        seed=config.seed,
        counts=CACHED_COUNTS,
    )
    parts = [file_sha256(folder / task.vae_checkpoint)]
    if teacher is not None:
        path = _teacher_folder(config, task, folder)
        names = [] if path is None else sorted(path.glob("*.safetensors"))
        parts += [file_sha256(file) for file in names] or [config.alignment.teacher]
    fingerprint = hashlib.sha256("".join(parts).encode()).hexdigest()
    cache, shares = Path(config.out) / "cache", tuple(config.subject_counts)
    features = _on_grid(teacher, task)

    def sprites(split: str, **changes: Any) -> SpriteSource:
        return SpriteSource(
            replace(settings, **changes), encode, features, cache, fingerprint, shares, split=split
        )

    source: Source = sprites("train")
    if config.free_colors:
        free = sprites("train", clips=config.cache_free_clips, views=2, free_colors=True)
        source = MixedSprites(source, free, config.free_colors)
    validation = None
    if config.validate_every:
        validation = sprites("held_out", clips=config.validation_clips, views=2)
    return source, validation
