"""Build a `Trainer` from a configuration: load the frozen parts, make or load the DiT, open the data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from refalign_ext.backbone import ReferenceBackbone, WanModel, WanVAE, build_dit, dit_arguments
from refalign_ext.checkpoint.reading import read_any_dit, read_teacher_input
from refalign_ext.config import TrainConfig
from refalign_ext.data.cache.reader import CachedText
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import parallelize
from refalign_ext.encoders import checkpoint_folder, task_config, teacher_folder, text_encoder
from refalign_ext.lora import TARGETS, add_lora
from refalign_ext.projectors import (
    ReferenceProjectors,
    TeacherInput,
    projectors_from_tensors,
    teacher_input_from_tensors,
)
from refalign_ext.teachers import Teacher, load_teacher
from refalign_ext.training.sources import (
    clip_sources,
    open_caches,
    require_clip_sets,
    sampling_of,
    sprite_sources,
    with_cached_variants,
)
from refalign_ext.training.trainer import EncodeText, Trainer

if TYPE_CHECKING:
    from easydict import EasyDict


def build_trainer(config: TrainConfig, parallel: Parallel) -> Trainer:
    """Everything a run needs, on this rank. Nothing is written: that begins with `Source.prepare`.

    Raises:
        ValueError: for missing or unfitting files and settings, named one by one.
    """
    task, folder, device = task_config(config), checkpoint_folder(config), parallel.device
    if config.data is None and config.task != "r2v-tiny":
        raise ValueError(f"--task {config.task} needs --data MANIFEST.jsonl (docs/data.md)")
    if config.recipe == "paper_stage2" and config.dit_ckpt is None:
        raise ValueError(
            "--recipe paper_stage2 goes on from the first stage: name its result with --dit_ckpt"
        )
    if config.lora_rank and config.from_scratch:
        raise ValueError("--lora_rank adapts weights that exist: leave --from_scratch out")
    require_clip_sets(config)
    config = with_cached_variants(config)
    sampling = sampling_of(config, task)
    caches = open_caches(config, sampling, parallel)
    teacher = None
    if config.needs_teacher:
        path = teacher_folder(config, task, folder)
        teacher = load_teacher(config.alignment.teacher, path, device=device)
    vae = WanVAE(vae_pth=folder / task.vae_checkpoint, device=device, config=task.vae)
    model, projectors = build_trained_modules(config, task, folder, teacher, parallel)
    if config.lora_rank:
        alpha = config.lora_alpha or float(config.lora_rank)
        add_lora(model, config.lora_rank, alpha, config.lora_targets or TARGETS, seed=config.seed)
    backbone = ReferenceBackbone(model.train())
    trained = parallelize(backbone, projectors, parallel, config)
    if config.teacher_input:
        assert parallel.is_alone, "the plan refuses several ranks"
        trained.teacher_input = _teacher_input(config, folder, model.dim, teacher).to(device)

    if config.data is None:
        source, validation = sprite_sources(config, task, folder, vae, teacher)
    else:
        source, validation = clip_sources(config, task, sampling, vae, teacher, caches, parallel)

    def load_text_encoder() -> EncodeText:
        return text_encoder(folder, task, torch.device("cpu") if config.t5_cpu else device, device)

    encode_text = CachedText(caches, device, load_text_encoder) if caches else load_text_encoder()
    return Trainer(config, backbone, trained, source, encode_text, parallel, validation)


def build_trained_modules(
    config: TrainConfig, task: EasyDict, folder: Path, teacher: Teacher | None, parallel: Parallel
) -> tuple[torch.nn.Module, ReferenceProjectors | None]:
    saved_projectors = {}
    if config.from_scratch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = WanModel(**dit_arguments(task))
    else:
        checkpoint = read_any_dit(Path(config.dit_ckpt or folder), with_teacher_input=config.teacher_input)
        saved_projectors = checkpoint.projectors
        # Several ranks leave the weights in the file: sharding reads each rank's part and makes float32 of it.
        dtype = None
        if parallel.is_alone:
            frozen_half = config.lora_rank and config.precision == "bf16"
            dtype = torch.bfloat16 if frozen_half else torch.float32
        model = build_dit(checkpoint, task, source=str(config.dit_ckpt or folder), device="cpu", dtype=dtype)
    depth = config.alignment.depth
    if not config.alignment.weight:
        teacher = None
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


def _teacher_input(config: TrainConfig, folder: Path, dim: int, teacher: Teacher) -> TeacherInput:
    """That of the checkpoint that the run starts from, or a new one."""
    source = Path(config.dit_ckpt or folder)
    saved = {} if config.from_scratch else read_teacher_input(source)
    if not saved:
        return TeacherInput(teacher.dim, dim)
    return teacher_input_from_tensors(saved, teacher_dim=teacher.dim, dim=dim, source=str(source))
