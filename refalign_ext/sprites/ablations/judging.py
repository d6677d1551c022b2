"""What a study measures of a trained arm, and the control that has to score at chance."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from refalign_ext.sprites.evaluate import JudgingJob, judge_folder
from refalign_ext.sprites.pixels import save_picture

FLOW_ERROR = "validation/flow"
JOB_SEED = 1000  # plus the seed of the arm; previews, by which recipes are chosen, have another one


def judging_jobs(seed: int, clips: int, sample_steps: int) -> dict[str, JudgingJob]:
    """What every arm of a seed generates: held-out subjects, references in another pose and scale.

    `shuffled` is the control, with a quarter of the clips: a model that heeds its references shows the wrong subjects there,
    and one that guesses finds the colours by chance.
    """
    usual = JudgingJob(clips, 1, seed=JOB_SEED + seed, sample_steps=sample_steps)
    return {
        "one": usual,
        "two": replace(usual, subjects=2),
        "shuffled": replace(usual, clips=max(2, clips // 4), references="shuffled"),
    }


def judge_checkpoint(
    frozen: Path, checkpoint: Path, out: Path, jobs: dict[str, JudgingJob], *, device: str, precision: str
) -> dict[str, dict[str, Any]]:
    """Judge the averaged weights of a checkpoint; a picture of every job goes to `out`.

    Args:
        frozen: folder of VAE, text encoder and teacher.
        precision: of the DiT, `fp32` or `bf16`.

    Returns:
        for every job the judge's `table` and its `answers`; see `judge.tabulate` and `judge.judge_clip`.
    """
    found = {}
    for name, job in jobs.items():
        evaluation = judge_folder(
            frozen, "generation", job, dit_ckpt=checkpoint, device=device, precision=precision
        )
        save_picture(out / f"{name}.png", evaluation.contact_sheet(rows=10))
        found[name] = {"table": evaluation.table(), "answers": evaluation.answers}
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
