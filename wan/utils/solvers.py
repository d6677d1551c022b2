"""The solvers that turn noise into latents: thin adapters over diffusers' schedulers with Wan's and RefAlign's grids.

Only the grids are ours. diffusers' own defaults give other noise levels than the released models are sampled
with (by up to 6e-3 for UniPC and 7e-2 for Euler), so every grid is written down here and handed to the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Moves noise levels in [0, 1] towards 1: `shift * s / (1 + (shift - 1) * s)`; shift 1 changes nothing."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


class Solver:
    """One run from noise to latents.

    Attributes:
        name: "unipc", "dpm++" or "euler".
        timesteps: float32 tensor of `num_steps` times in (0, num_train_timesteps], largest first, on the device
            asked for. UniPC and DPM++ carry whole numbers, because upstream truncates them to int64 before the
            model sees them; Euler carries the exact `sigma * num_train_timesteps`.
        sigmas: float32 tensor of `num_steps + 1` noise levels on the CPU, ending in 0.
    """

    def __init__(self, name: str, scheduler: Any, timesteps: torch.Tensor) -> None:
        self.name = name
        self.timesteps = timesteps
        self.sigmas: torch.Tensor = scheduler.sigmas
        self._scheduler = scheduler
        # Positions, not times, drive the schedulers: truncated times can repeat when there are many steps.
        scheduler.set_begin_index(0)

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor | float, sample: torch.Tensor
    ) -> torch.Tensor:
        """Advances `sample` by one grid step.

        Args:
            model_output: the predicted velocity (noise minus data) at `sample`, same shape as `sample`.
            timestep: the entry of `timesteps` the velocity was predicted at. Steps must be taken in grid order.
            sample: the current latents, any shape with at least two axes.

        Returns:
            The latents at the next noise level, in the dtype of `sample`.
        """
        prediction = model_output.to(sample.dtype)
        return self._scheduler.step(prediction, timestep, sample, return_dict=False)[0].to(sample.dtype)


def make_solver(
    name: str,
    num_steps: int,
    shift: float,
    num_train_timesteps: int = 1000,
    device: torch.device | str = "cpu",
) -> Solver:
    """Builds a solver with the grid the released models are sampled with.

    Args:
        name: of a row of `SOLVERS`.
        num_steps: number of model evaluations, at least 1.
        shift: how far the grid leans towards high noise; above 0.
        num_train_timesteps: the time that stands for sigma = 1.
        device: where `timesteps` lives.

    Raises:
        ValueError: for an unknown name, fewer than one step or a shift that is not above 0.
    """
    if num_steps < 1:
        raise ValueError(f"the number of sampling steps is {num_steps}: give 1 or more")
    if not shift > 0:
        raise ValueError(f"the sampling shift is {shift}: give a number above 0 (5.0 is usual)")
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}: choose one of {', '.join(SOLVERS)}")
    scheduler = SOLVERS[name](num_steps, shift, num_train_timesteps)
    return Solver(name, scheduler, scheduler.timesteps.to(device=device, dtype=torch.float32))


def _unipc(num_steps: int, shift: float, num_train_timesteps: int) -> Any:
    """Upstream's wan/utils/fm_solvers_unipc.py, with the shift given to `set_timesteps`."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        num_train_timesteps=num_train_timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )
    # Upstream rounds its largest noise level to float32 and lays the grid out in float64.
    largest = float(np.float32(1 - 1 / num_train_timesteps))
    scheduler.set_timesteps(sigmas=np.linspace(largest, 0, num_steps + 1)[:-1])
    return scheduler


def _dpm(num_steps: int, shift: float, num_train_timesteps: int) -> Any:
    """Upstream's wan/utils/fm_solvers.py through `get_sampling_sigmas`."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=num_train_timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
    )
    # The scheduler takes no grid of its own, so its state is laid out first and its grid replaced afterwards.
    scheduler.set_timesteps(num_steps)
    sigmas = shift_sigmas(np.linspace(1, 0, num_steps + 1)[:-1], shift)
    scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
    scheduler.timesteps = torch.from_numpy((sigmas * num_train_timesteps).astype(np.int64))
    return scheduler


def _euler(num_steps: int, shift: float, num_train_timesteps: int) -> Any:
    """RefAlign's grid (paper, section "Inference")."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_train_timesteps, shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, num_steps + 1)[:-1])
    return scheduler


SOLVERS: dict[str, Callable[[int, float, int], Any]] = {"unipc": _unipc, "dpm++": _dpm, "euler": _euler}
"""By name: (num_steps, shift, num_train_timesteps) -> a diffusers scheduler whose grid is laid out. A new solver is a
row here, and its name one in `refalign_ext.request.SOLVERS`, which --help reads without torch."""
