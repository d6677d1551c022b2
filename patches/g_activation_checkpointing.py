"""Recomputing activations in the backward pass, which training a large model needs.

Upstream's model only samples. diffusers' own switch (`enable_gradient_checkpointing`) does the rest once the model says
that it has one and runs its blocks through it; without the switch, blocks run as before.
"""

from __future__ import annotations

import ast

from refalign_ext.upstream.model_source import block_call, model_forward, require_positional
from refalign_ext.upstream.source import PlaceNotFound, SourceTree, names_of

NAME = "activation-checkpointing"
_SWITCH = "_supports_gradient_checkpointing"
_METHOD = '''
def _run_block(self, block, *args):
    """One block; its activations are recomputed in the backward pass where that is switched on."""
    if self.gradient_checkpointing and torch.is_grad_enabled():
        return self._gradient_checkpointing_func(block, *args)
    return block(*args)

'''


def edit(tree: SourceTree) -> bool:
    source, call = block_call(tree)
    _, model = tree.locate(source.name, "WanModel")
    if not isinstance(model, ast.ClassDef):
        raise PlaceNotFound(f"{source.name}: WanModel is no class")
    if any(_SWITCH in names_of(node) for node in model.body):
        return False
    require_positional(source, call)
    _, make = tree.function(source.name, "WanModel.__init__")
    first = next(node for node in model.body if not isinstance(node, ast.Expr))
    source.insert_before(first, f"{_SWITCH} = True\n\n")
    source.insert_at_end(make, "self.gradient_checkpointing = False")
    source.insert_before(model_forward(tree)[1], _METHOD)
    source.replace(call.func, "self._run_block")
    source.replace(call.args[0], f"{source.segment(call.func)}, {source.segment(call.args[0])}")
    return True
