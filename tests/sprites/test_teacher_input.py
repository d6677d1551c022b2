"""Arm D of the paper's table 2: the teacher's features as a second input of the DiT."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from easydict import EasyDict
from safetensors.torch import save_file
from torch import Tensor, nn

from refalign_ext.backbone import WAN_CONFIGS
from refalign_ext.checkpoint.export import export_checkpoint
from refalign_ext.checkpoint.reading import read_any_dit, read_extra_module
from refalign_ext.config import TrainConfig, recipe, with_overrides
from refalign_ext.data.batch import EncodedSample
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import recompute_activations
from refalign_ext.planning.training_plan import make_training_plan
from refalign_ext.sprites.ablations.teacher_input import (
    TEACHER_INPUT,
    AddedTokens,
    TeacherInput,
    attach_teacher_input,
    load_teacher_input,
)
from refalign_ext.training.build import build_trained_modules
from refalign_ext.training.extra_module import wanted_modules
from refalign_ext.training.previews import generate_latents
from refalign_ext.training.randomness import SampleRandomness, sample_randomness
from refalign_ext.training.trainer import Trainer, TrainerHooks
from tests.helpers import tiny_training as tiny
from tests.helpers.checkpoints import read_dit
from tests.helpers.tiny_training import BASE, TEACHER_DIM, TEXT_DIM, Source, change

CPU = torch.device("cpu")
ARM = change(BASE, weight=0.0, teacher_input=True)
DIM = 24


def build(config: TrainConfig, scale: float = 0.0) -> Trainer:
    """A tiny trainer; the new weights are drawn from a normal distribution of this deviation, 0 leaves them."""
    plain = tiny.build(config, Source())
    if not config.teacher_input:
        return plain
    module = TeacherInput(TEACHER_DIM, DIM)
    if scale:
        nn.init.normal_(module.projection.weight, std=scale, generator=torch.Generator().manual_seed(3))
    attached = attach_teacher_input(module, plain.backbone.model, CPU)
    plain.trained.add_module("teacher_input", attached.module)
    return Trainer(
        config,
        plain.backbone,
        plain.trained,
        plain.source,
        plain.encode_text,
        plain.parallel,
        plain.validation,
        TrainerHooks(around_forward=attached.around_forward),
    )


def batch(trainer: Trainer, keep: tuple[bool, ...]) -> tuple[list[EncodedSample], list[SampleRandomness]]:
    samples = trainer.source.samples(0, range(len(keep)))
    draws = [sample_randomness(sample, index, trainer.config) for index, sample in enumerate(samples)]
    return samples, [
        dataclasses.replace(d, keep_references=k, keep_text=True) for d, k in zip(draws, keep, strict=True)
    ]


def saved(trainer: Trainer) -> Path:
    trainer.save()
    folder = trainer.finish_saving()
    assert folder is not None
    return folder


def other_features(samples: list[EncodedSample]) -> list[EncodedSample]:
    return [dataclasses.replace(sample, features=sample.features.flip(-1)) for sample in samples]


def test_training_starts_from_the_model_as_it_is_and_the_gradient_arrives() -> None:
    plain, arm = (build(config) for config in (change(BASE, weight=0.0), ARM))
    samples, draws = batch(arm, (True, True, True, True))
    losses = [trainer.losses(samples, draws) for trainer in (plain, arm)]
    assert torch.equal(losses[0].errors, losses[1].errors)
    losses[1].total.backward()
    gradient = arm.trained.teacher_input.projection.weight.grad
    assert gradient.shape == (DIM, TEACHER_DIM) and gradient.abs().max() > 1e-6
    names = {name for name in arm.trained.state_dict() if name.startswith("teacher_input.")}
    assert names == {"teacher_input.projection.weight"}
    assert arm.trained.projectors is None and arm.config.needs_teacher and not plain.config.needs_teacher


def test_features_change_the_prediction_of_their_own_sample_only() -> None:
    trainer = build(ARM, scale=1.0)
    samples, draws = batch(trainer, (True, True, True, True))  # with 1, 3, 0 and 2 references
    before = trainer.losses(samples, draws).errors
    changed = [*other_features(samples[:2]), *samples[2:]]
    after = trainer.losses(changed, draws).errors
    assert (before[:2] - after[:2]).abs().min() > 1e-5
    assert torch.equal(before[2:], after[2:])


def test_dropped_references_have_no_features() -> None:
    trainer = build(ARM, scale=1.0)
    samples, draws = batch(trainer, (False, False, True, False))
    before, after = (trainer.losses(s, draws).errors for s in (samples, other_features(samples)))
    assert torch.equal(before, after)
    plain = build(change(BASE, weight=0.0))
    assert torch.equal(before, plain.losses(samples, draws).errors)


def test_it_stands_beside_alignment() -> None:
    trainer = build(change(BASE, teacher_input=True))
    plain = build(BASE)
    first, second = (t.train_step().values for t in (trainer, plain))
    assert first["alignment/positive"] == second["alignment/positive"] > 0
    assert trainer.trained.teacher_input.projection.weight.abs().max() > 0


@pytest.mark.parametrize("way", ["full", "selective"])
def test_repeated_blocks_see_it_too(way: str) -> None:
    gradients = []
    for mode in ("none", way):
        trainer = build(ARM, scale=1.0)
        recompute_activations(trainer.backbone.model, mode)
        trainer.losses(*batch(trainer, (True, False, True, True))).total.backward()
        gradients.append({name: p.grad for name, p in trainer.trained.named_parameters()})
    assert gradients[0]["teacher_input.projection.weight"].abs().max() > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_uninterrupted_one(optimizer: str, tmp_path: Path) -> None:
    config = change(ARM, optimizer=optimizer, out=str(tmp_path), seed=5, batch_size=4)
    whole, first, second = (build(config) for _ in range(3))
    for _ in range(5):
        whole.train_step()
    for _ in range(2):
        first.train_step()
    second.load(saved(first))
    for _ in range(3):
        second.train_step()
    for one, other in (
        (whole.trained.state_dict(), second.trained.state_dict()),
        (whole.ema.average, second.ema.average),
    ):
        assert one.keys() == other.keys() and any("teacher_input." in name for name in one)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole.trained.teacher_input.projection.weight.abs().max() > 0
    assert not torch.equal(
        whole.trained.teacher_input.projection.weight, whole.ema.average["teacher_input.projection.weight"]
    )


def test_a_checkpoint_gives_its_average_to_those_who_use_it_and_refuses_the_others(tmp_path: Path) -> None:
    trainer = build(change(ARM, out=str(tmp_path)))
    for _ in range(2):
        trainer.train_step()
    path = saved(trainer)
    average = trainer.ema.extra_state_dict("teacher_input")
    assert average.keys() == {"projection.weight"}
    assert not torch.equal(average["projection.weight"], trainer.trained.teacher_input.projection.weight)
    found = read_extra_module(path, "teacher_input")
    assert found.keys() == average.keys()
    assert torch.equal(found["projection.weight"], average["projection.weight"])
    with trainer.ema.applied():
        assert torch.equal(trainer.trained.teacher_input.projection.weight, average["projection.weight"])
    weights = read_any_dit(path, extra=("teacher_input",)).state_dict
    assert weights.keys() == trainer.ema.state_dict().keys() == trainer.trained.dit.state_dict().keys()
    refused = [
        lambda: read_any_dit(path),  # generate.py, the pipeline, `sprites assemble` and runs without it
        lambda: read_dit(path),
        lambda: export_checkpoint(path, tmp_path / "out"),
    ]
    for use in refused:
        with pytest.raises(ValueError, match="was trained with --teacher_input") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    plain = build(change(BASE, weight=0.0, out=str(tmp_path / "plain")))
    assert read_extra_module(saved(plain), "teacher_input") == {}
    with pytest.raises(ValueError, match="does not fit this run"):
        plain.load(path)


def test_a_run_starts_from_a_checkpoint_with_and_without_it(tmp_path: Path) -> None:
    task = EasyDict(
        WAN_CONFIGS["r2v-tiny"],
        **{"dim": DIM, "ffn_dim": 32, "num_heads": 2, "num_layers": 3, "freq_dim": 16},
        **{"in_dim": 4, "out_dim": 4, "text_dim": TEXT_DIM, "text_len": 16},
    )
    encoders = SimpleNamespace(teacher=SimpleNamespace(dim=TEACHER_DIM), folder=tmp_path, device=CPU)

    def start_from(config: TrainConfig) -> tuple[nn.Module, Tensor]:
        model, projectors = build_trained_modules(
            config, task, tmp_path, None, Parallel.single(CPU), extra=["teacher_input"]
        )
        assert projectors is None
        module = TEACHER_INPUT.attach(config, model, encoders).module
        assert module.projection.weight.requires_grad
        return model, module.projection.weight

    trainer = build(change(ARM, out=str(tmp_path / "arm"), ema_decay=0.0), scale=1.0)
    plain = build(change(BASE, weight=0.0, out=str(tmp_path / "plain")))
    start = with_overrides(recipe("tiny"), {"alignment.weight": 0.0, "teacher_input": True})
    for source, scale in ((trainer, 1.0), (plain, 0.0)):
        config = with_overrides(start, {"dit_ckpt": str(saved(source))})
        model, found = start_from(config)
        assert torch.equal(model.head.head.weight, source.ema.state_dict()["head.head.weight"])
        assert torch.equal(found, trainer.trained.teacher_input.projection.weight * scale)
    config = with_overrides(start, {"dit_ckpt": str(tmp_path / "arm" / "checkpoints" / "step-00000000")})
    with pytest.raises(ValueError, match="was trained with --teacher_input"):
        build_trained_modules(config, task, tmp_path, None, Parallel.single(CPU))
    encoders.teacher.dim += 1
    with pytest.raises(ValueError, match="use the --alignment.teacher that it was trained with"):
        start_from(config)
    assert not start_from(with_overrides(start, {"from_scratch": True}))[1].any()


def test_only_branches_with_references_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, seen = build(ARM, scale=1.0), []
    sample = trainer.source.sample(1)
    original = AddedTokens.given

    def spy(self: AddedTokens, tokens: list[Tensor]) -> object:
        seen.append(tokens[0])
        return original(self, tokens)

    monkeypatch.setattr(AddedTokens, "given", spy)
    with torch.no_grad():
        generate_latents(trainer, sample, 0)
        expected = trainer.trained.teacher_input(sample.features).flatten(0, 1)
    kept = [bool(tokens.any()) for tokens in seen]
    assert any(kept) and not all(kept)
    for tokens, has_references in zip(seen, kept, strict=True):
        torch.testing.assert_close(tokens, expected * has_references)


def test_it_is_added_to_each_samples_own_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first block sees differs by the tokens given, on the references of each sample and nowhere else."""
    trainer = tiny.build(BASE, Source())
    added, seen = AddedTokens(trainer.backbone.model), []
    trainer.backbone.model.blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: seen.append(args[0] if args else kwargs["x"]), with_kwargs=True
    )
    samples = trainer.source.samples(0, range(4))  # with 1, 3, 0 and 2 references
    given = [torch.randn(sample.references.shape[1] * 4, DIM) for sample in samples]
    for context in (nullcontext(), added.given(given), nullcontext()):
        with torch.no_grad(), context:
            latents = [sample.latents for sample in samples]
            texts = [torch.zeros(1, TEXT_DIM)] * 4
            trainer.backbone(latents, torch.zeros(4), texts, [sample.references for sample in samples])
    assert torch.equal(seen[0], seen[2])
    video = 2 * 4  # tokens
    for before, after, tokens in zip(seen[0], seen[1], given, strict=True):
        expected = before.clone()
        expected[video : video + len(tokens)] += tokens
        assert torch.equal(after, expected)


@pytest.mark.parametrize(("changes", "world_size"), [({"lora_rank": 2, "ema_decay": 0.0}, 1), ({}, 2)])
def test_what_it_does_not_go_with_is_refused(changes: dict[str, object], world_size: int) -> None:
    config = with_overrides(recipe("tiny"), {"teacher_input": True, **changes})
    with pytest.raises(ValueError, match="teacher_input trains all weights in one process"):
        wanted_modules(config, [TEACHER_INPUT], world_size)


def test_the_plan_counts_its_teacher() -> None:
    config = with_overrides(recipe("tiny"), {"teacher_input": True})
    alone = make_training_plan(with_overrides(config, {"alignment.weight": 0.0}), WAN_CONFIGS["r2v-tiny"], 1)
    assert "teacher dinov3-tiny" in alone.device
    without = make_training_plan(
        with_overrides(config, {"alignment.weight": 0.0, "teacher_input": False}), WAN_CONFIGS["r2v-tiny"], 1
    )
    assert "teacher dinov3-tiny" not in without.device


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    tensors = TeacherInput(7, 5).state_dict()
    assert load_teacher_input(tensors, teacher_dim=7, dim=5, source="x").projection.in_features == 7
    with pytest.raises(ValueError, match="x: its teacher input is"):
        load_teacher_input(tensors, teacher_dim=7, dim=6, source="x")
    save_file(tensors, tmp_path / "file.safetensors")
    assert read_extra_module(tmp_path / "file.safetensors", "teacher_input") == {}
