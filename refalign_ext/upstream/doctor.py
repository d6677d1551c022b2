"""One screen on a Wan tree and the machine: what fits, what is lost, what this computer can do."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import platform
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from refalign_ext.upstream.checkout import describe
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
    """What `doctor` found.

    Attributes:
        tree: path, version and commit.
        findings: everything that refalign_ext relies on in it.
        tasks: verdicts on its text-to-video tasks.
        patches: how each patch stands; empty for this repository's own tree.
        unclear: why that cannot be told; empty if it can.
        machine: (subject, value) lines on this computer.
        blocked: why the model cannot run here as it is; empty if it can.
    """

    tree: str
    findings: list[ContractEntry]
    tasks: dict[str, str]
    patches: list[Outcome]
    unclear: str
    machine: list[tuple[str, str]]
    blocked: str

    @property
    def exit_code(self) -> int:
        """0 if references can be used with this tree on this machine, else 1."""
        lost = any(f.state != PRESENT and f.cost not in OPTIONAL for f in self.findings)
        return int(lost or bool(self.blocked))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield from _wrapped("tree", self.tree)
        for finding in self.findings:
            if finding.state != PRESENT:
                yield from _wrapped(finding.state, f"{finding.name}: {finding.detail}; costs: {finding.cost}")
        yield from _wrapped(PRESENT, "; ".join(f.name for f in self.findings if f.state == PRESENT))
        for task, verdict in self.tasks.items():
            yield from _wrapped("task", f"{task}: {verdict}")
        if self.patches:
            states = dict.fromkeys(outcome.state for outcome in self.patches)
            for state in states:
                names = [outcome.unit.name for outcome in self.patches if outcome.state == state]
                yield from _wrapped("patches", f"{state}: {', '.join(names)}")
        if self.unclear:
            yield from _wrapped("patches", self.unclear)
        for name, value in self.machine:
            yield from _wrapped(name, value)
        lost = list(dict.fromkeys(f.cost for f in self.findings if f.state != PRESENT))
        if self.blocked:
            yield from _wrapped("result", self.blocked)
        elif self.exit_code:
            yield from _wrapped("result", f"lost: {'; '.join(lost)}")
        else:
            without = f", without {'; '.join(lost)}" if lost else ""
            yield from _wrapped("result", f"references work with this tree here{without}")


def doctor(root: Path) -> DoctorReport:
    """Looks at a tree, which is not imported, and at this machine.

    Args:
        root: the folder that holds `wan/`.

    Raises:
        ValueError: if there is no tree.
    """
    contract, own = Contract(root), is_ours(root)
    outcomes, unclear = [], ""
    try:
        outcomes = [] if own else status(root, load_units())
    except ValueError as error:
        unclear = str(error)
    kernels = _kernels()
    blocked = "" if own else _blocked(root, outcomes, kernels)
    tree = f"{root} ({describe(root)})"
    return DoctorReport(
        tree,
        contract.findings,
        text_to_video_tasks(contract.tree),
        outcomes,
        unclear,
        _machine(kernels),
        blocked,
    )


def text_to_video_tasks(tree: SourceTree) -> dict[str, str]:
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
            fields = _config_fields(tree.file(name).tree)
        except PlaceNotFound as error:
            verdicts[task] = str(error)
            continue
        if reason := refusal(fields.get("boundary"), fields.get("vae_stride")):
            verdicts[task] = reason
        else:
            verdicts[task] = f"r2v-{task.removeprefix('t2v-')} is made from it"
    return verdicts


def _config_fields(tree: ast.Module) -> dict[str, str]:
    """`config.name = value` statements of a configuration file."""
    return {
        target.attr: ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute)
    }


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

    versions = ", ".join(
        f"{name} {_version(name)}" for name in ("torch", "diffusers", "transformers", "safetensors")
    )
    devices = [
        f"cuda:{index} {torch.cuda.get_device_name(index)} ({_free_on(index)})"
        for index in range(torch.cuda.device_count())
    ]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [
        ("python", f"{platform.python_version()} on {platform.system()}, {versions}"),
        ("attention", ", ".join([*kernels, "SDPA"])),
        ("devices", ", ".join([*devices, f"cpu ({os.cpu_count()} cores)"])),
        ("free", f"memory {_free_memory()}, disk here {shutil.disk_usage('.').free / GIB:.0f} GiB"),
        ("teachers", _teachers()),
    ]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _free_on(index: int) -> str:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return f"{free / GIB:.0f} of {total / GIB:.0f} GiB free"


def _free_memory() -> str:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        return f"{int(found.split()[1]) * 1024 / GIB:.0f} GiB"
    except (OSError, StopIteration, ValueError, IndexError):
        return "unknown"


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


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        f"{label:<9} {text}",
        WIDTH,
        subsequent_indent=" " * 10,
        break_long_words=False,
        break_on_hyphens=False,
    )
