"""Numbers that are not finite: how files show them, and steps that are skipped for them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refalign_ext.atomic_io import write_json

logger = logging.getLogger(__name__)


def json_values(value: Any) -> Any:
    """`value` as every reader of JSON takes it: numbers that are not finite as the strings `nan`, `inf` and `-inf`."""
    if isinstance(value, Mapping):
        return {name: json_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class NonFiniteGuard:
    """Writes down steps that were skipped in the run's folder, and ends a run after `limit` in a row."""

    def __init__(self, limit: int, out: Path) -> None:
        self.limit, self.folder, self.count = limit, out / "skipped", 0

    def skipped(self, step: int, report: Mapping[str, Any], *, writes: bool) -> None:
        """Count a skipped step, which one rank writes down; FloatingPointError if it is one too many."""
        if writes:
            path = self.folder / f"step-{step:08d}.json"
            write_json(path, {"step": step, **json_values(report)}, indent=2)
            logger.warning("step %d skipped, it is not finite: %s tells its samples and losses", step, path)
        self.count += 1
        if self.count >= self.limit:
            raise FloatingPointError(
                f"{self.count} step{'s' if self.count > 1 else ''} in a row gave a loss or gradient that is not finite: "
                f"see the samples in {self.folder}, lower --learning_rate or leave them out; the last checkpoint is "
                "untouched"
            )

    def reset(self) -> None:
        """Note that a step went through."""
        self.count = 0
