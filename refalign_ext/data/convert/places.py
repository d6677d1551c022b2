"""Where a converter may write its manifest, and what has to lie beside it."""

from __future__ import annotations

from pathlib import Path

from refalign_ext.data.conversion_report import Report


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


def inside(folder: Path, root: Path, flag: str) -> Path:
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


def nothing_left(source: object, report: Report) -> str:
    """The error of a conversion that kept no clip: the most frequent reason with an example."""
    reasons = sorted(report.dropped["clips"].items(), key=lambda item: -item[1])
    if not reasons:
        return f"{source}: it has no rows"
    reason, count = reasons[0]
    example = report.examples["clips"][reason][0]
    return f"{source}: no clip can be used: {count} x {reason}, such as {example}"
