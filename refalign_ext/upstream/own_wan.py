"""Whether the package `wan` is this repository's. Imports no torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

VARIABLE = "WAN_ROOT"
OURS = Path(__file__).resolve().parents[2]


def is_ours(root: Path) -> bool:
    """Whether a folder holds this repository's `wan/`, here or in another copy."""
    return (root / "wan" / "utils" / "weights.py").is_file()


def check_own_wan() -> None:
    """Refuses a `wan` package found first on the path that is not this repository's; it is not imported for that."""
    spec = find_spec("wan")
    folder = Path(next(iter((spec and spec.submodule_search_locations) or [str(OURS / "wan")])))
    if not is_ours(folder.parent):
        raise ValueError(
            f"the package wan found first is {folder}: put {OURS} before it on PYTHONPATH and name that tree by "
            f"{VARIABLE}={folder.parent}"
        )
