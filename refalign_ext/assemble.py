"""Build a `Trainer` from a configuration: load the frozen parts, make or load the DiT, open the data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refalign_ext.backbone import (
    WAN_CONFIGS,
    ReferenceBackbone,
    T5EncoderModel,
    WanModel,
    WanVAE,
    dit_arguments,
    file_sha256,
    load_dit,
    read_dit_checkpoint,
    read_state_dict,
    require_files,
    required_files,
)
from refalign_ext.checkpoint import PROJECTORS_FILE
from refalign_ext.config import TrainConfig
from refalign_ext.data.batch import Source
from refalign_ext.data.manifest import ManifestSource, read_manifest
from refalign_ext.projectors import ReferenceProjectors, projectors_from_tensors
from refalign_ext.sprites.dataset import MixedSprites, SpriteSettings, SpriteSource
from refalign_ext.teachers import Teacher, load_teacher
from refalign_ext.trainer import Trainer

if TYPE_CHECKING:
    from easydict import EasyDict

# Shares of cached sprite clips with one, two and three subjects; which ones a step draws is a setting.
CACHED_COUNTS = (0.7, 0.25, 0.05)
EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "r2v-tiny"


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


def assemble(config: TrainConfig, device: torch.device) -> Trainer:
    """Everything a run needs, on `device`. Nothing is written: that begins with `Source.prepare`.

    Raises:
        ValueError: for missing or unfitting files and settings, named one by one.
    """
    task, folder = task_config(config), checkpoint_folder(config)
    if config.data is None and config.task != "r2v-tiny":
        raise ValueError(f"--task {config.task} needs --data MANIFEST.jsonl (docs/training.md shows a line)")
    rows = None if config.data is None else read_manifest(Path(config.data))
    teacher = None
    if config.alignment.weight:
        path = _teacher_folder(config, task, folder)
        teacher = load_teacher(config.alignment.teacher, path, device=device)
    vae = WanVAE(vae_pth=folder / task.vae_checkpoint, device=device, config=task.vae)
    model, projectors = _trained_parts(config, task, folder, teacher, device)
    model.train()
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.compile:
        _compile_blocks(model)
    source: Source
    if rows is None:
        source = _sprites(config, task, folder, vae, teacher)
    else:
        features = _on_grid(teacher, task)
        source = ManifestSource(rows, task.size, task.frame_num, vae.encode, features, config.seed)
    encode_text = text_encoder(folder, task, device)
    return Trainer(config, ReferenceBackbone(model), projectors, source, encode_text, device)


def text_encoder(
    folder: Path, task: EasyDict, device: torch.device
) -> Callable[[Sequence[str]], list[Tensor]]:
    """Prompts to features, remembering the prompts it has seen: captions repeat, and the encoder is frozen."""
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

    return lambda prompts: [encode_one(prompt).to(device) for prompt in prompts]


def _trained_parts(
    config: TrainConfig, task: EasyDict, folder: Path, teacher: Teacher | None, device: torch.device
) -> tuple[torch.nn.Module, ReferenceProjectors | None]:
    saved_projectors = {}
    if config.from_scratch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = WanModel(**dit_arguments(task))
    else:
        path = Path(config.dit_ckpt) if config.dit_ckpt else folder
        model = load_dit(path, task, device="cpu", dtype=torch.float32)
        saved_projectors = _saved_projectors(path)
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
    return model.to(device), None if projectors is None else projectors.to(device, torch.float32)


def _saved_projectors(path: Path) -> dict[str, Tensor]:
    """Projectors inside a release's file, or beside the DiT in a training checkpoint; empty if there are none."""
    beside = path / PROJECTORS_FILE
    return read_state_dict(beside) if beside.is_file() else read_dit_checkpoint(path).projectors


def _compile_blocks(model: torch.nn.Module) -> None:
    # Every block and every number of references is a shape of its own; the default limit of eight would fall back.
    settings = torch._dynamo.config
    is_renamed = hasattr(settings, "recompile_limit")  # since torch 2.7
    setattr(settings, "recompile_limit" if is_renamed else "cache_size_limit", 8 * len(model.blocks))
    for block in model.blocks:
        block.compile(dynamic=False)


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
) -> Source:
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
    palette = SpriteSource(settings, encode, _on_grid(teacher, task), cache, fingerprint, shares)
    if not config.free_colors:
        return palette
    settings = replace(settings, clips=config.cache_free_clips, views=2, free_colors=True)
    free = SpriteSource(settings, encode, _on_grid(teacher, task), cache, fingerprint, shares)
    return MixedSprites(palette, free, config.free_colors)
