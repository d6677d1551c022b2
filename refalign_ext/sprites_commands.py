"""`python -m refalign_ext sprites ...`: the sprite world, and the parts of the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import click

from refalign_ext.sprites.train_teacher import main as train_teacher
from refalign_ext.sprites.train_vae import main as train_vae


@click.group()
def sprites() -> None:
    """The sprite world and the embedded model."""


sprites.add_command(train_vae, "train-vae")
sprites.add_command(train_teacher, "train-teacher")


@sprites.command()
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path("assets/r2v-tiny"), help="Folder to write."
)
@click.option("--vae", type=click.Path(path_type=Path, exists=True), help="vae.pt of train-vae.")
@click.option("--teacher", type=click.Path(path_type=Path, exists=True), help="Folder of train-teacher.")
@click.option("--text/--no-text", default=False, help="Write tokenizer and text encoder.")
@click.option(
    "--dit", type=click.Path(path_type=Path, exists=True), help="Checkpoint folder of train_refalign.py."
)
def assemble(folder: Path, vae: Path | None, teacher: Path | None, text: bool, dit: Path | None) -> None:
    """Write trained parts into the embedded model's folder, in Wan2.1's layout and formats."""
    from refalign_ext import embedded

    if text:
        embedded.write_text_encoder(folder)
    if vae is not None:
        embedded.write_vae(folder, vae)
    if teacher is not None:
        embedded.write_teacher(folder, teacher)
    if dit is not None:
        embedded.write_dit(folder, dit)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    click.echo(f"{folder}: {size / 1e6:.1f} MB")


@sprites.command(context_settings={"show_default": True})
@click.option("--ckpt_dir", type=click.Path(path_type=Path, exists=True), default=Path("assets/r2v-tiny"))
@click.option(
    "--dit_ckpt", type=click.Path(path_type=Path, exists=True), help="Another DiT, such as a checkpoint."
)
@click.option("--what", type=click.Choice(["real", "reconstruction", "generation"]), default="generation")
@click.option("--clips", type=click.IntRange(1), default=200)
@click.option("--subjects", type=click.IntRange(1, 3), default=1)
@click.option("--split", type=click.Choice(["held_out", "palette", "train"]), default="held_out")
@click.option("--pair", type=click.Choice(["cross", "regular"]), default="cross")
@click.option("--seed", type=click.IntRange(0), default=1000)
@click.option("--ref_guide_scale", type=float)
@click.option("--text_guide_scale", type=float)
@click.option("--sample_steps", type=click.IntRange(1))
@click.option("--sample_shift", type=float)
@click.option("--device", default="cpu")
@click.option("--out", type=click.Path(path_type=Path), default=Path("outputs/judge"))
def judge(
    ckpt_dir: Path,
    dit_ckpt: Path | None,
    what: str,
    clips: int,
    subjects: int,
    split: str,
    pair: str,
    seed: int,
    ref_guide_scale: float | None,
    text_guide_scale: float | None,
    sample_steps: int | None,
    sample_shift: float | None,
    device: str,
    out: Path,
) -> None:
    """Judge real clips, VAE reconstructions or generated clips; writes a table (json) and a picture."""
    from PIL import Image

    from refalign_ext.evaluation.sprites import Job, contact_sheet, judge_folder

    job = Job(
        clips, subjects, split, pair, seed, ref_guide_scale, text_guide_scale, sample_steps, sample_shift
    )
    evaluation = judge_folder(ckpt_dir, what, job, dit_ckpt=dit_ckpt, device=device)
    table = evaluation.table()
    click.echo(f"{what}, {clips} clips of {subjects} subject(s), split {split}, {pair} pairs, seed {seed}")
    for name, row in table.items():
        if row["count"]:
            click.echo(
                f"  {name:13s} {row['share']:6.1%}  [{row['low']:.1%}, {row['high']:.1%}]  of {row['count']}"
            )
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{what}-{subjects}-{split}-{pair}-{seed}"
    shown = {name: row if row["count"] else None for name, row in table.items()}
    (out / f"{stem}.json").write_text(json.dumps({"job": job.__dict__, "table": shown}, indent=2) + "\n")
    Image.fromarray(contact_sheet(evaluation, rows=10)).save(out / f"{stem}.png")
    click.echo(f"wrote {out / stem}.json and .png")


@sprites.command(context_settings={"show_default": True})
@click.argument("metrics", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), default=Path("outputs/curves.png"))
def plot(metrics: Path, out: Path) -> None:
    """Draw a training run's curves from its metrics.jsonl: losses, alignment, and the judge's figures."""
    from refalign_ext.evaluation.curves import draw_curves

    draw_curves(metrics, out)
    click.echo(f"wrote {out}")
