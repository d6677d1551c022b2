"""Any two arms of a written ablation table, paired by seed.

    python benchmarks/ablation_pairs.py docs/ablations/table-2 D E

`table.md` compares A with every other arm; this prints the first named arm minus the second with the same intervals.
Flow-matching errors are compared only between arms whose timesteps are drawn alike.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from refalign_ext.sprites.ablations.report import interval_text
from refalign_ext.sprites.ablations.summary import are_comparable, paired_difference


def pairs(table: dict[str, Any], first: str, second: str) -> list[str]:
    """A line for each figure of both arms of a `table.json`: percentage points, and the flow-matching error as it is."""
    for letter in (first, second):
        if letter not in table["arms"]:
            raise click.UsageError(f"{letter}: this table has {', '.join(table['arms'])}")
    arms = [table["arms"][letter] for letter in (first, second)]
    lines = []
    for job, metrics in arms[0]["figures"].items():
        if not are_comparable(job, *(arm["changes"] for arm in arms)):
            continue
        for metric in metrics:
            figures = [arm["figures"][job][metric] or {"by_seed": {}} for arm in arms]
            difference = paired_difference(*(figure["by_seed"] for figure in figures))
            if difference is not None:
                text, seeds = interval_text(difference, job), ", ".join(difference["seeds"])
                lines.append(f"{job} {metric}: {text}, seeds {seeds}")
    return lines


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("first")
@click.argument("second")
def main(folder: Path, first: str, second: str) -> None:
    """FIRST minus SECOND, two arms of the table in FOLDER."""
    path = folder / "table.json"
    if not path.is_file():
        raise click.UsageError(f"{path} is not there: write it with `python -m refalign_ext ablate`")
    click.echo("\n".join(pairs(json.loads(path.read_text(encoding="utf-8")), first, second)))


if __name__ == "__main__":
    main()
