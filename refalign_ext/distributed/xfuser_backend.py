"""xfuser's long-context attention in place of our exchange of tokens: optional, for generation on GPUs.

API: xdit-project/xDiT, xfuser/core/distributed/parallel_state.py and xfuser/core/long_ctx_attention/hybrid/attn_layer.py.
Its groups are ours: Ulysses ranks are neighbours, ring ranks stride over them, branches of the guidance are its data
parallelism. It is compared with our exchange before it is used.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from refalign_ext.backbone import ReferenceBackbone
from refalign_ext.distributed.mesh import Parallel, failure_on_any_rank

logger = logging.getLogger(__name__)

# What packages raise that are absent, older or newer than expected, or made for another device.
_FAILURES = (
    *(ImportError, AttributeError, RuntimeError, AssertionError),
    *(TypeError, ValueError, LookupError, OSError),
)
_TOLERANCE = 2e-2  # of attention over normal values in bf16, whose results are of the order of 1
_PROBE_TOKENS = 16  # per rank


class XfuserCore(nn.Module):
    """Attention core of a block in which xfuser exchanges the tokens.

    xfuser knows no padding: where there is some (`k_lens`), and only there, the core that this one holds answers.
    """

    def __init__(self, core: nn.Module, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.core = core
        self.attention = attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor, k_lens: Any) -> Tensor:
        """q, k, v [B, L / size, heads, C] of this rank's tokens -> [B, L / size, heads, C]."""
        if k_lens is not None:
            return self.core(q, k, v, k_lens)
        return self.attention(None, query=q, key=k, value=v, window_size=self.core.window_size)


def attach_xfuser(backbone: ReferenceBackbone, parallel: Parallel, dtype: torch.dtype) -> bool:
    """Let xfuser exchange tokens where `attach_sequence_parallel` has been attached; all ranks call it together.

    If it cannot be imported, set up or does not give our numbers on any rank, a warning on rank 0 says why, nothing is
    changed and False is returned.
    """
    if parallel.sizes.sequence == 1:
        return False
    cores = [block.self_attn.core for block in backbone.model.blocks]
    attentions: list[Callable[..., Tensor]] = []
    # One after another on all ranks: a rank on which one fails would leave the others waiting in the next.
    steps: tuple[Callable[[], None], ...] = (
        lambda: _import("xfuser.core.distributed", "xfuser.core.long_ctx_attention"),
        lambda: attentions.append(_set_up(parallel)),
        lambda: _require_same_numbers(backbone.model, XfuserCore(cores[0], attentions[0]), parallel, dtype),
    )
    for step in steps:
        reason = None
        try:
            step()
        except _FAILURES as error:
            reason = f"on rank {parallel.rank}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        reason = failure_on_any_rank(reason)
        if reason is not None:
            logger.warning("xfuser cannot be used (%s): the torch backend exchanges tokens instead", reason)
            return False
    for block, core in zip(backbone.model.blocks, cores, strict=True):
        block.self_attn.core = XfuserCore(core, attentions[0])
    logger.info("xfuser exchanges tokens among the sequence ranks")
    return True


def _import(*names: str) -> None:
    for name in names:
        importlib.import_module(name)


def _set_up(parallel: Parallel) -> Callable[..., Tensor]:
    groups = importlib.import_module("xfuser.core.distributed")
    attention = importlib.import_module("xfuser.core.long_ctx_attention")
    sizes = parallel.sizes
    groups.init_distributed_environment(rank=parallel.rank, world_size=sizes.world)
    groups.initialize_model_parallel(
        data_parallel_degree=sizes.data,
        sequence_parallel_degree=sizes.sequence,
        ring_degree=sizes.ring,
        ulysses_degree=sizes.ulysses,
    )
    return attention.xFuserLongContextAttention()


@torch.no_grad()
def _require_same_numbers(
    model: nn.Module, candidate: XfuserCore, parallel: Parallel, dtype: torch.dtype
) -> None:
    """Compare with our exchange on a few tokens."""
    generator = torch.Generator().manual_seed(parallel.rank)
    shape = (3, 1, _PROBE_TOKENS, model.num_heads, model.dim // model.num_heads)
    q, k, v = torch.randn(shape, generator=generator).to(parallel.device, dtype).unbind(0)
    difference = (candidate(q, k, v, None).float() - candidate.core(q, k, v, None).float()).abs().max().item()
    if not difference <= _TOLERANCE:
        raise ValueError(f"its attention differs from ours by {difference:.2g}")
