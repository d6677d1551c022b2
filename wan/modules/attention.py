"""The one place where attention is computed.

`attention` is what the models call. FlashAttention 3, FlashAttention 2 or PyTorch's scaled dot product
attention (SDPA) answers, whichever the device, the dtype and the installed packages allow; every one of them
honours `k_lens`. Public signatures as in Wan-Video/Wan2.1, wan/modules/attention.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

try:
    import flash_attn_interface
except ImportError:
    flash_attn_interface = None

try:
    import flash_attn
except ImportError:
    flash_attn = None

FLASH_ATTN_3_AVAILABLE = flash_attn_interface is not None
FLASH_ATTN_2_AVAILABLE = flash_attn is not None

logger = logging.getLogger(__name__)

_HALF_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_MAX_HEAD_DIM = 256

# CPU training in half precision: SDPA's backward takes 2 to 2.5 times as long as softmax between two matmuls
# while the score matrix is small (16 x 4 heads x 144 x 144, one thread: 26 against 10 ms, forward and
# backward). The gain shrinks as the scores leave the caches, and their memory grows, so larger problems stay
# with SDPA.
_CPU_MATMUL_MAX_SCORES = 2**23

Lengths = Sequence[int] | torch.Tensor | None


def kernel_name(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    dropout_p: float = 0.0,
    version: int | None = None,
) -> str:
    """Which implementation `attention` uses: "FlashAttention 3", "FlashAttention 2" or "SDPA".

    FlashAttention takes half precision on CUDA only; version 3 knows no dropout. `version` asks for one of
    them and falls back to the other if that one is not installed.
    """
    if device.type != "cuda" or dtype not in _HALF_DTYPES or head_dim > _FLASH_MAX_HEAD_DIM:
        return "SDPA"
    usable = [3] if FLASH_ATTN_3_AVAILABLE and dropout_p == 0.0 else []
    if FLASH_ATTN_2_AVAILABLE:
        usable.append(2)
    if not usable:
        return "SDPA"
    return f"FlashAttention {version if version in usable else usable[0]}"


@cache
def announce_kernel(name: str) -> None:
    """Log once per process and kernel which implementation computes attention."""
    logger.info("attention is computed by %s", name)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_lens: Lengths = None,
    k_lens: Lengths = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    version: int | None = None,
) -> torch.Tensor:
    """`attention` that rounds other inputs to `dtype` (float16 or bfloat16) where a FlashAttention kernel can run."""
    if dtype not in _HALF_DTYPES:
        raise ValueError(
            f"flash_attention computes in float16 or bfloat16, not in {dtype}; use attention() instead"
        )
    options = (dropout_p, softmax_scale, q_scale, causal, window_size, deterministic, dtype)
    return attention(q, k, v, q_lens, k_lens, *options, fa_version=version or 3)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_lens: Lengths = None,
    k_lens: Lengths = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    fa_version: int | None = None,
) -> torch.Tensor:
    """Softmax attention, computed in the dtype of q.

    Args:
        q: [B, Lq, Nq, C] queries.
        k: [B, Lk, Nk, C] keys; Nq is a multiple of Nk.
        v: [B, Lk, Nk, Cv] values.
        q_lens: [B] valid queries per sample; the rows after them come out as zeros. None: all.
        k_lens: [B] valid keys per sample, each at least 1; the keys after them are never attended to. None:
            all. Lists and CPU tensors cost no device synchronisation; if every sample is full no mask is
            built.
        dropout_p: probability with which an attention weight is dropped.
        softmax_scale: factor on the scores, 1 / sqrt(C) by default.
        q_scale: factor on q.
        causal: mask the future; the last query is aligned with the last key, as FlashAttention does.
        window_size: (left, right) neighbours that a query sees, -1 for no limit.
        deterministic: ask FlashAttention for a deterministic backward; SDPA follows
            `torch.use_deterministic_algorithms`.
        dtype: half dtype for float32 inputs when `fa_version` demands FlashAttention; otherwise not used.
        fa_version: 2 or 3 demands that FlashAttention, or the other one if it is missing, also for float32
            inputs.

    Returns:
        [B, Lq, Nq, Cv] in q's dtype.

    Raises:
        ValueError: a length is less than 1 (keys), negative (queries) or longer than the tensor.
    """
    given = q.dtype
    half = given if given in _HALF_DTYPES or fa_version is None else dtype
    name = kernel_name(q.device, half, q.size(-1), dropout_p=dropout_p, version=fa_version)
    if name != "SDPA":
        q, k, v = q.to(half), k.to(half), v.to(half)
    num_queries, num_keys = q.size(1), k.size(1)
    queries = _lengths(q_lens, q.size(0), num_queries, "q_lens", minimum=0)
    keys = _lengths(k_lens, q.size(0), num_keys, "k_lens", minimum=1)
    if keys is not None and max(keys) < num_keys:
        k, v = k[:, : max(keys)], v[:, : max(keys)]
        keys = None if min(keys) == max(keys) else keys
    if q_scale is not None:
        q = q * q_scale

    if name == "SDPA":
        mask = _mask(q.size(0), num_queries, k.size(1), queries, keys, causal, window_size, q.device)
        out = _sdpa(q, k, v, mask, dropout_p, softmax_scale)
    else:
        options: dict[str, Any] = dict(
            softmax_scale=softmax_scale, causal=causal, deterministic=deterministic
        )
        options["window_size"] = tuple(window_size)
        if name == "FlashAttention 2":
            options["dropout_p"] = dropout_p
        module = flash_attn_interface if name == "FlashAttention 3" else flash_attn
        out = _flash(module, q, k, v, queries, keys, options)
    if queries is not None and min(queries) < num_queries:
        valid = _valid_positions(queries, num_queries, q.device)
        out = out.masked_fill(~valid[:, :, None, None], 0.0)
    return out.to(given)


def _lengths(lengths: Lengths, batch: int, limit: int, what: str, minimum: int) -> list[int] | None:
    """Lengths as integers, or None if every sample is full."""
    if lengths is None:
        return None
    values = [int(n) for n in (lengths.tolist() if isinstance(lengths, torch.Tensor) else lengths)]
    if len(values) != batch or min(values) < minimum or max(values) > limit:
        raise ValueError(f"{what} must hold {batch} lengths from {minimum} to {limit}, got {values}")
    return None if min(values) == limit else values


def _valid_positions(lengths: Sequence[int], limit: int, device: torch.device) -> torch.Tensor:
    """[B, limit] bool, True at the first lengths[b] positions of sample b."""
    return torch.arange(limit, device=device) < torch.tensor(lengths, device=device)[:, None]


def _mask(
    batch: int,
    num_queries: int,
    num_keys: int,
    queries: list[int] | None,
    keys: list[int] | None,
    causal: bool,
    window_size: tuple[int, int],
    device: torch.device,
) -> torch.Tensor | None:
    """[B or 1, 1, Lq or 1, Lk] bool, True where a query sees a key; None if every query sees every key."""
    mask = None if keys is None else _valid_positions(keys, num_keys, device)[:, None, None, :]
    left, right = window_size
    right = 0 if causal else right
    if left < 0 and right < 0:
        return mask
    last_query = torch.tensor(queries or [num_queries] * batch, device=device)
    last_key = torch.tensor(keys or [num_keys] * batch, device=device)
    # position of a query among the keys, given that both sequences end together
    position = torch.arange(num_queries, device=device) + (last_key - last_query)[:, None]
    distance = torch.arange(num_keys, device=device) - position[:, :, None]
    near = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        near &= distance >= -left
    if right >= 0:
        near &= distance <= right
    return near[:, None] if mask is None else near[:, None] & mask


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
) -> torch.Tensor:
    if k.size(2) != q.size(2):
        k, v = (u.repeat_interleave(q.size(2) // u.size(2), dim=2) for u in (k, v))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, L, C]
    if dropout_p == 0.0 and _matmul_is_faster(q, k, v):
        out = _matmul_attention(q, k, v, mask, softmax_scale)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=softmax_scale
        )
    return out.transpose(1, 2)


def _matmul_is_faster(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    if q.device.type != "cpu" or q.dtype not in _HALF_DTYPES or not torch.is_grad_enabled():
        return False
    scores = q.size(0) * q.size(1) * q.size(2) * k.size(2)
    return scores <= _CPU_MATMUL_MAX_SCORES and (q.requires_grad or k.requires_grad or v.requires_grad)


def _matmul_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, softmax_scale: float | None
) -> torch.Tensor:
    scale = 1.0 / math.sqrt(q.size(-1)) if softmax_scale is None else softmax_scale
    scores = (q * scale) @ k.transpose(-1, -2)  # [B, heads, Lq, Lk]
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) @ v


def _flash(
    module: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: list[int] | None,
    keys: list[int] | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """FlashAttention; samples of unequal length are packed one after the other, so padding is never read."""
    if queries is None and keys is None:
        out = module.flash_attn_func(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out
    batch, num_queries, num_keys = q.size(0), q.size(1), k.size(1)
    queries = queries or [num_queries] * batch
    keys = keys or [num_keys] * batch
    valid_queries = _valid_positions(queries, num_queries, q.device)
    valid_keys = _valid_positions(keys, num_keys, q.device)
    packed = module.flash_attn_varlen_func(
        q[valid_queries],
        k[valid_keys],
        v[valid_keys],
        cu_seqlens_q=_offsets(queries, q.device),
        cu_seqlens_k=_offsets(keys, q.device),
        max_seqlen_q=max(queries),
        max_seqlen_k=max(keys),
        **options,
    )
    packed = packed[0] if isinstance(packed, tuple) else packed
    out = packed.new_zeros(batch, num_queries, *packed.shape[1:])
    out[valid_queries] = packed
    return out


def _offsets(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """[B + 1] int32: where each packed sample begins, and the end of the last."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
