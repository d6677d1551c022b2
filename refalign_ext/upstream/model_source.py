"""Parts of the model's source that several patches edit: forward, the loop over the blocks, a block's parameters."""

from __future__ import annotations

import ast

from refalign_ext.upstream.source import (
    Function,
    SourceFile,
    SourceTree,
    calls_of,
    dotted,
    parameters_of,
)

MODEL = "wan/modules/model.py"
FORWARD = ("x", "t", "context", "seq_len")
BLOCK = ("x", "e", "seq_lens", "grid_sizes", "freqs", "context", "context_lens")


def model_forward(tree: SourceTree) -> tuple[SourceFile, Function]:
    """`WanModel.forward`."""
    return tree.function(MODEL, "WanModel.forward", FORWARD)


def block_call(tree: SourceTree) -> tuple[SourceFile, ast.Call]:
    """The call `block(...)` in the loop over the blocks."""
    source, forward = model_forward(tree)
    calls = [
        call
        for loop in ast.walk(forward)
        if isinstance(loop, ast.For) and dotted(loop.iter) == "self.blocks"
        for call in calls_of(loop, dotted(loop.target))
    ]
    if len(calls) != 1:
        raise source.changed(forward, f"WanModel.forward calls its blocks in {len(calls)} places, not one")
    return source, calls[0]


def block_parameters(tree: SourceTree) -> list[str]:
    """The parameters of a block's forward, the known ones first and in the known order."""
    source, forward = tree.function(MODEL, "WanAttentionBlock.forward", BLOCK)
    have = parameters_of(forward)
    if tuple(have[: len(BLOCK)]) != BLOCK:
        raise source.changed(
            forward, f"WanAttentionBlock.forward takes ({', '.join(have)}), not ({', '.join(BLOCK)}) first"
        )
    return have


def require_positional(source: SourceFile, call: ast.Call) -> None:
    """Refuses a call of the blocks that hides arguments in a dictionary."""
    if any(keyword.arg is None for keyword in call.keywords):
        raise source.changed(
            call, "blocks get their arguments from a dictionary: the unit positional-blocks is needed too"
        )
