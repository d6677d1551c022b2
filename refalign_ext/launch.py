"""One training run from the command line: configuration, device, logs, previews, resume."""

from __future__ import annotations

import json
import logging
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refalign_ext.assemble import assemble, task_config
from refalign_ext.backbone import WanModel, dit_arguments, is_out_of_memory, resolve_device
from refalign_ext.checkpoint import resolve_resume
from refalign_ext.config import TrainConfig, recipe, with_overrides
from refalign_ext.trainer import Trainer

logger = logging.getLogger(__name__)


def train(
    recipe_name: str | None,
    overrides: dict[str, Any],
    *,
    device: str = "auto",
    resume: str = "auto",
    threads: int | None = None,
) -> Trainer:
    """Train as the command line asks; returns the trainer at its last step.

    Raises:
        ValueError: for settings or files that do not fit, before anything is written.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    if threads is not None:
        torch.set_num_threads(threads)
    name = recipe_name or ("tiny" if overrides.get("task", "r2v-tiny") == "r2v-tiny" else "paper")
    config = with_overrides(recipe(name), overrides)
    out = Path(config.out)
    checkpoint = resolve_resume(out / "checkpoints", resume)
    _check_writable(out)
    trainer = assemble(config, resolve_device(device))
    if checkpoint is not None:
        trainer.load(checkpoint)
        logger.info("resuming from %s", checkpoint)
    (out / "settings.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what an interrupted run logged beyond its last checkpoint
    with SummaryWriter(str(out / "tensorboard"), purge_step=trainer.step + 1) as writer:

        def log(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

        preview = _sprite_preview(trainer, config, writer) if config.data is None else None
        trainer.run(log=log, preview=preview)
    logger.info("done: %s", out / "checkpoints")
    return trainer


def explain(error: BaseException) -> str:
    """One line for the user; REFALIGN_TRACEBACK=1 prints the traceback first."""
    if os.environ.get("REFALIGN_TRACEBACK") == "1":
        traceback.print_exception(error)
    if is_out_of_memory(error):
        return "out of memory: lower --batch_size (raise --accumulation), or use --gradient_checkpointing"
    if isinstance(error, RuntimeError):
        return f"{' '.join(str(error).split())[:300]} (REFALIGN_TRACEBACK=1 shows where)"
    return " ".join(str(error).split())


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"--out {out} cannot be written ({error.strerror}): choose another folder"
        ) from error


def _sprite_preview(trainer: Trainer, config: TrainConfig, writer: Any) -> Callable[[int], dict[str, float]]:
    """Pictures and the judge's figures on subjects that training never shows, made with the averaged weights."""
    from PIL import Image

    from refalign_ext.assemble import checkpoint_folder
    from refalign_ext.backbone import WanVAE
    from refalign_ext.evaluation.sprites import Job, SpriteEvaluator, contact_sheet
    from refalign_ext.sprites.vae_onepass import lay_channels_last

    task = task_config(config)
    vae = WanVAE(
        vae_pth=checkpoint_folder(config) / task.vae_checkpoint, device=trainer.device, config=task.vae
    )
    lay_channels_last(vae.model)
    evaluator = SpriteEvaluator(task, vae, trainer.encode_text)
    folder = Path(config.out) / "previews"
    folder.mkdir(parents=True, exist_ok=True)

    def preview(step: int) -> dict[str, float]:
        # A model of its own: the one in training may be compiled, and sampling must not disturb it.
        model = WanModel(**dit_arguments(task)).to(trainer.device)
        model.load_state_dict(trainer.averaged_state())
        values, sheets = {}, []
        for subjects, clips in ((1, 48), (2, 24)):
            evaluation = evaluator.generate(model, Job(clips=clips, subjects=subjects))
            for key, row in evaluation.table().items():
                if not np.isnan(row["share"]):
                    values[f"judge_{subjects}/{key}"] = row["share"]
            sheets.append(contact_sheet(evaluation, rows=6))
        width = max(sheet.shape[1] for sheet in sheets)
        padded = [np.pad(s, ((0, 6), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in sheets]
        picture = np.concatenate(padded)
        aside = folder / f"step-{step:08d}.part"
        Image.fromarray(picture).save(aside, format="PNG")
        aside.replace(folder / f"step-{step:08d}.png")
        writer.add_image("preview", picture, step, dataformats="HWC")
        return values

    return preview
