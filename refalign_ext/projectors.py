"""Projectors from the student's reference tokens to the teacher's feature space (paper eq. 7).

Projectors exist only during training, live outside the diffusion transformer, and are saved beside it under the release's
key names `blocks.{i}.input_mlp.proj.{0,2}.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class _Projection(nn.Module):
    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        hidden_dim = student_dim // 2
        self.proj = nn.Sequential(
            nn.Linear(student_dim, hidden_dim, bias=False),
            nn.SiLU(),
            nn.Linear(hidden_dim, teacher_dim, bias=False),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(tokens)


class _Block(nn.Module):
    """Holds one projection under the name that the release gives it inside a transformer block."""

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.input_mlp = _Projection(student_dim, teacher_dim)


class ReferenceProjectors(nn.Module):
    """`depth` unshared projectors Linear(d, d/2) - SiLU - Linear(d/2, D), without biases.

    Args:
        student_dim: width d of the diffusion transformer.
        teacher_dim: width D of the teacher's features.
        depth: number K of aligned blocks.
    """

    def __init__(self, student_dim: int, teacher_dim: int, depth: int) -> None:
        super().__init__()
        self.student_dim = student_dim
        self.teacher_dim = teacher_dim
        self.depth = depth
        self.blocks = nn.ModuleList(_Block(student_dim, teacher_dim) for _ in range(depth))

    def forward(self, reference_tokens: Sequence[Tensor]) -> list[Tensor]:
        """Project `depth` tensors [B, M, N, d], one per block, to [B, M, N, D]; empty tensors are allowed."""
        if len(reference_tokens) != self.depth:
            raise ValueError(
                f"{self.depth} projectors got the tokens of {len(reference_tokens)} blocks; set tap_depth={self.depth}"
            )
        return [block.input_mlp(tokens) for block, tokens in zip(self.blocks, reference_tokens, strict=True)]


def projectors_from_tensors(
    projectors: Mapping[str, Tensor],
    *,
    student_dim: int,
    teacher_dim: int,
    depth: int,
    source: str,
) -> ReferenceProjectors:
    """Projectors from the `projectors` of a RefAlign release; sizes are read from the tensors.

    Args:
        projectors: `blocks.{i}.input_mlp.proj.{0,2}.weight` -> tensor.
        student_dim, teacher_dim, depth: what the run needs.
        source: named in errors.

    Raises:
        ValueError: foreign, missing or misshapen tensors, or sizes other than those asked for.
    """
    first, second = (projectors.get(f"blocks.0.input_mlp.proj.{layer}.weight") for layer in (0, 2))
    if first is None or second is None:
        raise ValueError(
            f"{source}: no projector tensors (blocks.0.input_mlp.*); train new projectors instead"
        )
    sizes = (first.shape[-1], second.shape[0], len({key.split(".")[1] for key in projectors}))
    with torch.device("meta"):
        module = ReferenceProjectors(*sizes)
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in projectors.items()}
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            raise ValueError(
                f"{source}: {key} is {found.get(key, 'missing')}, expected {expected.get(key, 'no such projector tensor')}"
            )
    for name, has, wants, remedy in (
        ("student_dim", module.student_dim, student_dim, "choose the task these weights belong to"),
        ("teacher_dim", module.teacher_dim, teacher_dim, "choose the teacher they were trained with"),
        ("depth", module.depth, depth, "set the depth"),
    ):
        if wants != has:
            raise ValueError(
                f"{source}: projectors have {name} {has}, this run needs {wants}; {remedy} or set --alignment.new_projectors"
            )
    # Copies: training must not change the tensors of the caller's checkpoint.
    module.load_state_dict({key: value.clone() for key, value in projectors.items()}, assign=True)
    return module.requires_grad_(True)
