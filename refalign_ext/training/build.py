"""Build a `Trainer` from a configuration: open the data, make or load the trained modules, attach what runs beside them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from refalign_ext.backbone import ReferenceBackbone, WanModel, build_dit, dit_arguments
from refalign_ext.checkpoint.reading import read_any_dit
from refalign_ext.config import TrainConfig
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import parallelize
from refalign_ext.encoders import Encoders
from refalign_ext.lora import TARGETS, add_lora
from refalign_ext.projectors import ReferenceProjectors, projectors_from_tensors
from refalign_ext.request import split_loras
from refalign_ext.training.data_source import DataSource
from refalign_ext.training.extra_module import ExtraModule, wanted_modules
from refalign_ext.training.trainer import Trainer, TrainerHooks

if TYPE_CHECKING:
    from easydict import EasyDict


def build_trainer(
    config: TrainConfig,
    parallel: Parallel,
    source: DataSource,
    encoders: Encoders,
    *,
    extra_modules: Sequence[ExtraModule] = (),
    stop_requested: Callable[[], bool] = lambda: False,
) -> Trainer:
    """The trainer of a run, on this rank; ValueError for files or settings that are missing or do not fit.

    Nothing is written: that begins with `Source.prepare`.

    Args:
        extra_modules: those that exist; the configuration says which of them are used.
    """
    if config.recipe == "paper_stage2" and config.dit_ckpt is None:
        raise ValueError(
            "--recipe paper_stage2 goes on from the first stage: name its result with --dit_ckpt"
        )
    if (config.lora_rank or config.lora) and config.from_scratch:
        flag = "lora_rank" if config.lora_rank else "lora"
        raise ValueError(f"--{flag} adapts weights that exist: leave --from_scratch out")
    config = source.complete(config)
    data = source.open(config, encoders, parallel)
    wanted = wanted_modules(config, extra_modules, parallel.sizes.world)
    teacher_dim = encoders.teacher.dim if encoders.teacher is not None and config.alignment.weight else None
    model, projectors = build_trained_modules(
        config, encoders.task, encoders.folder, teacher_dim, parallel, extra=[extra.name for extra in wanted]
    )
    if config.lora_rank:
        alpha = config.lora_alpha or float(config.lora_rank)
        add_lora(model, config.lora_rank, alpha, config.lora_targets or TARGETS, seed=config.seed)
    backbone = ReferenceBackbone(model.train())
    trained = parallelize(backbone, projectors, parallel, config)
    hooks = TrainerHooks(stop_requested)
    for extra in wanted:
        attached = extra.attach(config, model, encoders)
        trained.add_module(extra.name, attached.module)
        hooks = TrainerHooks(stop_requested, attached.around_forward)
    return Trainer(
        config, backbone, trained, data.training, data.encode_text, parallel, data.validation, hooks
    )


def build_trained_modules(
    config: TrainConfig,
    task: EasyDict,
    folder: Path,
    teacher_dim: int | None,
    parallel: Parallel,
    *,
    extra: Collection[str] = (),
) -> tuple[torch.nn.Module, ReferenceProjectors | None]:
    """The DiT and its projectors, new or from the checkpoint that the run starts from.

    Args:
        folder: of the checkpoint, where `dit_ckpt` names no other.
        teacher_dim: width of the features to align to; None: no projectors.
        extra: extra modules that the run uses, without which their checkpoints would be other models.
    """
    saved_projectors = {}
    if config.from_scratch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = WanModel(**dit_arguments(task))
    else:
        source = Path(config.dit_ckpt or folder)
        checkpoint = read_any_dit(source, extra=extra, loras=split_loras(config.lora))
        saved_projectors = checkpoint.projectors
        # Several ranks leave the weights in the file: sharding reads each rank's part and makes float32 of it.
        dtype = None
        if parallel.is_alone:
            frozen_half = config.lora_rank and config.precision == "bf16"
            dtype = torch.bfloat16 if frozen_half else torch.float32
        model = build_dit(checkpoint, task, source=str(source), device="cpu", dtype=dtype)
    depth, projectors = config.alignment.depth, None
    if teacher_dim is not None and depth > len(model.blocks):
        raise ValueError(f"--alignment.depth {depth}: {config.task} has {len(model.blocks)} blocks")
    if teacher_dim is not None and saved_projectors and not config.alignment.new_projectors:
        projectors = projectors_from_tensors(
            saved_projectors, student_dim=model.dim, teacher_dim=teacher_dim, depth=depth, source="--dit_ckpt"
        )
    elif teacher_dim is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 1)
            projectors = ReferenceProjectors(model.dim, teacher_dim, depth)
    if parallel.is_alone:
        model.to(parallel.device)
    return model, None if projectors is None else projectors.to(parallel.device, torch.float32)
