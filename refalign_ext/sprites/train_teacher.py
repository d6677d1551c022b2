"""Train the embedded alignment teacher, or others to compare it with: `python -m refalign_ext sprites train-teacher`.

A small DINOv3 learns that two views of a subject (other angle, scale, place, background) are the same and that all other
subjects are not: contrastive learning over features averaged on the subject's own patches. By that alone it tells colours
and hardly any shapes (read back with a linear probe: pattern 73%, shape 32%, chance 25%), and what the teacher does not
know it cannot teach. So every patch of a subject also has to say its shape, its pattern and both of its colours, and half
of the subjects have free colours. Nothing is shared with the judge. A teacher of another kind is `sprites.train_siglip`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refalign_ext.atomic_io import atomic_folder
from refalign_ext.sprites.pixels import to_images
from refalign_ext.sprites.teacher_probe import linear_probe
from refalign_ext.sprites.teacher_settings import HEAD, HIDDEN, KINDS, LAYERS, PATCH, SIDE, TeacherSettings
from refalign_ext.sprites.train_siglip import CaptionLesson
from refalign_ext.sprites.training_steps import train_steps
from refalign_ext.sprites.world import (
    BACKGROUNDS,
    PATTERNS,
    REFERENCE_TILT,
    SHAPES,
    SpriteSubject,
    paint,
    paint_background,
    subjects_of,
    tinted,
)
from refalign_ext.teachers import IMAGENET_MEAN, IMAGENET_STD, load_teacher
from refalign_ext.training.muon import Muon

if TYPE_CHECKING:
    from transformers import DINOv3ViTModel

LARGEST_TILT = REFERENCE_TILT[1]


def build_teacher(seed: int = 0, size: str = "tiny") -> DINOv3ViTModel:
    """A DINOv3 on 8-pixel patches; `tiny` has 0.8 million parameters."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    hidden = HIDDEN[size]
    config = DINOv3ViTConfig(
        patch_size=PATCH,
        image_size=SIDE,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // HEAD,
        num_register_tokens=4,
        layerscale_value=1.0,
        drop_path_rate=0.0,
        attn_implementation="eager",  # trains twice as fast on a CPU
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DINOv3ViTModel(config)


def view_of(rng: np.random.Generator, subject: SpriteSubject) -> tuple[np.ndarray, np.ndarray]:
    """One view [SIDE, SIDE, 3] uint8, two thirds of the time on white as references are, and its coverage."""
    if rng.random() < 2 / 3:
        canvas = np.full((SIDE, SIDE, 3), 255, np.float32)
    else:
        canvas = paint_background(list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))], SIDE, SIDE)
    scale = rng.uniform(0.3, 0.85)
    room = max(0.0, 0.5 - scale / 2)
    center = tuple(float(SIDE * (0.5 + rng.uniform(-room, room))) for _ in range(2))
    coverage = paint(canvas, subject, center, scale * SIDE, rng.uniform(-LARGEST_TILT, LARGEST_TILT))
    return np.rint(canvas).astype(np.uint8), coverage


def tokens_of(model: DINOv3ViTModel, images: Tensor, coverage: Tensor) -> tuple[Tensor, Tensor]:
    """Patch features [B, N, D] and the share of the subject in every patch [B, N]; images [B, 3, H, W] in 0..1."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    skipped = 1 + model.config.num_register_tokens
    tokens = model(pixel_values=(images - mean) / std).last_hidden_state[:, skipped:].float()  # [B, N, D]
    return tokens, F.avg_pool2d(coverage[:, None], PATCH).flatten(1)


def pool(tokens: Tensor, weight: Tensor) -> Tensor:
    """Unit features [B, D] averaged over the patches that show the subject."""
    pooled = (tokens * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp_min(1e-6)
    return F.normalize(pooled, dim=-1)


class Attributes(nn.Module):
    """What every patch of a subject has to tell, linearly from its direction: shape, pattern, both colours."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shape, self.pattern = nn.Linear(dim, len(SHAPES)), nn.Linear(dim, len(PATTERNS))
        self.colors = nn.Linear(dim, 6)

    def loss(self, tokens: Tensor, weight: Tensor, subjects: list[SpriteSubject]) -> Tensor:
        """tokens [B, N, D] and their weights [B, N]."""
        unit = F.normalize(tokens, dim=-1) * tokens.shape[-1] ** 0.5
        shape = torch.tensor([SHAPES.index(subject.shape) for subject in subjects])
        pattern = torch.tensor([PATTERNS.index(subject.pattern) for subject in subjects])
        colors = torch.tensor([[*subject.rgb[0], *subject.rgb[1]] for subject in subjects]) / 127.5 - 1
        count = tokens.shape[1]
        wrong = (
            F.cross_entropy(self.shape(unit).mT, shape[:, None].expand(-1, count), reduction="none")
            + F.cross_entropy(self.pattern(unit).mT, pattern[:, None].expand(-1, count), reduction="none")
            + (self.colors(unit) - colors[:, None]).square().mean(-1)
        )
        return (wrong * weight).sum() / weight.sum()


def batch_of(rng: np.random.Generator, subjects: list[SpriteSubject]) -> tuple[Tensor, Tensor]:
    """One view of each subject: images [B, 3, SIDE, SIDE] in 0..1 and coverage [B, SIDE, SIDE]."""
    views = [view_of(rng, subject) for subject in subjects]
    return to_images([image for image, _ in views]), torch.from_numpy(
        np.stack([coverage for _, coverage in views])
    ).float()


class ViewLesson:
    """Two views of a subject are alike and unlike those of all others, and every patch tells its attributes.

    Attributes:
        model: what is kept.
        attributes: what only training needs.
    """

    def __init__(self, seed: int, size: str, batch_size: int) -> None:
        self.seed, self.batch_size = seed, batch_size
        self.model = build_teacher(seed, size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.attributes = Attributes(self.model.config.hidden_size)
        self.subjects = subjects_of("train")

    def loss(self, rng: np.random.Generator) -> Tensor:
        """Loss of a batch drawn with `rng`."""
        chosen = [self.subjects[index] for index in rng.permutation(len(self.subjects))[: self.batch_size]]
        chosen = [tinted(rng, subject) if rng.random() < 0.5 else subject for subject in chosen]
        with torch.autocast("cpu", torch.bfloat16):
            views = [tokens_of(self.model, *batch_of(rng, chosen)) for _ in range(2)]
        first, second = (pool(*view) for view in views)
        logits = first @ second.T / 0.1
        target = torch.arange(len(chosen))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss + sum(self.attributes.loss(*view, chosen) for view in views) / 2

    def report(self) -> str:
        """How far it is, for the log; the model is in evaluation mode."""
        shares = [
            f"{self.retrieval(group):.1%} of {len(group)}"
            for group in (self.subjects, subjects_of("held_out"))
        ]
        return f"cross-view retrieval: trained subjects {shares[0]}, held-out {shares[1]}"

    @torch.no_grad()
    def retrieval(self, subjects: list[SpriteSubject]) -> float:
        """Share of subjects whose second view is nearest to their first among all second views (cross-view top-1)."""
        rng = np.random.default_rng([self.seed, 99])
        first, second = (pool(*tokens_of(self.model, *batch_of(rng, subjects))) for _ in range(2))
        return float(((first @ second.T).argmax(1) == torch.arange(len(subjects))).float().mean())


def train_lesson(
    lesson: ViewLesson | CaptionLesson, settings: TeacherSettings, write: Callable[[str], None]
) -> None:
    """Muon on the matrices of all blocks and AdamW on the rest; `write` takes a line every hundred steps."""
    blocks = (".layer.", ".layers.")
    matrices, others = [], []
    for name, parameter in lesson.model.named_parameters():
        is_matrix = any(part in f".{name}" for part in blocks) and parameter.ndim == 2
        (matrices if is_matrix else others).append(parameter)
    extra = [] if lesson.attributes is None else list(lesson.attributes.parameters())
    optimizers = [
        Muon(matrices, lr=settings.muon_learning_rate),
        torch.optim.AdamW([*others, *extra], lr=settings.learning_rate, weight_decay=0.05, betas=(0.9, 0.95)),
    ]

    def loss_of(step: int) -> Tensor:
        # The step seeds its batch, and what the model itself draws (DINOv3 stretches its positions at random).
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((settings.seed << 32) + step)
            return lesson.loss(np.random.default_rng([settings.seed, step]))

    def report(step: int, loss: float) -> None:
        lesson.model.eval()
        write(f"step {step} loss {loss:.3f} {lesson.report()}")
        lesson.model.train()

    lesson.model.train()
    train_steps(
        [*lesson.model.parameters(), *extra],
        optimizers,
        loss_of,
        steps=settings.steps,
        warmup=50,
        decay=0.5,
        least=0.02,
        report_every=100,
        report=report,
        label="teacher",
    )
    lesson.model.eval()


def train_teacher(settings: TeacherSettings, out: Path) -> None:
    """Train a teacher, write it as a transformers folder `teacher`, and write down what a linear probe reads from it."""
    from tqdm import tqdm

    lesson_class = ViewLesson if settings.kind == "dinov3" else CaptionLesson
    lesson = lesson_class(settings.seed, settings.size, settings.batch_size)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.txt").open("w", buffering=1) as log:

        def write(line: str) -> None:
            tqdm.write(line)
            log.write(line + "\n")

        count = sum(parameter.numel() for parameter in lesson.model.parameters())
        write(
            f"{settings.kind} {settings.size}, {count / 1e6:.2f} M parameters, {settings.steps} steps of "
            f"{settings.batch_size}, seed {settings.seed}"
        )
        train_lesson(lesson, settings, write)
        folder = out / "teacher"
        with atomic_folder(folder) as unfinished:
            lesson.model.to(torch.bfloat16).save_pretrained(unfinished)
            shutil.rmtree(folder, ignore_errors=True)
        teacher = load_teacher(KINDS[settings.kind], folder)
        known = [
            f"{name} {share:.1%} (chance {chance:.1%})"
            for name, (share, chance) in linear_probe(teacher).items()
        ]
        write(f"linear probe on held-out subjects, features averaged over the patches: {', '.join(known)}")
