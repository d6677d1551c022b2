"""Which parameter goes to which optimizer, and the learning rate over a run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from refalign_ext.config import TrainConfig
from refalign_ext.distributed.parallelize import TrainedModules
from refalign_ext.projectors import ReferenceProjectors
from refalign_ext.training.muon import Muon
from refalign_ext.training.optimizers import build_optimizers, learning_rate_scale, set_learning_rates

CONFIG = TrainConfig(
    learning_rate=1e-3, muon_learning_rate=2e-2, betas=(0.8, 0.9), weight_decay=0.03, warmup_steps=0
)


def small_model() -> nn.Module:
    model = nn.Module()
    model.patch_embedding = nn.Conv3d(2, 4, 1)
    model.head = nn.Linear(4, 2)
    block = nn.Module()
    block.ffn = nn.Linear(4, 8)
    block.modulation = nn.Parameter(torch.zeros(1, 6, 4))
    block.norm = nn.LayerNorm(4)
    block.frozen = nn.Linear(4, 4).requires_grad_(False)
    model.blocks = nn.ModuleList([block])
    return model


def shapes(optimizer: torch.optim.Optimizer) -> list[list[tuple[int, ...]]]:
    return [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]


def test_adamw_takes_everything_with_the_configured_settings() -> None:
    model, projectors = small_model(), ReferenceProjectors(4, 6, 1)
    (optimizer,) = build_optimizers(TrainedModules(model, projectors), CONFIG)
    assert type(optimizer) is torch.optim.AdamW
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in trained}
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in projectors.parameters()}
    for group in optimizer.param_groups:
        assert (group["lr"], group["base_lr"], group["betas"]) == (1e-3, 1e-3, (0.8, 0.9))
        assert group["weight_decay"] == 0.03


def test_muon_takes_the_blocks_matrices() -> None:
    config = dataclasses.replace(CONFIG, optimizer="muon")
    adamw, muon = build_optimizers(TrainedModules(small_model(), ReferenceProjectors(4, 6, 1)), config)
    assert type(muon) is Muon
    assert shapes(muon) == [[(8, 4)]]
    assert muon.param_groups[0]["base_lr"] == 2e-2
    assert sorted(shapes(adamw)[0]) == sorted(
        [(4, 2, 1, 1, 1), (4,), (2, 4), (2,), (8,), (1, 6, 4), (4,), (4,)]
    )
    assert shapes(adamw)[1] == [(2, 4), (6, 2)]
    (without,) = build_optimizers(TrainedModules(nn.Linear(2, 2), None), config)
    assert type(without) is torch.optim.AdamW and len(without.param_groups) == 1


def test_learning_rate_over_a_run() -> None:
    config = dataclasses.replace(CONFIG, steps=10, warmup_steps=4, schedule="linear", decay_share=0.5)
    scales = [learning_rate_scale(step, config) for step in range(10)]
    assert scales == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert [learning_rate_scale(step, CONFIG) for step in (0, 5, 10**6)] == [1, 1, 1]
    assert learning_rate_scale(12, config) == 0  # a run that was made shorter


def test_cosine_falls_from_the_end_of_the_warm_up_to_the_end_of_the_run() -> None:
    config = dataclasses.replace(CONFIG, steps=8, warmup_steps=2, schedule="cosine")
    scales = [learning_rate_scale(step, config) for step in range(8)]
    assert scales == pytest.approx([0.5, 1, 1, 0.933012701892, 0.75, 0.5, 0.25, 0.066987298108])
    assert learning_rate_scale(8, config) == learning_rate_scale(100, config) == pytest.approx(0, abs=1e-15)
    at_once = dataclasses.replace(config, warmup_steps=0)
    assert [learning_rate_scale(step, at_once) for step in (0, 4)] == pytest.approx([1, 0.5])
    short = dataclasses.replace(config, steps=2)  # over before the warm-up is
    assert [learning_rate_scale(step, short) for step in range(3)] == pytest.approx([0.5, 1, 1])


def test_scaling_starts_from_the_full_rates() -> None:
    config = dataclasses.replace(CONFIG, optimizer="muon")
    optimizers = build_optimizers(TrainedModules(small_model(), ReferenceProjectors(4, 6, 1)), config)
    for scale in (0.5, 0.25):
        set_learning_rates(optimizers, scale)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    assert rates == pytest.approx([0.25e-3, 0.25e-3, 0.5e-2])
