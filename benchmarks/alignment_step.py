"""What reference alignment costs per training step of r2v-tiny on the sprite world.

    python benchmarks/alignment_step.py --device cpu --threads 1 --write

The same trainer, batch and weights without alignment and with alignment of 1 to 6 blocks, in turns in one process on the
same samples. On a CPU the ratio is that of the process's CPU time, which other programs disturb least. Teacher features
are read from the sprite cache, as in training.
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


def step_seconds(trainer: Trainer) -> float:
    """Seconds of one optimizer step: wall time on a GPU, CPU time elsewhere."""
    on_gpu = trainer.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    trainer.train_step()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def measure(references: int, steps: int, device: torch.device) -> list[float]:
    """Median seconds of a step for each of `DEPTHS`."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = [build(depth, references, Path(folder), device) for depth in DEPTHS]
        for trainer in trainers:
            trainer.source.prepare()
            for _ in range(3):
                trainer.train_step()
        rounds = tqdm(range(steps), desc=f"{references} references", unit="round")
        runs = [[step_seconds(trainer) for trainer in trainers] for _ in rounds]
    return [statistics.median(taken) for taken in zip(*runs, strict=True)]


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
    title = f"Cost of reference alignment per training step, r2v-tiny, {place.type}"
    columns = [f"{depth} blocks" if depth else "none" for depth in DEPTHS]
    lines = [
        *section_head(title, f"{name}, {threads} thread(s)"),
        f"- `python benchmarks/alignment_step.py --device {device} --threads {threads} --steps {steps}`: recipe `tiny`, batch 8, "
        f"eager, bf16 autocast, median of {steps} interleaved steps; in brackets the ratio to no alignment",
        "",
        f"| references | {' | '.join(columns)} |",
        "|---|" + "---|" * len(DEPTHS),
    ]
    for references in SHARES:
        found = measure(references, steps, place)
        cells = [f"{1000 * seconds:.0f} ms ({seconds / found[0]:.2f})" for seconds in found]
        lines.append(f"| {references} | {' | '.join(cells)} |")
    show_section(lines, write=write)


if __name__ == "__main__":
    main()
