import torch
from torch.nn.functional import scaled_dot_product_attention

try:
    import flash_attn
except ImportError:
    flash_attn = None

FLASH_ATTN_3_AVAILABLE = False
FLASH_ATTN_2_AVAILABLE = flash_attn is not None


# fmt: off
def flash_attention(q, k, v, q_lens=None, k_lens=None, dropout_p=0.0, softmax_scale=None, q_scale=None, causal=False,
                    window_size=(-1, -1), deterministic=False, dtype=torch.bfloat16, version=None):
    """q, k, v [B, L, heads, C]."""
    assert q.device.type == "cuda"
    assert FLASH_ATTN_2_AVAILABLE or FLASH_ATTN_3_AVAILABLE
    halves = (u.to(dtype) for u in (q, k, v))
    return flash_attn.flash_attn_func(*halves, causal=causal, softmax_scale=softmax_scale).to(q.dtype)


def attention(q, k, v, q_lens=None, k_lens=None, dropout_p=0.0, softmax_scale=None, q_scale=None, causal=False,
              window_size=(-1, -1), deterministic=False, dtype=torch.bfloat16, fa_version=None):
    if FLASH_ATTN_2_AVAILABLE or FLASH_ATTN_3_AVAILABLE:
        return flash_attention(q, k, v, k_lens=k_lens, causal=causal, dtype=dtype)
    heads_first = (u.transpose(1, 2).to(dtype) for u in (q, k, v))
    return scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)
# fmt: on
