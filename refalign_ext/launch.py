"""One training run from the command line: configuration, device, logs, previews, resume."""

from __future__ import annotations

import json
import logging
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refalign_ext.assemble import assemble, task_config
from refalign_ext.backbone import WanModel, dit_arguments, resolve_device
from refalign_ext.checkpoint import resolve_resume, set_aside_after
from refalign_ext.config import TrainConfig, recipe, with_overrides
from refalign_ext.errors import describe_error
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
        FloatingPointError: if a loss is not finite.
        KeyboardInterrupt: after a stop that was asked for; the checkpoint is written by then.
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
    out.mkdir(parents=True, exist_ok=True)
    trainer.source.prepare()
    for moved in set_aside_after(out / "checkpoints", trainer.step):
        logger.warning("a run beyond step %d was here: its checkpoint is now %s", trainer.step, moved)
    (out / "settings.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    _forget_metrics_after(out / "metrics.jsonl", trainer.step)
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what an interrupted run logged beyond its last checkpoint
    tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=trainer.step + 1)
    with tensorboard as writer, _stop_on_interrupt() as should_stop:

        def log(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

        has_preview = config.data is None and config.preview_every > 0
        preview = _sprite_preview(trainer, config, writer) if has_preview else None
        trainer.run(log=log, preview=preview, should_stop=should_stop)
    if trainer.step < config.steps:
        raise KeyboardInterrupt
    logger.info("done: %s", out / "checkpoints")
    return trainer


def explain(error: BaseException) -> str:
    """One line for the user; REFALIGN_TRACEBACK=1 prints the traceback first."""
    line = describe_error(
        error, "out of memory: lower --batch_size (raise --accumulation), or use --gradient_checkpointing"
    )
    if line is None:
        return f"{' '.join(str(error).split())[:300]} (REFALIGN_TRACEBACK=1 shows where)"
    return line


def _check_writable(out: Path) -> None:
    """Try the folder, or the nearest one above it that exists, without leaving anything there."""
    folder = out.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"--out {out} cannot be written ({error.strerror}): choose another folder"
        ) from error


def _forget_metrics_after(path: Path, step: int) -> None:
    """Drop what an interrupted run logged beyond the checkpoint that the run goes on from."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
        aside = path.with_suffix(".part")
        aside.write_text("".join(kept), encoding="utf-8")
        aside.replace(path)


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C lets the running step finish and be saved; the second stops at once."""
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, signal.default_int_handler)
        print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr)

    previous = signal.getsignal(signal.SIGINT)
    # Handlers belong to the main thread, and a job in the background ignores the terminal's Ctrl-C.
    if threading.current_thread() is not threading.main_thread() or previous is signal.SIG_IGN:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, previous)


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
        for subjects, clips in ((1, config.preview_clips), (2, max(1, config.preview_clips // 2))):
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
