"""Recipes hold what the paper and the release say, and every value is checked."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from refalign_ext.backbone import WAN_CONFIGS
from refalign_ext.config import (
    ACTIVATION_CHECKPOINTING,
    OPTIMIZERS,
    PRECISIONS,
    RECIPES,
    SCHEDULES,
    TIMESTEPS,
    AlignmentConfig,
    TrainConfig,
    recipe,
    setting_fields,
    with_overrides,
)
from refalign_ext.distributed.parallelize import TrainedModules, recompute_activations
from refalign_ext.teachers import TEACHERS
from refalign_ext.timesteps import TIMESTEP_RECIPES
from refalign_ext.training.optimizers import build_optimizers, learning_rate_scale


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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_known(schedule: str) -> None:
    config = TrainConfig(schedule=schedule, steps=10, decay_share=0.5)
    last = learning_rate_scale(9, config)
    assert last == 1 if schedule == "constant" else 0 < last < 0.3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_known(optimizer: str) -> None:
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(2, 3)])})
    kinds = {
        type(one).__name__.lower()
        for one in build_optimizers(TrainedModules(model, None), TrainConfig(optimizer=optimizer))
    }
    assert kinds == {"adamw", optimizer}


def test_every_way_of_activation_checkpointing_is_known() -> None:
    class Model:
        asked: list[tuple] = []

        def enable_gradient_checkpointing(self, *given: object) -> None:
            self.asked.append(given)

    assert set(ACTIVATION_CHECKPOINTING) == {"none", "full", "selective"}
    model = Model()
    for mode in ACTIVATION_CHECKPOINTING:
        recompute_activations(model, mode)
    assert [len(given) for given in model.asked] == [0, 1]
    assert PRECISIONS == ("fp32", "bf16")


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
        (
            "timesteps",
            "uniform",
            "timesteps is 'uniform': choose one of paper, release, release_ungated, logit_normal",
        ),
        ("alignment.tap", "ffn", "alignment.tap is 'ffn': choose one of block, self_attn"),
        ("optimizer", "sgd", "choose one of adamw, muon"),
        ("schedule", "step", "choose one of constant, linear, cosine"),
        ("precision", "fp16", "choose one of fp32, bf16"),
        ("data_schedule", "turns", "choose one of mixed, stages"),
        ("sampling.cross_pairs", 1.5, "sampling.cross_pairs is 1.5: it is a share"),
        ("sampling.stride", 0, "sampling.stride is 0: it must be at least 1"),
        ("validation_share", 1.0, "validation_share is 1.0"),
        ("batch_size", 0, "batch_size is 0: it must be at least 1"),
        ("global_batch_size", -1, "global_batch_size is -1: it must be at least 0"),
        ("activation_checkpointing", "some", "is 'some': choose one of none, full, selective"),
        ("ulysses_size", -1, "ulysses_size is -1"),
        ("ring_size", -2, "ring_size is -2"),
        ("max_skipped_steps", 0, "max_skipped_steps is 0: it must be at least 1"),
        ("spike_factor", -1.0, "spike_factor is -1.0"),
        ("spike_factor", float("nan"), "spike_factor is nan"),
        ("validate_every", -1, "validate_every is -1"),
        ("validation_clips", 0, "validation_clips is 0"),
        ("timeout_minutes", 0.0, "timeout_minutes is 0.0"),
        ("timeout_minutes", float("inf"), "timeout_minutes is inf"),
        ("lora_rank", -1, "lora_rank is -1"),
        ("lora_alpha", -1.0, "lora_alpha is -1.0"),
        ("steps", 0, "steps is 0"),
        ("save_every", 0, "save_every is 0"),
        ("keep_last", 0, "keep_last is 0"),
        ("log_every", 0, "log_every is 0"),
        ("cache_clips", 0, "cache_clips is 0"),
        ("cache_views", 0, "cache_views is 0"),
        ("cache_free_clips", 0, "cache_free_clips is 0"),
        ("free_colors", 1.5, "free_colors is 1.5"),
        ("preview_clips", 0, "preview_clips is 0"),
        ("preview_every", -1, "preview_every is -1: it must be at least 0"),
        ("warmup_steps", -1, "warmup_steps is -1"),
        ("seed", -1, "seed is -1"),
        ("seed", 2**63, "below 2\\*\\*63"),
        ("learning_rate", -1.0, "learning_rate is -1.0"),
        ("learning_rate", float("nan"), "learning_rate is nan: give a finite number"),
        ("muon_learning_rate", float("inf"), "muon_learning_rate is inf"),
        ("weight_decay", -0.1, "weight_decay is -0.1"),
        ("clip_norm", -1.0, "clip_norm is -1.0"),
        ("betas", (0.9,), "betas is"),
        ("betas", (0.9, 1.0), "betas is"),
        ("betas", (0.9, float("nan")), "betas is .*finite"),
        ("drop_text", -0.1, "drop_text is -0.1: it is a share"),
        ("drop_both", 0.9, "exceed 1"),
        ("regular_pairs", 1.1, "regular_pairs is 1.1"),
        ("ema_decay", 1.0, "ema_decay is 1.0"),
        ("decay_share", 0.0, "decay_share is 0.0"),
        ("subject_counts", (1.0, 2.0), "subject_counts is"),
        ("subject_counts", (0.0, 0.0, 0.0), "subject_counts is"),
        ("subject_counts", (1.0, -1.0, 1.0), "subject_counts is"),
        ("alignment.depth", 0, "set alignment.weight to 0"),
        ("alignment.weight", -1.0, "alignment.weight is -1.0"),
        ("alignment.negative_weight", -1.0, "alignment.negative_weight is -1.0"),
        ("alignment.margin", float("nan"), "alignment.margin is nan"),
    ],
)
def test_bad_values_are_named(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_overrides(recipe("tiny"), {name: value})


@pytest.mark.parametrize(
    ("batch_size", "global_batch_size", "data_size", "passes"),
    [
        (1, 0, 1, 1),
        (3, 0, 8, 1),
        (1, 128, 1, 128),
        (2, 128, 8, 8),
        (4, 128, 32, 1),
        (5, 35, 7, 1),
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
        (8, 128, 5, "120 or 160"),
        (2, 5, 1, "4 or 6"),
        (4, 2, 2, "8"),
        (16, 128, 16, "256"),
    ],
)
def test_a_global_batch_that_does_not_divide_names_the_nearest(
    batch_size: int, global_batch_size: int, data_size: int, near: str
) -> None:
    config = TrainConfig(batch_size=batch_size, global_batch_size=global_batch_size)
    with pytest.raises(ValueError) as caught:
        config.accumulation(data_size)
    line = str(caught.value)
    assert line.startswith(f"global_batch_size is {global_batch_size}: {data_size} data-parallel groups run ")
    assert f"run {batch_size * data_size} samples at once" in line
    assert line.endswith(f"give a multiple of it, such as {near}") and "\n" not in line
    for size in near.split(" or "):
        other = dataclasses.replace(config, global_batch_size=int(size))
        assert other.accumulation(data_size) * batch_size * data_size == int(size)


def test_without_alignment_the_depth_does_not_matter() -> None:
    assert (
        with_overrides(recipe("tiny"), {"alignment.weight": 0.0, "alignment.depth": 0}).alignment.depth == 0
    )
