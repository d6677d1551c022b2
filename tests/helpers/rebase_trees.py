"""Copies of `tests/upstream_like`, as git checkouts and with deliberate drift."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch
from torch import nn

UPSTREAM_LIKE = Path(__file__).resolve().parents[1] / "upstream_like"
ATTENTION = "wan/modules/attention.py"
MODEL = "wan/modules/model.py"
T5 = "wan/modules/t5.py"


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.com"]
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def checkout(folder: Path, *, with_git: bool = True) -> Path:
    """A copy, committed unless `with_git` is False."""
    shutil.copytree(UPSTREAM_LIKE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    if with_git:
        git(folder, "init", "--quiet")
        commit(folder)
    return folder


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "a release")


def contents(root: Path) -> dict[str, bytes]:
    """Every file outside git's own folder."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".git" not in path.parts and "__pycache__" not in path.parts
    }


def change(root: Path, file: str, *pairs: tuple[str, str]) -> None:
    """Replaces texts in a file; each must be there."""
    path = root / file
    text = path.read_text(encoding="utf-8")
    for old, new in pairs:
        assert old in text, f"{file} has no {old!r}"
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def fill(module: nn.Module) -> None:
    """Weights that do not depend on how a tree draws them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def rename_an_argument(root: Path) -> None:
    change(
        root,
        ATTENTION,
        ("q_lens=None, k_lens=None,", "q_lens=None, key_lens=None,"),
        ("k_lens=k_lens", "key_lens=key_lens"),
    )
    change(root, MODEL, ("k_lens=", "key_lens="))


def move_the_attention(root: Path) -> None:
    (root / ATTENTION).rename(root / "wan/modules/kernels.py")
    (root / ATTENTION).write_text('"""Attention lives in kernels.py now."""\n', encoding="utf-8")
    for file in (MODEL, "wan/modules/__init__.py"):
        change(root, file, ("from .attention import", "from .kernels import"))


def move_the_blocks(root: Path) -> None:
    """Everything before the head goes to a file of its own."""
    text = (root / MODEL).read_text(encoding="utf-8")
    start, head = text.index("def sinusoids"), text.index("class Head")
    blocks, preamble = text[start:head], text[:start]
    (root / "wan/modules/blocks.py").write_text(preamble + blocks, encoding="utf-8")
    names = "WanAttentionBlock, WanLayerNorm, rotation_tables, sinusoids, two_layers"
    (root / MODEL).write_text(f"{preamble}\nfrom .blocks import {names}\n\n\n{text[head:]}", encoding="utf-8")


def add_a_block_argument(root: Path) -> None:
    change(
        root,
        MODEL,
        ("def forward(self, x, e, seq_lens,", "def forward(self, x, e, noise_level, seq_lens,"),
        ("            e=e0,\n", "            e=e0,\n            noise_level=t,\n"),
    )


def demand_another_input(root: Path) -> None:
    change(root, MODEL, ("def forward(self, x, t, context, seq_len, y=None):",
                         "def forward(self, x, t, context, seq_len, camera):"))  # fmt: skip


def gate_the_text(root: Path) -> None:
    change(
        root,
        MODEL,
        (
            "x = x + self.cross_attn(self.norm3(x), context, context_lens)",
            "x = x + torch.tanh(self.cross_attn(self.norm3(x), context, context_lens))",
        ),
    )


def import_by_name(root: Path) -> None:
    change(root, MODEL, ("from .attention import", "from wan.modules.attention import"))


def break_the_syntax(root: Path) -> None:
    change(root, MODEL, ("class Head(nn.Module):", "class Head(nn.Module)"))
