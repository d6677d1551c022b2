"""Programs in processes that are forked from this one: as a user's, without the seconds of imports.

What depends on a fresh interpreter (`--help` without torch, what is imported at all) needs a process of its own.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch.utils import tensorboard  # noqa: F401 - these here once, not in every process

from refalign_ext.cli import training_tables  # noqa: F401
from refalign_ext.serving import generation  # noqa: F401


class Program:
    """A program at work; killed when its block ends.

    Args:
        main: takes the words of a command line and gives an exit code.
        words: the command line.
        folder: where it runs; must exist.
        said: where its output goes, as `NAME.out` and `NAME.err`.
        variables: of its environment, besides this process's.
        before: called in the new process first.
    """

    def __init__(
        self,
        main: Callable[[list[str]], int],
        *words: object,
        folder: Path,
        said: Path,
        variables: Mapping[str, object] | None = None,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        self._said = said
        self._process = multiprocessing.get_context("fork").Process(
            target=self._run, args=(main, [str(word) for word in words], folder, variables or {}, before)
        )
        self._process.start()
        self.pid = self._process.pid

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def wait(self, seconds: float = 300.0) -> int:
        """The exit code; -N if the signal N ended it.

        Raises:
            AssertionError: if it still runs.
        """
        self._process.join(seconds)
        assert self.returncode is not None, f"still running after {seconds} s:\n{self.stderr}"
        return self.returncode

    @property
    def returncode(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """As a user's `kill`; nothing if it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.join()

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._said.with_suffix(".out").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """The same of standard error."""
        return self._said.with_suffix(".err").read_text(errors="replace")

    def _run(
        self,
        main: Callable[[list[str]], int],
        words: list[str],
        folder: Path,
        variables: Mapping[str, object],
        before: Callable[[], object],
    ) -> None:
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(self._said.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        # pytest reads what is printed and logged elsewhere.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        logging.getLogger().handlers.clear()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.update({name: str(value) for name, value in variables.items()})
        os.chdir(folder)
        torch.set_num_threads(1)
        code: object = 1
        try:
            before()
            code = main(words)
        except SystemExit as stop:
            code = stop.code
        except BaseException:  # noqa: BLE001 - the test shows it
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)
