"""Runs under torchrun's own agent, in forked processes: restarts, signals and exits as with torchrun, without its imports.

The program is train_refalign.py's `main`; only the model and its samples are those of tests/helpers/tiny_training.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils import tensorboard  # noqa: F401 - here once, not in every rank

import train_refalign
from refalign_ext.checkpoint.stored_tensors import StoredTensors
from refalign_ext.cli import training_tables  # noqa: F401 - here once, not in every rank
from refalign_ext.training import run as launch
from refalign_ext.training.trainer import TrainerHooks
from tests.helpers.tiny_training import DEPTH, Source, build

SETTINGS = (
    *("--device", "cpu", "--threads", "1", "--precision", "fp32", "--log_every", "1", "--preview_every", "0"),
    *("--validate_every", "0", "--schedule", "constant", "--warmup_steps", "0"),
    *("--batch_size", "1", "--global_batch_size", "2", "--alignment.depth", str(DEPTH)),
)


class Agent:
    """An agent at work.

    Args:
        process: the agent.
        folder: where its ranks leave their process ids, and what all of them say.
    """

    def __init__(self, process: Any, folder: Path) -> None:
        self.process, self.folder = process, folder

    def wait(self, seconds: float) -> int:
        """The agent's exit code: 0, 1 if a rank failed for good, -N if the signal N ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s:\n{self.said()}"
        return self.process.exitcode

    def said(self) -> str:
        """What agent and ranks wrote so far, progress bars left out."""
        lines = (self.folder / "said.txt").read_text(errors="replace").replace("\r", "\n").splitlines()
        return "\n".join(line for line in lines if line.strip() and not line.startswith("training:"))

    def own(self) -> str:
        """The same without the agent's own words, which begin with a letter and the date."""
        return "\n".join(
            line for line in self.said().splitlines() if not re.match(r"[EWI]\d{4} |\[W\d{4} ", line)
        )

    def pid(self, rank: int, attempt: int = 0, seconds: float = 60.0) -> int:
        """The process id of a rank, after the agent's start number `attempt`."""
        path = self.folder / f"{attempt}-{rank}.pid"
        until(path.exists, seconds, self.said)
        return int(path.read_text())

    def kill(self, rank: int, attempt: int = 0) -> bool:
        """SIGKILL for a rank, unless it has ended; True if it hit.

        A rank that has done its work waits for the others in a lock of multiprocessing's, which dies with it: torchrun's
        ranks are no forked processes and have none. It is held while we look whether it has got there.
        """
        pid = self.pid(rank, attempt)
        try:
            os.kill(pid, signal.SIGSTOP)
            is_done = (self.folder / f"{attempt}-{rank}.done").exists()
            os.kill(pid, signal.SIGCONT if is_done else signal.SIGKILL)
        except ProcessLookupError:
            return False
        return not is_done

    def attempts(self) -> int:
        """How many times rank 0 was started."""
        return len(list(self.folder.glob("*-0.pid")))


def until(holds: Callable[[], bool], seconds: float, said: Callable[[], str]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"nothing after {seconds} s:\n{said()}"
        time.sleep(0.005)


@contextmanager
def agent(
    folder: Path,
    ranks: int,
    *arguments: object,
    restarts: int = 0,
    patch: Callable[[int], None] | None = None,
) -> Iterator[Agent]:
    """train_refalign.py with these arguments under an agent; nothing of it is left when the block ends.

    Args:
        folder: made; holds the run in `run` unless `--out` says otherwise.
        restarts: as torchrun's `--max-restarts`.
        patch: called on every rank with its number before it begins.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = [*SETTINGS, "--out", folder / "run", *arguments]
    process = multiprocessing.get_context("fork").Process(
        target=_agent, args=(folder, ranks, restarts, [str(word) for word in words], patch)
    )
    process.start()
    try:
        yield Agent(process, folder)
    finally:
        # The agent leads a process group of its own, with its ranks in it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _agent(folder: Path, ranks: int, restarts: int, words: list[str], patch: Any) -> None:
    os.setsid()
    said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    # pytest reads what is printed elsewhere.
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    logging.getLogger().handlers.clear()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        start_method="fork",
        monitor_interval=0.05,
    )
    code = 0
    try:
        elastic_launch(config, _rank)(folder, words, patch)
    except ChildFailedError:
        code = 1
    except SignalException as stop:
        signal.signal(stop.sigval, signal.SIG_DFL)
        os.kill(os.getpid(), stop.sigval)
    os._exit(code)


def _build_trainer(config: Any, parallel: Any, *_: object, stop_requested: Any, **others: object) -> Any:
    return build(config, Source(), parallel, hooks=TrainerHooks(stop_requested))


def _rank(folder: Path, words: list[str], patch: Callable[[int], None] | None) -> None:
    rank, attempt = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
    unfinished = folder / f"{attempt}-{rank}.part"
    unfinished.write_text(str(os.getpid()))
    unfinished.rename(unfinished.with_suffix(".pid"))
    launch.build_trainer = _build_trainer
    if patch is not None:
        patch(rank)
    if (code := train_refalign.main(words)) != 0:
        raise SystemExit(code)
    (folder / f"{attempt}-{rank}.done").touch()


def curve(run: Path) -> dict[int, float]:
    """Loss by step, as logged."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss/total"] for row in rows}


def state_hash(checkpoint: Path) -> str:
    """One hash of every tensor in a checkpoint, whatever number of ranks wrote it."""
    stored, digest = StoredTensors(checkpoint), hashlib.sha256()
    for name in sorted(stored.tensors):
        digest.update(name.encode())
        digest.update(stored.read(name).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
