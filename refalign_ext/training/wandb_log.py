"""Weights & Biases, whose failures must not end a training."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refalign_ext.atomic_io import write_text
from refalign_ext.errors import one_line

logger = logging.getLogger(__name__)

_SECONDS = "60"
_NETWORK_PACKAGES = {"wandb", "requests", "urllib3", "httpx"}


class WandbRun:
    """A W&B run that may fail without the training noticing more than one warning; ValueError if it wants a login."""

    def __init__(self, out: Path, project: str, settings: dict[str, Any]) -> None:
        import wandb

        self._module, self._run = wandb, None
        # The other ranks wait for the start, and a finished job holds its machines: neither may take the network's time.
        for name in ("WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"):
            os.environ.setdefault(name, _SECONDS)
        id_file = out / "wandb_id.txt"
        if not id_file.is_file():
            write_text(id_file, secrets.token_hex(4) + "\n")
        run_id = id_file.read_text(encoding="utf-8").strip()
        options = {"project": project, "id": run_id, "name": out.absolute().name, "dir": str(out)}
        self._try(lambda: self._open({**options, "config": settings}), "did not start")

    def _open(self, options: dict[str, Any]) -> None:
        wandb = self._module
        try:
            self._run = wandb.init(**options, resume="allow")
        except wandb.errors.UsageError as error:
            raise ValueError(
                f"Weights & Biases does not start ({one_line(error, 200)}): run `wandb login`, set WANDB_MODE=offline or leave "
                "--wandb out"
            ) from error
        except Exception as error:
            if not _is_network_failure(error):
                raise
            text = "W&B cannot be reached (%s): logging to %s/wandb, upload it later with `wandb sync`"
            logger.warning(text, one_line(error, 200), options["dir"])
            wandb.teardown()  # the attempt above still holds the run's id
            self._run = wandb.init(**options, mode="offline")
        # Values carry their step: W&B's own counter never goes back, and a resumed run must.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Callable[[Any], dict[str, Any]]) -> None:
        """Log what `values` makes of the wandb module."""
        if self._run is not None:
            self._try(lambda: self._run.log({"step": step, **values(self._module)}), "stopped")

    def finish(self, *, failed: bool) -> None:
        """Upload what is left, for a minute at most."""
        if self._run is not None:
            self._try(lambda: self._run.finish(exit_code=int(failed)), "did not finish")

    def _try(self, action: Callable[[], None], what: str) -> None:
        try:
            action()
        except Exception as error:
            if not _is_network_failure(error):
                raise
            self._run = None
            text = "W&B %s (%s): the training goes on, TensorBoard and metrics.jsonl have everything"
            logger.warning(text, what, one_line(error, 200))


def _is_network_failure(error: Exception) -> bool:
    """What W&B and the libraries below it raise of their own, which has no common base class."""
    packages = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError | EOFError | RuntimeError) or bool(packages & _NETWORK_PACKAGES)
