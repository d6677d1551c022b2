from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint folder of the task r2v-tiny with random weights; read it, do not change it."""
    from tests.helpers.tiny_checkpoint import build

    return build(tmp_path_factory.mktemp("r2v-tiny"))
