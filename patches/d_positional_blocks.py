"""Blocks get their arguments by position, in the order of `WanAttentionBlock.forward`.

Upstream keeps them in a dictionary and calls `block(x, **kwargs)`; hooks that cut tokens for several ranks, and
checkpointing of activations, are handed positional arguments only. The values are the same.
"""

from __future__ import annotations

import ast

from refalign_ext.upstream.model_source import block_call, block_parameters, model_forward
from refalign_ext.upstream.source import SourceTree, calls_of, dotted

NAME = "positional-blocks"


def edit(tree: SourceTree) -> bool:
    source, call = block_call(tree)
    unpacked = [dotted(keyword.value) for keyword in call.keywords if keyword.arg is None]
    if not unpacked:
        return False
    parameters = block_parameters(tree)
    if len(call.args) != 1 or len(unpacked) != 1 or len(call.keywords) != 1 or not unpacked[0]:
        raise source.changed(call, "blocks are not called as block(x, **kwargs)")
    held = _keys(tree, unpacked[0])
    missing = [name for name in parameters[1:7] if name not in held]
    if missing:
        raise source.changed(call, f"{unpacked[0]} does not hold {', '.join(missing)} for the blocks")
    rest = [name for name in parameters[1:] if name in held]
    if parameters[1 : 1 + len(rest)] != rest or set(held) - set(rest):
        raise source.changed(
            call, f"{unpacked[0]} holds {', '.join(held)}, blocks take {', '.join(parameters)}"
        )
    lines = [source.segment(call.args[0]), *(f"{unpacked[0]}['{name}']" for name in rest)]
    indent = " " * (source.indentation(call) + 4)
    source.replace(call, f"{source.segment(call.func)}(\n{indent}" + f",\n{indent}".join(lines) + ")")
    return True


def _keys(tree: SourceTree, name: str) -> list[str]:
    """The keys of `name = dict(...)` in `WanModel.forward`."""
    source, forward = model_forward(tree)
    for node in ast.walk(forward):
        if isinstance(node, ast.Assign) and [dotted(target) for target in node.targets] == [name]:
            calls = calls_of(node.value, "dict")
            if calls and all(keyword.arg for keyword in calls[0].keywords):
                return [keyword.arg for keyword in calls[0].keywords if keyword.arg]
    raise source.changed(forward, f"{name} is not made by dict(...)")
