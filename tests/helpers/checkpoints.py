"""Whole tensors of a training checkpoint."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from refalign_ext.checkpoint.reading import open_dit
from refalign_ext.checkpoint.weights import read_weights


def read_dit(path: Path, *, raw: bool = False) -> dict[str, Tensor]:
    """The DiT's weights: the moving average if there is one and `raw` is not asked for, else what was trained."""
    return read_weights(open_dit(path, raw=raw).weights)


def read_projectors(path: Path) -> dict[str, Tensor]:
    """The projectors' weights; empty without projectors."""
    return read_weights(open_dit(path).projectors)
