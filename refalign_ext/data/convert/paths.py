"""Where a converter may write its manifest, and which folders the manifest may name files of."""

from __future__ import annotations

from pathlib import Path


def manifest_root(out: Path) -> Path:
    """The folder of the manifest `out`, resolved: paths in it are relative to this.

    Raises:
        ValueError: if there is no such folder, or `out` is one itself.
    """
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: its folder does not exist")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file, such as {out / 'manifest.jsonl'}")
    return out.parent.resolve()


def folder_inside(folder: Path, root: Path, flag: str) -> Path:
    """The folder that `flag` names, resolved: one that a manifest in `root` may name files of.

    Raises:
        ValueError: if there is no such folder, or it lies elsewhere.
    """
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder}: no such folder")
    resolved = folder.resolve()
    if not resolved.is_relative_to(root):
        raise ValueError(
            f"{flag} {folder}: not inside {root}, the folder of --out, and paths in a manifest may not leave it: give an "
            f"--out such as {resolved / 'manifest.jsonl'}, or above"
        )
    return resolved
