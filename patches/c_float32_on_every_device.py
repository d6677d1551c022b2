"""Parts that must compute in float32 do so under every device's autocast.

Upstream opens CUDA's autocast with float32 around the time embedding, the gated sums and the head. Autocast of another
device goes on inside it, and upstream's own assertions then fail. The device is that of the tokens; for CUDA tokens the
statement is what it was. Layer norm gets float32 tokens and, where the weights are in half precision (as FSDP makes them),
relies on CUDA's autocast to widen these; they are widened by name.
"""

from __future__ import annotations

import ast

from refalign_ext.upstream.source import SourceFile, SourceTree, dotted, parameters_of

NAME = "float32-on-every-device"
FILE = "wan/modules/model.py"
_SUPER = "super().forward"
_NORM = (
    "nn.functional.layer_norm(x.float(), self.normalized_shape, "
    "*(None if p is None else p.float() for p in (self.weight, self.bias)), self.eps)"
)
OWNERS = ("WanModel", "WanAttentionBlock", "Head")
_TEXT = "torch.autocast(x.device.type, dtype=torch.float32, enabled=x.device.type == 'cuda')"


def edit(tree: SourceTree) -> bool:
    sources = {id(source): source for source, _ in (tree.locate(FILE, name) for name in OWNERS)}
    count = sum(_edit(source) for source in sources.values())
    source, norm = tree.function(FILE, "WanLayerNorm.forward", ("x",))
    inner = [
        call for call in ast.walk(norm) if isinstance(call, ast.Call) and ast.unparse(call.func) == _SUPER
    ]
    if len(inner) != 1 or [ast.unparse(item) for item in inner[0].args] != ["x.float()"]:
        raise source.changed(norm, f"WanLayerNorm.forward does not call {_SUPER}(x.float())")
    source.replace(inner[0], _NORM)
    return count > 0


def _edit(source: SourceFile) -> int:
    found: set[ast.expr] = set()
    for function in ast.walk(source.tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        opened = [
            item.context_expr
            for node in ast.walk(function)
            if isinstance(node, ast.With)
            for item in node.items
        ]
        # A function inside another is walked with both.
        for expression in {item for item in opened if _is_float32_autocast(item)} - found:
            if "x" not in parameters_of(function):
                raise source.changed(expression, f"autocast in {function.name}, which has no argument x")
            source.replace(expression, _TEXT)
            found.add(expression)
    return len(found)


def _is_float32_autocast(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or dotted(node.func) not in (
        "amp.autocast",
        "torch.cuda.amp.autocast",
        "torch.amp.autocast",
        "torch.autocast",
    ):
        return False
    is_cuda = dotted(node.func).split(".")[-2:] == ["amp", "autocast"] and not node.args
    is_cuda = is_cuda or any(isinstance(item, ast.Constant) and item.value == "cuda" for item in node.args)
    return is_cuda and any(
        item.arg == "dtype" and dotted(item.value) == "torch.float32" for item in node.keywords
    )
