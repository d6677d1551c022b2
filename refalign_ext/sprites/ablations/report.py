"""A study's results as a table, plots and JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from refalign_ext.atomic_io import write_json, write_text
from refalign_ext.sprites.ablations.drawing import draw_clips, draw_table
from refalign_ext.sprites.ablations.study import Study
from refalign_ext.sprites.ablations.summary import PARTS, VALIDATION, Results, collect, summarize


def write_report(study: Study) -> Path:
    """Write `table.md`, `table.json`, `table.png` and `clips.png` of what is finished; returns the first.

    Raises:
        ValueError: if a result is of another study, or nothing is finished.
    """
    found = collect(study)
    if not found:
        raise ValueError(f"{study.folder}: no arm of table {study.table} is finished")
    summary = summarize(study, found)
    write_json(study.folder / "table.json", {**summary, "runs": _runs(study, found)})
    draw_table(study.folder / "table.png", summary, found)
    pictures = ["table.png"]
    if draw_clips(study.folder / "clips.png", study, found):
        pictures.append("clips.png")
    write_text(study.folder / "table.md", as_markdown(study, summary, pictures))
    return study.folder / "table.md"


def _runs(study: Study, found: Results) -> list[dict[str, Any]]:
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


def as_markdown(study: Study, summary: dict[str, Any], pictures: list[str]) -> str:
    """The tables: percent, mean over seeds and its standard error, then A minus each arm with 95% intervals.

    Args:
        pictures: files beside the table that it shows.
    """
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
    lines += ["", "Both colours are right in 1 of 15 cases by chance."]
    for picture in pictures:
        lines += ["", f"![{picture.removesuffix('.png')}]({picture})"]
    return "\n".join(lines) + "\n"


def _rows(
    arms: dict[str, Any],
    job: str,
    metrics: tuple[str, ...],
    text: Callable[[dict[str, Any], Callable[..., str]], str],
) -> list[str]:
    number = number_of(job)
    lines = [f"| arm | {' | '.join(metric.replace('_', ' ') for metric in metrics)} |"]
    lines.append("|---" * (len(metrics) + 1) + "|")
    for letter, arm in arms.items():
        figures = [arm["figures"][job][metric] for metric in metrics]
        cells = ["" if figure is None else text(figure, number) for figure in figures]
        if any(cells):
            lines.append(f"| {letter} | {' | '.join(cell or '-' for cell in cells)} |")
    return lines


def number_of(job: str) -> Callable[..., str]:
    """How figures of a job are written: in percent, a loss as it is."""
    return _plain if job == VALIDATION else _percent


def _percent(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.1f}"


def _plain(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}"


def _mean_text(figure: dict[str, Any], number: Callable[..., str]) -> str:
    error = figure["standard_error"]
    return number(figure["mean"]) + ("" if error is None else f" ± {number(error)}")


def _difference_text(figure: dict[str, Any], number: Callable[..., str]) -> str:
    difference = figure.get("a_minus_this")
    return "" if difference is None else interval_text(difference, number)


def interval_text(difference: dict[str, Any], number: Callable[..., str]) -> str:
    """A difference of `summary.paired_difference` with its interval, if it has one; `number`: see `number_of`."""
    text = number(difference["mean"], "+")
    if difference["low"] is None:
        return text
    return f"{text} [{number(difference['low'], '+')}, {number(difference['high'], '+')}]"
