"""Does dual guidance do something? Identity against the scale of the references, motion against that of the prompt.

Every cell of the grid makes the same clips from the same noise, so that differences between cells are paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from refalign_ext.atomic_io import save_figure, write_json, write_text
from refalign_ext.sprites.evaluate import JudgingJob
from refalign_ext.sprites.judge import wilson
from refalign_ext.sprites.judged import Judged, JudgedFolder, clip_shares

AXES = ("image", "text")
# What each scale is for: the references carry identity, the prompt the motion.
EXPECTED = {"image": ("colors", "pattern"), "text": ("motion",)}
SHOWN = ("colors", "pattern", "motion")
CEILING = 0.98  # a figure that is never lower has no room to rise
_LABELS = {"image": "image scale (references)", "text": "text scale (prompt)"}

Cells = dict[tuple[float, float], Judged]


def judge_grid(
    judge: JudgedFolder,
    job: JudgingJob,
    image_scales: Sequence[float],
    text_scales: Sequence[float],
    out: Path,
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

    axes = [_checked("--image_scales", image_scales), _checked("--text_scales", text_scales)]
    cells: Cells = {}
    for image, text in tqdm([(i, t) for i in axes[0] for t in axes[1]], desc="guidance", unit="cell"):
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
    write_text(out / "guidance.md", _markdown(entry, job))
    _draw(cells, axes, out / "guidance.png")
    return entry


def _checked(flag: str, scales: Sequence[float]) -> list[float]:
    found = sorted(set(scales))
    if len(found) < 2 or not all(math.isfinite(scale) and scale >= 0 for scale in found):
        given = ",".join(f"{scale:g}" for scale in scales)
        raise ValueError(f"{flag} {given}: give at least two different scales of 0 or more, such as 1,5,9")
    return found


def rise(cells: Cells, axis: str, metric: str) -> dict[str, Any]:
    """How much a figure rises from the lowest to the highest scale and from the lowest to the best one.

    Differences are paired by clip (each clip's mean over the other axis), with 95% intervals from their spread.
    """
    scales = sorted({place[AXES.index(axis)] for place in cells})
    clips = {scale: clips_at(cells, axis, scale, metric) for scale in scales}
    means = {
        scale: float(_known(clips[scale]).mean()) if len(_known(clips[scale])) else None for scale in scales
    }
    best = max(scales, key=lambda scale: -1.0 if means[scale] is None else means[scale])
    return {
        "shares": {f"{scale:g}": means[scale] for scale in scales},
        "best": best,
        "lowest_to_highest": _difference(clips[scales[-1]] - clips[scales[0]]),
        "lowest_to_best": _difference(clips[best] - clips[scales[0]]),
    }


def clips_at(cells: Cells, axis: str, scale: float, metric: str) -> np.ndarray:
    """[clips]: each clip's share of right answers at one scale of an axis, averaged over the other; NaN without any."""
    index = AXES.index(axis)
    rows = [clip_shares(cell.answers[metric]) for place, cell in cells.items() if place[index] == scale]
    return np.mean(rows, axis=0)


def _known(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def _difference(values: np.ndarray) -> dict[str, float] | None:
    known = _known(values)
    if len(known) < 2:
        return None
    mean, half = float(known.mean()), 1.96 * float(known.std(ddof=1)) / math.sqrt(len(known))
    return {"mean": mean, "low": mean - half, "high": mean + half, "clips": len(known)}


def _markdown(entry: dict[str, Any], job: JudgingJob) -> str:
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
        axis, metric = line["axis"], line["metric"]
        shares = [_share(share) for share in line["shares"].values()]
        best = f"{_share(line['shares'][format(line['best'], 'g')])} at {line['best']:g}"
        verdict = _verdict(line) if metric in EXPECTED[axis] else ""
        scales = entry["scales"][axis]
        lines.append(
            f"| {axis} {scales[0]:g} to {scales[-1]:g} | {metric} | {shares[0]} | {shares[-1]} "
            f"| {_points(line['lowest_to_highest'])} | {best} | {_points(line['lowest_to_best'])} | {verdict} |"
        )
    lines += [
        "",
        "Percent over all cells with that scale; differences in points, paired by clip, with 95% intervals. The best scale was "
        "chosen by the same figures, so its difference is a little too large.",
    ]
    return "\n".join([*lines, "", "![guidance](guidance.png)"]) + "\n"


def _verdict(line: dict[str, Any]) -> str:
    shares = [share for share in line["shares"].values() if share is not None]
    if shares and min(shares) >= CEILING:
        return "at its top everywhere"
    for name, verdict in (("lowest_to_highest", "rises"), ("lowest_to_best", "rises, then falls")):
        if line[name] is not None and line[name]["low"] > 0:
            return verdict
    return "**does not rise**"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _points(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    return f"{100 * found['mean']:+.1f} [{100 * found['low']:+.0f}, {100 * found['high']:+.0f}]"


def _draw(cells: Cells, axes: Sequence[Sequence[float]], path: Path) -> None:
    """Curves against each scale with Wilson intervals over clips, and a heat map for each figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    for panel, axis, other, scales in zip(
        top.subplots(1, 2, sharey=True), AXES, AXES[::-1], axes, strict=True
    ):
        for metric in SHOWN:
            clips = {scale: _known(clips_at(cells, axis, scale, metric)) for scale in scales}
            # A clip counts once, although it was generated for each of the other scales.
            rows = {scale: wilson(known.sum(), len(known)) for scale, known in clips.items() if len(known)}
            if not rows:
                continue
            share, low, high = np.array(list(rows.values())).T
            is_expected = metric in EXPECTED[axis]
            panel.errorbar(
                list(rows),
                share,
                np.clip([share - low, high - share], 0, None),
                marker="o",
                capsize=3,
                linestyle="-" if is_expected else ":",
                label=metric if is_expected else f"{metric} (not expected to follow)",
            )
        panel.set(xlabel=_LABELS[axis], ylim=(-0.02, 1.02), title=f"mean over the {_LABELS[other]}")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    images, texts = axes
    for panel, metric in zip(bottom.subplots(1, len(SHOWN)), SHOWN, strict=True):
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
    save_figure(figure, path, dpi=110)
