"""train_refalign.py: reference-to-video training with reference alignment."""

from __future__ import annotations

import os
from typing import Any

import click

from refalign_ext.cli.program import Program, stops_on_request
from refalign_ext.cli.settings import given_settings, setting_options


class Training(Program):
    """The program; every setting is a flag."""

    memory_advice = "out of memory: lower --batch_size (--global_batch_size accumulates), or use --activation_checkpointing full"


@click.command(
    "train_refalign.py",
    cls=Training,
    params=setting_options(),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--device", default="auto", help="cpu, cuda, mps or auto (default).")
@click.option(
    "--resume", default="auto", help="auto (default: newest checkpoint in --out), off, or a folder."
)
@click.option(
    "--wan_root",
    metavar="DIR",
    help="Official Wan checkout whose model to train (default: WAN_ROOT, else ours).",
)
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="CPU threads (default: all).")
@click.option("--dry-run", is_flag=True, help="Print the plan (who holds what, memory) and stop.")
@click.option(
    "--world_size", type=click.IntRange(1), metavar="N", help="Devices to plan for, with --dry-run."
)
def train(
    device: str,
    resume: str,
    wan_root: str | None,
    threads: int | None,
    dry_run: bool,
    world_size: int | None,
    **settings: Any,
) -> None:
    """Train reference-to-video with reference alignment (RefAlign).

    Without arguments it trains the embedded r2v-tiny model on the sprite world: no downloads, no GPU, and a stopped run
    goes on where it was. Real weights: --task r2v-1.3B --ckpt_dir Wan2.1-T2V-1.3B --data manifest.jsonl

    On many devices: torchrun --nproc_per_node=8 train_refalign.py ...; --dry-run shows how it would be divided.
    """
    if world_size is not None and not dry_run:
        raise click.UsageError(
            f"--world_size {world_size}: a number of devices, with --dry-run (torchrun sets it otherwise)"
        )
    if wan_root is not None:
        os.environ["WAN_ROOT"] = wan_root
    from refalign_ext.cli.training_tables import DATA_SOURCES, EXTRA_MODULES
    from refalign_ext.training.run import run_training

    overrides = given_settings(settings)
    with stops_on_request("stopped; the same command goes on from the last checkpoint"):
        run_training(
            overrides.pop("recipe", None),
            overrides,
            sources=DATA_SOURCES,
            extra_modules=EXTRA_MODULES,
            device=device,
            resume=resume,
            threads=threads,
            dry_run=dry_run,
            world_size=world_size,
        )
