"""Timestep recipes: distributions, weights, seeds; and the noising of latents."""

import math

import pytest
import torch

from refalign_ext.timesteps import (
    TIMESTEP_RECIPES,
    add_noise,
    release_timesteps,
    shift_sigma,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", TIMESTEP_RECIPES)
def test_samples_are_seeded_and_in_range(name):
    recipe = TIMESTEP_RECIPES[name]
    first = recipe.sample(2000, generator())
    assert first.shape == (2000,)
    assert first.dtype == torch.float32
    assert first.device.type == "cpu"
    assert first.min() > 0
    assert first.max() <= 1000
    torch.testing.assert_close(first, recipe.sample(2000, generator()), rtol=0, atol=0)
    assert not torch.equal(first, recipe.sample(2000, generator(1)))


@pytest.mark.parametrize("name", TIMESTEP_RECIPES)
def test_one_by_one_is_the_same_as_a_batch_for_weights(name):
    recipe = TIMESTEP_RECIPES[name]
    timesteps = recipe.sample(5, generator())
    for weigh in (recipe.flow_weight, recipe.alignment_gate):
        weights = weigh(timesteps)
        assert weights.shape == timesteps.shape
        assert weights.dtype == timesteps.dtype
        assert (weights >= 0).all()
        torch.testing.assert_close(weights, torch.cat([weigh(timestep[None]) for timestep in timesteps]))


def test_paper_is_uniform_with_equal_weights():
    recipe = TIMESTEP_RECIPES["paper"]
    sigma = recipe.sample(40000, generator()).double() / 1000
    quantiles = torch.quantile(sigma, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    torch.testing.assert_close(
        quantiles, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), atol=0.01, rtol=0
    )
    assert (recipe.flow_weight(sigma) == 1).all()
    assert (recipe.alignment_gate(sigma) == 1).all()


def test_shifted_timesteps():
    plain = TIMESTEP_RECIPES["logit_normal"].sample(100, generator()) / 1000
    shifted = TIMESTEP_RECIPES["logit_normal_shift4"].sample(100, generator()) / 1000
    torch.testing.assert_close(shifted, 4 * plain / (1 + 3 * plain))


def test_release_draws_every_step_of_its_grid():
    grid = release_timesteps()
    expected = [1000 * 5 * (u / 1000) / (1 + 4 * u / 1000) for u in range(1000, 0, -1)]
    torch.testing.assert_close(grid, torch.tensor(expected, dtype=torch.float64))
    drawn = TIMESTEP_RECIPES["release"].sample(20000, generator()).double()
    nearest = (drawn[:, None] - grid.flip(0)[None]).abs().min(1).values
    assert nearest.max() < 1e-4
    assert drawn.float().unique().numel() == 1000  # bf16 would leave 294


def test_release_weights_are_the_formula():
    recipe, grid = TIMESTEP_RECIPES["release"], release_timesteps()
    bell = [math.exp(-2 * ((timestep - 500) / 1000) ** 2) for timestep in grid.tolist()]
    lowest = min(bell)
    total = sum(value - lowest for value in bell)
    expected = torch.tensor([(value - lowest) * 1000 / total for value in bell], dtype=torch.float64)
    torch.testing.assert_close(recipe.flow_weight(grid), expected)
    assert recipe.flow_weight(grid).mean().item() == pytest.approx(1.0)
    assert recipe.flow_weight(grid.float()).dtype == torch.float32
    gate = recipe.alignment_gate(grid)
    torch.testing.assert_close(gate, (grid / 1000) ** 3)
    assert gate.mean().item() == pytest.approx(0.53, abs=0.005)


def test_logit_normal():
    recipe = TIMESTEP_RECIPES["logit_normal"]
    sigma = recipe.sample(40000, generator()).double() / 1000
    logit = torch.log(sigma / (1 - sigma))
    assert logit.mean().item() == pytest.approx(0.0, abs=0.02)
    assert logit.std().item() == pytest.approx(1.0, abs=0.02)


def test_shift_of_one_changes_nothing():
    sigma = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shift_sigma(sigma, 1.0), sigma)
    torch.testing.assert_close(shift_sigma(torch.tensor([0.0, 1.0]), 5.0), torch.tensor([0.0, 1.0]))


def test_add_noise():
    """Each sample at its own level, and z_t moves along eps - z_0."""
    latents = [torch.full((1, 2), 2.0), torch.full((3,), 4.0)]
    noise = [torch.full((1, 2), 10.0), torch.full((3,), -4.0)]
    noisy = add_noise(latents, noise, torch.tensor([250.0, 1000.0]))
    torch.testing.assert_close(noisy, [torch.full((1, 2), 4.0), torch.full((3,), -4.0)])
    with pytest.raises(ValueError, match="timestep"):
        add_noise(latents, noise, torch.tensor([250.0]))
