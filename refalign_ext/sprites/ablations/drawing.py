"""Pictures of a table: its figures, and the same clips by every arm side by side."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from refalign_ext.atomic_io import save_figure
from refalign_ext.sprites.ablations.study import Study
from refalign_ext.sprites.ablations.summary import CURVES, PARTS, VALIDATION, Results, common_seeds
from refalign_ext.sprites.evaluate import SHEET_FRAMES

_CLIPS = 4  # shown of each job


def draw_table(path: Path, summary: dict[str, Any], found: Results) -> None:
    """Bars with standard errors for every part of the table, and accuracy in previews against training steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 19), layout="constrained")
    bars = [part for part in PARTS if part[1] != VALIDATION]
    panels = list(figure.subplots(5, 2).flat)
    arms = list(found)
    width, common = 0.8 / len(arms), common_seeds(found)
    for axes, (title, job, metrics) in zip(panels, bars, strict=False):
        for place, letter in enumerate(arms):
            figures = [summary["arms"][letter]["figures"][job][metric] for metric in metrics]
            known = [(x, entry) for x, entry in enumerate(figures) if entry is not None]
            axes.bar(
                [x + (place - (len(arms) - 1) / 2) * width for x, _ in known],
                [100 * entry["mean"] for _, entry in known],
                width,
                yerr=[100 * (entry["standard_error"] or 0.0) for _, entry in known],
                label=letter,
                color=f"C{place}",
            )
        axes.set_xticks(range(len(metrics)), [metric.replace("_", " ") for metric in metrics])
        axes.set(title=title, ylabel="percent", ylim=(0, 102))
        axes.grid(alpha=0.3, axis="y")
    for axes, (name, title, factor) in zip(panels[len(bars) :], CURVES, strict=True):
        for place, letter in enumerate(arms):
            steps, means = curve_of({seed: found[letter][seed] for seed in common}, name)
            axes.plot(steps, factor * np.array(means), marker="o", markersize=3, color=f"C{place}")
        axes.set(title=f"In training: {title}", xlabel="optimizer step")
        if factor == 100:
            axes.set(ylabel="percent", ylim=(0, 102))
        axes.grid(alpha=0.3)
    panels[0].legend(title="arm", ncols=len(arms), fontsize=8)
    save_figure(figure, path)


def curve_of(results: dict[int, dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """A preview's figure by step, averaged over the seeds that have it at that step."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for result in results.values():
        for step, shown in result["curve"].items():
            if name in shown:
                by_step[int(step)].append(shown[name])
    steps = sorted(by_step)
    return steps, [mean(by_step[step]) for step in steps]


def draw_clips(path: Path, study: Study, found: Results) -> bool:
    """The first clips of one seed: their references, and the middle frame that every arm made of the same noise.

    Returns:
        False, and nothing is written, if no seed has the pictures of all arms (results travel without them).
    """
    from matplotlib.figure import Figure

    arms = [arm for arm in study.arms.arms if arm.letter in found]
    for seed in common_seeds(found):
        folders = [study.arm_folder(arm, seed) for arm in arms]
        if all((folder / f"{job}.png").is_file() for folder in folders for job in ("one", "two")):
            break
    else:
        return False
    lines = []  # the references of a clip, and its middle frame by every arm
    for job, subjects in (("one", 1), ("two", 2)):
        sheets = [_cells(folder / f"{job}.png", subjects) for folder in folders]
        for clips in list(zip(*sheets, strict=True))[:_CLIPS]:
            lines.append((clips[0][:subjects], [clip[subjects + SHEET_FRAMES // 2] for clip in clips]))
    columns = 2 + len(arms)
    figure = Figure(figsize=(1.3 * columns, 1.35 * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, title in zip(grid[0], ["references", "", *(arm.letter for arm in arms)], strict=True):
        axes.set_title(title, fontsize=10)
    for row, (references, shown) in zip(grid, lines, strict=True):
        for axes, cell in zip([*row[: len(references)], *row[2:]], [*references, *shown], strict=True):
            axes.imshow(cell)
    figure.suptitle(f"Seed {seed}: the same clips and noise", fontsize=10)
    save_figure(figure, path)
    return True


def _cells(path: Path, subjects: int) -> list[list[np.ndarray]]:
    """A contact sheet's square cells by clip: references, then frames."""
    from PIL import Image

    with Image.open(path) as picture:
        sheet = np.asarray(picture.convert("RGB"))
    count = subjects + SHEET_FRAMES
    size = sheet.shape[1] // count
    return [np.split(row, count, axis=1) for row in np.split(sheet, sheet.shape[0] // size)]
