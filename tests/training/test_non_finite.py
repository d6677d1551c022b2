"""Steps that are not finite, written down and counted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from refalign_ext.training.non_finite import NonFiniteGuard, write_skipped


def test_skipped_steps_are_written_and_end_the_run_when_too_many(tmp_path: Path) -> None:
    report = {
        "samples": ["a", "b"],
        "losses": {"flow": [math.nan, 1.0], "alignment": [math.inf, -math.inf]},
        "kept": [(True, False)],
        "gradient_norm": math.nan,
    }
    path = write_skipped(tmp_path, 12, report)
    assert path == tmp_path / "skipped" / "step-00000012.json"

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "step": 12,
        "samples": ["a", "b"],
        "losses": {"flow": ["nan", 1.0], "alignment": ["inf", "-inf"]},
        "kept": [[True, False]],
        "gradient_norm": "nan",
    }
    assert [file.name for file in path.parent.iterdir()] == [path.name]

    guard = NonFiniteGuard(3, tmp_path)
    for _ in range(4):
        guard.skipped()
        guard.skipped()
        guard.reset()
    guard.skipped()
    guard.skipped()
    with pytest.raises(FloatingPointError, match=f"3 steps in a row.*{path.parent}.*--learning_rate"):
        guard.skipped()
    with pytest.raises(FloatingPointError, match="1 step in a row"):
        NonFiniteGuard(0, tmp_path).skipped()
