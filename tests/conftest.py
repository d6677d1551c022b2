from __future__ import annotations

import os
from pathlib import Path

import pytest

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # workers share the cores; set before torch is imported, and for what tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint folder of the task r2v-tiny with random weights; read it, do not change it."""
    from tests.helpers.tiny_checkpoint import build

    return build(tmp_path_factory.mktemp("r2v-tiny"))
