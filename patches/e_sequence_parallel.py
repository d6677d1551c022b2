"""The seam at which several ranks share one sequence, with gradients.

Upstream replaces whole forwards for sequence parallelism and gathers without gradients. refalign_ext attaches to a child of
self-attention called `core`, which has no parameters (the checkpoint's keys stay), and cuts the rotary table like the
tokens, for which the table has to hold one row per token. The rotations are the same numbers, made once per pass instead
of once per block.
"""

from __future__ import annotations

from refalign_ext.upstream.model_source import (
    MODEL,
    block_call,
    block_parameters,
    model_forward,
    require_positional,
)
from refalign_ext.upstream.source import SourceTree, calls_of, dotted, names_of

NAME = "sequence-parallel"

_CORE = '''
class _AttentionCore(nn.Module):
    """Softmax attention of rotated queries and keys; a module without parameters, so that hooks can reach it."""

    def __init__(self, window_size):
        super().__init__()
        self.window_size = window_size

    def forward(self, q, k, v, k_lens):
        return {attention}(q=q, k=k, v=v, k_lens=k_lens, window_size=self.window_size)


'''
_ROTATIONS = '''
def _rotations(freqs, grid_sizes, seq_len):
    """Cosine and sine for every token, [B, seq_len, 1, C / 2, 2] float64; padding is not turned."""
    pairs = freqs.size(1)
    tables = freqs.split([pairs - 2 * (pairs // 3), pairs // 3, pairs // 3], dim=1)
    rotations = torch.ones(len(grid_sizes), seq_len, pairs, dtype=freqs.dtype, device=freqs.device)
    for sample, (frames, rows, columns) in zip(rotations, grid_sizes.tolist()):
        token = torch.arange(frames * rows * columns, device=freqs.device)
        places = (token // (rows * columns), token // columns % rows, token % columns)
        sample[:len(token)] = torch.cat([table[place] for table, place in zip(tables, places)], dim=1)
    return torch.view_as_real(rotations).unsqueeze(2)


'''
_ROTATE = '''
def _rotate(x, rotations):
    """x [B, L, heads, C] turned by `_rotations`, float32."""
    x = torch.view_as_complex(x.to(torch.float64).unflatten(3, (-1, 2)))
    return torch.view_as_real(x * torch.view_as_complex(rotations)).flatten(3).float()


'''
_AT_START = """
if not freqs.is_complex():
    return _rotate(x, freqs)
"""


def edit(tree: SourceTree) -> bool:
    source, forward = tree.function(
        MODEL, "WanSelfAttention.forward", ("x", "seq_lens", "grid_sizes", "freqs")
    )
    if source.find("_AttentionCore") is not None or calls_of(forward, "self.core"):
        return False
    calls = [call for name in ("flash_attention", "attention") for call in calls_of(forward, name)]
    if len(calls) != 1:
        raise source.changed(
            forward, f"WanSelfAttention.forward calls attention in {len(calls)} places, not one"
        )
    given = {keyword.arg: keyword.value for keyword in calls[0].keywords}
    if set(given) != {"q", "k", "v", "k_lens", "window_size"} or calls[0].args:
        raise source.changed(
            calls[0],
            f"attention is called with ({', '.join(map(str, given))}), not (q, k, v, k_lens, window_size)",
        )
    _, owner = tree.locate(source.name, "WanSelfAttention")
    _, make = tree.function(source.name, "WanSelfAttention.__init__", ("window_size",))
    source.insert_before(owner, _CORE.format(attention=dotted(calls[0].func)))
    source.insert_at_end(make, "self.core = _AttentionCore(window_size)")
    values = ", ".join(source.segment(given[name]) for name in ("q", "k", "v", "k_lens"))
    source.replace(calls[0], f"self.core({values})")

    rope_source, rope = tree.function(source.name, "rope_apply", ("x", "grid_sizes", "freqs"))
    rope_source.insert_before(rope, _ROTATE)
    rope_source.insert_at_start(rope, _AT_START)

    block_parameters(tree)
    model_source, call = block_call(tree)
    require_positional(model_source, call)
    _, model_forward_node = model_forward(tree)
    tables = [
        keyword.value
        for node in calls_of(model_forward_node, "dict")
        for keyword in node.keywords
        if keyword.arg == "freqs" and dotted(keyword.value) == "self.freqs"
    ]
    is_known = any("grid_sizes" in names_of(node) for node in model_forward_node.body)
    if len(tables) != 1 or not is_known:
        raise model_source.changed(
            model_forward_node, "WanModel.forward does not hand self.freqs and grid_sizes to its blocks"
        )
    model_source.insert_before(model_source.find("WanModel"), _ROTATIONS)
    model_source.replace(tables[0], "_rotations(self.freqs, grid_sizes, seq_len)")
    return True
