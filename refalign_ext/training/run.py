"""One training run from the command line: configuration, plan, ranks, logs, previews, resume."""

from __future__ import annotations

import json
import logging
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from refalign_ext.backbone import resolve_device
from refalign_ext.checkpoint.checkpointer import abandon_checkpoints_after, resolve_resume
from refalign_ext.config import TrainConfig, configure
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.process_group import (
    environment_rank,
    environment_world_size,
    lost_rank,
    rank_device,
    start_process_group,
    stop_process_group,
)
from refalign_ext.encoders import Encoders, task_config
from refalign_ext.planning.plan import Plan
from refalign_ext.planning.table import plan_table
from refalign_ext.planning.training_plan import make_training_plan
from refalign_ext.tasks import TASKS
from refalign_ext.training.build import build_trainer
from refalign_ext.training.data_source import DataSource, choose_data_source
from refalign_ext.training.extra_module import ExtraModule, wanted_modules
from refalign_ext.training.loop import train_loop
from refalign_ext.training.run_log import RunLog
from refalign_ext.training.trainer import Trainer

logger = logging.getLogger(__name__)


def run_training(
    recipe_name: str | None,
    overrides: dict[str, Any],
    *,
    sources: Sequence[DataSource],
    extra_modules: Sequence[ExtraModule] = (),
    device: str = "auto",
    resume: str = "auto",
    threads: int | None = None,
    dry_run: bool = False,
    world_size: int | None = None,
) -> Trainer | None:
    """Train as the command line asks; returns the trainer at its last step, or None after a dry run.

    Args:
        sources, extra_modules: those that there are.
        dry_run: print the plan and stop; nothing is loaded, written or needed.
        world_size: ranks to plan for in a dry run; None: those that there are.

    Raises:
        ValueError: for settings or files that do not fit, before anything is written.
        FloatingPointError: if too many steps in a row are not finite.
        KeyboardInterrupt: after a stop that was asked for; the checkpoint is written by then.
    """
    is_main = environment_rank() == 0
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(levelname)s %(message)s")
    if threads is not None:
        torch.set_num_threads(threads)
    config = configure(recipe_name, overrides)
    world = (world_size if dry_run else None) or environment_world_size()
    wanted_modules(config, extra_modules, world)
    place = None if dry_run else resolve_device(rank_device(device))
    on_gpu = place is not None and place.type == "cuda"
    memory = torch.cuda.get_device_properties(place).total_memory if on_gpu else None
    plan = make_training_plan(config, task_config(config), world, device_memory=memory)
    is_small = plan.fits and world == 1 and TASKS[config.task].bundled is not None
    if is_main and (dry_run or not is_small):
        print(plan_table(plan), file=sys.stdout if dry_run else sys.stderr, flush=True)
    plan.require_fit()
    if place is None:
        return None
    with _started_ranks(plan, place, config) as parallel:
        return _train(config, parallel, resume, sources, extra_modules)


@contextmanager
def _started_ranks(plan: Plan, device: torch.device, config: TrainConfig) -> Iterator[Parallel]:
    """This rank's place in the plan, as long as the block lasts; ConnectionError if another rank is gone."""
    if plan.sizes.world == 1:
        yield Parallel.single(device)
        return
    timeout = 60 * config.timeout_minutes
    start_process_group(device, timeout)
    try:
        yield Parallel.create(plan.sizes, device, timeout)
    except (OSError, RuntimeError) as error:
        reason = lost_rank(error, timeout)
        if reason is None:
            raise
        raise ConnectionError(reason) from error
    # After a failure the process ends anyway, and leaving the group could wait for ranks that are gone.
    stop_process_group()


def _train(
    config: TrainConfig,
    parallel: Parallel,
    resume: str,
    sources: Sequence[DataSource],
    extra_modules: Sequence[ExtraModule],
) -> Trainer:
    out = Path(config.out)
    # Rank 0 decides, so that all go on from the same place even if one looks a moment later.
    checkpoint = parallel.broadcast_from_rank0(lambda: resolve_resume(out / "checkpoints", resume))
    parallel.broadcast_from_rank0(lambda: _require_writable(out))
    encoders = Encoders(config, parallel.device)
    source = choose_data_source(config, sources)
    received: list[int] = []  # signals
    trainer = build_trainer(
        config, parallel, source, encoders, extra_modules=extra_modules, stop_requested=lambda: bool(received)
    )
    if checkpoint is not None:
        trainer.load(checkpoint)
        logger.info("resuming from %s", checkpoint)
    settings, is_main = trainer.config.to_dict(), parallel.is_main
    log = RunLog(out, first_step=trainer.step, wandb_project=config.wandb, settings=settings, is_main=is_main)
    _prepare_data(trainer)
    if is_main:
        out.mkdir(parents=True, exist_ok=True)
        for moved in abandon_checkpoints_after(out / "checkpoints", trainer.step):
            logger.warning("a run beyond step %d was here: its checkpoint is now %s", trainer.step, moved)
        (out / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    parallel.barrier()
    with log, _stop_on_signal(received, is_main):
        preview = source.make_preview(trainer, encoders, log) if config.preview_every else None
        train_loop(trainer, log, preview=preview)
    if trainer.step < config.steps:
        raise KeyboardInterrupt(128 + (received[0] if received else signal.SIGINT))
    logger.info("done: %s", out / "checkpoints")
    return trainer


def _prepare_data(trainer: Trainer) -> None:
    """Fill caches on rank 0, which may take long; the others then find them."""
    for turn in (True, False):
        for source in (trainer.source, trainer.validation):
            if source is not None and trainer.parallel.is_main == turn:
                source.prepare()
        trainer.parallel.wait_for_main()


def _require_writable(out: Path) -> None:
    """Try the folder, or the nearest one above it that exists, without leaving anything there."""
    nearest = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(
            f"--out {out} cannot be written ({error.strerror}): choose another folder"
        ) from error


@contextmanager
def _stop_on_signal(received: list[int], is_main: bool) -> Iterator[None]:
    """Adds signals to `received`, so that the running step is finished and saved; a second Ctrl-C stops at once."""

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        # A scheduler may repeat itself, and torchrun passes on what it got.
        if is_main and len(received) == 1:
            again = " (Ctrl-C again: at once)" if number == signal.SIGINT else ""
            print(f"\nstopping after this step{again}", file=sys.stderr)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # A job in the background ignores the terminal's Ctrl-C, and handlers belong to the main thread.
    if threading.current_thread() is not threading.main_thread():
        before = {}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
