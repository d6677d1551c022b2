"""What becomes of a tree's text-to-video tasks."""

from __future__ import annotations

import ast

from refalign_ext.upstream.source import PlaceNotFound, SourceTree
from refalign_ext.upstream.tree import refusal


def recognise(tree: SourceTree) -> dict[str, str]:
    """What RefAlign does with the tree's text-to-video tasks; a task's name -> a verdict.

    Read from the fields of its configuration; see `refusal`.
    """
    verdicts = {}
    for name in sorted(tree.texts):
        if not name.startswith("wan/configs/wan_") or "t2v" not in name and "ti2v" not in name:
            continue
        task = (
            name.removeprefix("wan/configs/wan_")
            .removesuffix(".py")
            .replace("_", "-")
            .replace("1-3B", "1.3B")
        )
        try:
            fields = _fields(tree.file(name).tree)
        except PlaceNotFound as error:
            verdicts[task] = str(error)
            continue
        if reason := refusal(fields.get("boundary"), fields.get("vae_stride")):
            verdicts[task] = reason
        else:
            verdicts[task] = f"r2v-{task.removeprefix('t2v-')} is made from it"
    return verdicts


def _fields(tree: ast.Module) -> dict[str, str]:
    """`config.name = value` statements of a configuration file."""
    return {
        target.attr: ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute)
    }
