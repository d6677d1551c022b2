"""Pictures of training runs."""

from __future__ import annotations

import json
from pathlib import Path

from refalign_ext.atomic_io import save_figure

PANELS = (
    ("flow-matching loss", ("loss/flow",)),
    ("reference alignment", ("alignment/positive", "alignment/negative")),
    (
        "judge, one subject",
        ("judge_1/colors", "judge_1/pattern", "judge_1/shape", "judge_1/motion", "judge_1/size"),
    ),
    ("judge, two subjects", ("judge_2/colors", "judge_2/swapped", "judge_2/motion", "judge_2/found")),
)


def draw_curves(metrics: Path, out: Path) -> None:
    """One panel each for losses, alignment terms and the judge's figures, against optimizer steps."""
    from matplotlib.figure import Figure

    entries: dict[int, dict[str, float]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        # A resumed run logs the steps since its checkpoint again: the later line counts.
        entries.setdefault(entry["step"], {}).update(entry)
    if not entries:
        raise ValueError(f"{metrics} is empty: train first")
    steps = sorted(entries)
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for name in names:
            # A skipped step's loss is logged as text, because JSON knows no nan.
            known = [step for step in steps if isinstance(entries[step].get(name), (int, float))]
            values = [entries[step][name] for step in known]
            if name.startswith("judge"):
                axes.plot(known, values, marker="o", markersize=3, label=name.split("/")[1])
            else:
                axes.plot(known, values, alpha=0.2, linewidth=0.7)
                axes.plot(known, _smooth(values), color=axes.lines[-1].get_color(), label=name.split("/")[1])
        axes.set(title=title, xlabel="optimizer step")
        if title.startswith("judge"):
            axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    save_figure(figure, out, dpi=110)


def _smooth(values: list[float], share: float = 0.95) -> list[float]:
    smoothed, mean = [], None
    for value in values:
        mean = value if mean is None else share * mean + (1 - share) * value
        smoothed.append(mean)
    return smoothed
