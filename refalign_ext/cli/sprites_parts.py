"""`python -m refalign_ext sprites train-...`: the parts of the embedded model besides its DiT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from refalign_ext.sprites.teacher_settings import HIDDEN, KINDS, TeacherSettings

_PATH = click.Path(path_type=Path)
_SHOW_DEFAULTS = {"show_default": True}


@click.command("train-vae", context_settings=_SHOW_DEFAULTS)
@click.option("--image_steps", type=click.IntRange(0), default=200, help="Steps before clips join images.")
@click.option("--steps", type=click.IntRange(1), default=2400, help="Steps on pictures.")
@click.option("--place_steps", type=click.IntRange(1), default=700, help="Steps on places, after them.")
@click.option("--out", type=_PATH, default=Path("outputs/vae"), help="Folder for the state.")
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--size", default=48, help="Side of the rendered frames in pixels.")
@click.option("--frames", type=click.IntRange(1), default=9)
@click.option("--crop", default=32, help="Side of the training crops of clips in pixels.")
@click.option("--save_every", type=click.IntRange(1), default=200)
def train_vae(out: Path, **settings: Any) -> None:
    """Train the embedded VAE and write `vae.pt`, a state dict in the library's names with folded normalisation."""
    from refalign_ext.sprites import train_vae as training

    training.train_vae(out, **settings)
    click.echo(f"wrote {out / 'vae.pt'}")


_USUAL = TeacherSettings()


@click.command("train-teacher", context_settings=_SHOW_DEFAULTS)
@click.option("--kind", type=click.Choice(list(KINDS)), default=_USUAL.kind, help="What it learns from.")
@click.option("--size", type=click.Choice(list(HIDDEN)), default=_USUAL.size, help="Tiny: 0.8 M parameters.")
@click.option("--steps", type=click.IntRange(0), default=_USUAL.steps, help="0 writes an untrained one.")
@click.option("--batch_size", type=click.IntRange(2), default=_USUAL.batch_size, help="Subjects a step.")
@click.option("--out", type=_PATH, default=Path("outputs/teacher"))
@click.option("--seed", type=click.IntRange(0), default=_USUAL.seed)
@click.option("--learning_rate", default=_USUAL.learning_rate, help="Of AdamW.")
@click.option("--muon_learning_rate", default=_USUAL.muon_learning_rate, help="Of Muon, on blocks' matrices.")
def train_teacher(out: Path, **settings: Any) -> None:
    """Train a teacher, write it as a transformers folder, and read back what it knows."""
    from refalign_ext.sprites import train_teacher as training

    training.train_teacher(TeacherSettings(**settings), out)
    click.echo(f"wrote {out / 'teacher'} and log.txt")


@click.command("train-text", context_settings=_SHOW_DEFAULTS)
@click.option("--steps", type=click.IntRange(1), default=2000)
@click.option("--out", type=_PATH, default=Path("outputs/text"))
@click.option("--seed", type=click.IntRange(0), default=0)
def train_text(steps: int, out: Path, seed: int) -> None:
    """Train the embedded text encoder and write `text.pt`, a state dict in transformers' names."""
    from refalign_ext.sprites.train_text import train_text_encoder

    train_text_encoder(out, steps=steps, seed=seed)
