"""The teachers of table 3: every kind and size loads by name, gives the DiT's grid, learns, and is read back."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from refalign_ext.cli.sprites_parts import train_teacher
from refalign_ext.sprites import teacher_probe
from refalign_ext.sprites.teacher_probe import dominant_color, fit_linear, linear_probe
from refalign_ext.sprites.teacher_settings import HIDDEN, KINDS, SIDE, TeacherSettings
from refalign_ext.sprites.train_siglip import TEXT_LENGTH, CaptionLesson, draw_pair
from refalign_ext.sprites.train_teacher import ViewLesson, train_lesson
from refalign_ext.sprites.world import COLORS, PALETTE, all_subjects, render_reference, subjects_of
from refalign_ext.teachers import Teacher, load_teacher

LESSONS = {"dinov3": ViewLesson, "siglip2": CaptionLesson}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes of one view, and no bf16, which takes many times longer on processors without it."""
    monkeypatch.setattr(teacher_probe, "VIEWS", 1)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def run(out: Path, **options: object) -> str:
    """The command's log."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    result = CliRunner().invoke(train_teacher, [*words, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return (out / "log.txt").read_text()


@pytest.mark.parametrize("size", list(HIDDEN))
@pytest.mark.parametrize("kind", list(KINDS))
def test_an_untrained_one_of_every_kind_and_size_loads_and_gives_the_grid(
    kind: str, size: str, tmp_path: Path
) -> None:
    log = run(tmp_path, kind=kind, size=size, steps=0)
    teacher = load_teacher(KINDS[kind], tmp_path / "teacher")
    assert teacher.dim == HIDDEN[size]
    images = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    features = teacher(images, (6, 6))
    assert features.shape == (2, 36, HIDDEN[size])
    shifted = images.clone()
    shifted[:, :, 40:, 40:] *= -1  # the last patch alone
    change = (teacher(shifted, (6, 6)) - features).norm(dim=-1)
    assert (change.argmax(1) == 35).all()  # in raster order, one patch a cell
    assert " 0 steps" in log and "step 1 " not in log and "(chance " in log


@pytest.mark.parametrize("kind", list(KINDS))
def test_sizes_are_a_quarter_and_four_times_the_parameters(kind: str) -> None:
    small, tiny, large = (
        sum(
            parameter.numel()
            for name, parameter in LESSONS[kind](0, size, 2).model.named_parameters()
            if "text_model" not in name
        )
        for size in ("small", "tiny", "large")
    )
    assert 3 < tiny / small < 5 and 3 < large / tiny < 5
    assert 0.7e6 < tiny < 1.2e6


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_few_steps_lower_the_loss_and_a_seed_makes_the_same_weights_again(kind: str) -> None:
    settings, weights = TeacherSettings(kind, "small", steps=12, batch_size=8, seed=3), []
    for _ in range(2):
        lesson, losses, lines = LESSONS[kind](3, "small", 8), [], []
        for _ in ("before", "after"):
            with torch.no_grad():
                losses.append(
                    np.mean([lesson.loss(np.random.default_rng(seed)).item() for seed in (5, 6, 7)])
                )
            if len(losses) == 1:
                train_lesson(lesson, settings, lines.append)
        assert losses[1] < losses[0] - 0.2
        assert len(lines) == 1 and lines[0].startswith("step 12 loss ") and "held-out" in lines[0]
        weights.append(lesson.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_captions_fit_and_name_the_shape_that_is_shown() -> None:
    lesson = CaptionLesson(0, "small", 4)
    rng, subjects = np.random.default_rng(0), subjects_of("train")
    pairs = [draw_pair(rng, subjects, on_white) for on_white in (True, False) * 50]
    inputs = lesson.inputs(pairs)
    assert inputs["input_ids"].shape == (100, TEXT_LENGTH)
    ends = inputs["input_ids"] == lesson.tokenizer.eos_token_id
    assert (ends.sum(1) == 1).all()  # none is cut off
    assert inputs["pixel_values"].abs().max() <= 1.0
    corners = np.stack([image[0, 0] for image, _ in pairs])
    assert (corners[::2] == 255).all() and (corners[1::2] != 255).any(1).all()
    names = {"red", "green", "blue", "yellow", "magenta", "cyan", "halves", "core", "band"}
    assert not any(name in caption.lower().split() for _, caption in pairs for name in names)


class Averager(Teacher):
    """Knows the mean colour of each patch and nothing else."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(1, 1))

    def __call__(self, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, grid).flatten(2).mT


class Constant(Averager):
    """Knows nothing."""

    def __call__(self, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return torch.ones(len(images), grid[0] * grid[1], 3)


def test_the_probe_tells_what_is_known_from_what_is_not() -> None:
    nothing, colors = linear_probe(Constant()), linear_probe(Averager())
    assert nothing.keys() == {"pattern", "shape", "dominant colour"}
    for share, chance in nothing.values():
        assert share <= chance + 1e-6 and 0.15 < chance < 0.45
    share, chance = colors["dominant colour"]
    assert share > 0.7 > 2 * chance
    assert colors["shape"][0] < 0.55


def test_the_probe_is_a_logistic_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 4, generator=generator)
    labels = (features[:, 1] > 0.3).long() + (features[:, 1] > 1).long()
    weight = fit_linear(features, labels)
    assert weight.shape == (5, 3)
    right = (torch.nn.functional.pad(features, (0, 1), value=1.0) @ weight).argmax(1) == labels
    assert right.float().mean() > 0.95


def test_the_dominant_colour_is_the_one_with_more_pixels() -> None:
    palette = torch.tensor([PALETTE[name] for name in COLORS], dtype=torch.float32)
    for subject in all_subjects()[::29]:
        image = torch.from_numpy(render_reference(subject, 96, 96, 0.0, 0.9)).float().flatten(0, 1)
        distance = torch.cdist(image, palette)
        counts = distance.argmin(1)[distance.min(1).values < 5].bincount(minlength=len(COLORS))
        assert COLORS[int(counts.argmax())] == dominant_color(subject)
