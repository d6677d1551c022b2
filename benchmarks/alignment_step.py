"""What reference alignment costs per training step of r2v-tiny on the sprite world.

    python benchmarks/alignment_step.py --device cpu --threads 1 --write

The same trainer, batch and weights, with the alignment weight at zero and with alignment of 1 to 6 blocks; each variant is a
`Trainer` as `train_refalign.py` builds it, and all take turns in one process on the same samples. On a CPU the ratio is that of
the process's CPU time, which other programs on the machine disturb least. Teacher features are read from the sprite cache, as in
training: computing them is part of filling it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import torch
from tqdm import tqdm

from benchmarks.machine import processor, section_head, show_section
from refalign_ext.backbone import resolve_device
from refalign_ext.config import configure
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.encoders import Encoders
from refalign_ext.sprites.training_data import SPRITE_DATA
from refalign_ext.training.build import build_trainer
from refalign_ext.training.trainer import Trainer

SHARES = {1: (1.0, 0.0, 0.0), 2: (0.0, 1.0, 0.0), 3: (0.0, 0.0, 1.0)}
DEPTHS = (0, 1, 3, 6)


def build(depth: int, references: int, folder: Path, device: torch.device) -> Trainer:
    """A trainer that aligns the first `depth` blocks; 0: none."""
    settings = {
        "from_scratch": True,
        "alignment.weight": 0.5 if depth else 0.0,
        "alignment.depth": max(depth, 1),
        "subject_counts": SHARES[references],
        "cache_clips": 64,
        "cache_free_clips": 64,
        "cache_views": 2,
        "validate_every": 0,
        "preview_every": 0,
        "out": str(folder / f"{references}-{depth}"),
        "cache": str(folder / "cache"),
    }
    config = configure("tiny", settings)
    return build_trainer(config, Parallel.single(device), SPRITE_DATA, Encoders(config, device))


def seconds_of_step(trainer: Trainer) -> tuple[float, float]:
    """CPU and wall seconds of one optimizer step."""
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    process, wall = time.process_time(), time.perf_counter()
    trainer.train_step()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() - process, time.perf_counter() - wall


def measure(references: int, steps: int, device: torch.device) -> dict[int, tuple[float, float]]:
    """Median CPU and wall seconds of a step by depth."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {depth: build(depth, references, Path(folder), device) for depth in DEPTHS}
        for trainer in trainers.values():
            trainer.source.prepare()
            for _ in range(3):
                trainer.train_step()
        runs: dict[int, list[tuple[float, float]]] = {depth: [] for depth in DEPTHS}
        for _ in tqdm(range(steps), desc=f"{references} references", unit="round"):
            for depth, trainer in trainers.items():
                runs[depth].append(seconds_of_step(trainer))
    return {
        depth: tuple(statistics.median(run[clock] for run in taken) for clock in (0, 1))
        for depth, taken in runs.items()
    }


@click.command(context_settings={"show_default": True})
@click.option("--steps", type=click.IntRange(1), default=40, help="Steps of each variant.")
@click.option("--threads", type=click.IntRange(1), default=1)
@click.option("--device", default="cpu")
@click.option("--write", is_flag=True, help="Append the result to benchmarks/RESULTS.md.")
def main(steps: int, threads: int, device: str, write: bool) -> None:
    """Measure and print, as a section of RESULTS.md."""
    torch.set_num_threads(threads)
    place = resolve_device(device)
    name = processor() if place.type == "cpu" else torch.cuda.get_device_name(place)
    clock = 1 if place.type == "cuda" else 0
    lines = [
        *section_head(
            f"Cost of reference alignment per training step, r2v-tiny, {place.type}",
            f"{name}, {threads} thread(s)",
        ),
        f"- `python benchmarks/alignment_step.py --device {device} --threads {threads} --steps {steps}`: recipe `tiny`, batch 8, "
        f"eager, bf16 autocast, median of {steps} interleaved steps, {'wall' if clock else 'CPU'} time; in brackets the ratio to "
        "no alignment",
        "",
        "| references | " + " | ".join(f"{depth} blocks" if depth else "none" for depth in DEPTHS) + " |",
        "|---|" + "---|" * len(DEPTHS),
    ]
    for references in SHARES:
        found = measure(references, steps, place)
        cells = [
            f"{1000 * found[depth][clock]:.0f} ms ({found[depth][clock] / found[0][clock]:.2f})"
            for depth in DEPTHS
        ]
        lines.append(f"| {references} | " + " | ".join(cells) + " |")
    show_section(lines, write=write)


if __name__ == "__main__":
    main()
