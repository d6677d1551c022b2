"""Which state a checkout is in: version, commit, edits."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def head_commit(root: Path) -> str | None:
    """The commit that is checked out, 40 digits; None if `root` is not the top of a git checkout."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return None
    return _git(root, "rev-parse", "HEAD")


def changed_files(root: Path) -> list[str]:
    """Python files below `wan/` that differ from the commit or that git does not know and does not ignore."""
    lines = _git(root, "status", "--porcelain", "-z", "--untracked-files=all", "--no-renames", "--", "wan")
    if lines is None:
        raise ValueError(f"{root}: git status fails, so edits cannot be told from the release")
    return sorted(entry[3:] for entry in lines.split("\0") if entry.endswith(".py"))


def describe_checkout(root: Path) -> str:
    """Version, commit and edits in one line."""
    path = root / "pyproject.toml"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search(r'^version\s*=\s*"([^"]+)"', text, re.MULTILINE)
    version = f"version {found[1] if found else 'unknown'}"
    commit = head_commit(root)
    if commit is None:
        return f"{version}, no git checkout"
    date = _git(root, "log", "-1", "--format=%cs")
    edited = len(changed_files(root))
    edits = f", differs from it in {edited} file{'s'[: edited != 1]}" if edited else ""
    return f"{version}, commit {commit[:7]} of {date}{edits}"


def _git(root: Path, *arguments: str) -> str | None:
    # A tree from elsewhere may configure programs that git runs by itself; none is wanted here.
    safe = ["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"]
    command = ["git", "--no-optional-locks", "-C", str(root), *safe]
    try:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip("\n") if done.returncode == 0 else None
