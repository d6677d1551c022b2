"""Training timesteps: how they are sampled and how each one weights the losses, as recipes with a name.

A timestep is t = 1000 * sigma in (0, 1000], kept in float32 or float64 and never rounded to a grid of integers or to bf16
(bf16 leaves 294 distinct values of 1000).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
_RELEASE_SHIFT = 5.0


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """shift * s / (1 + (shift - 1) * s): moves noise levels towards 1 for shift > 1, as the sampling grids do."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def release_timesteps() -> Tensor:
    """The 1000 timesteps that the release samples from, descending from 1000, [1000] float64."""
    uniform = torch.linspace(1.0, 0.0, NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float64)[:-1]
    return NUM_TRAIN_TIMESTEPS * shift_sigma(uniform, _RELEASE_SHIFT)


def _uniform_sigma(count: int, generator: torch.Generator) -> Tensor:
    # rand lies in [0, 1); 1 - rand lies in (0, 1], so pure noise is possible and a clean latent is not.
    return 1.0 - torch.rand(count, generator=generator, dtype=torch.float64)


def _release_sigma(count: int, generator: torch.Generator) -> Tensor:
    index = torch.randint(NUM_TRAIN_TIMESTEPS, (count,), generator=generator)
    return 1.0 - index.double() / NUM_TRAIN_TIMESTEPS


def _logit_normal_sigma(count: int, generator: torch.Generator) -> Tensor:
    return torch.sigmoid(torch.randn(count, generator=generator, dtype=torch.float64))


def _one(timestep: Tensor) -> Tensor:
    return torch.ones_like(timestep)


def _bell(timestep: Tensor) -> Tensor:
    return torch.exp(-2.0 * ((timestep - NUM_TRAIN_TIMESTEPS / 2) / NUM_TRAIN_TIMESTEPS).square())


def _release_flow_weight(timestep: Tensor) -> Tensor:
    grid = _bell(release_timesteps())
    lowest = grid.min().item()
    scale = NUM_TRAIN_TIMESTEPS / (grid - lowest).sum().item()
    # Below the grid's smallest timestep the bell may fall under the grid's minimum by rounding: a weight is never negative.
    return ((_bell(timestep.double()) - lowest) * scale).clamp_min(0.0).to(timestep.dtype)


def _cubic_gate(timestep: Tensor) -> Tensor:
    return (timestep / NUM_TRAIN_TIMESTEPS) ** 3


@dataclass(frozen=True)
class TimestepRecipe:
    """How timesteps are sampled and how they weight the flow-matching and the reference-alignment loss."""

    sample_sigma: Callable[[int, torch.Generator], Tensor]
    """(count, generator) -> unshifted sigma in (0, 1], [count] float64."""
    shift: float
    """Shift of the sampled sigma; 1 leaves it as it is."""
    flow_weight: Callable[[Tensor], Tensor]
    """Timesteps [B] -> weights of the flow-matching loss [B]."""
    alignment_gate: Callable[[Tensor], Tensor]
    """Timesteps [B] -> weights of the reference-alignment loss [B]."""

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Sample timesteps in (0, 1000], [count] float32, on the CPU: a seed gives the same ones on any device."""
        assert generator.device.type == "cpu"
        return (NUM_TRAIN_TIMESTEPS * shift_sigma(self.sample_sigma(count, generator), self.shift)).float()


TIMESTEP_RECIPES: dict[str, TimestepRecipe] = {
    # The paper says no more than "rectified flow", so: uniform sigma, no shift, every timestep weighs the same.
    "paper": TimestepRecipe(_uniform_sigma, 1.0, _one, _one),
    # As in the official release: the shifted grid with its bell-shaped flow weight and alignment gated towards high noise.
    "release": TimestepRecipe(_release_sigma, _RELEASE_SHIFT, _release_flow_weight, _cubic_gate),
    "release_ungated": TimestepRecipe(_release_sigma, _RELEASE_SHIFT, _release_flow_weight, _one),
    # Most steps at middle noise, where the tiny model learns fastest; weights as in the paper recipe.
    "logit_normal": TimestepRecipe(_logit_normal_sigma, 1.0, _one, _one),
    # The same leaning towards high noise, where a clip's layout and its subjects' colours are decided.
    "logit_normal_shift4": TimestepRecipe(_logit_normal_sigma, 4.0, _one, _one),
}


def add_noise(latents: Sequence[Tensor], noise: Sequence[Tensor], timestep: Tensor) -> list[Tensor]:
    """z_t = (1 - sigma) z_0 + sigma eps (eq. 1) with sigma = t / 1000, per sample, sizes may differ.

    Args:
        latents: B clean latents, [C, F, H, W] each.
        noise: B noise tensors of the same shapes.
        timestep: [B], in (0, 1000].
    """
    if timestep.shape != (len(latents),):
        raise ValueError(f"timestep must have shape [{len(latents)}], got {tuple(timestep.shape)}")
    noisy = []
    for sample, noise_sample, level in zip(
        latents, noise, timestep.double() / NUM_TRAIN_TIMESTEPS, strict=True
    ):
        sigma = level.to(sample.device, torch.promote_types(sample.dtype, torch.float32))
        noisy.append((1.0 - sigma) * sample + sigma * noise_sample)
    return noisy
