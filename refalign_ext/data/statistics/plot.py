"""The statistics of a data set as one picture of small plots."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from refalign_ext.atomic_io import save_figure
from refalign_ext.data.statistics.stats import Stats
from refalign_ext.data.statistics.tally import Distribution, Tally

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 4
_BARS = 10
_BINS = 30
_COLOUR = "#2e62be"
_FAINT = "#7a7e86"


def plot_stats(stats: Stats, out: Path) -> None:
    """Draws histograms and bars of everything that was counted into the PNG `out`, written aside and renamed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panels = _panels(stats)
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 2.9 * rows + 0.8), layout="constrained")
    figure.suptitle(
        f"{Path(stats.path).name}: {stats.clips:,} clips, {stats.hours:,.2f} hours, "
        f"{stats.pairs.total:,} references, {stats.groups:,} groups",
        fontsize=14,
    )
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for axes, (title, draw) in zip(grid, panels):
        axes.set_title(title, fontsize=11, loc="left")
        axes.tick_params(labelsize=8, length=2)
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=axis is axes.yaxis))
        counts = axes.xaxis if draw.func is _bars else axes.yaxis
        counts.set_major_formatter(EngFormatter(sep=""))  # 12k
        draw(axes)
    for axes in list(figure.axes)[len(panels) :]:
        axes.remove()
    save_figure(figure, out)


def _panels(stats: Stats) -> list[tuple[str, partial[None]]]:
    """Title and drawing of each plot; scores that no clip has are left out."""
    panels: list[tuple[str, partial[None]]] = [
        ("seconds per clip", partial(_histogram, stats.seconds)),
        ("frames per clip", partial(_histogram, stats.frames)),
        ("frames per second", partial(_histogram, stats.fps)),
        ("long enough for (share of clips)", partial(_shares, stats.long_enough, stats.frames.count)),
        ("frame size", partial(_bars, stats.sizes)),
        ("aspect ratio, nearest", partial(_bars, stats.aspects)),
        ("references per clip", partial(_columns, stats.references)),
        ("subjects per clip", partial(_columns, stats.subjects)),
        ("references by pair", partial(_bars, stats.pairs)),
        ("subjects by kind", partial(_bars, stats.kinds)),
        ("subjects by class", partial(_bars, stats.classes)),
        ("words of prompt", partial(_histogram, stats.prompt_words)),
    ]
    if len(stats.sources.counts) > 1:
        panels.append(("clips by source", partial(_bars, stats.sources)))
    for name, distribution in sorted(stats.scores.items()):
        kind, score = name.split(".")
        panels.append((f"score of {kind}s: {score}", partial(_histogram, distribution)))
    return panels


def _histogram(distribution: Distribution, axes: Axes) -> None:
    """Counts by value; a long tail is left out and said so. The line is the median."""
    if not distribution.count:
        _nothing(axes)
        return
    values, counts = distribution.points()
    low, high = distribution.smallest, distribution.largest
    tail = distribution.quantile(0.99)
    if high - low > 2 * (tail - low) > 0:
        axes.text(
            1,
            1,
            f"1% up to {high:,.4g} not shown",
            color=_FAINT,
            fontsize=8,
            ha="right",
            transform=axes.transAxes,
        )
        high = tail
    if high == low:
        low, high = low - 0.5, high + 0.5
    bins: int | np.ndarray = _BINS
    if (values == values.round()).all():  # bars of as many numbers each, or some would stand out
        step = -(-(high - low + 1) // (2 * _BINS))
        bins = np.arange(low - 0.5, high + step + 0.5, step)
    axes.hist(values, bins=bins, range=(low, high), weights=counts, color=_COLOUR)
    axes.axvline(distribution.quantile(0.5), color="black", linewidth=1)
    axes.set_xlabel(f"median {distribution.quantile(0.5):,.4g}, mean {distribution.mean:,.4g}", fontsize=8)


def _bars(tally: Tally, axes: Axes) -> None:
    """The most frequent names, the first on top."""
    names = tally.to_dict(_BARS)
    if not names:
        _nothing(axes)
        return
    labels = [_plain(name) for name in names]
    places = range(len(labels))
    axes.barh(places, list(names.values()), color=[_FAINT if name == "others" else _COLOUR for name in names])
    axes.set_yticks(places, labels)
    axes.set_ylim(max(len(labels), 4) - 0.4, -0.6)


def _columns(tally: Tally, axes: Axes) -> None:
    """Counts of whole numbers, in their order."""
    if not tally.total:
        _nothing(axes)
        return
    numbers = {int(name): times for name, times in tally.counts.items()}
    axes.bar(list(numbers), list(numbers.values()), color=_COLOUR)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(min(numbers) - 0.6, max(*numbers, min(numbers) + 4) + 0.6)


def _shares(numbers: dict[str, int], total: int, axes: Axes) -> None:
    if not numbers or not total:
        _nothing(axes)
        return
    shares = [number / total for number in numbers.values()]
    axes.barh(range(len(shares)), shares, color=_COLOUR)
    axes.set_yticks([])
    for place, (name, share) in enumerate(zip(numbers, shares)):
        axes.text(0.01, place - 0.43, f"{name}: {share:.1%}", fontsize=8, va="bottom")
    axes.set_xlim(0, 1)
    axes.set_ylim(max(len(shares), 3) - 0.3, -0.8)


def _nothing(axes: Axes) -> None:
    axes.set_axis_off()
    axes.text(0, 0.5, "unknown", color=_FAINT, transform=axes.transAxes)


def _plain(name: str) -> str:
    """A name short enough for an axis, without what matplotlib would read as a formula."""
    name = name if len(name) <= 18 else name[:17] + "\u2026"
    return name.replace("$", r"\$")
