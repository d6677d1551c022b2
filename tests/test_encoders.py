"""The frozen parts of a run are loaded once, whoever uses them, and not before."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from refalign_ext import encoders
from refalign_ext.cli.training_tables import DATA_SOURCES
from refalign_ext.config import recipe, with_overrides
from refalign_ext.training.run import run_training

SETTINGS = {
    **{"steps": 1, "batch_size": 1, "precision": "fp32", "from_scratch": True, "ema_decay": 0.0},
    **{"cache_clips": 6, "cache_views": 1, "free_colors": 0.0, "validate_every": 1, "validation_clips": 1},
    **{"preview_every": 1, "preview_clips": 1, "preview_steps": 1},
}
LOADERS = ("WanVAE", "T5EncoderModel", "load_teacher")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each frozen part was loaded."""
    count: Counter = Counter()

    def counted(name: str) -> Any:
        original = getattr(encoders, name)

        def load(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return original(*args, **kwargs)

        return load

    for name in LOADERS:
        monkeypatch.setattr(encoders, name, counted(name))
    return count


def test_a_run_with_previews_loads_each_part_once(loaded: Counter, tmp_path: Path) -> None:
    trainer = run_training(
        "tiny", {**SETTINGS, "out": str(tmp_path)}, sources=DATA_SOURCES, device="cpu", threads=1
    )
    assert trainer.step == 1
    assert len(list((tmp_path / "previews").iterdir())) == 1
    assert loaded == dict.fromkeys(LOADERS, 1)


def test_parts_that_nobody_uses_are_not_loaded(loaded: Counter) -> None:
    config = with_overrides(recipe("tiny"), {"alignment.weight": 0.0})
    parts = encoders.Encoders(config, torch.device("cpu"), dit=False)
    assert parts.teacher is None and parts.features is None and parts.teacher_files == []
    assert not loaded
