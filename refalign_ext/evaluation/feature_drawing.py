"""Pictures of reference tokens: t-SNE and PCA block by block, and curves of how well references are told apart."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from refalign_ext.atomic_io import save_figure
from refalign_ext.evaluation.features import Sample
from refalign_ext.evaluation.separability import METRICS, Numbers, Place, SampleTokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

METHODS = ("t-SNE", "PCA")
MOST_COLUMNS = 8  # blocks in a picture; the curves are about all of them
_MARKERS = "o^sDvP*X"


def embed(tokens: Tensor, method: str, seed: int) -> tuple[np.ndarray, str]:
    """Tokens [S, D] as points [S, 2] by t-SNE (cosine distance) or PCA, and what to write under them.

    Raises:
        ValueError: for fewer than four tokens.
    """
    if len(tokens) < 4:
        raise ValueError(f"{len(tokens)} tokens are too few to draw: give pictures that show more than white")
    values = tokens.float().numpy()
    if method == "PCA":
        from sklearn.decomposition import PCA

        model = PCA(n_components=2, random_state=seed)
        points = model.fit_transform(values)
        return points, f"{100 * float(model.explained_variance_ratio_.sum()):.0f}% of variance"
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(values) - 1) / 3)
    model = TSNE(perplexity=perplexity, metric="cosine", init="pca", random_state=seed)
    return model.fit_transform(values), f"perplexity {perplexity:.0f}"


def draw_tokens(
    path: Path,
    timestep: float,
    shown: Sample,
    tokens: dict[str, dict[Place, list[SampleTokens]]],
    numbers: dict[str, dict[Place, Numbers]],
    *,
    seed: int,
    footer: str,
) -> None:
    """One picture for one noise level: references, a row per checkpoint and method, and the numbers' curves.

    Args:
        shown: the first sample, whose tokens are drawn: a colour per reference, a marker per view.
        tokens, numbers: by name of the checkpoint.
    """
    from matplotlib.figure import Figure
    from tqdm import tqdm

    blocks = sorted(block for level, block in next(iter(tokens.values())) if level == timestep)
    columns = [
        blocks[i] for i in np.unique(np.linspace(0, len(blocks) - 1, MOST_COLUMNS).round().astype(int))
    ]
    rows = [(name, method) for name in tokens for method in METHODS]
    heights = [1.3, *[1.9 for _ in rows], 2.8]
    figure = Figure(figsize=(max(10, 1.9 * len(columns) + 1), sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights)
    _draw_references(parts[0], shown, timestep)
    bar = tqdm(total=len(rows) * len(columns), desc="embedding", unit="plot")
    for part, (name, method) in zip(parts[1:-1], rows, strict=True):
        part.supylabel(f"{name}\n{method}", fontsize=9)
        for axes, block in zip(part.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
            _draw_points(axes, tokens[name][timestep, block][0], method, seed)
            axes.set_title(f"block {block}", fontsize=8)
            bar.update()
    bar.close()
    _draw_curves(parts[-1], timestep, blocks, numbers)
    parts[-1].supxlabel(footer, fontsize=8, color="grey")
    save_figure(figure, path, dpi=110)


def _color(reference: int) -> tuple[float, float, float]:
    from matplotlib import colormaps

    return colormaps["tab10"].colors[reference % 10]


def _draw_references(part: SubFigure, shown: Sample, timestep: float) -> None:
    pictures = [
        (view, index, image)
        for view, images in enumerate(shown.views, 1)
        for index, image in enumerate(images)
    ]
    prompt = textwrap.shorten(shown.prompt, 130, placeholder=" ...")
    part.suptitle(f"{prompt}  (noise level {timestep:g} of 1000)", fontsize=9)
    for axes, (view, index, image) in zip(
        part.subplots(1, len(pictures), squeeze=False)[0], pictures, strict=True
    ):
        small = image.resize((48, 48 * image.height // image.width), Image.Resampling.LANCZOS)
        axes.imshow(np.asarray(small if image.width > 96 else image))
        axes.set(xticks=[], yticks=[])
        if len(shown.views) > 1:
            axes.set_xlabel(f"view {view}", fontsize=7, labelpad=2)
        for spine in axes.spines.values():
            spine.set(color=_color(index), linewidth=3)


def _draw_points(axes: Axes, sample: SampleTokens, method: str, seed: int) -> None:
    points, note = embed(sample.tokens, method, seed)
    for reference in sample.references.unique().tolist():
        for view in sample.views.unique().tolist():
            chosen = ((sample.references == reference) & (sample.views == view)).numpy()
            marker = _MARKERS[view % len(_MARKERS)]
            axes.scatter(
                *points[chosen].T, s=7, color=_color(reference), marker=marker, alpha=0.75, linewidth=0
            )
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(note, fontsize=6, labelpad=1)


def _draw_curves(
    part: SubFigure, timestep: float, blocks: Sequence[int], numbers: dict[str, dict[Place, Numbers]]
) -> None:
    names = [
        name
        for name in METRICS
        if all(found[timestep, block][name] is not None for found in numbers.values() for block in blocks)
    ]
    for axes, metric in zip(part.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for label, found in numbers.items():
            rows = [found[timestep, block][metric] for block in blocks]
            errors = [1.96 * (row["standard_error"] or 0.0) for row in rows]
            means = [row["mean"] for row in rows]
            axes.errorbar(blocks, means, errors, marker="o", markersize=3, capsize=2, label=label)
        axes.plot(blocks, [row["chance"] for row in rows], color="grey", linestyle=":", label="chance")
        axes.set_title(METRICS[metric][0], fontsize=8)
        axes.set_xlabel("block", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    part.axes[0].legend(fontsize=7)
