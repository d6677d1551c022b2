"""Weights & Biases, whose failures must not end a training."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refalign_ext.training.log_files import METRICS_FILE, write_whole

logger = logging.getLogger(__name__)

WANDB_ID_FILE = "wandb_id.txt"
_WANDB_SECONDS = 60
_NETWORK_PACKAGES = {"wandb", "requests", "urllib3", "httpx"}


class WandbRun:
    """A W&B run that may fail without the training noticing more than one warning."""

    def __init__(self, out: Path, project: str, settings: dict[str, Any]) -> None:
        import wandb

        self._module, self._run = wandb, None
        # The other ranks wait for the start, and a finished job holds its machines: neither may take the network's time.
        os.environ.setdefault("WANDB_INIT_TIMEOUT", str(_WANDB_SECONDS))
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(_WANDB_SECONDS))
        id_file = out / WANDB_ID_FILE
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else ""
        if not run_id:
            run_id = secrets.token_hex(4)
            write_whole(id_file, run_id + "\n")
        name = out.absolute().name
        options = {"project": project, "id": run_id, "name": name, "dir": str(out), "config": settings}
        self._try(lambda: self._open(options), "did not start")

    def _open(self, options: dict[str, Any]) -> None:
        usage_error = self._module.errors.UsageError
        try:
            self._run = self._module.init(**options, resume="allow")
        except usage_error as error:
            raise ValueError(
                f"Weights & Biases does not start ({' '.join(str(error).split())[:200]}): run `wandb login`, set "
                "WANDB_MODE=offline or leave --wandb out"
            ) from error
        except Exception as error:
            if not _is_network_failure(error):
                raise
            logger.warning(
                "W&B cannot be reached (%s): logging to %s/wandb, upload it later with `wandb sync`",
                _one_line(error),
                options["dir"],
            )
            self._module.teardown()  # the attempt above still holds the run's id
            self._run = self._module.init(**options, mode="offline")
        # Values carry their step: W&B's own counter never goes back, and a resumed run must.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Callable[[Any], dict[str, Any]]) -> None:
        """Log what `values` makes of the wandb module."""
        if self._run is not None:
            self._try(lambda: self._run.log({"step": step, **values(self._module)}), "stopped")

    def finish(self, *, failed: bool) -> None:
        """Upload what is left, for a minute at most."""
        run = self._run
        if run is not None:
            self._try(lambda: run.finish(exit_code=int(failed)), "did not finish")
        self._run = None

    def _try(self, action: Callable[[], None], what: str) -> None:
        try:
            action()
        except Exception as error:
            if not _is_network_failure(error):
                raise
            self._run = None
            logger.warning(
                "W&B %s (%s): the training goes on, TensorBoard and %s have everything",
                what,
                _one_line(error),
                METRICS_FILE,
            )


def _is_network_failure(error: Exception) -> bool:
    """What W&B and the libraries below it raise of their own, which has no common base class."""
    packages = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError | EOFError | RuntimeError) or bool(packages & _NETWORK_PACKAGES)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
