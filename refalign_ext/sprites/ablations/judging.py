"""What a study measures of a trained arm, and the control that has to score at chance."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from refalign_ext.atomic_io import atomic_open
from refalign_ext.sprites.evaluate import Job, contact_sheet, judge_folder
from refalign_ext.sprites.judged import answers_of

FLOW_ERROR = "validation/flow"
JOB_SEED = 1000  # plus the seed of the arm; previews, by which recipes are chosen, have another one


def jobs(seed: int, clips: int, sample_steps: int) -> dict[str, Job]:
    """What every arm of a seed generates: held-out subjects, references in another pose and scale.

    `shuffled` is the control, with a quarter of the clips: a model that heeds its references shows the wrong subjects there,
    and one that guesses finds the colours by chance.
    """
    usual = Job(clips, 1, seed=JOB_SEED + seed, sample_steps=sample_steps)
    return {
        "one": usual,
        "two": replace(usual, subjects=2),
        "shuffled": replace(usual, clips=max(2, clips // 4), references="shuffled"),
    }


def judge_checkpoint(
    frozen: Path, checkpoint: Path, out: Path, wanted: dict[str, Job], *, device: str, precision: str
) -> dict[str, dict[str, Any]]:
    """Judge the averaged weights of a checkpoint; a picture of every job goes to `out`.

    Args:
        frozen: folder of VAE, text encoder and teacher.
        wanted: see `jobs`.
        precision: of the DiT, `fp32` or `bf16`.

    Returns:
        for every job the judge's `table` (metric -> share, low, high, count, or None without answers) and its `answers`.
    """
    from PIL import Image

    found = {}
    for name, job in wanted.items():
        evaluation = judge_folder(
            frozen, "generation", job, dit_ckpt=checkpoint, device=device, precision=precision
        )
        with atomic_open(out / f"{name}.png") as file:
            Image.fromarray(contact_sheet(evaluation, rows=min(10, job.clips))).save(file, format="PNG")
        # JSON knows no nan, which is what the share of no answers is.
        table = {metric: row if row["count"] else None for metric, row in evaluation.table().items()}
        found[name] = {"table": table, "answers": answers_of(evaluation)}
    return found


def read_metrics(path: Path) -> tuple[dict[str, dict[str, float]], float | None]:
    """From a run's metrics by step: the judge's figures in previews and the validation clips' flow-matching error; and the
    median of clips trained per second.
    """
    curve: dict[str, dict[str, float]] = {}
    speeds = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        shown = {
            name: value for name, value in entry.items() if name.startswith("judge_") or name == FLOW_ERROR
        }
        if shown:
            curve.setdefault(str(entry["step"]), {}).update(shown)
        speeds += [entry["speed/clips_per_second"]] if "speed/clips_per_second" in entry else []
    return curve, statistics.median(speeds) if speeds else None
