"""A study's results as a table and JSON; pictures are in `drawing`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from refalign_ext.atomic_io import write_json, write_text
from refalign_ext.sprites.ablations.drawing import draw_clips, draw_table
from refalign_ext.sprites.ablations.study import Study
from refalign_ext.sprites.ablations.summary import PARTS, VALIDATION, collect, summarize_study


def write_report(study: Study) -> Path:
    """Write `table.md`, `table.json`, `table.png` and `clips.png` of what is finished; returns the first.

    Raises:
        ValueError: if a result is of another study, or nothing is finished.
    """
    found = collect(study)
    if not found:
        raise ValueError(f"{study.folder}: no arm of table {study.table} is finished")
    summary = summarize_study(study, found)
    runs = [
        {
            "arm": arm.letter,
            "seed": seed,
            "folder": study.arm_folder(arm, seed).relative_to(study.out).as_posix(),
            "clips_per_second": result["clips_per_second"],
            "judging_seconds": result["judging_seconds"],
        }
        for arm in study.arms.arms
        for seed, result in found.get(arm.letter, {}).items()
    ]
    write_json(study.folder / "table.json", {**summary, "runs": runs})
    draw_table(study.folder / "table.png", summary, found)
    pictures = ["table.png"]
    if draw_clips(study.folder / "clips.png", study, found):
        pictures.append("clips.png")
    write_text(study.folder / "table.md", as_markdown(study, summary, pictures))
    return study.folder / "table.md"


def as_markdown(study: Study, summary: dict[str, Any], pictures: list[str]) -> str:
    """The tables: percent, mean over seeds and its standard error, then A minus each arm with 95% intervals.

    Args:
        pictures: files beside the table that it shows.
    """
    arms = summary["arms"]
    lines = [
        f"# {summary['title']}",
        "",
        f"{study.steps} steps from one text-to-video model; {study.clips} clips for each figure; percent, mean over seeds ± "
        "standard error.",
        "",
        "| arm | what | seeds |",
        "|---|---|---|",
    ]
    for letter, arm in arms.items():
        seeds = ", ".join(map(str, arm["seeds"])) or "not finished"
        lines.append(f"| {letter} | {arm['title']} | {seeds} |")
    for title, job, metrics in PARTS:
        rows = _rows(arms, job, metrics, _mean_text)
        if not rows:
            continue
        lines += ["", f"## {title}", "", *rows]
        differences = _rows(arms, job, metrics, _difference_text)
        if differences and job != "shuffled":
            lines += ["", "A minus the arm, same seeds, 95% interval:", "", *differences]
    lines += ["", "Both colours are right in 1 of 15 cases by chance."]
    for picture in pictures:
        lines += ["", f"![{picture.removesuffix('.png')}]({picture})"]
    return "\n".join(lines) + "\n"


def _rows(
    arms: dict[str, Any], job: str, metrics: tuple[str, ...], text: Callable[[dict[str, Any], str], str]
) -> list[str]:
    """Lines of a table with a row for every arm that has anything to show; none if there is no such arm."""
    rows = []
    for letter, arm in arms.items():
        figures = [arm["figures"][job][metric] for metric in metrics]
        cells = ["" if figure is None else text(figure, job) for figure in figures]
        if any(cells):
            rows.append(f"| {letter} | {' | '.join(cell or '-' for cell in cells)} |")
    head = f"| arm | {' | '.join(metric.replace('_', ' ') for metric in metrics)} |"
    return [head, "|---" * (len(metrics) + 1) + "|", *rows] if rows else []


def _number(value: float, job: str, sign: str = "") -> str:
    """In percent; a loss as it is."""
    return f"{value:{sign}.4f}" if job == VALIDATION else f"{100 * value:{sign}.1f}"


def _mean_text(figure: dict[str, Any], job: str) -> str:
    error = figure["standard_error"]
    return _number(figure["mean"], job) + ("" if error is None else f" ± {_number(error, job)}")


def _difference_text(figure: dict[str, Any], job: str) -> str:
    difference = figure.get("a_minus_this")
    return "" if difference is None else interval_text(difference, job)


def interval_text(difference: dict[str, Any], job: str) -> str:
    """A difference of `summary.paired_difference` with its interval, if it has one."""
    text = _number(difference["mean"], job, "+")
    if difference["low"] is None:
        return text
    return f"{text} [{_number(difference['low'], job, '+')}, {_number(difference['high'], job, '+')}]"
