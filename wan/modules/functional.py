"""Root mean square norm and rotary position embedding, written so that little memory is moved.

PyTorch has a fused RMS norm only on CUDA; elsewhere the norm, its weight and the rotation read or write the queries
nine times. Here it is five: the norm's factor, one number per token, is folded into the table of rotations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

MAX_POSITIONS = 1024  # length of the table of angles: frames, rows and columns that can be told apart
_HAS_FUSED_RMS_NORM = hasattr(torch.ops.aten, "_fused_rms_norm")


def sinusoidal_embedding_1d(dim: int, position: torch.Tensor) -> torch.Tensor:
    """Cosines, then sines, of `position` [B] at dim / 2 frequencies from 1 down to nearly 1 / 10000.

    Returns float64 [B, dim]. Devices without float64 (MPS) get the table by way of the CPU, in float32.
    """
    assert dim % 2 == 0
    device = torch.device("cpu") if position.device.type == "mps" else position.device
    exponents = torch.arange(dim // 2, dtype=torch.float64, device=device) / (dim // 2)
    angles = torch.outer(position.to(device).to(torch.float64), torch.pow(10000.0, -exponents))
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return embedding.float().to(position.device) if position.device.type == "mps" else embedding


def rope_params(max_seq_len: int, dim: int, theta: float = 10000.0) -> torch.Tensor:
    """Unit complex numbers, [max_seq_len, dim / 2] complex128 on the CPU.

    Position p turns pair i of a head's channels by p / theta^(2 i / dim).
    """
    assert dim % 2 == 0
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64, device="cpu"), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rope_multipliers(
    freqs: torch.Tensor,
    grid_sizes: Sequence[Sequence[int]],
    seq_len: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Cosine and sine for every token of every sample.

    Args:
        freqs: [1024, C / 2] complex128, `WanModel.freqs` (C channels per head).
        grid_sizes: per sample the (frames, rows, columns) of its tokens, which come in row-major order.
        seq_len: number of tokens to which samples are padded; padding is not turned.
        dtype: float32 or float64.
        device: device of the result.

    Returns:
        [B, seq_len, 1, C / 2, 2]; the first size is 1 if all samples have the same grid.

    Raises:
        ValueError: a side of a grid exceeds the table.
    """
    grids = [tuple(int(n) for n in grid) for grid in grid_sizes]
    grids = grids[:1] if len(set(grids)) == 1 else grids
    table = torch.view_as_real(freqs).to(dtype).to(device)  # in this order, for devices without float64
    pairs = table.size(1)
    spatial = pairs // 3
    frame_table, row_table, column_table = table.split([pairs - 2 * spatial, spatial, spatial], dim=1)
    out = table.new_empty(len(grids), seq_len, pairs, 2)
    for multipliers, (frames, rows, columns) in zip(out, grids, strict=True):
        if max(frames, rows, columns) > len(table):
            raise ValueError(
                f"a grid of {frames} x {rows} x {columns} tokens exceeds the {len(table)} rotary positions; "
                "use fewer frames or a smaller size"
            )
        tokens = frames * rows * columns
        parts = (
            frame_table[:frames, None, None].expand(frames, rows, columns, -1, 2),
            row_table[None, :rows, None].expand(frames, rows, columns, -1, 2),
            column_table[None, None, :columns].expand(frames, rows, columns, -1, 2),
        )
        multipliers[:tokens] = torch.cat(parts, dim=3).flatten(0, 2)
        multipliers[tokens:, :, 0] = 1.0
        multipliers[tokens:, :, 1] = 0.0
    return out.unsqueeze(2)


def rope_apply(x: torch.Tensor, grid_sizes: torch.Tensor | None, freqs: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding over (frame, row, column).

    Args:
        x: [B, L, heads, C].
        grid_sizes: [B, 3] frames, rows, columns; only read when `freqs` is the raw table.
        freqs: the raw table `WanModel.freqs` [1024, C / 2] (complex), or the result of `rope_multipliers`.

    Returns:
        [B, L, heads, C] in x's dtype. Half precision is turned in float32.
    """
    return rotate(x, _prepared(freqs, grid_sizes, x))


def rotate(x: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of channels of x [B, L, heads, C] by `rope_multipliers`, in at least float32."""
    pairs = x.to(multipliers.dtype).unflatten(-1, (-1, 2))  # [B, L, heads, C / 2, 2]
    if x.device.type == "mps" or torch.compiler.is_compiling():
        # compilers fuse real arithmetic but not complex numbers, for which MPS lacks kernels
        (real, imaginary), (cosine, sine) = pairs.unbind(-1), multipliers.unbind(-1)
        turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1)
    else:
        turned = torch.view_as_real(_as_complex(pairs) * torch.view_as_complex(multipliers))
    return turned.flatten(-2).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in at least float32, back to x's dtype."""
    if _library_norm_is_fused(x):
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    return _RMSNormRotate.apply(x, weight, None, eps)


def rms_norm_rotate(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    heads: int,
    grid_sizes: torch.Tensor | None,
    freqs: torch.Tensor,
) -> torch.Tensor:
    """`rms_norm` over all heads, then `rope_apply` in each: x [B, L, heads * C] -> [B, L, heads, C]."""
    by_head = x.unflatten(-1, (heads, -1))
    multipliers = _prepared(freqs, grid_sizes, by_head)
    if _library_norm_is_fused(x):
        return rotate(rms_norm(x, weight, eps).unflatten(-1, (heads, -1)), multipliers)
    return _RMSNormRotate.apply(x, weight, multipliers, eps).unflatten(-1, (heads, -1))


def _prepared(freqs: torch.Tensor, grid_sizes: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    if not freqs.is_complex():
        return freqs
    assert grid_sizes is not None, "the raw table of rotations needs grid_sizes"
    dtype = torch.promote_types(x.dtype, torch.float32)
    return rope_multipliers(freqs, grid_sizes.tolist(), x.size(1), dtype, x.device)


def _as_complex(pairs: torch.Tensor) -> torch.Tensor:
    """[..., 2] as complex numbers; copied only if the layout forbids a view."""
    *strides, last = pairs.stride()
    if last != 1 or pairs.storage_offset() % 2 or any(stride % 2 for stride in strides):
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(pairs)


def _library_norm_is_fused(x: torch.Tensor) -> bool:
    """Whether PyTorch beats `_RMSNormRotate`: compilers fuse, CUDA has a kernel, MPS no complex numbers."""
    return torch.compiler.is_compiling() or x.device.type == "mps" or (x.is_cuda and _HAS_FUSED_RMS_NORM)


class _RMSNormRotate(torch.autograd.Function):
    """Norm, weight and, given multipliers, rotation; the backward recomputes nothing but products."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, multipliers: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = weight.to(dtype)
        factor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)  # [B, L, 1]
        factor = factor.square().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, multipliers, factor)
        if multipliers is None:
            # as upstream: the norm is rounded to x's dtype before the weight is applied
            return (x * factor).to(x.dtype).mul_(weight)
        turns = torch.view_as_complex(multipliers) * factor.unsqueeze(-1)  # [B, L, 1, C / 2]
        pairs = torch.view_as_complex((x * weight).view(*x.shape[:-1], -1, turns.size(-1), 2))
        return torch.view_as_real(pairs.mul_(turns)).flatten(-3).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, multipliers, factor = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        if multipliers is not None:
            turns = torch.view_as_complex(multipliers).conj()
            pairs = gradient.reshape(*x.shape[:-1], -1, turns.size(-1), 2)
            gradient = torch.view_as_real(_as_complex(pairs) * turns).flatten(-3)
        product = gradient * x
        weight_gradient = torch.tensordot(factor.squeeze(-1), product, dims=x.dim() - 1)
        along_x = (product @ weight).unsqueeze(-1).mul_(factor.pow(3)).div_(x.size(-1))  # [B, L, 1]
        x_gradient = (gradient * weight).mul_(factor).addcmul_(x, along_x, value=-1.0).to(x.dtype)
        return x_gradient, weight_gradient, None, None
