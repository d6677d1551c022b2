"""Sequence parallelism, attached with hooks: the model and the references' attachment stay single-device code.

Every rank embeds the whole sequence, works on its equal part of the tokens from the first block to the head, and joins
the head's output. Inside a block only self-attention needs other tokens: Ulysses exchanges tokens for heads around its
core, and over the ring keys and values are gathered. The model's own rotary table is cut like the tokens. Text is
never cut.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from refalign_ext.backbone import ReferenceBackbone
from refalign_ext.distributed.collectives import gather_heads, gather_tokens, scatter_heads
from refalign_ext.distributed.mesh import RING, SEQUENCE, ULYSSES, Parallel

# Positions in the arguments of a block's forward, as in upstream: x, e, seq_lens, grid_sizes, freqs, context, context_lens.
_TOKENS, _FREQS = 0, 4


def attach_sequence_parallel(backbone: ReferenceBackbone, parallel: Parallel) -> None:
    """Divide the tokens of every sample among the sequence ranks of `parallel`, for training and generation alike.

    Call it before FSDP and compilation. Gradients follow the rule of `collectives`: averaged over all ranks they are
    those of one device.
    """
    sizes, model = parallel.sizes, backbone.model
    if sizes.sequence == 1:
        return
    if model.num_heads % sizes.ulysses:
        raise ValueError(
            f"{model.num_heads} heads do not divide among {sizes.ulysses} Ulysses ranks: "
            "choose another --ulysses_size or use --ring_size"
        )
    lacking = [
        i
        for i, block in enumerate(model.blocks)
        if not isinstance(getattr(block.self_attn, "core", None), nn.Module)
    ]
    if lacking:
        raise ValueError(
            f"{type(model).__name__} computes attention inside blocks.{lacking[0]}.self_attn: sequence parallelism needs "
            "it as a child module `core`, as in this repository's wan/ (for another tree: python -m refalign_ext patch apply)"
        )
    hooks = _Hooks(backbone, parallel)
    for index, block in enumerate(model.blocks):
        core = block.self_attn.core
        block.register_forward_pre_hook(hooks.cut_first if index == 0 else hooks.cut)
        core.register_forward_pre_hook(hooks.before_attention)
        core.register_forward_hook(hooks.after_attention)
    model.head.register_forward_hook(hooks.join)
    backbone.seq_len_multiple = sizes.sequence
    backbone.sequence_rank, backbone.sequence_size = parallel.sequence_rank, sizes.sequence


class _Hooks:
    def __init__(self, backbone: ReferenceBackbone, parallel: Parallel) -> None:
        self.rank, self.size = parallel.sequence_rank, parallel.sizes.sequence
        self.has_ulysses, self.has_ring = parallel.sizes.ulysses > 1, parallel.sizes.ring > 1
        self.sequence = parallel.group(SEQUENCE)
        self.ulysses, self.ring = parallel.group(ULYSSES), parallel.group(RING)

    def _part(self, x: Tensor) -> Tensor:
        """This rank's part along axis 1. The adjoint of a slice puts zeros elsewhere, as it should."""
        share = x.shape[1] // self.size
        return x.narrow(1, self.rank * share, share)

    def cut(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The rotary table of the held tokens: [B, L, 1, C / 2, 2] -> [B, L / size, 1, C / 2, 2]."""
        return (*args[:_FREQS], self._part(args[_FREQS]), *args[_FREQS + 1 :])

    def cut_first(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same, and the tokens: [B, L, dim] -> [B, L / size, dim]."""
        return self.cut(block, (self._part(args[_TOKENS]), *args[_TOKENS + 1 :]))

    def before_attention(self, core: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """q, k, v [B, L / size, heads, C] -> q [B, L / ring, heads / ulysses, C], k and v [B, L, heads / ulysses, C]."""
        q, k, v, k_lens = args
        if self.has_ulysses:
            q, k, v = (scatter_heads(x, self.ulysses) for x in (q, k, v))
        if self.has_ring:
            k, v = (gather_tokens(x, self.ring) for x in (k, v))
        return q, k, v, k_lens

    def after_attention(self, core: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """[B, L / ring, heads / ulysses, C] -> [B, L / size, heads, C]."""
        return gather_heads(out, self.ulysses) if self.has_ulysses else out

    def join(self, head: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """[B, L / size, patch] -> [B, L, patch]."""
        return gather_tokens(out, self.sequence)
