"""What a teacher knows of the sprite world, which is what it can teach."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refalign_ext.sprites.pixels import to_images
from refalign_ext.sprites.teacher_settings import PATCH, SIDE
from refalign_ext.sprites.world import (
    COLORS,
    PATTERNS,
    SHAPES,
    SpriteSubject,
    inside_second_color,
    inside_shape,
    render_cross_reference,
    subjects_of,
)
from refalign_ext.teachers import Teacher

VIEWS = 4  # references of each subject, to fit the probe and to test it
GRID = (SIDE // PATCH, SIDE // PATCH)
PENALTY = 1e-3  # on the squared weights of the probe


def dominant_color(subject: SpriteSubject) -> str:
    """Name of the colour that covers more of the subject."""
    x, y = np.meshgrid(*[np.linspace(-1, 1, 101)] * 2)
    inside = inside_shape(subject.shape, x, y) < 0
    second = (inside_second_color(subject.pattern, x, y) < 0)[inside].mean()
    return subject.second if second > 0.5 else subject.first


QUESTIONS: dict[str, Callable[[SpriteSubject], int]] = {
    "pattern": lambda subject: PATTERNS.index(subject.pattern),
    "shape": lambda subject: SHAPES.index(subject.shape),
    "dominant colour": lambda subject: COLORS.index(dominant_color(subject)),
}


def linear_probe(teacher: Teacher, seed: int = 0) -> dict[str, tuple[float, float]]:
    """How well a linear map of the frozen features, averaged over the patches, tells what a reference shows.

    Args:
        seed: of the references, those of training's subjects to fit the map and those of held-out ones to test it.

    Returns:
        Attribute -> share of right answers on held-out subjects, and chance: the share of the most frequent answer.
    """
    (known, fitted), (tested, asked) = (
        _features(teacher, subjects_of(split), np.random.default_rng([seed, 97, number]))
        for number, split in enumerate(("train", "held_out"))
    )
    mean, deviation = known.mean(0), known.std(0) + 1e-6
    known, tested = (known - mean) / deviation, (tested - mean) / deviation
    found = {}
    for name, answer in QUESTIONS.items():
        labels, truth = (torch.tensor([answer(s) for s in subjects]) for subjects in (fitted, asked))
        weight = fit_linear(known, labels)
        right = (_with_one(tested) @ weight).argmax(1) == truth
        found[name] = right.float().mean().item(), truth.bincount().max().item() / len(truth)
    return found


def fit_linear(features: Tensor, labels: Tensor) -> Tensor:
    """Weights [D + 1, classes] of a penalised logistic regression on features [K, D]; the last row is the bias."""
    weight = torch.zeros(features.shape[1] + 1, int(labels.max()) + 1, requires_grad=True)
    inputs = _with_one(features)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(inputs @ weight, labels) + PENALTY * weight[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach()


def _features(
    teacher: Teacher, subjects: list[SpriteSubject], rng: np.random.Generator
) -> tuple[Tensor, list[SpriteSubject]]:
    """Features [K, D] of `VIEWS` references of each subject, and whose they are."""
    shown = [subject for subject in subjects for _ in range(VIEWS)]
    images = to_images([render_cross_reference(rng, subject, SIDE, SIDE)[0] for subject in shown])
    return teacher(images * 2 - 1, GRID).mean(1), shown


def _with_one(features: Tensor) -> Tensor:
    return F.pad(features, (0, 1), value=1.0)
