"""Files that a run's logs and reports share: JSON that every reader takes, and disk errors that name the file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refalign_ext.atomic_io import atomic_open

METRICS_FILE = "metrics.jsonl"


def json_values(value: Any) -> Any:
    """`value` as every reader of JSON takes it: numbers that are not finite as the strings `nan`, `inf` and `-inf`."""
    if isinstance(value, Mapping):
        return {name: json_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole or not there."""
    with named_disk_errors(path), atomic_open(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def named_disk_errors(path: Path) -> Iterator[None]:
    """A full disk names no file of its own accord."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{path} cannot be written ({reason}): free some space or check the folder") from error
