"""`python -m refalign_ext export`: a training checkpoint as the files that others load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(path_type=Path)


@click.command(context_settings={"show_default": True})
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=FOLDER, required=True, help="Folder to write; new or empty.")
@click.option(
    "--layout",
    type=click.Choice(["upstream", "diffusers"]),
    default="upstream",
    help="Whose names and config.",
)
@click.option("--projectors/--no-projectors", default=False, help="Keep the projectors, to train on.")
@click.option("--raw", is_flag=True, help="The trained weights instead of their moving average.")
@click.option(
    "--adapter",
    is_flag=True,
    help="Of a LoRA run, the adapter alone (upstream: peft's folder) instead of the merged model.",
)
@click.option(
    "--base", type=FOLDER, help="Of a LoRA run, its base model, if it is not where the settings say."
)
@click.option(
    "--shard_gigabytes",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    help="Largest size of a file (10^9 bytes).",
)
def export(
    checkpoint: Path, out: Path, adapter: bool, projectors: bool, shard_gigabytes: float, **options: Any
) -> None:
    """Write the model in a training CHECKPOINT as safetensors, without loading it on a device."""
    from refalign_ext.checkpoint.export import export_adapter, export_checkpoint

    if adapter and projectors:
        raise ValueError("--adapter and --projectors exclude each other: export the merged model with them")
    if adapter:
        files = export_adapter(checkpoint, out, **options)
    else:
        files = export_checkpoint(
            checkpoint, out, projectors=projectors, shard_gigabytes=shard_gigabytes, **options
        )
    size = sum(file.stat().st_size for file in files)
    click.echo(f"{out}: {len(files)} file{'s' if len(files) > 1 else ''}, {size / 1e9:.2f} GB")
