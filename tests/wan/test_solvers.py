"""Solver grids and trajectories against facts measured on the published code, and against the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wan.utils.solvers import SOLVERS, make_solver, shift_sigmas


def grid(name: str, steps: int, shift: float) -> np.ndarray:
    start = float(np.float32(0.999)) if name == "unipc" else 1.0
    return shift_sigmas(np.linspace(start, 0, steps + 1)[:-1], shift)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 3, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_grid(name: str, steps: int, shift: float) -> None:
    solver = make_solver(name, steps, shift)
    assert solver.sigmas.shape == (steps + 1,)
    assert solver.sigmas[-1] == 0
    np.testing.assert_allclose(solver.sigmas[:-1].numpy(), grid(name, steps, shift), atol=1e-7, rtol=0)
    assert solver.timesteps.dtype == torch.float32
    assert solver.timesteps.shape == (steps,)
    assert bool((solver.timesteps[1:] < solver.timesteps[:-1]).all())


def test_upstream_unipc_starts_below_one_and_truncates_its_times() -> None:
    solver = make_solver("unipc", 50, 5.0)
    # sigma 0.999 shifted by 5, and the times that upstream casts to int64
    assert solver.sigmas[0].item() == pytest.approx(5 * 0.999 / (1 + 4 * 0.999), abs=1e-7)
    assert solver.timesteps[:4].tolist() == [999.0, 995.0, 991.0, 987.0]
    assert torch.equal(solver.timesteps, solver.timesteps.trunc())


def test_dpm_and_euler_start_at_one() -> None:
    assert make_solver("dpm++", 50, 5.0).sigmas[0] == 1.0
    assert make_solver("euler", 50, 5.0).sigmas[0] == 1.0


def test_euler_times_are_not_rounded() -> None:
    solver = make_solver("euler", 50, 5.0)
    expected = torch.from_numpy(grid("euler", 50, 5.0) * 1000)
    torch.testing.assert_close(solver.timesteps.double(), expected, atol=1e-3, rtol=0)
    assert not torch.equal(solver.timesteps, solver.timesteps.round())


def test_euler_steps_follow_the_formula() -> None:
    solver = make_solver("euler", 7, 3.0)
    sigmas = np.append(grid("euler", 7, 3.0), 0.0)
    generator = torch.Generator().manual_seed(0)
    sample = expected = torch.randn(4, 3, 2, 2, generator=generator)
    for index, timestep in enumerate(solver.timesteps):
        velocity = torch.randn(4, 3, 2, 2, generator=generator)
        sample = solver.step(velocity, timestep, sample)
        expected = expected + (sigmas[index + 1] - sigmas[index]) * velocity
    torch.testing.assert_close(sample, expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_straight_flow_ends_at_the_data(name: str, steps: int) -> None:
    # On a straight path the velocity is noise - data everywhere, so every solver must land on the data exactly.
    generator = torch.Generator().manual_seed(1)
    noise, data = torch.randn(2, 4, 3, 2, 2, generator=generator)
    solver = make_solver(name, steps, 5.0)
    sample = (1 - solver.sigmas[0]) * data + solver.sigmas[0] * noise
    for timestep in solver.timesteps:
        sample = solver.step(noise - data, timestep, sample)
    torch.testing.assert_close(sample, data, atol=2e-5, rtol=0)


def test_convergence_to_the_exact_solution() -> None:
    # data ~ N(0, s^2): the exact velocity at x is known, and so is where a noise sample ends.
    spread = 0.5

    def error(name: str, steps: int) -> float:
        solver = make_solver(name, steps, 1.0)
        sample = torch.ones(1, 1, 1, 1)
        start = solver.sigmas[0].double()
        for sigma, timestep in zip(solver.sigmas[:-1].double(), solver.timesteps, strict=True):
            variance = (1 - sigma) ** 2 * spread**2 + sigma**2
            velocity = sample.double() * (sigma - (1 - sigma) * spread**2) / variance
            sample = solver.step(velocity.float(), timestep, sample)
        exact = spread / ((1 - start) ** 2 * spread**2 + start**2).sqrt()
        return abs(sample.item() / exact.item() - 1)

    for name in SOLVERS:
        assert error(name, 40) < error(name, 20) / 1.6
    assert error("unipc", 20) < error("dpm++", 20) < error("euler", 20) / 2


def test_many_steps_with_repeating_times_still_advance() -> None:
    solver = make_solver("dpm++", 400, 8.0)
    assert len(solver.timesteps.unique()) < 400
    sample = torch.zeros(1, 1, 2, 2)
    for timestep in solver.timesteps:
        sample = solver.step(torch.ones_like(sample), timestep, sample)
    torch.testing.assert_close(sample, -torch.ones_like(sample), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("heun", 5, 5.0), "heun.*unipc, dpm\\+\\+, euler"),
        (("euler", 0, 5.0), "steps is 0"),
        (("euler", 5, 0.0), "shift is 0.0"),
        (("euler", 5, float("nan")), "shift is nan"),
    ],
)
def test_bad_settings_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_solver(*arguments)
