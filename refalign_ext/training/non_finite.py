"""Steps whose loss or gradient is not finite: what is written down of them, and when there are too many."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refalign_ext.training.log_files import json_values, write_whole

SKIPPED_FOLDER = "skipped"


class NonFiniteGuard:
    """Stops a run whose steps are skipped, for losses or gradients that are not finite, too often in a row.

    Args:
        limit: skipped steps in a row that end the run; 0 counts as 1.
        out: the run's folder, for the message.
    """

    def __init__(self, limit: int, out: Path) -> None:
        self.limit, self.folder, self.count = max(1, limit), Path(out) / SKIPPED_FOLDER, 0

    def skipped(self) -> None:
        """Count a skipped step.

        Raises:
            FloatingPointError: if it is one too many.
        """
        self.count += 1
        if self.count >= self.limit:
            raise FloatingPointError(
                f"{self.count} step{'s' if self.count > 1 else ''} in a row gave a loss or gradient that is not "
                f"finite: see the samples in {self.folder}, lower --learning_rate or leave them out; the last "
                "checkpoint is untouched"
            )

    def reset(self) -> None:
        """Note that a step went through."""
        self.count = 0


def write_skipped(out: Path, step: int, report: Mapping[str, Any]) -> Path:
    """Write what is known about a skipped step to `out/skipped/step-00000012.json`; returns the file.

    Args:
        out: the run's folder.
        step: the step that was skipped, as in the logs.
        report: what `json_values` takes.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(out) / SKIPPED_FOLDER / f"step-{step:08d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(
        path, json.dumps({"step": step, **json_values(dict(report))}, indent=2, allow_nan=False) + "\n"
    )
    return path
