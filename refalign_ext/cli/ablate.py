"""`python -m refalign_ext ablate`: the paper's tables in miniature."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from refalign_ext.cli.program import stops_on_request
from refalign_ext.cli.settings import read_settings
from refalign_ext.sprites.ablations.arms import TABLES

PATH = click.Path(path_type=Path)
# What is small and what is usual, where the command line leaves it open.
USUAL = {"seeds": 3, "steps": 1500, "start_steps": 2000, "clips": 128}
QUICK = {"seeds": 1, "steps": 2, "start_steps": 2, "clips": 2}
QUICK_SETTINGS = {
    "cache_clips": 8,
    "cache_free_clips": 8,
    "cache_views": 1,
    "batch_size": 2,
    "warmup_steps": 0,
    "log_every": 1,
    "preview_every": 2,
    "preview_clips": 1,
    "validate_every": 0,
}


@click.command(context_settings={"show_default": True, "ignore_unknown_options": True})
@click.option("--table", type=click.Choice(list(TABLES)), required=True, help="What is compared.")
@click.option("--arm", "letters", multiple=True, help="Only this arm of the table; may be repeated.")
@click.option("--seeds", type=click.IntRange(1), help="Runs of every arm.  [default: 3]")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps of an arm.  [default: 1500]")
@click.option("--start_steps", type=click.IntRange(1), help="Of the model all start from.  [default: 2000]")
@click.option("--clips", type=click.IntRange(2), help="Clips judged for each figure.  [default: 128]")
@click.option("--sample_steps", type=click.IntRange(1), default=10, help="Sampling steps of judged clips.")
@click.option("--out", type=PATH, default=Path("outputs/ablations"), help="Folder of all tables, to share.")
@click.option(
    "--start",
    type=click.Path(path_type=Path, exists=True),
    help="A text-to-video model to start from, in any layout, such as that of another study.  [default: train one]",
)
@click.option("--teachers", type=PATH, help="Folder of table 3's teachers.  [default: teachers in --out]")
@click.option("--device", default="auto", help="cpu, cuda, mps or auto.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: all]")
@click.option(
    "--quick", is_flag=True, help="Tiny numbers, to see that everything works; A and one other arm."
)
@click.argument("settings", nargs=-1, type=click.UNPROCESSED)
def ablate(
    table: str,
    letters: tuple[str, ...],
    quick: bool,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Train, generate and judge the arms of one of the paper's tables, or of `recipes` or `copying` (docs/ablations.md).

    SETTINGS are those of train_refalign.py, such as --compile or --batch_size 16, for every arm. What is finished is
    not done again, a stopped run goes on, and several processes may take the same table.
    """
    from refalign_ext.sprites.ablations.report import write_report
    from refalign_ext.sprites.ablations.study import Study

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    if options["start"] is not None and options["start_steps"] is not None:
        raise ValueError("--start is trained already: leave --start_steps out")
    for name, usual in (QUICK if quick else USUAL).items():
        options[name] = options[name] or usual
    arms = TABLES[table].chosen(letters)
    if quick and not letters:
        arms = TABLES[table].quick()
    study = Study(
        table,
        settings={**(QUICK_SETTINGS if quick else {}), **read_settings(settings)},
        teacher_steps=2 if quick else None,
        **options,
    )
    runs = [(arm, seed) for seed in range(1, study.seeds + 1) for arm in arms]
    with stops_on_request("stopped; the same command goes on from there"):
        elsewhere = [f"{arm.letter} with seed {seed}" for arm, seed in runs if not study.run(arm, seed)]
    if elsewhere:
        click.echo(
            f"in other processes' hands: {', '.join(elsewhere)}; the same command again completes the table"
        )
    report = write_report(study)
    click.echo(report.read_text(encoding="utf-8"))
    click.echo(f"wrote {report}, table.json and table.png")
