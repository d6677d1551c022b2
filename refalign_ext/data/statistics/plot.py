"""The statistics of a data set as one picture of small plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from refalign_ext.atomic_io import save_figure
from refalign_ext.data.statistics.stats import NAMES, Stats, most_frequent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 4
_BARS = 10
_COLOUR = "#2e62be"


def plot_stats(stats: Stats, out: Path) -> None:
    """Draws a histogram of each column of numbers and bars of each column of names into the PNG `out`."""
    from matplotlib.figure import Figure

    numbers = {name: values for name, values in stats.numbers.items() if len(values)}
    measured = len(stats.numbers["frames"])
    bars = {name: most_frequent(stats.names[name], _BARS) for name in NAMES if stats.names[name]}
    if measured:
        bars["share long enough for"] = {name: count / measured for name, count in stats.long_enough.items()}
    rows = max(1, -(-(len(numbers) + len(bars)) // _COLUMNS))
    figure = Figure(figsize=(4 * _COLUMNS, 2.9 * rows + 0.8), layout="constrained")
    figure.suptitle(
        f"{Path(stats.path).name}: {stats.clips:,} clips, {stats.hours:,.2f} hours, "
        f"{stats.names['pairs'].total():,} references, {stats.groups:,} groups"
    )
    grid = iter(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for name, values in numbers.items():
        _histogram(next(grid), name, values)
    for name, counts in bars.items():
        axes = next(grid)
        labels = [
            (label if len(label) <= 24 else f"{label[:23]}\u2026").replace("$", r"\$") for label in counts
        ]
        axes.barh(range(len(counts)), list(counts.values()), color=_COLOUR)
        axes.set_yticks(range(len(counts)), labels, fontsize=8)
        axes.set_ylim(max(len(counts), 4) - 0.4, -0.6)
        if name.startswith("share"):
            axes.set_xlim(0, 1)
        axes.set_title(name, loc="left")
    for axes in grid:
        axes.set_axis_off()
    save_figure(figure, out)


def _histogram(axes: Axes, name: str, values: np.ndarray) -> None:
    """Counts by value without the 1% in the long tail; the line is the median."""
    median, shown_to = np.median(values), np.quantile(values, 0.99, method="higher")
    axes.hist(values, bins=30, range=(values.min(), shown_to), color=_COLOUR)
    axes.axvline(median, color="black", linewidth=1)
    axes.set_title(name, loc="left")
    axes.set_xlabel(
        f"median {median:,.4g}, mean {values.mean():,.4g}, largest {values.max():,.4g}", fontsize=8
    )
