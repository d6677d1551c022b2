"""What the training of every embedded teacher shares: sizes, images, and the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from refalign_ext.training.muon import Muon

SIDE = 48  # pixels of a view, as of a clip of r2v-tiny
PATCH = 8  # pixels: VAE stride 4 times DiT patch 2, so that teacher and DiT grids match
LAYERS, HEAD = 4, 32  # blocks, channels of a head


class Lesson(Protocol):
    """A model in training: `model` is what is kept, `trained` holds it and what only training needs."""

    model: nn.Module
    trained: nn.Module

    def loss(self, rng: np.random.Generator) -> Tensor:
        """Loss of a batch drawn with `rng`."""
        ...

    def report(self) -> str:
        """How far it is, for the log; the model is in evaluation mode."""
        ...


def to_images(images: list[np.ndarray]) -> Tensor:
    """[H, W, 3] uint8 each -> [B, 3, H, W] in 0..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def train(
    lesson: Lesson,
    *,
    steps: int,
    seed: int,
    learning_rate: float,
    muon_learning_rate: float,
    write: Callable[[str], None],
) -> None:
    """Muon on the matrices of all blocks and AdamW on the rest, in bf16, with warm-up and linear decay.

    Args:
        seed: with the number of the step the seed of its batch, and of what the model itself draws (DINOv3 stretches its
            positions at random).
        write: takes a line every hundred steps.
    """
    from tqdm import tqdm

    blocks = (".layer.", ".layers.")
    matrices = [
        parameter
        for name, parameter in lesson.model.named_parameters()
        if any(part in f".{name}" for part in blocks) and parameter.ndim == 2
    ]
    known = {id(matrix) for matrix in matrices}
    parameters = list(lesson.trained.parameters())
    optimizers = [
        Muon(matrices, lr=muon_learning_rate),
        torch.optim.AdamW(
            [p for p in parameters if id(p) not in known],
            lr=learning_rate,
            weight_decay=0.05,
            betas=(0.9, 0.95),
        ),
    ]
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    lesson.model.train()
    for step in tqdm(range(steps), desc="teacher", mininterval=2):
        for group, rate in groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * max(0.02, min(1.0, (1 - step / steps) / 0.5))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((seed << 32) + step)
            loss = lesson.loss(np.random.default_rng([seed, step]))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            lesson.model.eval()
            write(f"step {step + 1} loss {loss.item():.3f} {lesson.report()}")
            lesson.model.train()
    lesson.model.eval()
