"""Importing `wan.modules` on a machine without CUDA.

A default argument asks CUDA for its current device while a function is being defined, which fails without one. It is
asked when the function is called without that argument; where there is no CUDA the CPU takes its place.
"""

from __future__ import annotations

import ast

from refalign_ext.upstream.source import SourceTree, dotted

NAME = "import-without-cuda"
FOLDER = "wan/modules/"


def edit(tree: SourceTree) -> bool:
    places = []
    for name in tree.texts:
        # Code of tasks that refalign_ext never imports (modules/animate, modules/s2v) stays as it is.
        if not name.startswith(FOLDER) or "/" in name[len(FOLDER) :]:
            continue
        source = tree.file(name)
        for function in ast.walk(source.tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            positional = [*function.args.posonlyargs, *function.args.args]
            defaults = function.args.defaults
            pairs = list(zip(positional[len(positional) - len(defaults) :], defaults, strict=True))
            pairs += [
                (p, d) for p, d in zip(function.args.kwonlyargs, function.args.kw_defaults) if d is not None
            ]
            for parameter, default in pairs:
                if isinstance(default, ast.Call) and dotted(default.func).startswith("torch.cuda."):
                    places.append((source, function, parameter.arg, default))
    for source, function, parameter, default in places:
        asked = source.segment(default)
        source.replace(default, "None")
        source.insert_at_start(
            function,
            f"if {parameter} is None:\n    {parameter} = {asked} if torch.cuda.is_available() else 'cpu'\n",
        )
    return bool(places)
