"""Attention without CUDA or FlashAttention, with the padding masked.

Upstream's `flash_attention` asserts a CUDA device and FlashAttention, and the fallback in `attention` ignores `k_lens`, so
that padding is attended to. A masked attention in plain PyTorch answers where those cannot; where FlashAttention can,
nothing changes.
"""

from __future__ import annotations

from refalign_ext.upstream.source import SourceTree

NAME = "cpu-attention"
FILE = "wan/modules/attention.py"
_USED = ("q", "k", "v", "q_lens", "k_lens", "dropout_p", "softmax_scale", "q_scale", "causal", "window_size")
_FLAGS = ("FLASH_ATTN_2_AVAILABLE", "FLASH_ATTN_3_AVAILABLE")

_FUNCTION = '''
def _masked_attention(q, k, v, q_lens=None, k_lens=None, dropout_p=0., softmax_scale=None, q_scale=None, causal=False,
                      window_size=(-1, -1)):
    """Plain softmax attention that never attends beyond k_lens; [B, L, heads, C], computed in v's dtype."""
    if causal or tuple(window_size) != (-1, -1):
        raise NotImplementedError('causal and windowed attention need FlashAttention')
    out_dtype, length = q.dtype, k.size(1)
    q, k = q.to(v.dtype), k.to(v.dtype)
    if q_scale is not None:
        q = q * q_scale
    mask = None
    if k_lens is not None:
        lengths = torch.as_tensor(k_lens, device=k.device)
        if int(lengths.min()) < length:
            mask = (torch.arange(length, device=k.device) < lengths[:, None])[:, None, None]
    if k.size(2) != q.size(2):
        k, v = (u.repeat_interleave(q.size(2) // u.size(2), dim=2) for u in (k, v))
    x = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, dropout_p=dropout_p, scale=softmax_scale).transpose(1, 2)
    if q_lens is not None:
        valid = torch.arange(x.size(1), device=x.device) < torch.as_tensor(q_lens, device=x.device)[:, None]
        x = x.masked_fill(~valid[:, :, None, None], 0.)
    return x.to(out_dtype)


'''
_REST = "q_lens, k_lens, dropout_p, softmax_scale, q_scale, causal, window_size"
_IN_FLASH = f"""
if q.device.type != 'cuda' or not ({" or ".join(_FLAGS)}):
    return _masked_attention(q, k, v, {_REST})
"""
_IN_ATTENTION = f"""
if (q_lens is not None or k_lens is not None) and not ({" or ".join(_FLAGS)}):
    return _masked_attention(q.to(dtype), k.to(dtype), v.to(dtype), {_REST})
"""


def edit(tree: SourceTree) -> bool:
    source, function = tree.function(FILE, "flash_attention", _USED)
    for flag in _FLAGS:
        tree.locate(source.name, flag)
    source.insert_before(function, _FUNCTION)
    source.insert_at_start(function, _IN_FLASH)
    other, fallback = tree.function(source.name, "attention", (*_USED, "dtype"))
    other.insert_at_start(fallback, _IN_ATTENTION)
    return True
