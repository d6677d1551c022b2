"""One timestep per sample, for batches too, is one row of modulation (Wan2.2).

Wan2.2 accepts a timestep per token and spreads a single one over all tokens first. That works for one sample only, since a
batch of timesteps [B] does not expand to [B, seq_len], and gives every token its own copy of the six modulation vectors:
gigabytes for a long video, which could not be cut among ranks either. A timestep per sample keeps one row, which
broadcasts; timesteps per token work as before.
"""

from __future__ import annotations

import ast

from refalign_ext.upstream.model_source import model_forward
from refalign_ext.upstream.source import SourceTree, calls_of

NAME = "one-timestep"


def edit(tree: SourceTree) -> bool:
    source, forward = model_forward(tree)
    spread = [call for call in calls_of(forward, "t.expand") if len(call.args) == 2]
    if not spread:
        return False
    folded = [
        call
        for call in ast.walk(forward)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "unflatten"
        and len(call.args) == 2
        and isinstance(call.args[1], ast.Tuple)
        and [ast.unparse(item) for item in call.args[1].elts][1:] == ["seq_len"]
    ]
    if len(spread) != 1 or len(folded) != 1:
        raise source.changed(
            forward,
            f"WanModel.forward spreads t in {len(spread)} and folds it in {len(folded)} places, not one each",
        )
    source.replace(spread[0], "t.unsqueeze(1)")
    source.replace(folded[0].args[1].elts[1], "-1")
    return True
