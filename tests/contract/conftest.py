"""Where the contract tests find the tree under test: a patched copy, so that WAN_ROOT itself stays as found."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

UPSTREAM_LIKE = Path(__file__).resolve().parents[1] / "upstream_like"
# Taken out of the environment, because in this process refalign_ext works with its own `wan/`; trees are opened by name.
# Workers of a parallel run find it under the other name.
NAMED_ROOT = (os.environ.pop("WAN_ROOT", "") or os.environ.get("CONTRACT_WAN_ROOT", "")).strip()
os.environ["CONTRACT_WAN_ROOT"] = NAMED_ROOT


def copy_of_tree(root: Path, units: tuple[str, ...] = ()) -> Path:
    """A copy of the tree under test with these patches, all where none are named, and no others."""
    from refalign_ext.upstream.patching import apply, load_units, revert
    from refalign_ext.upstream.record import RECORD

    source = Path(NAMED_ROOT).expanduser().resolve() if NAMED_ROOT else UPSTREAM_LIKE
    shutil.copytree(source / "wan", root / "wan", ignore=shutil.ignore_patterns("__pycache__"))
    if (source / RECORD).is_dir():
        shutil.copytree(source / RECORD, root / RECORD)
        revert(root, load_units())
    apply(root, load_units(), names=units, force=True)
    return root


@pytest.fixture(scope="session")
def patched_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree that WAN_ROOT names, or `tests/upstream_like`, with all patches."""
    return copy_of_tree(tmp_path_factory.mktemp("patched"))


@pytest.fixture(scope="session")
def released_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as it was released, but for batches of timesteps, which Wan2.2 does not take."""
    return copy_of_tree(tmp_path_factory.mktemp("released"), ("one-timestep",))


@pytest.fixture(scope="session")
def untouched_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the model exactly as it was released."""
    return copy_of_tree(tmp_path_factory.mktemp("untouched"), ("import-without-cuda",))
