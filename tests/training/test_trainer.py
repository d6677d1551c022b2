"""Training: batches equal accumulation, a resumed run equals an uninterrupted one, and the losses are eq. 4 and 8 to 11."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from refalign_ext.config import TrainConfig
from refalign_ext.data.batch import EncodedSample
from refalign_ext.layout import SampleLayout
from refalign_ext.losses import reference_alignment_loss
from refalign_ext.timesteps import TIMESTEP_RECIPES, add_noise
from refalign_ext.training.randomness import SampleRandomness, sample_randomness
from refalign_ext.training.trainer import StepReport, Trainer, TrainerHooks
from tests.helpers.tiny_training import BASE, DEPTH, Source, build, change, encode_text


class Recorder(torch.optim.SGD):
    """Keeps the gradients that a step would use and changes no weight."""

    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def named_weights(trainer: Trainer) -> dict[str, nn.Parameter]:
    return dict(trainer.trained.named_parameters())


def copies(trainer: Trainer) -> dict[str, Tensor]:
    """All weights as they are now."""
    return {name: parameter.detach().clone() for name, parameter in named_weights(trainer).items()}


def saved(trainer: Trainer) -> Path:
    """The folder of a checkpoint of the present step."""
    trainer.save()
    folder = trainer.finish_saving()
    assert folder is not None
    return folder


def gradients(config: TrainConfig) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What one optimizer step logs, and the gradients that reach the optimizer."""
    trainer = build(config)
    weights = named_weights(trainer)
    recorder = Recorder(weights.values(), lr=0.0)
    recorder.param_groups[0]["base_lr"] = 0.0
    trainer.optimizers = [recorder]
    values = trainer.train_step().values
    return values, dict(zip(weights, recorder.gradients, strict=True))


def assert_close_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max() + 1e-8, name


@pytest.mark.parametrize("tap", ["block", "self_attn"])
@pytest.mark.parametrize("timesteps", ["paper", "release"])
def test_a_batch_of_two_equals_two_accumulated_batches_of_one(timesteps: str, tap: str) -> None:
    config = change(
        timesteps=timesteps, tap=tap, clip_norm=0.0, drop_text=0.0, drop_references=0.0, drop_both=0.0
    )
    batch_values, batch = gradients(change(config, batch_size=2, global_batch_size=2))
    single_values, single = gradients(change(config, batch_size=1, global_batch_size=2))
    for name in ("loss/total", "loss/flow", "alignment/positive", "alignment/negative", "gradient_norm"):
        assert single_values[name] == pytest.approx(batch_values[name], rel=1e-5), name
        assert batch_values[name] > 0
    assert sum(name.startswith("projectors.") for name in batch) == 2 * DEPTH
    assert_close_gradients(single, batch)
    assert all(gradient.any() for gradient in batch.values())
    four_values, _ = gradients(change(config, batch_size=2, global_batch_size=4))
    assert four_values["loss/total"] != batch_values["loss/total"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_dropped_conditions_and_samples_without_references_equal_in_any_batch(batch_size: int) -> None:
    config = change(clip_norm=0.0, drop_text=0.3, drop_references=0.3, drop_both=0.3, seed=1)
    kept = [sample_randomness(Source().sample(i), i, config).keep_references for i in range(8)]
    assert any(kept) and not all(kept)
    values, reference = gradients(change(config, batch_size=8, global_batch_size=8))
    others, found = gradients(change(config, batch_size=batch_size, global_batch_size=8))
    assert others["loss/total"] == pytest.approx(values["loss/total"], rel=1e-5)
    assert_close_gradients(found, reference)


@pytest.mark.parametrize("tap", ["block", "self_attn"])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(mode: str, tap: str) -> None:
    values, plain = gradients(change(tap=tap))
    others, recomputed = gradients(change(tap=tap, activation_checkpointing=mode))
    assert others["loss/total"] == values["loss/total"]
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("tap", ["block", "self_attn"])
def test_compiled_blocks_compute_the_same(tap: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as for a compiler, run without one."""
    original, compiled = nn.Module.compile, []

    def compile_module(self: nn.Module, **settings: object) -> None:
        compiled.append(self)
        original(self, backend="aot_eager", **settings)

    monkeypatch.setattr(nn.Module, "compile", compile_module)
    values, plain = gradients(change(tap=tap))
    assert not compiled
    torch._dynamo.reset()
    others, found = gradients(change(tap=tap, compile=True, activation_checkpointing=mode))
    assert len(compiled) == 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert found.keys() == plain.keys()
    assert others["loss/total"] == pytest.approx(values["loss/total"], rel=1e-6)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_uninterrupted_one(optimizer: str, tmp_path: Path) -> None:
    config = change(optimizer=optimizer, out=str(tmp_path), global_batch_size=4, seed=5)
    whole = build(config)
    reports = [whole.train_step() for _ in range(6)]
    first = build(config)
    assert [first.train_step() for _ in range(3)] == reports[:3]
    folder = saved(first)
    resumed = build(config)
    torch.rand(7)  # the global generator's state must not matter
    resumed.load(folder)
    assert (resumed.step, resumed.samples_seen) == (3, 12)
    assert [resumed.train_step() for _ in range(3)] == reports[3:]
    assert len({report.values["loss/total"] for report in reports}) == 6
    for one, other in zip(named_weights(resumed).values(), named_weights(whole).values(), strict=True):
        assert torch.equal(one, other)
    assert resumed.ema.average.keys() == whole.ema.average.keys()
    assert all(torch.equal(resumed.ema.average[key], whole.ema.average[key]) for key in whole.ema.average)
    assert not all(
        torch.equal(whole.ema.average[key], value) for key, value in whole.backbone.model.state_dict().items()
    )
    assert len(resumed.optimizers) == (2 if optimizer == "muon" else 1)
    for one, other in zip(resumed.optimizers, whole.optimizers, strict=True):
        assert_same(one.state_dict(), other.state_dict())


def assert_same(one: object, other: object) -> None:
    """Equality of nested states with tensors inside."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


def own_messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this project logged; torch's checkpoints log every call for themselves."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("refalign_ext")]


def test_resuming_names_changed_settings_and_uses_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = change(out=str(tmp_path))
    trainer = build(config)
    trainer.train_step()
    folder = saved(trainer)
    changed = change(
        config, learning_rate=0.25, weight_decay=0.5, betas=(0.5, 0.6), margin=0.7, schedule="constant"
    )
    other = build(changed)
    with caplog.at_level(logging.WARNING):
        other.load(folder)
    assert set(own_messages(caplog)) == {
        "resuming with alignment.margin = 0.7 (the checkpoint has 1.0)",
        "resuming with betas = [0.5, 0.6] (the checkpoint has [0.9, 0.999])",
        "resuming with learning_rate = 0.25 (the checkpoint has 0.001)",
        "resuming with schedule = constant (the checkpoint has linear)",
        "resuming with weight_decay = 0.5 (the checkpoint has 0.01)",
    }
    group = other.optimizers[0].param_groups[0]
    assert (group["base_lr"], group["weight_decay"], tuple(group["betas"])) == (0.25, 0.5, (0.5, 0.6))
    assert other.train_step().values["learning_rate"] == 0.25
    caplog.clear()
    build(config).load(folder)
    assert not own_messages(caplog)


def test_average_can_be_switched_on_and_off(tmp_path: Path) -> None:
    plain = build(change(ema_decay=0.0, out=str(tmp_path / "plain")))
    plain.train_step()
    averaged = build(change(out=str(tmp_path / "averaged")))
    averaged.load(saved(plain))
    for key, value in plain.backbone.model.state_dict().items():
        assert torch.equal(averaged.ema.average[key], value)
    averaged.train_step()  # the average's tensors are its own
    raw = {key: value.clone() for key, value in averaged.backbone.model.state_dict().items()}
    assert not all(torch.equal(averaged.ema.state_dict()[key], raw[key]) for key in raw)
    plain.load(saved(averaged))
    assert plain.ema.average is None
    assert all(torch.equal(plain.ema.state_dict()[key], raw[key]) for key in raw)


def test_conditions_are_dropped_as_often_as_asked() -> None:
    config = change(drop_text=0.1, drop_references=0.1, drop_both=0.1)
    sample = EncodedSample("a", "p", torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), None)
    count = 4000
    found = Counter(
        (d.keep_text, d.keep_references) for d in (sample_randomness(sample, i, config) for i in range(count))
    )
    for kept in ((False, True), (True, False), (False, False)):
        assert found[kept] / count == pytest.approx(0.1, abs=0.019)  # four standard deviations
    assert found[True, True] / count == pytest.approx(0.7, abs=0.029)
    for drop_both, kept in ((0.0, (True, True)), (1.0, (False, False))):
        config = change(drop_text=0.0, drop_references=0.0, drop_both=drop_both)
        chosen = [sample_randomness(sample, i, config) for i in range(100)]
        assert {(one.keep_text, one.keep_references) for one in chosen} == {kept}


def test_draws_depend_on_seed_and_position_alone() -> None:
    source = Source()
    torch.manual_seed(1)
    first = sample_randomness(source.sample(3), 3, BASE)
    torch.manual_seed(2)
    other = dataclasses.replace(
        source.sample(7), name="other", prompt="other"
    )  # another clip of the same size
    second = sample_randomness(other, 3, change(batch_size=1, global_batch_size=4, learning_rate=1.0))
    assert torch.equal(first.timestep, second.timestep) and torch.equal(first.noise, second.noise)
    assert (first.keep_text, first.keep_references) == (second.keep_text, second.keep_references)
    for different in (sample_randomness(other, 4, BASE), sample_randomness(other, 3, change(seed=1))):
        assert different.timestep != first.timestep
        assert not torch.equal(different.noise, first.noise)
    assert first.noise.shape == source.sample(3).latents.shape
    assert 0 < first.timestep <= 1000


def seen_by_backbone(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What every call of the backbone gets."""
    calls, forward = [], trainer.backbone.forward

    def spy(latents, timestep, context, references, **options):  # noqa: ANN001, ANN202
        output = forward(latents, timestep, context, references, **options)
        calls.append(
            {"latents": latents, "context": context, "references": references, "output": output, **options}
        )
        return output

    monkeypatch.setattr(trainer.backbone, "forward", spy)
    return calls


def a_draw(sample: EncodedSample, **changes: object) -> SampleRandomness:
    noise = torch.randn(sample.latents.shape, generator=torch.Generator().manual_seed(9))
    return dataclasses.replace(SampleRandomness(torch.tensor(600.0), noise, True, True), **changes)


def test_a_dropped_reference_is_zero_latents_with_its_tokens_and_no_alignment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = build(BASE)
    calls = seen_by_backbone(trainer, monkeypatch)
    dropped, kept = Source().sample(1), Source().sample(3)
    losses = trainer.losses(
        [dropped, kept], [a_draw(dropped, keep_text=False, keep_references=False), a_draw(kept)]
    )
    (call,) = calls
    assert call["references"][0].shape == dropped.references.shape == (4, 3, 4, 4)
    assert not call["references"][0].any()
    assert torch.equal(call["references"][1], kept.references)
    assert torch.equal(call["context"][0], encode_text([""])[0])
    assert torch.equal(call["context"][1], encode_text([kept.prompt])[0])
    assert call["output"].reference_tokens[0].shape == (2, 3, 4, 24)
    alone = trainer.losses([kept], [a_draw(kept)])
    assert alone.positive.shape == alone.negative.shape == (DEPTH,)
    assert (alone.positive > 0).all() and (alone.negative > 0).all()
    torch.testing.assert_close(losses.positive, alone.positive / 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.negative, alone.negative / 2, rtol=1e-5, atol=0)
    nothing = trainer.losses([dropped], [a_draw(dropped, keep_references=False)])
    assert not nothing.positive.any() and not nothing.negative.any()
    assert nothing.total == nothing.flow
    nothing.total.backward()
    assert all(not p.grad.any() for p in trainer.trained.projectors.parameters())


@pytest.mark.parametrize("tap", ["block", "self_attn"])
@pytest.mark.parametrize("timesteps", ["paper", "release"])
def test_the_total_is_equation_11(timesteps: str, tap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = change(timesteps=timesteps, tap=tap, weight=0.3, negative_weight=0.7, margin=0.9)
    trainer = build(config)
    calls = seen_by_backbone(trainer, monkeypatch)
    samples = [Source().sample(1), Source().sample(3)]
    draws = [
        a_draw(sample, timestep=torch.tensor(t)) for sample, t in zip(samples, (700.0, 200.0), strict=True)
    ]
    losses = trainer.losses(samples, draws)
    (call,) = calls
    assert (call["tap_depth"], call["tap"]) == (DEPTH, tap)
    timestep = torch.tensor([700.0, 200.0])
    noisy = add_noise([s.latents for s in samples], [d.noise for d in draws], timestep)
    assert all(torch.equal(one, other) for one, other in zip(call["latents"], noisy, strict=True))

    recipe = TIMESTEP_RECIPES[timesteps]
    students = trainer.trained.projectors(call["output"].reference_tokens)
    flow, positive, negative = 0.0, torch.zeros(DEPTH), torch.zeros(DEPTH)
    for index, (sample, chance) in enumerate(zip(samples, draws, strict=True)):
        error = (call["output"].prediction[index] - (chance.noise - sample.latents)).square().mean()
        torch.testing.assert_close(losses.errors[index], error)
        flow += error * recipe.flow_weight(timestep)[index] / 2
        gate = (timestep[index] / 1000) ** 3 if timesteps == "release" else 1.0
        count = sample.references.shape[1]
        for block, student in enumerate(students):
            terms = reference_alignment_loss(
                student[index : index + 1, :count], sample.features[None], margin=0.9
            )
            positive[block] += gate * terms.positive.detach() / 2
            negative[block] += gate * terms.negative.detach() / 2
    torch.testing.assert_close(losses.flow, flow)
    torch.testing.assert_close(losses.positive, positive)
    torch.testing.assert_close(losses.negative, negative)
    torch.testing.assert_close(losses.total, flow + 0.3 * (positive + 0.7 * negative).mean())
    if timesteps == "release":
        assert not torch.allclose(recipe.flow_weight(timestep), torch.ones(2))
    else:
        assert torch.equal(recipe.flow_weight(timestep), torch.ones(2))


def test_without_alignment_nothing_of_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(change(weight=0.0))
    calls = seen_by_backbone(trainer, monkeypatch)
    values = trainer.train_step().values
    assert trainer.trained.projectors is None
    assert calls[0]["tap_depth"] == 0 and calls[0]["output"].reference_tokens == []
    assert values["loss/total"] == values["loss/flow"] > 0
    assert values["alignment/positive"] == values["alignment/negative"] == 0
    assert not any(name.startswith("alignment_by_block/") for name in values)


def test_weights_move_in_bf16_autocast_and_stay_float32() -> None:
    trainer = build(change(precision="bf16"))
    before = copies(trainer)
    exact = build(BASE).train_step().values
    values = trainer.train_step().values
    assert values["loss/total"] == pytest.approx(exact["loss/total"], rel=0.05)
    assert values["loss/total"] != exact["loss/total"]
    for name, parameter in named_weights(trainer).items():
        assert parameter.dtype == torch.float32
        assert not torch.equal(parameter, before[name]), name


def test_training_learns() -> None:
    class One(Source):
        def samples(self, step: int, indices: range) -> list[EncodedSample]:
            return [self.sample(1) for _ in indices]

    trainer = build(
        change(steps=60, schedule="constant", drop_text=0.0, drop_references=0.0, drop_both=0.0), One()
    )
    values = [trainer.train_step().values for _ in range(60)]
    assert values[-1]["alignment/positive"] < 0.5 * values[0]["alignment/positive"]
    flow = [value["loss/flow"] for value in values]
    assert sum(flow[-10:]) < 0.9 * sum(flow[:10])


class Broken(Source):
    """The samples at some positions hold something that is not finite."""

    def __init__(self, *positions: int, value: float = float("nan"), part: str = "latents") -> None:
        super().__init__()
        self.positions, self.value, self.part = positions, value, part

    def sample(self, index: int) -> EncodedSample:
        sample = super().sample(index)
        if index not in self.positions:
            return sample
        return dataclasses.replace(sample, **{self.part: getattr(sample, self.part) * self.value})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_is_as_if_it_had_never_been(optimizer: str, tmp_path: Path) -> None:
    config = change(optimizer=optimizer, global_batch_size=4, out=str(tmp_path))
    trainer, untouched = build(config, Broken(5)), build(config)
    for one in (trainer, untouched):
        assert not one.train_step().skipped
    weights, sums = copies(trainer), trainer.timestep_bins.sums.clone()
    states = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
    states = [{key: {k: v.clone() for k, v in state.items()} for key, state in s.items()} for s in states]
    average = {key: value.clone() for key, value in trainer.ema.average.items()}

    report = trainer.train_step()
    assert report.skipped and math.isnan(report.values["loss/total"])
    assert report.samples == ["sample-4", "sample-5", "sample-6", "sample-7"]
    (mine,) = json.loads((tmp_path / "skipped" / "step-00000002.json").read_text())["samples_by_rank"]
    assert [row["sample"] for row in mine] == report.samples
    assert [row["flow_error"] == "nan" for row in mine] == [False, True, False, False]
    assert [row["batch_total"] == "nan" for row in mine] == [True, True, False, False]
    assert (trainer.step, trainer.samples_seen) == (2, 8)
    assert_same(copies(trainer), weights)
    assert_same([optimizer.state_dict()["state"] for optimizer in trainer.optimizers], states)
    assert_same(trainer.ema.average, average)
    assert_same(trainer.timestep_bins.sums, sums)
    assert all(parameter.grad is None for parameter in named_weights(trainer).values())

    # It goes on with the next samples, exactly as from a checkpoint that says so.
    untouched.step, untouched.samples_seen = 2, 8
    assert trainer.train_step() == untouched.train_step()
    assert trainer.source.asked[-2:] == [(2, range(8, 10)), (2, range(10, 12))]
    assert_same(copies(trainer), copies(untouched))
    assert_same(trainer.ema.average, untouched.ema.average)
    assert not any(torch.equal(value, weights[name]) for name, value in copies(trainer).items())


@pytest.mark.parametrize(
    ("part", "value"),
    [("latents", math.nan), ("latents", math.inf), ("references", math.nan), ("features", math.nan)],
)
def test_whatever_is_not_finite_in_a_sample_skips_the_step(part: str, value: float, tmp_path: Path) -> None:
    trainer = build(
        change(out=str(tmp_path), drop_references=0.0, drop_both=0.0), Broken(1, value=value, part=part)
    )
    before = copies(trainer)
    assert trainer.train_step().skipped
    assert_same(copies(trainer), before)
    assert not trainer.train_step().skipped


def test_a_gradient_that_is_not_finite_skips_the_step_too(tmp_path: Path) -> None:
    trainer = build(change(out=str(tmp_path)))
    hook = trainer.trained.dit.head.head.bias.register_hook(lambda gradient: gradient * float("inf"))
    before = copies(trainer)
    report = trainer.train_step()
    assert report.skipped and math.isfinite(report.values["loss/total"])
    assert not math.isfinite(report.values["gradient_norm"])
    assert_same(copies(trainer), before)
    told = json.loads((tmp_path / "skipped" / "step-00000001.json").read_text())
    assert told["values"]["gradient_norm"] in ("inf", "nan")
    assert told["values"]["loss/total"] == report.values["loss/total"]
    hook.remove()
    assert not trainer.train_step().skipped


def test_learning_rate_and_clipping_reach_the_optimizer() -> None:
    trainer = build(change(clip_norm=1e-3, warmup_steps=4))
    seen: list[float] = []
    original = trainer.optimizers[0].step

    def spy() -> None:
        grads = [p.grad for p in named_weights(trainer).values()]
        seen.append(
            torch.nn.utils.get_total_norm(grads).item() if hasattr(nn.utils, "get_total_norm") else 1e-3
        )
        original()

    trainer.optimizers[0].step = spy
    values = [trainer.train_step().values for _ in range(2)]
    assert [value["learning_rate"] for value in values] == pytest.approx([0.25e-3, 0.5e-3])
    assert all(value["gradient_norm"] > 1e-3 for value in values)
    assert seen == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_positions_are_consecutive_over_micro_batches_and_steps() -> None:
    source = Source()
    trainer = build(change(batch_size=2, global_batch_size=6), source)
    reports = [trainer.train_step() for _ in range(2)]
    assert source.asked == [(s, range(6 * s + 2 * m, 6 * s + 2 * m + 2)) for s in range(2) for m in range(3)]
    assert [report.samples for report in reports] == [
        [f"sample-{i}" for i in range(6 * s, 6 * s + 6)] for s in (0, 1)
    ]
    assert [layout.references for layout in reports[0].layouts] == [1, 3, 0, 2, 1, 3]
    assert set(reports[1].layouts) == {SampleLayout(2, count, 2, 2) for count in (0, 1, 2, 3)}
    assert trainer.timestep_bins.sums[:, 1].sum() == 12
    assert (trainer.step, trainer.samples_seen) == (2, 12)


def test_a_resumed_run_may_have_another_batch_size(tmp_path: Path) -> None:
    """What was seen counts, not the steps: no sample is left out or seen twice."""
    first = build(change(batch_size=1, global_batch_size=3, out=str(tmp_path)))
    first.train_step()
    source = Source()
    other = build(change(batch_size=2, global_batch_size=4), source)
    other.load(saved(first))
    report = other.train_step()
    assert source.asked == [(1, range(3, 5)), (1, range(5, 7))]
    assert report.samples == [f"sample-{i}" for i in (3, 4, 5, 6)]
    assert (other.step, other.samples_seen) == (2, 7)


def test_reports_tell_each_block_and_whether_to_stop() -> None:
    trainer = build(BASE)
    report = trainer.train_step()
    assert type(report) is StepReport and not report.stopping and not report.skipped
    kinds = ("positive", "negative")
    assert set(report.values) == {
        *("loss/total", "loss/flow", "gradient_norm", "learning_rate"),
        *(f"alignment/{kind}" for kind in kinds),
        *(f"alignment_by_block/{kind}_{block}" for kind in kinds for block in range(DEPTH)),
    }
    for name in ("positive", "negative"):
        blocks = [report.values[f"alignment_by_block/{name}_{block}"] for block in range(DEPTH)]
        assert blocks[0] != blocks[1] and report.values[f"alignment/{name}"] == pytest.approx(sum(blocks) / 2)
    values = report.values
    weighted = BASE.alignment.weight * (values["alignment/positive"] + values["alignment/negative"])
    assert values["loss/total"] == pytest.approx(values["loss/flow"] + weighted, rel=1e-6)
    assert build(BASE, hooks=TrainerHooks(lambda: True)).train_step().stopping


def test_validation_is_the_same_at_any_step_and_for_any_batch_size() -> None:
    trainer = build(change(validation_clips=5))
    first = trainer.validate()
    assert set(first) == {f"validation/{name}" for name in ("loss", "flow", "positive", "negative")}
    trainer.step, trainer.samples_seen = 7, 901
    torch.rand(3)
    assert trainer.validate() == first
    for batch_size, global_batch_size in ((1, 0), (4, 0), (2, 6)):
        other = change(
            batch_size=batch_size, global_batch_size=global_batch_size, validation_clips=5, ema_decay=0.0
        )
        assert build(other).validate() == first
    assert build(change(validation_clips=4)).validate() != first
    assert build(change(validation_clips=5, seed=1)).validate() != first


def test_validation_is_the_mean_over_its_clips() -> None:
    config = change(validation_clips=6)
    trainer, source = build(config), Source()
    found = trainer.validate()
    losses = []
    for place in range(6):
        sample = source.sample(place)
        chance = sample_randomness(sample, place, config, purpose="validation/")
        assert (
            chance.timestep != sample_randomness(sample, place, config).timestep
        )  # not the noise that training sees
        assert not torch.equal(chance.noise, sample_randomness(sample, place, config).noise)
        losses.append(trainer.losses([sample], [chance]))
    for name, terms in (
        ("loss", [one.total for one in losses]),
        ("flow", [one.flow for one in losses]),
        ("positive", [one.positive.mean() for one in losses]),
        ("negative", [one.negative.mean() for one in losses]),
    ):
        assert found[f"validation/{name}"] == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)
    without = build(change(weight=0.0, validation_clips=2)).validate()
    assert set(without) == {"validation/loss", "validation/flow"}
    assert without["validation/loss"] == without["validation/flow"] > 0


def test_validation_and_training_do_not_touch_each_other() -> None:
    watched, plain = build(change(validation_clips=3)), build(BASE)
    values = []
    for _ in range(3):
        values.append(watched.validate()["validation/loss"])
        assert all(parameter.grad is None for parameter in named_weights(watched).values())
        assert watched.train_step() == plain.train_step()
    assert len(set(values)) == 3
    assert_same(copies(watched), copies(plain))
    assert_same(watched.timestep_bins.sums, plain.timestep_bins.sums)
    assert watched.backbone.model.training


def test_averaged_weights_are_in_the_model_for_a_block_only() -> None:
    trainer = build(BASE)
    for _ in range(2):
        trainer.train_step()
    average = {key: value.clone() for key, value in trainer.ema.average.items()}
    raw = {key: value.clone() for key, value in trainer.trained.dit.state_dict().items()}
    assert not any(torch.equal(average[key], raw[key]) for key in raw)
    assert_same(trainer.ema.state_dict(), average)
    assert_same(trainer.ema.full_state_dict(), average)
    with trainer.ema.applied():
        assert_same(dict(trainer.trained.dit.state_dict()), average)
    assert_same(dict(trainer.trained.dit.state_dict()), raw)
    with pytest.raises(RuntimeError, match="no disk"):
        with trainer.ema.applied():
            raise RuntimeError("no disk")
    assert_same(dict(trainer.trained.dit.state_dict()), raw)
    assert_same(trainer.ema.average, average)
