"""A study's results as a table, a plot and JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refalign_ext.ablations.intervals import mean_and_error, paired_interval
from refalign_ext.ablations.judging import FLOW_ERROR
from refalign_ext.ablations.study import Study
from refalign_ext.aside import written_aside
from refalign_ext.evaluation.judged import write_json, write_text

VALIDATION = "validation"  # no job: what training itself measured at its end
# Parts of the table: title, and the metrics of a job.
PARTS = (
    ("Identity, one subject", "one", ("colors", "pattern", "shape")),
    ("Identity, two subjects", "two", ("found", "colors", "pattern", "shape", "swapped")),
    ("Following the prompt, one subject", "one", ("motion", "size", "background")),
    ("Following the prompt, two subjects", "two", ("motion", "size", "background")),
    ("Copying from the reference, one subject", "one", ("copied_pose", "copied_scale")),
    ("Copying from the reference, two subjects", "two", ("copied_pose", "copied_scale")),
    ("Control: another clip's reference", "shuffled", ("colors", "pattern")),
    ("Flow-matching error on held-out clips (a loss, not percent)", VALIDATION, ("flow_error",)),
)
CURVES = (
    ("judge_1/colors", "colours, one subject", 100),
    ("judge_2/colors", "colours, two subjects", 100),
    (FLOW_ERROR, "flow-matching error on held-out clips", 1),
)

Values = dict[int, float]  # seed -> share


def collect(study: Study) -> dict[str, dict[int, dict[str, Any]]]:
    """Finished runs of the table: letter -> seed -> result.

    Raises:
        ValueError: if one is of another study, or they did not all start from the same model.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    starts: dict[str, Path] = {}
    for arm in study.arms.arms:
        for seed in range(1, study.seeds + 1):
            result = study.result(arm, seed)
            if result is not None:
                found.setdefault(arm.letter, {})[seed] = result
                starts.setdefault(result["start"], study.arm_folder(arm, seed))
    if len(starts) > 1:
        first, second, *_ = starts.values()
        raise ValueError(
            f"{first} and {second} started from different models: delete the older one and run again"
        )
    return found


def shares(results: dict[int, dict[str, Any]], job: str, metric: str) -> Values:
    """A metric by seed, without seeds in which its question never arose."""
    if job == VALIDATION:
        last = {
            seed: max(result["curve"].items(), key=lambda row: int(row[0]))[1]
            for seed, result in results.items()
        }
        return {seed: shown[FLOW_ERROR] for seed, shown in last.items() if FLOW_ERROR in shown}
    rows = {seed: result["judged"][job]["table"].get(metric) for seed, result in results.items()}
    return {seed: row["share"] for seed, row in rows.items() if row is not None}


def summarize(study: Study, found: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """For every arm, job and metric: values by seed, mean, standard error, and A minus this arm with its interval."""
    first = study.arms.reference
    arms = {}
    for arm in study.arms.arms:
        figures: dict[str, dict[str, Any]] = defaultdict(dict)
        for _, job, metrics in PARTS:
            for metric in metrics:
                values = shares(found.get(arm.letter, {}), job, metric)
                reference = shares(found.get(first.letter, {}), job, metric)
                is_comparable = job != VALIDATION or arm.changes.get("timesteps") == first.changes.get(
                    "timesteps"
                )
                compared = None if arm is first or not is_comparable else reference
                figures[job][metric] = _figure(values, compared)
        arms[arm.letter] = {
            "title": arm.title,
            "changes": arm.changes,
            "seeds": sorted(found.get(arm.letter, {})),
            "figures": figures,
        }
    return {"table": study.table, "title": study.arms.title, "arms": arms}


def _figure(values: Values, reference: Values | None) -> dict[str, Any] | None:
    if not values:
        return None
    center, error = mean_and_error(list(values.values()))
    figure: dict[str, Any] = {"by_seed": values, "mean": center, "standard_error": error}
    paired = sorted(values.keys() & reference.keys()) if reference is not None else []
    if paired:
        difference, low, high = paired_interval([reference[s] for s in paired], [values[s] for s in paired])
        figure["a_minus_this"] = {"mean": difference, "low": low, "high": high, "seeds": paired}
    return figure


def write_report(study: Study) -> Path:
    """Write `table.md`, `table.json` and `table.png` of what is finished; returns the first.

    Raises:
        ValueError: if a result is of another study, or nothing is finished.
    """
    found = collect(study)
    if not found:
        raise ValueError(f"{study.folder}: no arm of table {study.table} is finished")
    summary = summarize(study, found)
    write_json(study.folder / "table.json", {**summary, "runs": _runs(study, found)})
    _draw(study.folder / "table.png", summary, found)
    write_text(study.folder / "table.md", as_markdown(study, summary))
    return study.folder / "table.md"


def _runs(study: Study, found: dict[str, dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Where each run lies, below the folder of all tables, and what it cost."""
    names = ("clips_per_second", "judging_seconds")
    return [
        {
            "arm": arm.letter,
            "seed": seed,
            "folder": study.arm_folder(arm, seed).relative_to(study.out).as_posix(),
            **{name: result[name] for name in names},
        }
        for arm in study.arms.arms
        for seed, result in found.get(arm.letter, {}).items()
    ]


def as_markdown(study: Study, summary: dict[str, Any]) -> str:
    """The tables: percent, mean over seeds and its standard error, then A minus each arm with 95% intervals."""
    arms = summary["arms"]
    lines = [f"# {summary['title']}", ""]
    lines.append(
        f"{study.steps} steps from one text-to-video model; {study.clips} clips for each figure; percent, mean over seeds ± "
        "standard error."
    )
    lines += ["", "| arm | what | seeds |", "|---|---|---|"]
    for letter, arm in arms.items():
        seeds = ", ".join(map(str, arm["seeds"])) or "not finished"
        lines.append(f"| {letter} | {arm['title']} | {seeds} |")
    for title, job, metrics in PARTS:
        rows = _rows(arms, job, metrics, _mean_text)
        if len(rows) == 2:
            continue
        lines += ["", f"## {title}", "", *rows]
        differences = _rows(arms, job, metrics, _difference_text)
        if len(differences) > 2 and job != "shuffled":
            lines += ["", "A minus the arm, same seeds, 95% interval:", "", *differences]
    lines += ["", "Both colours are right in 1 of 15 cases by chance.", "", "![plot](table.png)"]
    return "\n".join(lines) + "\n"


def _rows(
    arms: dict[str, Any],
    job: str,
    metrics: tuple[str, ...],
    text: Callable[[dict[str, Any], Callable[..., str]], str],
) -> list[str]:
    number = _plain if job == VALIDATION else _percent
    lines = [f"| arm | {' | '.join(metric.replace('_', ' ') for metric in metrics)} |"]
    lines.append("|---" * (len(metrics) + 1) + "|")
    for letter, arm in arms.items():
        figures = [arm["figures"][job][metric] for metric in metrics]
        cells = ["" if figure is None else text(figure, number) for figure in figures]
        if any(cells):
            lines.append(f"| {letter} | {' | '.join(cell or '-' for cell in cells)} |")
    return lines


def _percent(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.1f}"


def _plain(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}"


def _mean_text(figure: dict[str, Any], number: Callable[..., str]) -> str:
    error = figure["standard_error"]
    return number(figure["mean"]) + ("" if error is None else f" ± {number(error)}")


def _difference_text(figure: dict[str, Any], number: Callable[..., str]) -> str:
    difference = figure.get("a_minus_this")
    if difference is None:
        return ""
    text = number(difference["mean"], "+")
    if difference["low"] is None:
        return text
    return f"{text} [{number(difference['low'], '+')}, {number(difference['high'], '+')}]"


def _draw(path: Path, summary: dict[str, Any], found: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Bars with standard errors for every part of the table, and accuracy in previews against training steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 19), layout="constrained")
    FigureCanvasAgg(figure)
    bars = [part for part in PARTS if part[1] != VALIDATION]
    panels = list(figure.subplots(5, 2).flat)
    arms = [letter for letter, arm in summary["arms"].items() if arm["seeds"]]
    width = 0.8 / len(arms)
    # Seeds differ more than arms do: while a table is unfinished, curves are those of the seeds that all arms have.
    common = sorted(set.intersection(*(set(found[letter]) for letter in arms)))
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
            axes.plot(steps, [factor * value for value in means], marker="o", markersize=3, color=f"C{place}")
        axes.set(title=f"In training: {title}", xlabel="optimizer step")
        if factor == 100:
            axes.set(ylabel="percent", ylim=(0, 102))
        axes.grid(alpha=0.3)
    panels[0].legend(title="arm", ncols=len(arms), fontsize=8)
    with written_aside(path) as file:
        figure.savefig(file, dpi=100, format="png")


def curve_of(results: dict[int, dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """A preview's figure by step, averaged over the seeds that have it at that step."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for result in results.values():
        for step, shown in result["curve"].items():
            if name in shown:
                by_step[int(step)].append(shown[name])
    steps = sorted(by_step)
    return steps, [mean_and_error(by_step[step])[0] for step in steps]
