"""The arrows between the parts of the repository, and a few calls that no file may contain.

Imports are read from the syntax tree, so imports inside functions and under TYPE_CHECKING count, and nothing is executed.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

from refalign_ext.upstream.source import dotted

ROOT = Path(__file__).resolve().parents[2]

# The parts of refalign_ext (a file or a folder), one group per line. A part may import parts on the lines above it and on
# its own line left of it.
ORDER = [
    "errors atomic_io paths",
    "config request",
    "layout references tasks media",
    "losses timesteps projectors teachers",
    "upstream backbone",
    "guidance parallelism sampler pipeline lora encoders",
    "data",
    "distributed",
    "planning",
    "checkpoint",
    "serving",
    "training",
    "evaluation",
    "sprites",
    "__init__",
    "cli",
    "__main__",
]
RANK = {part: rank for rank, part in enumerate(" ".join(ORDER).split())}

ENTRY_SCRIPTS = {"generate", "train_refalign"}
# The package itself imports only `wan.configs`, to add the tasks to WAN_CONFIGS.
MAY_IMPORT_WAN = ("backbone", "__init__")
KNOWS_RANKS = ("distributed", "checkpoint")  # the parts of refalign_ext that may use process groups
# Modules that must recognise sharded tensors where they meet them, inside a function: what they may import.
MAY_IMPORT_LATE = {"refalign_ext.training.muon": "torch.distributed.tensor"}
DEVICE_FREE = ("wan", "refalign_ext")
NOT_OURS = {"__pycache__", "node_modules", "outputs", "runs", "build", "dist"}
NUMBERED_DEVICE = re.compile(r"cuda:\d+")


def python_files(root: Path) -> list[Path]:
    """All Python files below `root`, without hidden folders, virtual environments and program output."""
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in NOT_OURS
            and not (Path(folder, name) / "pyvenv.cfg").exists()
        )
        found += [Path(folder, name) for name in sorted(files) if name.endswith(".py")]
    return found


def module_name(path: Path, root: Path) -> str:
    """`refalign_ext/data/manifest.py` -> `refalign_ext.data.manifest`; a package is named `refalign_ext.data.__init__`."""
    return ".".join(path.relative_to(root).with_suffix("").parts)


def imported_modules(tree: ast.AST, module: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute module name) of every import in `tree`, relative ones resolved.

    `from package import name` yields `package.name` where that is one of the `known` modules or packages, else `package`.
    """
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in known or base == "torch" else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def part_of(module: str) -> str:
    """The name in ORDER that a module of refalign_ext belongs to; the bare package is its `__init__`."""
    return [*module.split("."), "__init__"][1]


def docstrings(tree: ast.AST) -> set[int]:
    """Identities of the string nodes that are docstrings or bare string statements."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def import_violations(tree: ast.AST, module: str, known: set[str]) -> Iterator[tuple[int, str]]:
    package = module.split(".")[0]
    part = part_of(module)
    if package == "refalign_ext" and part not in RANK:
        yield (
            1,
            f"{part} has no place in ORDER of tests/repository/test_import_direction.py: add it after what it imports",
        )
    for line, target in imported_modules(tree, module, known):
        target_package = target.split(".")[0]
        if target_package == "torchvision":
            yield line, "imports torchvision, which is not a dependency"
        if package not in ("wan", "refalign_ext"):
            continue
        if target_package in ENTRY_SCRIPTS | {"tests", "benchmarks"}:
            yield line, f"{package} imports {target_package}, which stands above it"
        if package == "wan" and target_package == "refalign_ext":
            yield line, "wan imports refalign_ext"
        if package == "refalign_ext" and target_package == "wan" and part not in MAY_IMPORT_WAN:
            yield line, "imports wan; only refalign_ext/backbone.py may, take it from there"
        if package == "refalign_ext" and target_package == "refalign_ext":
            target_part = part_of(target)
            if part in RANK and RANK[part] < RANK.get(target_part, -1):
                yield line, f"{part} imports {target_part}, which stands below it"


def device_violations(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Hard-coded devices in both packages."""
    if module.split(".")[0] not in DEVICE_FREE:
        return
    ignored = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            yield node.lineno, "calls .cuda(): use .to(device)"
        text = node.value if isinstance(node, ast.Constant) and id(node) not in ignored else None
        if isinstance(text, str) and NUMBERED_DEVICE.fullmatch(text):
            yield node.lineno, f'names "{text}": the device is the caller\'s choice'


def distributed_violations(tree: ast.Module, module: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """Process groups anywhere but in the one part that knows of ranks: all else runs without one."""
    package = module.split(".")[0]
    if package not in {*DEVICE_FREE, *ENTRY_SCRIPTS} or part_of(module) in KNOWS_RANKS:
        return
    where = "; only refalign_ext/distributed and refalign_ext/checkpoint may"
    at_once = {node.lineno for node in tree.body}
    for line, target in imported_modules(tree, module, known):
        is_allowed = target == MAY_IMPORT_LATE.get(module) and line not in at_once
        if (target + ".").startswith("torch.distributed.") and not is_allowed:
            yield line, f"imports torch.distributed{where}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) == "torch.distributed":
            yield node.lineno, f"uses torch.distributed{where}"


def keyword_violations(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Switches that run code from files or from the network; anything but the safe literal counts."""
    safe = {"trust_remote_code": False, "weights_only": True}
    for node in ast.walk(tree):
        pairs: list[tuple[str | None, ast.expr]] = []
        if isinstance(node, ast.Call):
            pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
        elif isinstance(node, ast.Dict):
            pairs = [
                (key.value, value)
                for key, value in zip(node.keys, node.values)
                if isinstance(key, ast.Constant) and isinstance(key.value, str)
            ]
        for name, value in pairs:
            if name in safe and not (isinstance(value, ast.Constant) and value.value is safe[name]):
                yield value.lineno, f"sets {name} to {ast.unparse(value)}: only {safe[name]} is allowed"


def find_violations(root: Path) -> list[str]:
    """Everything wrong below `root`, as `file:line: what`."""
    files = python_files(root)
    known = {module_name(path, root) for path in files}
    known |= {name.removesuffix(".__init__") for name in known}
    known |= {name.rpartition(".")[0] for name in known if "." in name}
    violations: list[str] = []
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        module = module_name(path, root)
        found = [
            *import_violations(tree, module, known),
            *device_violations(tree, module),
            *distributed_violations(tree, module, known),
            *keyword_violations(tree),
        ]
        where = path.relative_to(root).as_posix()
        violations += [f"{where}:{line}: {what}" for line, what in sorted(set(found))]
    return violations


def test_repository_has_no_violations() -> None:
    packages = {path.relative_to(ROOT).parts[0] for path in python_files(ROOT)}
    assert {"wan", "refalign_ext", "tests"} <= packages
    violations = find_violations(ROOT)
    assert not violations, "\n" + "\n".join(violations)


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_every_kind_of_violation_is_found(tmp_path: Path) -> None:
    bad = {
        "wan/__init__.py": "",
        "wan/modules/up.py": "def f():\n    from refalign_ext import losses\n",
        "wan/script.py": "import generate\n",
        "wan/group.py": "import torch.distributed as dist\n",
        "wan/group_from.py": "from torch import distributed\n",
        "wan/group_used.py": "import torch\ntorch.distributed.barrier()\n",
        "wan/moved.py": "def f(model):\n    return model.cuda()\n",
        "wan/numbered.py": "DEVICE = 'cuda:0'\n",
        "refalign_ext/__init__.py": "from refalign_ext.pipeline import R2VPipeline\n",
        "refalign_ext/losses.py": "from torch.distributed import all_reduce\n",
        "refalign_ext/layout.py": "from .training import trainer\n",
        "refalign_ext/pipeline.py": "import importlib\nvae = importlib.import_module('wan.modules.vae')\n",
        "refalign_ext/guidance.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from wan import WanT2V\n",
        "refalign_ext/sampler.py": "from refalign_ext import R2VPipeline\n",
        "refalign_ext/data/loader.py": "from ..training import trainer\n",
        "refalign_ext/training/trainer.py": "def f():\n    import torch.distributed as dist\n",
        "refalign_ext/training/run.py": "import torch\ntorch.distributed.destroy_process_group()\n",
        "refalign_ext/training/muon.py": "from torch.distributed.tensor import DTensor\n",
        "refalign_ext/training/optimizers.py": "def f():\n    from torch.distributed.tensor import DTensor\n",
        "refalign_ext/distributed/mesh.py": "import torch.distributed as dist\nfrom refalign_ext.training import trainer\n",
        "train_refalign.py": "import importlib\nimportlib.import_module('torch.distributed')\n",
        "refalign_ext/novelty.py": "",
        "refalign_ext/teachers.py": "load('x', trust_remote_code=True)\nload('y', **{'trust_remote_code': flag})\n",
        "benchmarks/speed.py": "import torchvision.io\nimport torch\ntorch.load('x', weights_only=False)\n",
    }
    violations = find_violations(write_tree(tmp_path, bad))
    expected = [
        "benchmarks/speed.py:1: imports torchvision",
        "benchmarks/speed.py:3: sets weights_only to False",
        "refalign_ext/data/loader.py:1: data imports training, which stands below it",
        "refalign_ext/guidance.py:3: imports wan; only refalign_ext/backbone.py may",
        "refalign_ext/distributed/mesh.py:2: distributed imports training, which stands below it",
        "refalign_ext/training/run.py:2: uses torch.distributed; only refalign_ext/distributed and refalign_ext/checkpoint may",
        "refalign_ext/layout.py:1: layout imports training, which stands below it",
        "refalign_ext/losses.py:1: imports torch.distributed",
        "refalign_ext/training/muon.py:1: imports torch.distributed",
        "refalign_ext/novelty.py:1: novelty has no place in ORDER",
        "refalign_ext/training/optimizers.py:2: imports torch.distributed",
        "refalign_ext/pipeline.py:2: imports wan; only refalign_ext/backbone.py may",
        "refalign_ext/sampler.py:1: sampler imports __init__, which stands below it",
        "refalign_ext/teachers.py:1: sets trust_remote_code to True",
        "refalign_ext/teachers.py:2: sets trust_remote_code to flag",
        "refalign_ext/training/trainer.py:2: imports torch.distributed",
        "train_refalign.py:2: imports torch.distributed",
        "wan/group.py:1: imports torch.distributed",
        "wan/group_from.py:1: imports torch.distributed",
        "wan/group_used.py:2: uses torch.distributed",
        "wan/modules/up.py:2: wan imports refalign_ext",
        "wan/moved.py:2: calls .cuda()",
        'wan/numbered.py:1: names "cuda:0"',
        "wan/script.py:1: wan imports generate",
    ]
    missed = [line for line in expected if not any(found.startswith(line) for found in violations)]
    assert not missed
    assert len(violations) == len(expected), violations


def test_allowed_arrows_are_not_reported(tmp_path: Path) -> None:
    good = {
        "wan/__init__.py": "",
        "wan/modules/__init__.py": "",
        "wan/modules/model.py": "'cuda:0'\nimport torch\nfrom ..utils import weights\ntorch.cuda.is_available()\n",
        "wan/utils/weights.py": "import torch\ntorch.load('x', weights_only=True)\n",
        "refalign_ext/__init__.py": "from .pipeline import R2VPipeline\n",
        "refalign_ext/layout.py": "",
        "refalign_ext/backbone.py": "from wan.modules.model import WanModel\nfrom .layout import TokenLayout\n",
        "refalign_ext/pipeline.py": "from refalign_ext import backbone, layout\n",
        "refalign_ext/training/trainer.py": "from refalign_ext.data import manifest\nfrom refalign_ext.distributed import mesh\n",
        "refalign_ext/training/muon.py": "def f():\n    from torch.distributed.tensor import DTensor\n",
        "refalign_ext/distributed/__init__.py": "",
        "refalign_ext/distributed/mesh.py": "import torch\nimport torch.distributed as dist\ntorch.distributed.barrier()\n",
        "benchmarks/scaling.py": "import torch.distributed as dist\n",
        "refalign_ext/data/__init__.py": "",
        "refalign_ext/data/manifest.py": "from . import helpers\n",
        "refalign_ext/data/helpers.py": "",
        "generate.py": "from refalign_ext import R2VPipeline\nfrom wan import WanT2V\n",
        "tests/test_all.py": "import generate\nfrom refalign_ext import cli\n",
        ".venv/lib/other.py": "import torchvision\n",
    }
    assert find_violations(write_tree(tmp_path, good)) == []
