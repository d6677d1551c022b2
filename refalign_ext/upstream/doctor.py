"""One screen on a Wan tree and the machine: what fits, what is lost, what this computer can do."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import platform
import shutil
import textwrap
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from refalign_ext.upstream.checkout import describe_checkout
from refalign_ext.upstream.contract import OPTIONAL, PRESENT, Contract, ContractEntry
from refalign_ext.upstream.own_wan import is_ours
from refalign_ext.upstream.patching import FOLDER, Outcome, load_units, status
from refalign_ext.upstream.source import PlaceNotFound, SourceTree
from refalign_ext.upstream.tree import refusal

WIDTH = 120
GIB = 2**30
KERNELS = (("flash_attn_interface", "FlashAttention 3"), ("flash_attn", "FlashAttention 2"))


@dataclass(frozen=True)
class DoctorReport:
    """What `doctor` found."""

    tree: str  # path, version and commit
    findings: list[ContractEntry]
    tasks: dict[str, str]  # verdicts on its text-to-video tasks
    patches: list[Outcome]  # none for this repository's own tree
    unclear: str  # why the state of the patches cannot be told
    machine: list[tuple[str, str]]
    blocked: str  # why the model cannot run here as it is

    @property
    def exit_code(self) -> int:
        """0 if references can be used with this tree on this machine, else 1."""
        lost = any(f.state != PRESENT and f.cost not in OPTIONAL for f in self.findings)
        return int(lost or bool(self.blocked))

    def __str__(self) -> str:
        absent = [f for f in self.findings if f.state != PRESENT]
        rows = [("tree", self.tree)]
        rows += [(f.state, f"{f.name}: {f.detail}; costs: {f.cost}") for f in absent]
        rows.append((PRESENT, "; ".join(f.name for f in self.findings if f.state == PRESENT)))
        rows += [("task", f"{task}: {verdict}") for task, verdict in self.tasks.items()]
        for state in dict.fromkeys(outcome.state for outcome in self.patches):
            names = [outcome.unit.name for outcome in self.patches if outcome.state == state]
            rows.append(("patches", f"{state}: {', '.join(names)}"))
        if self.unclear:
            rows.append(("patches", self.unclear))
        lost = "; ".join(dict.fromkeys(f.cost for f in absent))
        works = f"references work with this tree here{', without ' if lost else ''}{lost}"
        result = self.blocked or (f"lost: {lost}" if self.exit_code else works)
        rows += [*self.machine, ("result", result)]
        options = {"subsequent_indent": " " * 10, "break_long_words": False, "break_on_hyphens": False}
        return "\n".join(textwrap.fill(f"{label:<9} {text}", WIDTH, **options) for label, text in rows)


def doctor(root: Path) -> DoctorReport:
    """Looks at a tree (the folder that holds `wan/`), which is not imported, and at this machine."""
    contract = Contract(root)
    outcomes, unclear = [], ""
    try:
        outcomes = [] if is_ours(root) else status(root, load_units())
    except ValueError as error:
        unclear = str(error)
    kernels = _kernels()
    return DoctorReport(
        f"{root} ({describe_checkout(root)})",
        contract.findings,
        text_to_video_tasks(contract.tree),
        outcomes,
        unclear,
        _machine(kernels),
        _blocked(root, outcomes, kernels),
    )


def text_to_video_tasks(tree: SourceTree) -> dict[str, str]:
    """What RefAlign does with the tree's text-to-video tasks, a verdict by task, read from the fields of its configuration."""
    verdicts = {}
    for name in sorted(tree.texts):
        stem = name.removeprefix("wan/configs/wan_")
        if stem == name or "t2v" not in stem and "ti2v" not in stem:
            continue
        task = stem.removesuffix(".py").replace("_", "-").replace("1-3B", "1.3B")
        try:
            fields = _config_fields(tree.file(name).tree)
        except PlaceNotFound as error:
            verdicts[task] = str(error)
            continue
        reason = refusal(fields.get("boundary"), fields.get("vae_stride"))
        verdicts[task] = reason or f"r2v-{task.removeprefix('t2v-')} is made from it"
    return verdicts


def _config_fields(tree: ast.Module) -> dict[str, str]:
    """`config.name = value` statements of a configuration file."""
    assignments = (node for node in tree.body if isinstance(node, ast.Assign))
    pairs = ((target, node.value) for node in assignments for target in node.targets)
    return {target.attr: ast.unparse(value) for target, value in pairs if isinstance(target, ast.Attribute)}


def _blocked(root: Path, outcomes: list[Outcome], kernels: list[str]) -> str:
    import torch

    open_units = {outcome.unit.name for outcome in outcomes if outcome.state not in ("applied", "not needed")}
    needed = []
    if "cpu-attention" in open_units and not (torch.cuda.is_available() and kernels):
        needed.append("its attention needs CUDA and FlashAttention")
    if "import-without-cuda" in open_units and not torch.cuda.is_available():
        needed.append("its text encoder cannot be imported without CUDA")
    if not needed:
        return ""
    return f"{' and '.join(needed)}: python -m refalign_ext patch apply --wan_root {root}"


def _kernels() -> list[str]:
    """Names of the FlashAttention versions that are installed."""
    return [name for module, name in KERNELS if find_spec(module) is not None]


def _machine(kernels: list[str]) -> list[tuple[str, str]]:
    import torch

    libraries = ("torch", "diffusers", "transformers", "safetensors")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    devices = [
        f"cuda:{index} {torch.cuda.get_device_name(index)} ({_gib_of(torch.cuda.mem_get_info(index))} free)"
        for index in range(torch.cuda.device_count())
    ]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    disk = shutil.disk_usage(".")
    return [
        ("python", f"{platform.python_version()} on {platform.system()}, {versions}"),
        ("attention", ", ".join([*kernels, "SDPA"])),
        ("devices", ", ".join([*devices, f"cpu ({os.cpu_count()} cores)"])),
        ("free", f"disk here {_gib_of((disk.free, disk.total))}"),
        ("teachers", _teachers()),
    ]


def _gib_of(sizes: tuple[int, int]) -> str:
    return f"{sizes[0] / GIB:.0f} of {sizes[1] / GIB:.0f} GiB"


def _teachers() -> str:
    """Which teachers are at hand without a download."""
    from huggingface_hub import try_to_load_from_cache

    from refalign_ext.teachers import TEACHERS

    here, absent = [], []
    for name, entry in TEACHERS.items():
        if name == "siglip2-tiny":
            continue  # trained by its user: nothing to download
        if entry.repository is None:
            is_here = (FOLDER.parent / "assets" / "r2v-tiny" / "teacher").is_dir()
        else:
            is_here = isinstance(try_to_load_from_cache(entry.repository, "config.json"), str)
        (here if is_here else absent).append(name)
    return f"here: {', '.join(here) or 'none'}; not downloaded: {', '.join(absent) or 'none'}"
