"""From noise to latents with any model and any solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class SolverProtocol(Protocol):
    """What `denoise` needs of a solver; `make_solver` gives such objects."""

    timesteps: torch.Tensor

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor: ...


ModelFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def denoise(
    model_fn: ModelFunction,
    noise: torch.Tensor,
    solver: SolverProtocol,
    *,
    progress: bool = True,
    callback: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Integrates the flow from noise to data.

    Args:
        model_fn: `(latents, timestep) -> velocity`, guidance included; `timestep` is a float32 scalar tensor and
            the velocity has the shape of the latents.
        noise: the starting latents, any shape with at least two axes, usually [C, F, H, W] in float32.
        solver: gives `timesteps` and `step`; it must be fresh, because multistep solvers remember earlier steps.
        progress: shows a bar on standard error.
        callback: called as `callback(step index, latents)` after each step.

    Returns:
        The latents at noise level 0, shaped like `noise`.

    Raises:
        ValueError: when the result holds values that are not numbers.
    """
    from tqdm.auto import tqdm

    latents = noise
    steps = tqdm(solver.timesteps, desc="sampling", unit="step", disable=not progress, dynamic_ncols=True)
    for index, timestep in enumerate(steps):
        velocity = model_fn(latents, timestep)
        latents = solver.step(velocity, timestep, latents)
        if callback is not None:
            callback(index, latents)
    if not torch.isfinite(latents).all():
        raise ValueError(
            "sampling ended in values that are not numbers: try --dtype fp32 or smaller guidance scales"
        )
    return latents
