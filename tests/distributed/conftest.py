"""Leaves out what the installed torch cannot do."""

from __future__ import annotations

import pytest

from refalign_ext.distributed.parallelize import can_shard_on_cpu


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if can_shard_on_cpu():
        return
    reason = pytest.mark.skip(reason="FSDP2 of this torch does not run on CPUs")
    for item in items:
        if item.path.parent.name == "distributed" and item.path.name != "test_generation.py":
            item.add_marker(reason)
