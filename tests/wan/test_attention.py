"""The attention seam against a loop over samples, heads and queries' visible keys."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from wan.modules import attention as seam
from wan.modules.attention import attention, flash_attention, kernel_name

B, LQ, LK, HEADS, DIM = 3, 5, 7, 2, 8


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, LQ, HEADS, DIM), (B, LK, HEADS, DIM), (B, LK, HEADS, DIM + 2))
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)


def by_hand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_lens: list[int] | None = None,
    k_lens: list[int] | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    scale = softmax_scale or 1 / math.sqrt(q.size(-1))
    left, right = window_size[0], 0 if causal else window_size[1]
    out = q.new_zeros(*q.shape[:3], v.size(-1))
    group = q.size(2) // k.size(2)
    for b in range(q.size(0)):
        queries = q_lens[b] if q_lens else q.size(1)
        keys = k_lens[b] if k_lens else k.size(1)
        for head in range(q.size(2)):
            for i in range(queries):
                position = i + keys - queries
                visible = [
                    j
                    for j in range(keys)
                    if (left < 0 or j >= position - left) and (right < 0 or j <= position + right)
                ]
                scores = k[b, visible, head // group] @ q[b, i, head] * scale
                out[b, i, head] = scores.softmax(0) @ v[b, visible, head // group]
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k_lens": [7, 2, 5]},
        {"k_lens": [4, 4, 4]},
        {"q_lens": [5, 1, 3]},
        {"q_lens": [5, 1, 3], "k_lens": [7, 2, 5]},
        {"softmax_scale": 0.1},
        {"causal": True},
        {"causal": True, "q_lens": [5, 1, 3], "k_lens": [7, 2, 5]},
        {"window_size": (3, 1)},
        {"window_size": (-1, 1), "k_lens": [7, 6, 5]},
        {"window_size": (2, -1)},
    ],
    ids=str,
)
def test_equals_the_loop(qkv: tuple[torch.Tensor, ...], options: dict[str, Any]) -> None:
    torch.testing.assert_close(attention(*qkv, **options), by_hand(*qkv, **options), rtol=1e-10, atol=1e-12)
    lengths = {key: torch.tensor(value) for key, value in options.items() if key.endswith("_lens")}
    torch.testing.assert_close(
        attention(*qkv, **options | lengths), by_hand(*qkv, **options), rtol=1e-10, atol=1e-12
    )


def test_query_scale_and_grouped_heads(qkv: tuple[torch.Tensor, ...]) -> None:
    q, k, v = qkv
    torch.testing.assert_close(attention(q, k, v, q_scale=0.5), by_hand(q * 0.5, k, v))
    torch.testing.assert_close(attention(q, k[:, :, :1], v[:, :, :1]), by_hand(q, k[:, :, :1], v[:, :, :1]))


def test_padding_has_no_influence_even_if_it_is_not_a_number(qkv: tuple[torch.Tensor, ...]) -> None:
    q, k, v = qkv
    expected = attention(q, k[:, :4], v[:, :4])
    k, v = k.clone(), v.clone()
    k[:, 4:], v[:, 4:] = math.nan, math.nan
    assert torch.equal(attention(q, k, v, k_lens=[4, 4, 4]), expected)


@pytest.mark.parametrize("k_lens", [None, [LK] * B, torch.tensor([LK] * B), [3] * B])
def test_equally_long_samples_need_no_mask(
    qkv: tuple[torch.Tensor, ...], k_lens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *args, attn_mask, **rest: (
            masks.append(attn_mask) or original(*args, attn_mask=attn_mask, **rest)
        ),
    )
    attention(*qkv, k_lens=k_lens)
    assert masks == [None]


@pytest.mark.parametrize(
    "lengths", [{"k_lens": [7, 0, 5]}, {"k_lens": [8, 7, 7]}, {"k_lens": [7, 7]}, {"q_lens": [5, -1, 5]}]
)
def test_impossible_lengths_are_refused(qkv: tuple[torch.Tensor, ...], lengths: dict[str, list[int]]) -> None:
    with pytest.raises(ValueError, match="_lens must hold 3 lengths"):
        attention(*qkv, **lengths)


@pytest.mark.parametrize("k_lens", [None, [7, 2, 5]])
def test_training_in_bfloat16_on_the_cpu(
    qkv: tuple[torch.Tensor, ...], k_lens: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the size threshold matmuls take over; they must agree with SDPA, forward and backward."""
    results = []
    calls = []
    original = seam._matmul_attention
    monkeypatch.setattr(seam, "_matmul_attention", lambda *args: calls.append(1) or original(*args))
    for threshold in (0, B * HEADS * LQ * LK):
        monkeypatch.setattr(seam, "_CPU_MATMUL_MAX_SCORES", threshold)
        leaves = [u.bfloat16().requires_grad_() for u in qkv[:2]] + [
            qkv[2][..., :DIM].bfloat16().requires_grad_()
        ]
        out = attention(*leaves, k_lens=k_lens)
        out.float().square().sum().backward()
        results.append([out.detach(), *(u.grad for u in leaves)])
        with torch.no_grad():
            attention(*leaves, k_lens=k_lens)
    assert len(calls) == 1  # neither above the threshold nor without gradients
    for by_sdpa, by_matmul in zip(*results, strict=True):
        assert by_matmul.dtype == torch.bfloat16
        torch.testing.assert_close(by_matmul.float(), by_sdpa.float(), rtol=0.05, atol=0.05)


def test_float32_training_stays_with_sdpa(
    qkv: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seam, "_matmul_attention", None)
    attention(*(u.float().requires_grad_() for u in qkv))


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "options", "installed", "expected"),
    [
        ("cuda", torch.bfloat16, 128, {}, (3, 2), "FlashAttention 3"),
        ("cuda", torch.bfloat16, 128, {}, (2,), "FlashAttention 2"),
        ("cuda", torch.bfloat16, 128, {}, (), "SDPA"),
        ("cuda", torch.bfloat16, 128, {"version": 2}, (3, 2), "FlashAttention 2"),
        ("cuda", torch.bfloat16, 128, {"version": 3}, (2,), "FlashAttention 2"),
        ("cuda", torch.bfloat16, 128, {"dropout_p": 0.1}, (3, 2), "FlashAttention 2"),
        ("cuda", torch.bfloat16, 128, {"dropout_p": 0.1}, (3,), "SDPA"),
        ("cuda", torch.float32, 128, {}, (3, 2), "SDPA"),
        ("cuda", torch.float16, 288, {}, (3, 2), "SDPA"),
        ("cpu", torch.bfloat16, 128, {}, (3, 2), "SDPA"),
    ],
)
def test_choice_of_the_kernel(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    options: dict[str, Any],
    installed: tuple[int, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(seam, "FLASH_ATTN_3_AVAILABLE", 3 in installed)
    monkeypatch.setattr(seam, "FLASH_ATTN_2_AVAILABLE", 2 in installed)
    assert kernel_name(torch.device(device), dtype, head_dim, **options) == expected


def stand_in(returns_tuple: bool) -> SimpleNamespace:
    """A module with FlashAttention's functions and exactly their arguments, which computes by hand."""

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False
    ):
        out = by_hand(q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size)
        return (out, None) if returns_tuple else out

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert (q_ends[-1], k_ends[-1]) == (len(q), len(k))
        parts = []
        for i in range(len(q_ends) - 1):
            rows, columns = slice(q_ends[i], q_ends[i + 1]), slice(k_ends[i], k_ends[i + 1])
            assert rows.stop - rows.start <= max_seqlen_q and columns.stop - columns.start <= max_seqlen_k
            out = flash_attn_func(q[None, rows], k[None, columns], v[None, columns], **options)
            parts.append((out[0] if returns_tuple else out)[0])
        joined = torch.cat(parts)
        return (joined, None) if returns_tuple else joined

    return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k_lens": [7, 2, 5]},
        {"k_lens": [4, 4, 4]},
        {"q_lens": [5, 1, 3], "k_lens": [7, 2, 5], "causal": True},
        {"window_size": (3, 1), "softmax_scale": 0.2},
    ],
    ids=str,
)
def test_flash_attention_gets_packed_samples(
    qkv: tuple[torch.Tensor, ...], version: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seam, "kernel_name", lambda *args, **rest: f"FlashAttention {version}")
    monkeypatch.setattr(
        seam, "flash_attn_interface" if version == 3 else "flash_attn", stand_in(version == 3)
    )
    out = attention(*qkv, **options)
    torch.testing.assert_close(out, by_hand(*qkv, **options), rtol=1e-10, atol=1e-12)


def test_flash_attention_rounds_to_the_half_dtype_only_where_a_kernel_needs_it(
    qkv: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torch.equal(flash_attention(*qkv), attention(*qkv))
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        flash_attention(*qkv, dtype=torch.float32)
    monkeypatch.setattr(seam, "flash_attn", stand_in(False))
    monkeypatch.setattr(
        seam,
        "kernel_name",
        lambda device, dtype, *_, **__: "SDPA" if dtype == torch.float64 else "FlashAttention 2",
    )
    for rounded in (flash_attention(*qkv, version=2), attention(*qkv, fa_version=2)):
        assert rounded.dtype == torch.float64
        error = (rounded - by_hand(*qkv)).abs().max().item()
        assert 1e-5 < error < 0.05
    assert torch.equal(attention(*qkv), attention(*qkv, dtype=torch.float16))
