"""Does dual guidance do something? Identity against the scale of the references, motion against that of the prompt.

Every cell of the grid makes the same clips from the same noise, so that differences between cells are paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refalign_ext.atomic_io import save_figure, write_json, write_text
from refalign_ext.sprites.evaluate import Job
from refalign_ext.sprites.judge import wilson
from refalign_ext.sprites.judged import Judged, JudgedFolder, clip_shares, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = ("image", "text")
# What each scale is for: the references carry identity, the prompt the motion.
EXPECTED = {"image": ("colors", "pattern"), "text": ("motion",)}
SHOWN = ("colors", "pattern", "motion")
CEILING = 0.98  # a figure that is never lower has no room to rise
_LABELS = {"image": "image scale (references)", "text": "text scale (prompt)"}

Cells = dict[tuple[float, float], Judged]


def judge_grid(
    judge: JudgedFolder, job: Job, image_scales: Sequence[float], text_scales: Sequence[float], out: Path
) -> dict[str, Any]:
    """Judge one job under every pair of scales (or read what was judged before) and write what it shows.

    Writes `guidance.json`, `guidance.md` and `guidance.png` to `out`, and answers and a contact sheet for each cell to
    `out/cells`.

    Returns:
        What `guidance.json` holds.

    Raises:
        ValueError: if an axis has fewer than two different scales, or scales below 0 or not finite.
    """
    from tqdm import tqdm

    axes = (_checked("--image_scales", image_scales), _checked("--text_scales", text_scales))
    places = [(image, text) for image in axes[0] for text in axes[1]]
    cells: Cells = {}
    for image, text in tqdm(places, desc="guidance", unit="cell"):
        stem = out / "cells" / f"image-{image:g}-text-{text:g}"
        scaled = replace(job, ref_guide_scale=image, text_guide_scale=text)
        cells[image, text] = judge.judge("generation", scaled, stem, rows=6, progress=False)
    entry = {
        "job": asdict(job),
        "scales": dict(zip(AXES, axes, strict=True)),
        "rises": [
            {"axis": axis, "metric": metric, **rise(cells, axis, metric)} for axis in AXES for metric in SHOWN
        ],
        "cells": [
            {"image": image, "text": text, "table": cell.table} for (image, text), cell in cells.items()
        ],
    }
    write_json(out / "guidance.json", entry)
    write_text(out / "guidance.md", _markdown(cells, entry, job))
    _draw(cells, axes, out / "guidance.png")
    return entry


def _checked(flag: str, scales: Sequence[float]) -> list[float]:
    found = sorted(set(scales))
    if len(found) < 2 or not all(math.isfinite(scale) and scale >= 0 for scale in found):
        given = ",".join(f"{scale:g}" for scale in scales)
        raise ValueError(f"{flag} {given}: give at least two different scales of 0 or more, such as 1,5,9")
    return found


def pooled(cells: Cells, axis: str, scale: float, metric: str) -> dict[str, float] | None:
    """Share of right answers at one scale of an axis, over all scales of the other; None without any answer.

    The interval counts every clip once, although it was generated for each of the other scales.
    """
    shares = _clips_at(cells, axis, scale, metric)
    known = shares[~np.isnan(shares)]
    if not len(known):
        return None
    _, low, high = wilson(known.sum(), len(known))
    return {"share": float(known.mean()), "low": low, "high": high, "count": len(known)}


def rise(cells: Cells, axis: str, metric: str) -> dict[str, Any]:
    """How much a figure rises from the lowest to the highest scale and from the lowest to the best one.

    Differences are paired by clip (each clip's mean over the other axis), with 95% intervals from their spread.
    """
    scales = sorted({place[AXES.index(axis)] for place in cells})
    clips = {scale: _clips_at(cells, axis, scale, metric) for scale in scales}
    means = {scale: _mean(clips[scale]) for scale in scales}
    best = max(scales, key=lambda scale: -1.0 if means[scale] is None else means[scale])
    return {
        "shares": {f"{scale:g}": means[scale] for scale in scales},
        "best": best,
        "lowest_to_highest": _difference(clips[scales[-1]] - clips[scales[0]]),
        "lowest_to_best": _difference(clips[best] - clips[scales[0]]),
    }


def _clips_at(cells: Cells, axis: str, scale: float, metric: str) -> np.ndarray:
    """[clips]: each clip's share of right answers, averaged over the other axis."""
    index = AXES.index(axis)
    rows = [clip_shares(cell.answers[metric]) for place, cell in cells.items() if place[index] == scale]
    return np.mean(rows, axis=0)


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _difference(values: np.ndarray) -> dict[str, float] | None:
    known = values[~np.isnan(values)]
    if len(known) < 2:
        return None
    mean, half = float(known.mean()), 1.96 * float(known.std(ddof=1)) / math.sqrt(len(known))
    return {"mean": mean, "low": mean - half, "high": mean + half, "clips": len(known)}


def _markdown(cells: Cells, entry: dict[str, Any], job: Job) -> str:
    images, texts = entry["scales"]["image"], entry["scales"]["text"]
    lines = [
        "# Dual guidance",
        "",
        f"{job.clips} clips of {job.subjects} subject(s) a cell, split {job.split}, seed {job.seed}, the same clips and noise "
        "in every cell.",
        "",
        "| scale | figure | lowest | highest | difference | best | difference | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in entry["rises"]:
        scales = entry["scales"][line["axis"]]
        expected = line["metric"] in EXPECTED[line["axis"]]
        best = f"{_share(line['shares'][format(line['best'], 'g')])} at {line['best']:g}"
        lines.append(
            f"| {line['axis']} {scales[0]:g} to {scales[-1]:g} | {line['metric']} "
            f"| {_share(line['shares'][f'{scales[0]:g}'])} | {_share(line['shares'][f'{scales[-1]:g}'])} "
            f"| {_points(line['lowest_to_highest'])} | {best} | {_points(line['lowest_to_best'])} "
            f"| {_verdict(line) if expected else ''} |"
        )
    lines += [
        "",
        "Percent over all cells with that scale; differences in points, paired by clip, with 95% intervals. The best scale was "
        "chosen by the same figures, so its difference is a little too large.",
    ]
    for metric in SHOWN:
        lines += ["", f"**{metric}**, image scale down, text scale across", ""]
        lines += ["| | " + " | ".join(f"{text:g}" for text in texts) + " |", "|---" * (len(texts) + 1) + "|"]
        for image in images:
            row = " | ".join(percent(cells[image, text].table[metric]) for text in texts)
            lines.append(f"| {image:g} | {row} |")
    return "\n".join([*lines, "", "![guidance](guidance.png)"]) + "\n"


def _verdict(line: dict[str, Any]) -> str:
    shares = [share for share in line["shares"].values() if share is not None]
    if shares and min(shares) >= CEILING:
        return "at its top everywhere"
    for name in ("lowest_to_highest", "lowest_to_best"):
        found = line[name]
        if found is not None and found["low"] > 0:
            return "rises" if name == "lowest_to_highest" else "rises, then falls"
    return "**does not rise**"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _points(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    return f"{100 * found['mean']:+.1f} [{100 * found['low']:+.0f}, {100 * found['high']:+.0f}]"


def _draw(cells: Cells, axes: Sequence[Sequence[float]], path: Path) -> None:
    """Curves against each scale, and a heat map for each figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    for panel, axis, scales in zip(top.subplots(1, 2, sharey=True), AXES, axes, strict=True):
        for metric in SHOWN:
            rows = [(scale, pooled(cells, axis, scale, metric)) for scale in scales]
            known = [(scale, row) for scale, row in rows if row is not None]
            if not known:
                continue
            shares = [row["share"] for _, row in known]
            margins = [
                [row["share"] - row["low"] for _, row in known],
                [row["high"] - row["share"] for _, row in known],
            ]
            panel.errorbar(
                [scale for scale, _ in known],
                shares,
                np.clip(margins, 0, None),
                marker="o",
                capsize=3,
                linestyle="-" if metric in EXPECTED[axis] else ":",
                label=metric if metric in EXPECTED[axis] else f"{metric} (not expected to follow)",
            )
        other = _LABELS[AXES[1 - AXES.index(axis)]]
        panel.set(xlabel=_LABELS[axis], ylim=(-0.02, 1.02), title=f"mean over the {other}")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    for panel, metric in zip(bottom.subplots(1, len(SHOWN)), SHOWN, strict=True):
        _heat_map(panel, cells, axes, metric)
    save_figure(figure, path, dpi=110)


def _heat_map(panel: Axes, cells: Cells, axes: Sequence[Sequence[float]], metric: str) -> None:
    images, texts = axes
    rows = [[cells[image, text].table[metric] for text in texts] for image in images]
    values = np.array([[np.nan if row is None else row["share"] for row in line] for line in rows])
    panel.imshow(values, vmin=0, vmax=1, origin="lower", cmap="viridis", aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "white" if value < 0.6 else "black"
            panel.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=9)
    panel.set_xticks(range(len(texts)), [f"{scale:g}" for scale in texts])
    panel.set_yticks(range(len(images)), [f"{scale:g}" for scale in images])
    panel.set(xlabel=_LABELS["text"], ylabel=_LABELS["image"], title=metric)
