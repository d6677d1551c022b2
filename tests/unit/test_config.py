"""Recipes hold what the paper and the release say, and every value is checked."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import pytest

from refalign_ext import config as configuration
from refalign_ext.backbone import TAPS as BACKBONE_TAPS
from refalign_ext.backbone import WAN_CONFIGS
from refalign_ext.config import RECIPES, TAPS, TIMESTEPS, AlignmentConfig, TrainConfig, recipe, with_overrides
from refalign_ext.teachers import TEACHERS
from refalign_ext.timesteps import TIMESTEP_RECIPES


def test_the_papers_numbers() -> None:
    paper = recipe("paper")
    assert (paper.optimizer, paper.learning_rate, paper.betas, paper.weight_decay) == (
        "adamw",
        5e-5,
        (0.9, 0.999),
        0.01,
    )
    assert (paper.batch_size * paper.accumulation, paper.steps) == (128, 3000)
    assert (paper.drop_text, paper.drop_references, paper.drop_both) == (0.1, 0.1, 0.1)
    assert paper.alignment == AlignmentConfig(
        weight=1.0, negative_weight=1.0, margin=1.0, depth=9, tap="block", teacher="dinov3-l"
    )
    assert not paper.from_scratch


def test_the_release_differs_in_timesteps_and_weighting_only() -> None:
    paper, release = recipe("paper"), recipe("release")
    differing = {
        field.name
        for field in dataclasses.fields(TrainConfig)
        if getattr(paper, field.name) != getattr(release, field.name)
    }
    assert differing == {"recipe", "timesteps"}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_name_things_that_exist(name: str) -> None:
    config = recipe(name)
    assert config.recipe == name
    assert config.task in WAN_CONFIGS
    assert config.alignment.teacher in TEACHERS
    assert config.alignment.depth <= WAN_CONFIGS[config.task].num_layers
    assert json.loads(json.dumps(config.to_dict()))["alignment"]["depth"] == config.alignment.depth


def test_choices_are_those_of_the_parts() -> None:
    assert set(TIMESTEPS) == set(TIMESTEP_RECIPES)
    assert TAPS == BACKBONE_TAPS


def test_every_field_is_documented() -> None:
    tree = ast.parse(Path(configuration.__file__).read_text(encoding="utf-8"))
    for owner in ("TrainConfig", "AlignmentConfig"):
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner)
        for node, following in zip(body, body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and node.target.id != "alignment":
                assert isinstance(following, ast.Expr), f"{owner}.{node.target.id} has no description"


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


@pytest.mark.parametrize("name", ["stepz", "alignment.dept", "alignment", "alignment.alignment"])
def test_unknown_settings_are_named(name: str) -> None:
    if name == "alignment":
        return
    with pytest.raises(ValueError, match="unknown setting .*choose one of"):
        with_overrides(recipe("tiny"), {name: 1})


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown recipe 'papr': choose one of paper, release, tiny"):
        recipe("papr")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "timesteps",
            "uniform",
            "timesteps is 'uniform': choose one of paper, release, logit_normal, logit_normal_shift2",
        ),
        ("alignment.tap", "ffn", "alignment.tap is 'ffn': choose one of block, self_attn"),
        ("optimizer", "sgd", "choose one of adamw, muon"),
        ("schedule", "cosine", "choose one of constant, linear"),
        ("precision", "fp16", "choose one of fp32, bf16"),
        ("batch_size", 0, "batch_size is 0: it must be at least 1"),
        ("accumulation", -1, "accumulation is -1"),
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


def test_without_alignment_the_depth_does_not_matter() -> None:
    assert (
        with_overrides(recipe("tiny"), {"alignment.weight": 0.0, "alignment.depth": 0}).alignment.depth == 0
    )
