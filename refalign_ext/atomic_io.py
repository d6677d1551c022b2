"""Files that appear whole or not at all, and that one process at a time writes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def atomic_path(target: Path, folder: Path | None = None) -> Iterator[Path]:
    """A temporary path to write to, for what takes no file; it takes the place of `target` if nothing goes wrong.

    Until then it lies in `folder`, which is on the same file system, or next to the target.
    """
    folder = target.parent if folder is None else folder
    for needed in (target.parent, folder):
        needed.mkdir(parents=True, exist_ok=True)
    # Ranks on several machines may do the same at once: a process number would not be unique.
    temporary = folder / f".{target.name[:32]}.{uuid.uuid4().hex}.part"
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_open(target: Path, folder: Path | None = None) -> Iterator[BinaryIO]:
    """A file under a temporary name that takes the place of `target` if nothing goes wrong; see `atomic_path`."""
    with atomic_path(target, folder) as temporary, temporary.open("x+b") as file:
        yield file


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `target`, missing or empty until then, if nothing goes wrong."""
    unfinished = target.with_name(f"{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if target.is_dir():
            target.rmdir()
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(path: Path, entry: dict[str, Any], *, indent: int | None = 1) -> None:
    """Writes a JSON file whole or not at all; `indent` None puts all on one line, for many answers."""
    write_text(path, json.dumps(entry, indent=indent, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with atomic_open(path) as file:
        file.write(text.encode())


def save_figure(figure: Figure, path: Path, *, dpi: int = 100) -> None:
    """Draws a matplotlib figure into the PNG `path`; a `Figure` made without pyplot needs no display."""
    with atomic_open(path) as file:
        figure.savefig(file, dpi=dpi, format="png")


def sync(path: Path) -> None:
    """Waits until a file is on the disk; of a folder, the names in it, so that no power failure forgets a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FileLocked(ValueError):
    """Another process of this machine is writing the same file."""


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds a lock on what is to be `target` that ends with the process; raises FileLocked if another has it.

    The empty file `<target>.lock` stays, since another process may have opened it.
    """
    with target.with_name(target.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileLocked(
                f"{target}: another process is writing it: wait for it, or give every process its own --shard"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
