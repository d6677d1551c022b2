"""Pictures of the sprite world as tensors, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from refalign_ext.atomic_io import atomic_open


def to_video_tensor(frames: np.ndarray) -> Tensor:
    """[T, H, W, 3] uint8 -> [3, T, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float().div(127.5).sub(1)


def to_frames(video: Tensor) -> np.ndarray:
    """[3, T, H, W] in [-1, 1] -> [T, H, W, 3] uint8."""
    return video.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu().numpy()


def to_images(images: Sequence[np.ndarray]) -> Tensor:
    """[H, W, 3] uint8 each -> [B, 3, H, W] in 0..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write [H, W, 3] uint8 as a PNG, whole or not at all."""
    from PIL import Image

    with atomic_open(path) as file:
        Image.fromarray(picture).save(file, format="PNG")
