"""Training: batches equal accumulation, a resumed run equals an uninterrupted one, and the losses are eq. 4 and 8 to 11."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from refalign_ext.backbone import ReferenceBackbone, WanModel
from refalign_ext.config import AlignmentConfig, TrainConfig
from refalign_ext.data.batch import EncodedSample
from refalign_ext.losses import reference_alignment_loss
from refalign_ext.projectors import ReferenceProjectors
from refalign_ext.timesteps import add_noise, timestep_recipe
from refalign_ext.trainer import Draw, Trainer, draw

DEPTH, TEACHER_DIM, TEXT_DIM = 2, 12, 8
CPU = torch.device("cpu")
BASE = TrainConfig(
    recipe="test",
    task="r2v-tiny",
    from_scratch=True,
    alignment=AlignmentConfig(depth=DEPTH, teacher="dinov3-tiny", weight=0.5),
    batch_size=2,
    steps=6,
    learning_rate=1e-3,
    warmup_steps=2,
    schedule="linear",
    ema_decay=0.9,
    precision="fp32",
    save_every=3,
    drop_text=0.2,
    drop_references=0.2,
    drop_both=0.1,
)


def change(config: TrainConfig = BASE, **changes: object) -> TrainConfig:
    alignment = {key: changes.pop(key) for key in tuple(changes) if key in vars(config.alignment)}
    return dataclasses.replace(
        config, alignment=dataclasses.replace(config.alignment, **alignment), **changes
    )


class Source:
    """Samples of one size with one, three, no and two references in turn, from their position alone."""

    def __init__(self, with_features: bool = True) -> None:
        self.with_features, self.asked = with_features, []

    def prepare(self) -> None:
        pass

    def samples(self, step: int, indices: range) -> list[EncodedSample]:
        self.asked.append((step, indices))
        return [self.sample(index) for index in indices]

    def sample(self, index: int) -> EncodedSample:
        generator = torch.Generator().manual_seed(index)
        references = (1, 3, 0, 2)[index % 4]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        features = normal(references, 4, TEACHER_DIM) if self.with_features else None
        return EncodedSample(
            f"sample-{index}", f"prompt {index}", normal(4, 2, 4, 4), normal(4, references, 4, 4), features
        )


def encode_text(prompts: list[str]) -> list[Tensor]:
    """Features that differ between prompts, of differing lengths."""
    return [
        torch.randn(1 + len(prompt), TEXT_DIM, generator=torch.Generator().manual_seed(sum(prompt.encode())))
        for prompt in prompts
    ]


def build(config: TrainConfig, source: object | None = None) -> Trainer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WanModel(
            patch_size=(1, 2, 2),
            text_len=16,
            in_dim=4,
            dim=24,
            ffn_dim=32,
            freq_dim=16,
            text_dim=TEXT_DIM,
            out_dim=4,
            num_heads=2,
            num_layers=3,
        )
        nn.init.normal_(model.head.head.weight, std=0.1)
        projectors = ReferenceProjectors(24, TEACHER_DIM, DEPTH) if config.alignment.weight else None
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    source = Source(bool(config.alignment.weight)) if source is None else source
    return Trainer(config, ReferenceBackbone(model.train()), projectors, source, encode_text, CPU)


class Recorder(torch.optim.SGD):
    """Keeps the gradients that a step would use and changes no weight."""

    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def named_weights(trainer: Trainer) -> dict[str, nn.Parameter]:
    weights = dict(trainer.backbone.model.named_parameters())
    if trainer.projectors is not None:
        weights |= {f"projectors.{key}": p for key, p in trainer.projectors.named_parameters()}
    return weights


def gradients(config: TrainConfig) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What one optimizer step logs, and the gradients that reach the optimizer."""
    trainer = build(config)
    weights = named_weights(trainer)
    recorder = Recorder(weights.values(), lr=0.0)
    recorder.param_groups[0]["base_lr"] = 0.0
    trainer.optimizers = [recorder]
    values = trainer.train_step()
    return values, dict(zip(weights, recorder.gradients, strict=True))


@pytest.mark.parametrize("tap", ["block", "self_attn"])
@pytest.mark.parametrize("timesteps", ["paper", "release"])
def test_a_batch_of_two_equals_two_accumulated_batches_of_one(timesteps: str, tap: str) -> None:
    config = change(
        timesteps=timesteps, tap=tap, clip_norm=0.0, drop_text=0.0, drop_references=0.0, drop_both=0.0
    )
    batch_values, batch = gradients(change(config, batch_size=2, accumulation=1))
    single_values, single = gradients(change(config, batch_size=1, accumulation=2))
    for name in ("loss/total", "loss/flow", "alignment/positive", "alignment/negative", "gradient_norm"):
        assert single_values[name] == pytest.approx(batch_values[name], rel=1e-5), name
        assert batch_values[name] > 0
    assert sum(name.startswith("projectors.") for name in batch) == 2 * DEPTH
    for name, gradient in batch.items():
        largest = gradient.abs().max()
        assert largest > 0, name
        assert (single[name] - gradient).abs().max() <= 2e-5 * largest + 1e-8, name
    four_values, _ = gradients(change(config, batch_size=2, accumulation=2))
    assert four_values["loss/total"] != batch_values["loss/total"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_dropped_conditions_and_samples_without_references_equal_in_any_batch(batch_size: int) -> None:
    config = change(clip_norm=0.0, drop_text=0.3, drop_references=0.3, drop_both=0.3, seed=1)
    kept = [draw(Source().sample(i), i, config).keep_references for i in range(8)]
    assert any(kept) and not all(kept)
    values, reference = gradients(change(config, batch_size=8, accumulation=1))
    others, found = gradients(change(config, batch_size=batch_size, accumulation=8 // batch_size))
    assert others["loss/total"] == pytest.approx(values["loss/total"], rel=1e-5)
    for name, gradient in reference.items():
        assert (found[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max() + 1e-8, name


@pytest.mark.parametrize("tap", ["block", "self_attn"])
def test_gradient_checkpointing_changes_nothing(tap: str) -> None:
    values, plain = gradients(change(tap=tap))
    others, recomputed = gradients(change(tap=tap, gradient_checkpointing=True))
    assert others["loss/total"] == values["loss/total"]
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_uninterrupted_one(optimizer: str, tmp_path: Path) -> None:
    config = change(optimizer=optimizer, out=str(tmp_path), accumulation=2, seed=5)
    whole = build(config)
    losses = [whole.train_step() for _ in range(6)]
    first = build(config)
    assert [first.train_step() for _ in range(3)] == losses[:3]
    folder = first.save()
    resumed = build(config)
    torch.rand(7)  # the global generator's state must not matter
    resumed.load(folder)
    assert resumed.step == 3
    assert [resumed.train_step() for _ in range(3)] == losses[3:]
    assert len({value["loss/total"] for value in losses}) == 6
    for one, other in zip(named_weights(resumed).values(), named_weights(whole).values(), strict=True):
        assert torch.equal(one, other)
    assert resumed.average.keys() == whole.average.keys()
    assert all(torch.equal(resumed.average[key], whole.average[key]) for key in whole.average)
    assert not all(
        torch.equal(whole.average[key], value) for key, value in whole.backbone.model.state_dict().items()
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


def test_resuming_names_changed_settings_and_uses_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = change(out=str(tmp_path))
    trainer = build(config)
    trainer.train_step()
    folder = trainer.save()
    changed = change(
        config, learning_rate=0.25, weight_decay=0.5, betas=(0.5, 0.6), margin=0.7, schedule="constant"
    )
    other = build(changed)
    with caplog.at_level(logging.WARNING):
        other.load(folder)
    said = {record.getMessage() for record in caplog.records}
    assert said == {
        "resuming with alignment.margin = 0.7 (the checkpoint has 1.0)",
        "resuming with betas = [0.5, 0.6] (the checkpoint has [0.9, 0.999])",
        "resuming with learning_rate = 0.25 (the checkpoint has 0.001)",
        "resuming with schedule = constant (the checkpoint has linear)",
        "resuming with weight_decay = 0.5 (the checkpoint has 0.01)",
    }
    group = other.optimizers[0].param_groups[0]
    assert (group["base_lr"], group["weight_decay"], tuple(group["betas"])) == (0.25, 0.5, (0.5, 0.6))
    assert other.train_step()["learning_rate"] == 0.25
    caplog.clear()
    build(config).load(folder)
    assert not caplog.records


def test_a_checkpoint_of_another_model_or_optimizer_does_not_load(tmp_path: Path) -> None:
    trainer = build(change(out=str(tmp_path)))
    trainer.train_step()
    folder = trainer.save()
    with pytest.raises(
        ValueError, match=f"checkpoint {folder} does not fit this run .*1 optimizers.*--resume off"
    ):
        build(change(optimizer="muon")).load(folder)
    with pytest.raises(ValueError, match="does not fit"):
        build(change(weight=0.0)).load(folder)
    without = build(change(weight=0.0, out=str(tmp_path / "without")))
    without.train_step()
    with pytest.raises(ValueError, match="does not fit this run .*blocks.0.input_mlp"):
        build(BASE).load(without.save())


def test_average_can_be_switched_on_and_off(tmp_path: Path) -> None:
    plain = build(change(ema_decay=0.0, out=str(tmp_path / "plain")))
    plain.train_step()
    averaged = build(change(out=str(tmp_path / "averaged")))
    averaged.load(plain.save())
    for key, value in plain.backbone.model.state_dict().items():
        assert torch.equal(averaged.average[key], value)
    averaged.train_step()
    raw = {key: value.clone() for key, value in averaged.backbone.model.state_dict().items()}
    assert not all(torch.equal(averaged.averaged_state()[key], raw[key]) for key in raw)
    plain.load(averaged.save())
    assert plain.average is None
    assert all(torch.equal(plain.averaged_state()[key], raw[key]) for key in raw)


def test_conditions_are_dropped_as_often_as_asked() -> None:
    config = change(drop_text=0.1, drop_references=0.1, drop_both=0.1)
    sample = EncodedSample("a", "p", torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), None)
    count = 12000
    found = Counter((d.keep_text, d.keep_references) for d in (draw(sample, i, config) for i in range(count)))
    for kept in ((False, True), (True, False), (False, False)):
        assert found[kept] / count == pytest.approx(0.1, abs=0.011)  # four standard deviations
    assert found[True, True] / count == pytest.approx(0.7, abs=0.017)
    never = change(drop_text=0.0, drop_references=0.0, drop_both=0.0)
    assert all(
        draw(sample, i, never).keep_text and draw(sample, i, never).keep_references for i in range(300)
    )
    always = change(drop_text=0.0, drop_references=0.0, drop_both=1.0)
    assert not any(
        draw(sample, i, always).keep_text or draw(sample, i, always).keep_references for i in range(300)
    )


def test_draws_depend_on_seed_and_position_alone() -> None:
    source = Source()
    torch.manual_seed(1)
    first = draw(source.sample(3), 3, BASE)
    torch.manual_seed(2)
    other = dataclasses.replace(
        source.sample(7), name="other", prompt="other"
    )  # another clip of the same size
    second = draw(other, 3, change(batch_size=1, accumulation=4, learning_rate=1.0))
    assert torch.equal(first.timestep, second.timestep) and torch.equal(first.noise, second.noise)
    assert (first.keep_text, first.keep_references) == (second.keep_text, second.keep_references)
    for different in (draw(other, 4, BASE), draw(other, 3, change(seed=1))):
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


def a_draw(sample: EncodedSample, **changes: object) -> Draw:
    noise = torch.randn(sample.latents.shape, generator=torch.Generator().manual_seed(9))
    return Draw(
        **{
            "timestep": torch.tensor(600.0),
            "noise": noise,
            "keep_text": True,
            "keep_references": True,
            **changes,
        }
    )


def test_a_dropped_reference_is_zero_latents_with_its_tokens_and_no_alignment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = build(BASE)
    calls = seen_by_backbone(trainer, monkeypatch)
    dropped, kept = Source().sample(1), Source().sample(3)
    losses = trainer.losses([dropped, kept], [a_draw(dropped, keep_references=False), a_draw(kept)])
    (call,) = calls
    assert call["references"][0].shape == dropped.references.shape == (4, 3, 4, 4)
    assert not call["references"][0].any()
    assert torch.equal(call["references"][1], kept.references)
    assert call["output"].reference_tokens[0].shape == (2, 3, 4, 24)
    alone = trainer.losses([kept], [a_draw(kept)])
    assert alone.positive > 0 and alone.negative > 0
    assert losses.positive.item() == pytest.approx(alone.positive.item() / 2, rel=1e-5)
    assert losses.negative.item() == pytest.approx(alone.negative.item() / 2, rel=1e-5)
    nothing = trainer.losses([dropped], [a_draw(dropped, keep_references=False)])
    assert nothing.positive == nothing.negative == 0
    assert nothing.total == nothing.flow
    nothing.total.backward()
    assert all(not p.grad.any() for p in trainer.projectors.parameters())


def test_a_dropped_text_is_the_empty_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(BASE)
    calls = seen_by_backbone(trainer, monkeypatch)
    sample = Source().sample(1)
    trainer.losses([sample, sample], [a_draw(sample, keep_text=False), a_draw(sample)])
    empty, full = calls[0]["context"]
    assert torch.equal(empty, encode_text([""])[0])
    assert torch.equal(full, encode_text([sample.prompt])[0])


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

    recipe = timestep_recipe(timesteps)
    students = trainer.projectors(call["output"].reference_tokens)
    flow = positive = negative = 0.0
    for index, (sample, chance) in enumerate(zip(samples, draws, strict=True)):
        error = (call["output"].prediction[index] - (chance.noise - sample.latents)).square().mean()
        flow += error * recipe.flow_weight(timestep)[index] / 2
        gate = (timestep[index] / 1000) ** 3 if timesteps == "release" else 1.0
        count = sample.references.shape[1]
        for student in students:
            terms = reference_alignment_loss(
                student[index : index + 1, :count], sample.features[None], margin=0.9
            )
            positive += gate * terms.positive / (2 * DEPTH)
            negative += gate * terms.negative / (2 * DEPTH)
    torch.testing.assert_close(losses.flow, flow)
    torch.testing.assert_close(losses.positive, positive)
    torch.testing.assert_close(losses.negative, negative)
    torch.testing.assert_close(losses.total, flow + 0.3 * (positive + 0.7 * negative))
    if timesteps == "release":
        assert not torch.allclose(recipe.flow_weight(timestep), torch.ones(2))
    else:
        assert torch.equal(recipe.flow_weight(timestep), torch.ones(2))


def test_without_alignment_nothing_of_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(change(weight=0.0))
    calls = seen_by_backbone(trainer, monkeypatch)
    values = trainer.train_step()
    assert trainer.projectors is None
    assert calls[0]["tap_depth"] == 0 and calls[0]["output"].reference_tokens == []
    assert values["loss/total"] == values["loss/flow"] > 0
    assert values["alignment/positive"] == values["alignment/negative"] == 0


def test_weights_move_in_bf16_autocast_and_stay_float32() -> None:
    trainer = build(change(precision="bf16"))
    before = {name: p.detach().clone() for name, p in named_weights(trainer).items()}
    exact = build(BASE).train_step()
    values = trainer.train_step()
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
    values = [trainer.train_step() for _ in range(60)]
    assert values[-1]["alignment/positive"] < 0.5 * values[0]["alignment/positive"]
    flow = [value["loss/flow"] for value in values]
    assert sum(flow[-10:]) < 0.9 * sum(flow[:10])


def test_a_step_that_is_not_finite_stops_and_leaves_the_weights() -> None:
    class Broken(Source):
        def sample(self, index: int) -> EncodedSample:
            sample = super().sample(index)
            return dataclasses.replace(sample, latents=sample.latents * (float("nan") if index == 5 else 1))

    trainer = build(change(accumulation=2), Broken())
    trainer.train_step()
    before = {name: p.detach().clone() for name, p in named_weights(trainer).items()}
    with pytest.raises(
        FloatingPointError, match=r"loss of step 2 is nan \(samples sample-4, sample-5\): lower"
    ):
        trainer.train_step()
    assert trainer.step == 1
    assert all(torch.equal(p, before[name]) for name, p in named_weights(trainer).items())

    trainer = build(BASE)
    trainer.backbone.model.head.head.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="gradient of step 1 is (nan|inf)"):
        trainer.train_step()


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
    values = [trainer.train_step() for _ in range(2)]
    assert [value["learning_rate"] for value in values] == pytest.approx([0.25e-3, 0.5e-3])
    assert all(value["gradient_norm"] > 1e-3 for value in values)
    assert seen == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_positions_are_consecutive_over_micro_batches_and_steps() -> None:
    source = Source()
    trainer = build(change(batch_size=2, accumulation=3), source)
    trainer.train_step()
    trainer.train_step()
    assert source.asked == [(s, range(6 * s + 2 * m, 6 * s + 2 * m + 2)) for s in range(2) for m in range(3)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps that compute nothing."""

    def train_step(self: Trainer) -> dict[str, float]:
        self.step += 1
        names = ("loss/total", "loss/flow", "alignment/positive", "alignment/negative")
        return {name: float(self.step) for name in names}

    monkeypatch.setattr(Trainer, "train_step", train_step)
    return


def test_the_run_logs_saves_and_previews_when_due(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = change(out=str(tmp_path), steps=10, log_every=4, save_every=3, preview_every=5, keep_last=2)
    trainer = build(config)
    logged: list[tuple[int, dict]] = []
    previews: list[int] = []

    def preview(step: int) -> dict[str, float]:
        previews.append(step)
        return {"judge": 1.0}

    trainer.run(log=lambda step, values: logged.append((step, values)), preview=preview)
    assert [step for step, values in logged if "loss/total" in values] == [4, 8, 10]
    assert [step for step, values in logged if "judge" in values] == previews == [5, 10]
    assert all(values["clips_per_second"] > 0 for _, values in logged if "loss/total" in values)
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["step-00000009", "step-00000010"]
    bar = capsys.readouterr().err
    for part in ("training: 100%", "10/10", "loss 10.000", "RA+ 10.000", "RA- 10.000", "clips/s", "<00:00"):
        assert part in bar, bar


def test_a_stop_is_saved_at_the_step_it_came(quick: None, tmp_path: Path) -> None:
    trainer = build(change(out=str(tmp_path), save_every=100))
    trainer.run(log=lambda *given: None, should_stop=lambda: trainer.step == 4, progress=False)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
