"""Importing `wan.modules` on a machine without CUDA.

A default argument asks CUDA for its current device while a function is being defined, which fails without one. It is
asked when the function is called without that argument; where there is no CUDA the CPU takes its place.
"""

from __future__ import annotations

import ast

from refalign_ext.upstream.source import SourceTree, defaults_of, dotted

NAME = "import-without-cuda"
FOLDER = "wan/modules"


def edit(tree: SourceTree) -> bool:
    is_needed = False
    for name in tree.texts:
        # Code of tasks that refalign_ext never imports (modules/animate, modules/s2v) stays as it is.
        if name.rpartition("/")[0] != FOLDER:
            continue
        source = tree.file(name)
        for function in ast.walk(source.tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            for parameter, default in defaults_of(function).items():
                if isinstance(default, ast.Call) and dotted(default.func).startswith("torch.cuda."):
                    asked = f"{source.segment(default)} if torch.cuda.is_available() else 'cpu'"
                    source.replace(default, "None")
                    source.insert_at_start(function, f"if {parameter} is None:\n    {parameter} = {asked}\n")
                    is_needed = True
    return is_needed
