"""The run around the step: what is logged, saved, validated and shown when, and how it stops."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from refalign_ext.checkpoint.checkpointer import checkpoints_in
from refalign_ext.config import TrainConfig
from refalign_ext.layout import SampleLayout
from refalign_ext.planning.flops import AlignmentShape, ModelShape, step_flops
from refalign_ext.training.loop import train_loop
from refalign_ext.training.trainer import StepReport, Trainer
from tests.helpers.tiny_training import DEPTH, TEACHER_DIM, build, change

LAYOUT = SampleLayout(2, 1, 2, 2)  # 12 tokens


class Log:
    """Keeps what would be logged."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.entries.append((step, dict(values)))

    def steps_with(self, name: str) -> list[int]:
        return [step for step, values in self.entries if name in values]

    def values(self, name: str) -> list[float]:
        return [values[name] for _, values in self.entries if name in values]


def quick(
    config: TrainConfig,
    *,
    loss: Callable[[int], float] = float,
    stops_at: int | None = None,
) -> Trainer:
    """A trainer whose steps compute nothing; `loss` makes of a step what it reports."""
    trainer = build(config)

    def train_step() -> StepReport:
        trainer.step += 1
        trainer.samples_seen += trainer.clips_per_step
        names = ("loss/total", "loss/flow", "alignment/positive", "alignment/negative")
        values = dict.fromkeys(names, loss(trainer.step))
        samples = [f"sample-{trainer.step}-{i}" for i in range(trainer.clips_per_step)]
        trainer.timestep_bins.add(torch.tensor([50.0, 950.0]), torch.tensor([float(trainer.step), 1.0]))
        skipped = not math.isfinite(loss(trainer.step))
        return StepReport(values, skipped, trainer.step == stops_at, samples, [LAYOUT] * len(samples))

    trainer.train_step = train_step  # type: ignore[method-assign]
    return trainer


def checkpoints(out: Path) -> list[str]:
    return [path.name for path in checkpoints_in(out / "checkpoints")]


def own_messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("refalign_ext")]


def test_everything_comes_when_it_is_due(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = change(
        out=str(tmp_path),
        steps=10,
        log_every=4,
        save_every=3,
        preview_every=5,
        validate_every=4,
        keep_last=2,
    )
    trainer, log = quick(config), Log()
    trainer.validate = lambda: {"validation/loss": 2.0}  # type: ignore[method-assign]
    previews: list[int] = []

    def preview(step: int) -> dict[str, float]:
        previews.append(step)
        return {"judge": 1.0}

    train_loop(trainer, log, preview=preview)
    assert log.steps_with("loss/total") == [4, 8, 10]
    assert log.values("loss/total") == [4.0, 8.0, 10.0]
    assert log.steps_with("judge") == previews == [5, 10]
    assert log.steps_with("validation/loss") == [4, 8, 10]
    assert checkpoints(tmp_path) == ["step-00000009", "step-00000010"]
    bar = capsys.readouterr().err
    for part in ("training: 100%", "10/10", "loss 10.000", "RA+ 10.000", "RA- 10.000", "<00:00"):
        assert part in bar, bar


def test_nothing_is_due_that_was_not_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = change(out=str(tmp_path), steps=3, log_every=1, save_every=2, preview_every=0, validate_every=0)
    trainer, log = quick(config), Log()
    trainer.validate = lambda: pytest.fail("validated")  # type: ignore[method-assign]
    train_loop(trainer, log, preview=lambda step: pytest.fail("previewed"), progress=False)
    assert log.steps_with("loss/total") == [1, 2, 3]
    assert len(log.entries) == 3
    assert capsys.readouterr().err == ""
    without = build(change(out=str(tmp_path / "b"), steps=1, validate_every=1))
    without.validation = None
    other = Log()
    train_loop(without, other, progress=False)
    assert other.steps_with("validation/loss") == []


def test_a_stop_is_logged_and_saved_at_the_step_it_came(tmp_path: Path) -> None:
    config = change(out=str(tmp_path), save_every=100, log_every=100, validate_every=1, preview_every=4)
    trainer, log = quick(config, stops_at=4), Log()
    trainer.validate = lambda: {"validation/loss": 2.0}  # type: ignore[method-assign]
    train_loop(
        trainer, log, preview=lambda step: pytest.fail("who stops does not wait for pictures"), progress=False
    )
    assert trainer.step == 4
    assert checkpoints(tmp_path) == ["step-00000004"]
    assert log.steps_with("loss/total") == [4]
    assert log.steps_with("validation/loss") == [1, 2, 3]


def test_speed_counts_clips_tokens_and_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 4 clips of 12 tokens between log entries, at one second a step by the meter's clock."""
    monkeypatch.setattr("refalign_ext.training.loop.peak_flops", lambda device: 1e6)
    config = change(
        out=str(tmp_path), steps=4, log_every=2, global_batch_size=4, validate_every=2, preview_every=2
    )
    trainer, log = quick(config), Log()
    now = [0.0]
    monkeypatch.setattr(
        "refalign_ext.training.metrics.Throughput.__init__.__kwdefaults__",
        {"peak_flops": None, "clock": lambda: now[0]},
    )
    original = trainer.train_step

    def train_step() -> StepReport:
        now[0] += 1.0
        return dataclasses.replace(original(), data_wait=0.25)

    def slow(*_: object) -> dict[str, float]:
        now[0] += 100.0
        return {}

    trainer.train_step = train_step  # type: ignore[method-assign]
    trainer.validate = slow  # type: ignore[method-assign]
    train_loop(trainer, log, preview=slow, progress=False)
    shape, alignment = ModelShape.of(trainer.trained.dit), AlignmentShape(DEPTH, TEACHER_DIM)
    work = step_flops(shape, 8, 4, references=1, alignment=alignment).model
    assert log.steps_with("speed/seconds_per_step") == [2, 4]
    for _, values in log.entries:
        if "loss/total" not in values:
            continue
        assert values["speed/seconds_per_step"] == pytest.approx(1.0)
        assert values["speed/clips_per_second"] == pytest.approx(4.0)
        assert values["speed/tokens_per_second"] == pytest.approx(48.0)
        assert values["speed/data_wait"] == pytest.approx(0.25)
        assert values["speed/mfu"] == pytest.approx(4 * work / 1e6)
        assert values["memory/peak_gib"] > 0


def test_the_work_of_adapters_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refalign_ext.training.loop.peak_flops", lambda device: 1e9)
    shares = []
    for changes in ({}, {"lora_rank": 2, "ema_decay": 0.0}):
        trainer, log = (
            quick(change(out=str(tmp_path / str(len(shares))), steps=1, validate_every=0, **changes)),
            Log(),
        )
        train_loop(trainer, log, progress=False)
        (values,) = [values for _, values in log.entries]
        shares.append(values["speed/mfu"] / values["speed/clips_per_second"])
    assert 0.5 * shares[0] < shares[1] < 0.9 * shares[0]


def test_the_loss_by_timestep_starts_anew_with_every_entry(tmp_path: Path) -> None:
    trainer, log = quick(change(out=str(tmp_path), steps=4, log_every=2, validate_every=0)), Log()
    train_loop(trainer, log, progress=False)
    assert log.values("loss_by_timestep/0-100") == [1.5, 3.5]  # means of steps 1 and 2, 3 and 4
    assert log.values("loss_by_timestep/900-1000") == [1.0, 1.0]
    names = {name for _, values in log.entries for name in values if name.startswith("loss_by_timestep/")}
    assert names == {"loss_by_timestep/0-100", "loss_by_timestep/900-1000"}


def test_spikes_name_their_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def loss(step: int) -> float:
        return {60: 9.0, 61: math.nan, 62: 1.0}.get(step, 1.0 + 0.01 * (step % 3))

    config = change(out=str(tmp_path), steps=64, log_every=100, save_every=100, validate_every=0)
    with caplog.at_level(logging.WARNING):
        train_loop(quick(config, loss=loss), Log(), progress=False)
    assert own_messages(caplog) == ["loss spike 9.0000 in step 60: samples sample-60-0, sample-60-1"]
    caplog.clear()
    many = change(config, global_batch_size=20, out=str(tmp_path / "many"))
    train_loop(quick(many, loss=loss), Log(), progress=False)
    (line,) = own_messages(caplog)
    assert line.endswith("sample-60-15 and 4 more") and line.count(", ") == 15


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    trainer = quick(change(out=str(tmp_path), steps=2, validate_every=0))
    with pytest.raises(OSError, match="step-00000002 could not be written") as caught:
        train_loop(trainer, Log(), progress=False)
    assert "\n" not in str(caught.value)
