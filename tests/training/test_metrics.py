"""What is measured of a run."""

from __future__ import annotations

import math

import pytest
import torch

from refalign_ext.training.metrics import LossSpikeDetector, Throughput, TimestepBins


def test_loss_by_timestep() -> None:
    bins = TimestepBins()
    bins.add(torch.tensor([0.0, 99.9, 100.0]), torch.tensor([1.0, 3.0, 5.0], requires_grad=True))
    bins.add(torch.tensor([1000.0, 950.0]), torch.tensor([7.0, 8.0], dtype=torch.bfloat16))
    assert bins.sums.shape == (10, 2) and not bins.sums.requires_grad
    expected = {
        "loss_by_timestep/0-100": 2.0,
        "loss_by_timestep/100-200": 5.0,
        "loss_by_timestep/900-1000": 7.5,
    }
    assert TimestepBins.values(bins.sums) == expected
    assert TimestepBins.values(2 * bins.sums) == expected  # two equal ranks
    quarters = TimestepBins(4)
    quarters.add(torch.tensor([250.0]), torch.tensor([1.0]))
    assert TimestepBins.values(quarters.sums) == {"loss_by_timestep/250-500": 1.0}


def around_one(count: int) -> list[float]:
    return [1 + 0.1 * (-1) ** index for index in range(count)]  # mean 1, deviation 0.1


def test_a_spike_stands_out_and_does_not_hide_the_next() -> None:
    early = LossSpikeDetector(5)
    assert not any(early.is_spike(loss) for loss in [*around_one(48), 50.0])  # too early to tell
    watch = LossSpikeDetector(5)
    assert not any(watch.is_spike(loss) for loss in around_one(50))
    assert not watch.is_spike(1.45) and watch.is_spike(1.7)
    assert watch.is_spike(1000.0) and watch.is_spike(1.7)
    assert not watch.is_spike(0.0) and not watch.is_spike(math.nan) and not watch.is_spike(math.inf)
    assert watch.is_spike(1.9)


def test_many_spikes_are_a_new_level_and_old_losses_are_forgotten() -> None:
    watch = LossSpikeDetector(5)
    for loss in around_one(200):
        watch.is_spike(loss)
    assert [watch.is_spike(3 + 0.1 * (-1) ** index) for index in range(70)] == [True] * 10 + [False] * 60
    assert watch.is_spike(4.0)
    sliding = LossSpikeDetector(5, window=60)
    for loss in [*(10 * value for value in around_one(100)), *around_one(60)]:
        sliding.is_spike(loss)
    assert sliding.is_spike(2.0)


def test_spikes_among_equal_losses_and_turned_off() -> None:
    watch = LossSpikeDetector(5)
    assert not any(watch.is_spike(0.1 + 1e-9 * (index % 2)) for index in range(100))
    assert watch.is_spike(0.2)
    off = LossSpikeDetector(0)
    assert not any(off.is_spike(loss) for loss in [*around_one(100), 1e9])


def test_throughput() -> None:
    now = [100.0]
    speed = Throughput(torch.device("cpu"), peak_flops=1000.0, clock=lambda: now[0])
    for _ in range(2):
        now[0] += 4
        speed.step(clips=4, tokens=100, flops=1200.0, data_wait=1.0)
    with speed.paused():
        now[0] += 50
    values = speed.values()
    assert 0.01 < values.pop("memory/peak_gib") < 1000
    assert values == pytest.approx(
        {
            "speed/seconds_per_step": 4.0,
            "speed/clips_per_second": 1.0,
            "speed/tokens_per_second": 25.0,
            "speed/data_wait": 0.25,
            "speed/mfu": 0.3,
        }
    )
    now[0] += 2
    speed.step(clips=1, tokens=10, flops=0.0)
    second = speed.values()
    assert second["speed/seconds_per_step"] == pytest.approx(2) and second["speed/data_wait"] == 0
    assert set(speed.values()) == {"memory/peak_gib"}
    assert "speed/mfu" not in Throughput(torch.device("cpu")).values()
