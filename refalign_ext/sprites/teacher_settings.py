"""How an embedded teacher is trained. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = {"dinov3": "dinov3-tiny", "siglip2": "siglip2-tiny"}
"""What can be trained and its name in `refalign_ext.teachers`."""
HIDDEN = {"small": 64, "tiny": 128, "large": 256}
"""Width by size: a quarter, all and four times the parameters of the embedded teacher."""
SIDE = 48  # pixels of a view, as of a clip of r2v-tiny
PATCH = 8  # pixels: VAE stride 4 times DiT patch 2, so that teacher and DiT grids match
LAYERS, HEAD = 4, 32  # blocks, channels of a head


@dataclass(frozen=True)
class TeacherSettings:
    """Settings of `train_teacher`: `kind` is a key of KINDS, `size` one of HIDDEN, no steps leave it untrained."""

    kind: str = "dinov3"
    size: str = "tiny"
    steps: int = 1500
    batch_size: int = 64
    seed: int = 0
    learning_rate: float = 2e-3
    muon_learning_rate: float = 5e-3
