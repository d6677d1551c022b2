"""Recipes hold what the paper and the release say, and every value is checked."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from refalign_ext.backbone import WAN_CONFIGS
from refalign_ext.config import (
    OPTIMIZERS,
    RECIPES,
    TIMESTEPS,
    AlignmentConfig,
    TrainConfig,
    recipe,
    setting_fields,
    with_overrides,
)
from refalign_ext.distributed.parallelize import TrainedModules
from refalign_ext.teachers import TEACHERS
from refalign_ext.timesteps import TIMESTEP_RECIPES
from refalign_ext.training.optimizers import build_optimizers


def differing_fields(one: TrainConfig, other: TrainConfig) -> set[str]:
    return {
        field.name
        for field in dataclasses.fields(TrainConfig)
        if getattr(one, field.name) != getattr(other, field.name)
    }


def test_the_papers_numbers() -> None:
    first, second = recipe("paper_stage1"), recipe("paper_stage2")
    assert (first.optimizer, first.learning_rate, first.betas, first.weight_decay) == (
        "adamw",
        5e-5,
        (0.9, 0.999),
        0.01,
    )
    assert first.global_batch_size == 128
    assert (first.steps, second.steps) == (1800, 1200)  # 3000 in a ratio of 6 to 4
    assert (first.drop_text, first.drop_references, first.drop_both) == (0.1, 0.1, 0.1)
    assert first.alignment == AlignmentConfig(
        weight=1.0, negative_weight=1.0, margin=1.0, depth=9, tap="block", teacher="dinov3-l"
    )
    assert first.timesteps == "paper" and first.clip_norm == 1.0 and first.ema_decay == 0
    assert not first.from_scratch
    assert differing_fields(first, second) == {"recipe", "steps", "sampling"}
    assert (first.sampling.cross_pairs, second.sampling.cross_pairs) == (0, 1)


def test_the_release_differs_in_timesteps_and_weighting_only() -> None:
    assert differing_fields(recipe("paper_stage1"), recipe("release")) == {"recipe", "timesteps"}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_name_things_that_exist(name: str) -> None:
    config = recipe(name)
    assert config.recipe == name
    assert config.task in WAN_CONFIGS
    assert config.alignment.teacher in TEACHERS
    assert config.alignment.depth <= WAN_CONFIGS[config.task].num_layers
    assert json.loads(json.dumps(config.to_dict()))["alignment"]["depth"] == config.alignment.depth


def test_timesteps_are_those_of_the_part() -> None:
    assert set(TIMESTEPS) == set(TIMESTEP_RECIPES)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_known(optimizer: str) -> None:
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(2, 3)])})
    kinds = {
        type(one).__name__.lower()
        for one in build_optimizers(TrainedModules(model, None), TrainConfig(optimizer=optimizer))
    }
    assert kinds == {"adamw", optimizer}


def test_every_field_is_documented() -> None:
    assert all(field.metadata["text"] for field in setting_fields().values())


def test_overrides_replace_nested_and_plain_fields() -> None:
    config = with_overrides(recipe("tiny"), {"steps": 7, "alignment.depth": 3, "alignment.weight": 0.0})
    assert (config.steps, config.alignment.depth, config.alignment.weight) == (7, 3, 0.0)
    assert config.alignment.teacher == recipe("tiny").alignment.teacher
    assert config.optimizer == "muon"


def test_naming_weights_means_starting_from_them() -> None:
    tiny = recipe("tiny")
    assert tiny.from_scratch
    assert not with_overrides(tiny, {"dit_ckpt": "weights"}).from_scratch
    with pytest.raises(ValueError, match="from_scratch and dit_ckpt exclude each other"):
        with_overrides(tiny, {"dit_ckpt": "weights", "from_scratch": True})


def test_adapting_weights_means_starting_from_them_without_an_average() -> None:
    adapted = with_overrides(recipe("tiny"), {"lora_rank": 4})
    assert (adapted.lora_rank, adapted.from_scratch, adapted.ema_decay) == (4, False, 0.0)
    with pytest.raises(ValueError, match="lora_rank and ema_decay exclude each other"):
        with_overrides(recipe("tiny"), {"lora_rank": 4, "ema_decay": 0.9})


@pytest.mark.parametrize("name", ["stepz", "alignment.dept", "alignment", "alignment.alignment"])
def test_unknown_settings_are_named(name: str) -> None:
    with pytest.raises(ValueError, match="unknown setting .*choose one of"):
        with_overrides(recipe("tiny"), {name: 1})


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="unknown recipe 'papr': choose one of paper_stage1, paper_stage2, release, tiny"
    ):
        recipe("papr")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("timesteps", "uniform", "timesteps is 'uniform': choose one of paper, release, release_ungated"),
        ("alignment.tap", "ffn", "alignment.tap is 'ffn': choose one of block, self_attn"),
        ("activation_checkpointing", "some", "is 'some': choose one of none, full, selective"),
        ("sampling.cross_pairs", 1.5, "sampling.cross_pairs is 1.5"),
        ("drop_text", -0.1, "drop_text is -0.1"),
        ("batch_size", 0, "batch_size is 0: it must be at least 1"),
        ("ulysses_size", -1, "ulysses_size is -1"),
        ("alignment.weight", -1.0, "alignment.weight is -1.0"),
        ("spike_factor", float("nan"), "spike_factor is nan: give a finite number"),
        ("betas", (0.9, float("nan")), "betas is .*finite"),
        ("muon_learning_rate", float("inf"), "muon_learning_rate is inf"),
        ("seed", 2**63, "below 2\\*\\*63"),
        ("betas", (0.9,), "betas is"),
        ("betas", (0.9, 1.0), "betas is"),
        ("ema_decay", 1.0, "ema_decay is 1.0"),
        ("decay_share", 0.0, "decay_share is 0.0"),
        ("timeout_minutes", 0.0, "timeout_minutes is 0.0"),
        ("validation_share", 1.0, "validation_share is 1.0"),
        ("subject_counts", (1.0, 2.0), "subject_counts is"),
        ("subject_counts", (0.0, 0.0, 0.0), "subject_counts is"),
        ("subject_counts", (1.0, -1.0, 1.0), "subject_counts is"),
        ("drop_both", 0.9, "exceed 1"),
        ("alignment.depth", 0, "set alignment.weight to 0"),
    ],
)
def test_bad_values_are_named(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_overrides(recipe("tiny"), {name: value})


@pytest.mark.parametrize(
    ("batch_size", "global_batch_size", "data_size", "passes"),
    [
        (3, 0, 8, 1),
        (2, 128, 8, 8),
        (4, 128, 32, 1),
        (1, 6, 2, 3),
    ],
)
def test_accumulation_makes_the_global_batch(
    batch_size: int, global_batch_size: int, data_size: int, passes: int
) -> None:
    config = TrainConfig(batch_size=batch_size, global_batch_size=global_batch_size)
    assert config.accumulation(data_size) == passes
    assert passes * batch_size * data_size == (global_batch_size or batch_size * data_size)


@pytest.mark.parametrize(
    ("batch_size", "global_batch_size", "data_size", "near"),
    [
        (1, 128, 3, "126 or 129"),
        (2, 5, 1, "4 or 6"),
        (4, 2, 2, "8"),
    ],
)
def test_a_global_batch_that_does_not_divide_names_the_nearest(
    batch_size: int, global_batch_size: int, data_size: int, near: str
) -> None:
    config = TrainConfig(batch_size=batch_size, global_batch_size=global_batch_size)
    with pytest.raises(ValueError, match=f"global_batch_size is {global_batch_size}: .*such as {near}$"):
        config.accumulation(data_size)
    for size in near.split(" or "):
        other = dataclasses.replace(config, global_batch_size=int(size))
        assert other.accumulation(data_size) * batch_size * data_size == int(size)


def test_without_alignment_the_depth_does_not_matter() -> None:
    assert (
        with_overrides(recipe("tiny"), {"alignment.weight": 0.0, "alignment.depth": 0}).alignment.depth == 0
    )
