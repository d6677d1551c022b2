"""Muon: momentum whose update is orthogonalised, for the matrices of small models (Jordan et al. 2024).

torch.optim.Muon needs torch 2.9 and takes matrices only; this one runs on every torch we support and treats a
convolution's kernel as a matrix of output channels by everything else.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix, for [..., rows, columns], in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315  # quintic coefficients published with Muon
    transposed = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if transposed else matrix
    # The iteration is stable in bf16 and only its direction matters; on small models fp32 would double the step's cost.
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if transposed else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for parameters of two or more dimensions; the rest belongs to AdamW.

    The update is scaled by sqrt(max(1, rows / columns)), as in the original publication. Matrices of one shape are
    orthogonalised together. Of sharded ones (DTensor) every rank gathers the update whole and keeps its own rows.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 3e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            if any(parameter.ndim < 2 for parameter in group["params"]):
                raise ValueError(
                    "Muon takes parameters with two or more dimensions; give the others to AdamW"
                )

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"]).flatten(1)
                by_shape.setdefault(tuple(update.shape), []).append((parameter, _whole(update)))
            for (rows, columns), members in by_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in members]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for (parameter, _), update in zip(members, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(_like(update.view(parameter.shape), parameter), alpha=-scale)


def _whole(update: Tensor) -> Tensor:
    return update.full_tensor() if hasattr(update, "full_tensor") else update


def _like(update: Tensor, parameter: Tensor) -> Tensor:
    """The whole `update`, which all ranks have, placed as `parameter` is."""
    if not hasattr(parameter, "full_tensor"):
        return update
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    whole = DTensor.from_local(update.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(mesh, parameter.placements)
