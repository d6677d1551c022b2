"""Collectives that gradients pass through, each with its exact adjoint.

The objective that all of them differentiate is the sum over ranks of what each rank computes. Ranks that share a sample
compute its loss more than once, so a rank's gradient is `sequence` times its share, and the average that FSDP takes over
all ranks makes it whole again. Raw collectives on tensors that need gradients are silently not differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    """[size, ...]: slice i goes to rank i, and slice i of the result came from rank i. Its adjoint is itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(gradient, ctx.group), None


class _AllGather(torch.autograd.Function):
    """x of every rank, [size, *x.shape]. Its adjoint is the reduce-scatter of the gradients' sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        out = x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather(list(out.unbind(0)), x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out = gradient.new_empty(gradient.shape[1:])
        dist.reduce_scatter(out, [part.contiguous() for part in gradient.unbind(0)], group=ctx.group)
        return out, None


def scatter_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, L, H, C] of this rank's tokens -> [B, size * L, H / size, C]: all tokens of the group, some of the heads."""
    size = dist.get_world_size(group)
    batch, length, heads, channels = x.shape
    parts = x.reshape(batch, length, size, heads // size, channels).permute(
        2, 0, 1, 3, 4
    )  # [size, B, L, H/size, C]
    parts = _AllToAll.apply(parts, group)  # slice i: the tokens of rank i
    return parts.transpose(0, 1).reshape(batch, size * length, heads // size, channels)


def gather_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse of `scatter_heads`: [B, size * L, H / size, C] -> [B, L, H, C]."""
    size = dist.get_world_size(group)
    batch, length, heads, channels = x.shape
    parts = x.reshape(batch, size, length // size, heads, channels).transpose(0, 1)  # [size, B, L, H/size, C]
    parts = _AllToAll.apply(parts, group)  # slice i: the heads of rank i
    return parts.permute(1, 2, 0, 3, 4).reshape(batch, length // size, size * heads, channels)


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, L, ...] of this rank's tokens -> [B, size * L, ...], in rank order."""
    return _AllGather.apply(x, group).transpose(0, 1).flatten(1, 2)
