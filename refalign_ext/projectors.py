"""Projectors from the student's reference tokens to the teacher's feature space (paper eq. 7).

Projectors exist only during training, live outside the diffusion transformer, and are saved beside it under the release's
key names `blocks.{i}.input_mlp.proj.{0,2}.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

_KEY = re.compile(r"blocks\.(\d+)\.input_mlp\.proj\.([02])\.weight")


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
        if student_dim < 2 or teacher_dim < 1 or depth < 1:
            raise ValueError(
                f"projectors need student_dim >= 2, teacher_dim >= 1 and depth >= 1, got {student_dim}, {teacher_dim}, {depth}"
            )
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


def _describe(projectors: Mapping[str, Tensor], source: str) -> tuple[int, int, int]:
    """(student_dim, teacher_dim, depth) of a release's projector tensors, all shapes checked."""
    found = {key: _KEY.fullmatch(key) for key in projectors}
    foreign = [key for key, match in found.items() if match is None]
    if foreign:
        raise ValueError(
            f"{source}: {foreign[0]} is not a projector tensor (blocks.<i>.input_mlp.proj.<0|2>.weight)"
        )
    if not found:
        raise ValueError(
            f"{source}: no projector tensors (blocks.<i>.input_mlp.*); train new projectors instead"
        )
    depth = 1 + max(int(match[1]) for match in found.values())
    missing = [
        key
        for index in range(depth)
        for key in (f"blocks.{index}.input_mlp.proj.0.weight", f"blocks.{index}.input_mlp.proj.2.weight")
        if key not in projectors
    ]
    if missing:
        raise ValueError(f"{source}: {len(missing)} projector tensors are missing, first {missing[0]}")
    first, second = (
        projectors["blocks.0.input_mlp.proj.0.weight"],
        projectors["blocks.0.input_mlp.proj.2.weight"],
    )
    student_dim, teacher_dim = first.shape[-1], second.shape[0]
    expected = {"0": (student_dim // 2, student_dim), "2": (teacher_dim, student_dim // 2)}
    for key, match in found.items():
        if tuple(projectors[key].shape) != expected[match[2]]:
            raise ValueError(
                f"{source}: {key} has shape {tuple(projectors[key].shape)}, expected {expected[match[2]]}"
            )
    return student_dim, teacher_dim, depth


def projectors_from_tensors(
    projectors: Mapping[str, Tensor],
    *,
    student_dim: int | None = None,
    teacher_dim: int | None = None,
    depth: int | None = None,
    source: str = "projectors",
) -> ReferenceProjectors:
    """Projectors from the `projectors` of a RefAlign release; sizes are read from the tensors.

    Args:
        projectors: `blocks.{i}.input_mlp.proj.{0,2}.weight` -> tensor.
        student_dim, teacher_dim, depth: what the run needs; None accepts whatever the tensors have.
        source: named in errors.

    Raises:
        ValueError: foreign, missing or misshapen tensors, or sizes other than those asked for.
    """
    sizes = _describe(projectors, source)
    wanted = (student_dim, teacher_dim, depth)
    remedies = (
        "choose the task these weights belong to",
        "choose the teacher they were trained with",
        "set the depth",
    )
    names = ("student_dim", "teacher_dim", "depth")
    for name, has, wants, remedy in zip(names, sizes, wanted, remedies, strict=True):
        if wants is not None and wants != has:
            raise ValueError(
                f"{source}: projectors have {name} {has}, this run needs {wants}; {remedy} or set --alignment.new_projectors"
            )
    with torch.device("meta"):
        module = ReferenceProjectors(*sizes)
    # Copies: training must not change the tensors of the caller's checkpoint.
    module.load_state_dict(
        {key: value.clone() for key, value in projectors.items()}, strict=True, assign=True
    )
    return module.requires_grad_(True)
