"""`python -m refalign_ext sprites ...`: the sprite world, and the parts of the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refalign_ext.cli.program import stops_on_request
from refalign_ext.cli.settings import Numbers, read_settings
from refalign_ext.cli.sprites_parts import train_teacher, train_text, train_vae

if TYPE_CHECKING:
    from refalign_ext.sprites.judged import JudgedFolder

_EXISTING = click.Path(path_type=Path, exists=True)
_PATH = click.Path(path_type=Path)
_SHOW_DEFAULTS = {"show_default": True}


@click.group()
def sprites() -> None:
    """The sprite world and the embedded model."""


sprites.add_command(train_vae)
sprites.add_command(train_teacher)
sprites.add_command(train_text)


@sprites.command()
@click.option("--folder", type=_PATH, default=Path("assets/r2v-tiny"), help="Folder to write.")
@click.option("--vae", type=_EXISTING, help="vae.pt of train-vae.")
@click.option("--teacher", type=_EXISTING, help="Folder of train-teacher.")
@click.option("--text", type=_EXISTING, help="text.pt of train-text.")
@click.option("--dit", type=_EXISTING, help="Checkpoint folder of train_refalign.py.")
def assemble(
    folder: Path, vae: Path | None, teacher: Path | None, text: Path | None, dit: Path | None
) -> None:
    """Write trained parts into the embedded model's folder, in Wan2.1's layout and formats."""
    from refalign_ext.sprites import embedded_model as embedded

    for trained, write in (
        (text, embedded.write_text_encoder),
        (vae, embedded.write_vae),
        (teacher, embedded.write_teacher),
        (dit, embedded.write_dit),
    ):
        if trained is not None:
            write(folder, trained)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    click.echo(f"{folder}: {size / 1e6:.1f} MB")


@sprites.command(context_settings={**_SHOW_DEFAULTS, "ignore_unknown_options": True})
@click.option("--out", type=_PATH, default=Path("outputs/make"), help="Folder of all parts; resumes.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: all]")
@click.option("--device", default="auto", help="For the DiT; the other parts train on the CPU.")
@click.argument("settings", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def make(
    context: click.Context, out: Path, threads: int | None, device: str, settings: tuple[str, ...]
) -> None:
    """Train the whole embedded model from nothing: VAE, text encoder, teacher, DiT; stopped, it goes on.

    SETTINGS are those of train_refalign.py for the DiT, such as --compile or --steps 40000. The result is OUT/r2v-tiny, in
    Wan2.1's layout; copied over assets/r2v-tiny it is the embedded model.
    """
    import torch

    from refalign_ext.checkpoint.checkpointer import checkpoints_in
    from refalign_ext.cli.training_tables import DATA_SOURCES, EXTRA_MODULES
    from refalign_ext.sprites import embedded_model as embedded
    from refalign_ext.training.run import run_training

    chosen = read_settings(settings)
    if threads is not None:
        torch.set_num_threads(threads)
    folder = out / "r2v-tiny"
    parts = [
        (train_vae, out / "vae" / "vae.pt", embedded.write_vae),
        (train_text, out / "text" / "text.pt", embedded.write_text_encoder),
        (train_teacher, out / "teacher" / "teacher", embedded.write_teacher),
    ]
    for command, result, write in parts:
        if not result.exists():
            context.invoke(command, out=result.parent)
        write(folder, result)
    own = {"ckpt_dir": str(folder), "out": str(out / "dit")}
    with stops_on_request("stopped; the same command goes on from there"):
        run_training(
            "tiny",
            {**chosen, **own},
            sources=DATA_SOURCES,
            extra_modules=EXTRA_MODULES,
            device=device,
            threads=threads,
        )
    embedded.write_dit(folder, checkpoints_in(out / "dit" / "checkpoints")[-1])
    click.echo(f"wrote {folder}; judge it with: python -m refalign_ext sprites report --ckpt_dir {folder}")


_MODEL_OPTIONS = (
    click.option("--ckpt_dir", type=_EXISTING, default=Path("assets/r2v-tiny"), help="Checkpoint folder."),
    click.option("--dit_ckpt", type=_EXISTING, help="Another DiT, such as a checkpoint."),
    click.option("--sample_steps", type=click.IntRange(1), help="Sampling steps instead of the task's."),
    click.option("--sample_shift", type=float, help="Shift of the noise levels instead of the task's."),
    click.option("--device", default="cpu", help="Where to generate: cpu, cuda, mps or auto."),
)
_split_option = click.option(
    "--split", type=click.Choice(["held_out", "palette", "train"]), default="held_out", help="Which subjects."
)


def _judging_command(function: Callable[..., None]) -> click.Command:
    """A command that gets `folder`, opened from the options that all judging shares, instead of their values."""

    @wraps(function)
    def run(ckpt_dir: Path, dit_ckpt: Path | None, device: str, **settings: Any) -> None:
        from refalign_ext.sprites.judged import JudgedFolder

        function(JudgedFolder(ckpt_dir, dit_ckpt=dit_ckpt, device=device), **settings)

    command = run
    for option in reversed(_MODEL_OPTIONS):
        command = option(command)
    return sprites.command(context_settings=_SHOW_DEFAULTS)(command)


@_judging_command
@click.option("--what", type=click.Choice(["real", "reconstruction", "generation"]), default="generation")
@click.option("--clips", type=click.IntRange(1), default=200)
@click.option("--subjects", type=click.IntRange(1, 3), default=1)
@_split_option
@click.option("--pair", type=click.Choice(["cross", "regular"]), default="cross")
@click.option(
    "--references",
    type=click.Choice(["own", "shuffled"]),
    default="own",
    help="shuffled: the control in which every clip gets the references of another one.",
)
@click.option("--seed", type=click.IntRange(0), default=1000)
@click.option("--ref_guide_scale", type=float)
@click.option("--text_guide_scale", type=float)
@click.option("--out", type=_PATH, default=Path("outputs/judge"))
def judge(folder: JudgedFolder, what: str, out: Path, **settings: Any) -> None:
    """Judge real clips, VAE reconstructions or generated clips; writes a table (json) and a picture."""
    from refalign_ext.sprites.evaluate import JudgingJob
    from refalign_ext.sprites.judge import percent

    job = JudgingJob(**settings)
    shuffled = "-shuffled" if job.references == "shuffled" else ""
    stem = out / f"{what}-{job.subjects}-{job.split}-{job.pair}{shuffled}-{job.seed}"
    judged = folder.judge(what, job, stem)
    click.echo(f"{what}, {job.clips} clips of {job.subjects} subject(s): percent with 95% intervals")
    for name, row in judged.table.items():
        if row is not None:
            click.echo(f"  {name:13s} {percent(row):>16s}  of {row['count']}")
    click.echo(f"{'wrote' if judged.is_new else 'read from'} {stem}.json and .png")


@_judging_command
@click.option("--clips", type=click.IntRange(1), default=500, help="Clips of each row.")
@click.option("--seed", type=click.IntRange(0), default=1000, help="Training is steered by another one, 7.")
@click.option("--out", type=_PATH, default=Path("outputs/report"), help="Folder to write.")
def report(folder: JudgedFolder, clips: int, out: Path, **settings: Any) -> None:
    """Judge all that the embedded model has to do, against its gates; rows that were judged before are kept."""
    from refalign_ext.sprites.evaluate import JudgingJob
    from refalign_ext.sprites.report import make_report

    path = make_report(folder, JudgingJob(clips, **settings), out)
    click.echo(path.read_text(encoding="utf-8").partition("\n![")[0].rstrip())
    click.echo(f"wrote {path}, {path.with_suffix('.json')} and {path.parent / 'rows'}")


@_judging_command
@click.option("--image_scales", type=Numbers(), default="0,1,3,5,7", help="Pulls of the references in eq. 5.")
@click.option("--text_scales", type=Numbers(), default="0,1,3,5,7", help="Pulls of the prompt in eq. 5.")
@click.option("--clips", type=click.IntRange(1), default=60, help="Clips of each cell.")
@click.option("--subjects", type=click.IntRange(1, 3), default=1)
@_split_option
@click.option("--seed", type=click.IntRange(0), default=7, help="Not that of the report.")
@click.option("--out", type=_PATH, default=Path("outputs/guidance"), help="Folder to write.")
def guidance(
    folder: JudgedFolder, image_scales: list[float], text_scales: list[float], out: Path, **settings: Any
) -> None:
    """Judge a grid of guidance scales: identity should rise with one, motion with the other; resumes cell by cell."""
    from refalign_ext.sprites.evaluate import JudgingJob
    from refalign_ext.sprites.guidance_grid import judge_grid

    judge_grid(folder, JudgingJob(**settings), image_scales, text_scales, out)
    text = (out / "guidance.md").read_text(encoding="utf-8")
    click.echo(text.partition("\n![")[0].rstrip())
    click.echo(f"wrote {out / 'guidance.md'}, .json and .png")


@sprites.command(context_settings=_SHOW_DEFAULTS)
@click.argument("metrics", type=_EXISTING)
@click.option("--out", type=_PATH, default=Path("outputs/curves.png"))
def plot(metrics: Path, out: Path) -> None:
    """Draw a training run's curves from its metrics.jsonl: losses, alignment, and the judge's figures."""
    from refalign_ext.evaluation.curves import draw_curves

    draw_curves(metrics, out)
    click.echo(f"wrote {out}")
