"""Optimizers and their learning-rate schedule, built from a configuration."""

from __future__ import annotations

import math

import torch

from refalign_ext.config import TrainConfig
from refalign_ext.distributed.parallelize import TrainedModules
from refalign_ext.training.muon import Muon


def build_optimizers(trained: TrainedModules, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon over the matrices of the DiT's blocks and AdamW over the rest.

    Every group keeps its full learning rate as `base_lr`; `set_learning_rates` scales from it.
    """
    matrices, others = [], []
    for name, parameter in trained.dit.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = ".blocks." in f".{name}" and parameter.ndim == 2
        (matrices if config.optimizer == "muon" and is_matrix else others).append(parameter)
    groups = [{"params": others}]
    beside = [p for name, part in trained.named_children() if name != "dit" for p in part.parameters()]
    if beside:
        groups.append({"params": beside})
    decay = config.weight_decay
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, weight_decay=decay)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        optimizers.append(Muon(matrices, lr=config.muon_learning_rate, weight_decay=decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def learning_rate_scale(step: int, config: TrainConfig) -> float:
    """Factor on the base learning rates at optimizer step `step` (from 0).

    A linear warm-up over `warmup_steps`, then by `config.schedule`: `constant`; `linear`, to zero over the last
    `decay_share` of the run; or `cosine`, half a period from one at the end of the warm-up to zero at the end of the run,
    as in `get_cosine_schedule_with_warmup` of transformers. The last step's factor is the one before zero.
    """
    scale = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "linear":
        scale *= min(1.0, max(0.0, (1 - step / config.steps) / config.decay_share))
    elif config.schedule == "cosine" and step >= config.warmup_steps:
        share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        scale *= 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return scale


def set_learning_rates(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    """Set every group to `scale` times its base learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
