"""The embedded model's report: what is judged, which gates it has to pass, and the tables and pictures about both."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from refalign_ext.atomic_io import write_json, write_text
from refalign_ext.sprites.evaluate import JudgingJob
from refalign_ext.sprites.judge import METRIC_NAMES, percent
from refalign_ext.sprites.judged import Judged, JudgedFolder
from refalign_ext.sprites.world import WORLD_VERSION, subjects_of


@dataclass(frozen=True)
class ReportRow:
    """One row of the table: `what` is judged (see `judge_folder`) for `subjects` subjects of a split."""

    name: str
    title: str
    what: str
    subjects: int
    split: str = "held_out"
    references: str = "own"  # or "shuffled"; see `JudgingJob`

    def job(self, base: JudgingJob) -> JudgingJob:
        """The row's job, with number of clips, seed and sampling settings of `base`."""
        return replace(base, subjects=self.subjects, split=self.split, references=self.references)


@dataclass(frozen=True)
class Gate:
    """A figure that has to be at least, or at most, `bound`."""

    row: str
    metric: str
    bound: float
    at_most: bool = False

    def is_met(self, share: float) -> bool:
        """Whether a share of right answers passes."""
        return share <= self.bound if self.at_most else share >= self.bound

    def __str__(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {100 * self.bound:.0f}"


ROWS = (
    ReportRow("real-1", "real clips, 1 subject", "real", 1),
    ReportRow("real-2", "real clips, 2 subjects", "real", 2),
    ReportRow("real-3", "real clips, 3 subjects", "real", 3),
    ReportRow("reconstruction-1", "after the VAE, 1 subject", "reconstruction", 1),
    ReportRow("reconstruction-2", "after the VAE, 2 subjects", "reconstruction", 2),
    ReportRow(
        "reconstruction-palette", "after the VAE, 1 subject, *palette*", "reconstruction", 1, "palette"
    ),
    ReportRow("generation-1", "**1 subject, held out**", "generation", 1),
    ReportRow("generation-palette", "1 subject, *palette*", "generation", 1, "palette"),
    ReportRow("generation-train", "1 subject, trained on", "generation", 1, "train"),
    ReportRow("generation-2", "**2 subjects, held out**", "generation", 2),
    ReportRow("generation-3", "3 subjects, held out", "generation", 3),
    ReportRow("shuffled-1", "1 subject, reference of another clip", "generation", 1, references="shuffled"),
)
# A pattern counts only where both colours are right, so a gate on it is one on colours and texture together.
GATES = (
    Gate("reconstruction-1", "pattern", 0.95),
    Gate("reconstruction-2", "pattern", 0.95),
    Gate("reconstruction-palette", "pattern", 0.95),
    Gate("generation-1", "colors", 0.95),
    Gate("generation-1", "pattern", 0.85),
    Gate("generation-1", "shape", 0.75),
    Gate("generation-1", "motion", 0.97),
    Gate("generation-1", "size", 0.90),
    Gate("generation-1", "background", 0.99),
    Gate("generation-2", "found", 0.90),
    Gate("generation-2", "colors", 0.70),
    Gate("generation-2", "swapped", 0.10, at_most=True),
    Gate("generation-palette", "colors", 0.70),
    # The control: held-out subjects drawn at random share both colours in 10% of pairs (`color_chance`).
    Gate("shuffled-1", "colors", 0.10, at_most=True),
)


def color_chance(split: str = "held_out") -> float:
    """How often the reference of another clip's subject has both colours of this clip's, if subjects are drawn alike."""
    counts = Counter(subject.colors for subject in subjects_of(split))
    return sum(count * count for count in counts.values()) / counts.total() ** 2


def make_report(judge: JudgedFolder, base: JudgingJob, out: Path) -> Path:
    """Judge every row (or read it, if it was judged before) and write the report; returns `report.md`.

    Writes `report.md` and `report.json` to `out`, and answers and a contact sheet for each row to `out/rows`.

    Args:
        base: number of clips, seed and sampling settings of all rows.
    """
    from tqdm import tqdm

    judged: dict[str, Judged] = {}
    for number, row in enumerate(ROWS, 1):
        tqdm.write(f"[{number}/{len(ROWS)}] {row.name}: {base.clips} clips", file=sys.stderr)
        judged[row.name] = judge.judge(row.what, row.job(base), out / "rows" / row.name)
    gates = gate_results(judged)
    write_json(
        out / "report.json",
        {
            "world": WORLD_VERSION,
            "base": asdict(base),
            "chance": {"colors": color_chance()},
            "gates": gates,
            "rows": {row.name: {**asdict(row), "table": judged[row.name].table} for row in ROWS},
        },
    )
    write_text(out / "report.md", _markdown(judged, gates, base, out))
    return out / "report.md"


def gate_results(judged: dict[str, Judged]) -> list[dict[str, Any]]:
    """Every gate: row, metric, bound, share with its interval (None without answers), and whether it is met."""
    figures = [judged[gate.row].table[gate.metric] for gate in GATES]
    return [
        {
            **asdict(gate),
            "figure": figure,
            "met": figure is not None and gate.is_met(figure["share"]),
        }
        for gate, figure in zip(GATES, figures, strict=True)
    ]


def _markdown(judged: dict[str, Judged], gates: list[dict[str, Any]], base: JudgingJob, out: Path) -> str:
    """The report: gates, all figures, and the contact sheets as links relative to `out`."""
    names = [name for name in METRIC_NAMES if any(judged[row.name].table[name] for row in ROWS)]
    titles = {row.name: row.title for row in ROWS}
    lines = [
        "# Report on the embedded model",
        "",
        f"{sum(gate['met'] for gate in gates)} of {len(gates)} gates met; {base.clips} clips a row, seed {base.seed}. "
        "Percent with 95% Wilson intervals;",
        f"chance of both colours is {100 * color_chance():.0f}.",
        "",
        "| | figure | gate | judged | |",
        "|---|---|---|---|---|",
    ]
    for gate, result in zip(GATES, gates, strict=True):
        verdict = "met" if result["met"] else "**not met**"
        lines.append(
            f"| {titles[gate.row]} | {gate.metric} | {gate} | {percent(result['figure'])} | {verdict} |"
        )
    lines += ["", "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in ROWS:
        cells = [percent(judged[row.name].table[name]) for name in names]
        lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    for row in ROWS:
        lines += ["", f"![{row.title}]({judged[row.name].sheet.relative_to(out).as_posix()})"]
    return "\n".join(lines) + "\n"
