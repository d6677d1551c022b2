"""What a command line says about an error, the same in every program.

A mistake of the user, or of the machine, is one line and exit code 2. Anything else is a bug of ours: it keeps its
traceback and exit code 1. REFALIGN_TRACEBACK=1 prints the traceback of mistakes too.
"""

from __future__ import annotations

import os
import re
import traceback
from contextlib import suppress

import click

# Modules whose ValueErrors are written for users; those of libraries mean that we called them wrongly.
_OWN_PACKAGES = ("wan", "refalign_ext", "generate", "train_refalign", "__main__")
# The kinds of errors that `describe_error` may have a line for.
EXPECTED_ERRORS = (click.ClickException, ValueError, FloatingPointError, OSError, MemoryError, RuntimeError)
_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate")


def describe_error(error: BaseException, memory_advice: str) -> str | None:
    """One line for the user, `memory_advice` if memory ran out, or None for a bug, whose traceback should be shown.

    Mistakes are those of the command line (click), a ValueError or FloatingPointError raised in `wan`, `refalign_ext` or an
    entry script, an OSError (files, and as ConnectionError ranks that are gone) and memory that ran out.
    """
    if os.environ.get("REFALIGN_TRACEBACK") == "1":
        traceback.print_exception(error)
    if is_out_of_memory(error):
        return memory_advice
    is_own = isinstance(error, (ValueError, FloatingPointError)) and _is_raised_by_us(error)
    if isinstance(error, click.ClickException):
        return one_line(error.format_message())
    return one_line(error) if is_own or isinstance(error, OSError) else None


def one_line(error: object, limit: int | None = None) -> str:
    """What an error says in one line, of at most `limit` characters; its class if it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or the machine ran out of memory."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _MEMORY_SIGNS)


def _is_raised_by_us(error: BaseException) -> bool:
    """Whether the innermost frame of an error's traceback belongs to this repository."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "") if frames else ""
    # Errors that cross from another process bring its traceback as text: concurrent.futures as their cause,
    # torch's loaders in their message.
    if module.startswith(("concurrent.futures.", "torch._utils")):
        files = re.findall(r'File "(.+)", line \d+', f"{error.__cause__}\n{error}")
        return bool(files) and any(f"/{package}/" in files[-1] for package in ("wan", "refalign_ext"))
    return module.partition(".")[0] in _OWN_PACKAGES


def shortened(value: object) -> str:
    """A value as an error shows it: at most 60 characters."""
    with suppress(ValueError, RecursionError):  # integers too long, objects too deep
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return "a value that is too large to print"
