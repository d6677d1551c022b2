"""How a program ends: mistakes in one line, Ctrl-C, and one of several ranks that speaks for all."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click

from refalign_ext.errors import EXPECTED_ERRORS, describe_error


class Program(click.Command):
    """A command that ends with exit code 2 and one line after a mistake, 1 and a traceback after a bug."""

    memory_advice = "out of memory"  # the line for a device or machine that ran out of memory

    def run(self, arguments: Sequence[str] | None = None) -> int:
        """Runs the program; returns its exit code."""
        with suppress(AttributeError):  # what replaces standard output need not be a file
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
        try:
            code = super().main(arguments, prog_name=self.name, standalone_mode=False)
            return code if isinstance(code, int) else 0
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            return 2
        except click.Abort:  # Ctrl-C
            return 130
        except EXPECTED_ERRORS as error:
            line = describe_error(error, self.memory_advice)
            report_once(traceback.format_exc() if line is None else f"{self.name}: error: {line}")
            return 1 if line is None else 2

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        sys.exit(self.run(args))


def launched_ranks() -> int:
    """How many ranks torchrun started; 1 where the environment does not say, or says nonsense, which is reported elsewhere."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() else 1


def report_once(text: str) -> None:
    """Writes to standard error; of the ranks that torchrun started, one does."""
    if launched_ranks() == 1:
        click.echo(text, err=True)
        return
    from refalign_ext.distributed.process_group import report_error_once

    # Rank 0 may have left a progress bar on this line.
    prefix = "\n" if os.environ.get("RANK", "0") != "0" else ""
    report_error_once(lambda: click.echo(f"{prefix}{text}", err=True))


@contextmanager
def stops_on_request(message: str) -> Iterator[None]:
    """Ends the program with `message` after a Ctrl-C or SIGTERM that training answered by saving its state."""
    try:
        yield
    except KeyboardInterrupt as stop:
        with suppress(KeyboardInterrupt):
            report_once(message)
        raise click.exceptions.Exit(stop.args[0] if stop.args else 130) from None
