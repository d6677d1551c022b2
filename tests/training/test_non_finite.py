"""Steps that are not finite, written down and counted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from refalign_ext.training.non_finite import NonFiniteGuard


def test_skipped_steps_are_written_and_end_the_run_when_too_many(tmp_path: Path) -> None:
    guard = NonFiniteGuard(3, tmp_path)
    report = {"samples": ["a"], "losses": {"flow": [math.nan, 1.0], "alignment": (math.inf, -math.inf)}}
    guard.skipped(12, report, writes=True)
    (path,) = (tmp_path / "skipped").iterdir()
    assert path.name == "step-00000012.json"
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "step": 12,
        "samples": ["a"],
        "losses": {"flow": ["nan", 1.0], "alignment": ["inf", "-inf"]},
    }
    for _ in range(3):
        guard.reset()
        guard.skipped(13, {}, writes=False)
        guard.skipped(14, {}, writes=False)
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(FloatingPointError, match=f"3 steps in a row.*{path.parent}.*--learning_rate"):
        guard.skipped(15, {}, writes=False)
