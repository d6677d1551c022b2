"""The machine that results were measured on, and the sections of RESULTS.md."""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("RESULTS.md")


def processor() -> str:
    """Model name of the CPU, or what the platform says."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def interleaved_medians(
    functions: Sequence[Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Median seconds of each function, called in turns so that other programs disturb all alike; waits for CUDA."""
    runs: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for seconds, function in zip(runs, functions, strict=True):
            start = clock()
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds.append(clock() - start)
    return [statistics.median(seconds) for seconds in runs]


def section_head(title: str, machine: str, *libraries: str) -> list[str]:
    """First lines of a section of RESULTS.md: title, date, machine, versions."""
    versions = ", ".join([f"Python {platform.python_version()}", f"torch {torch.__version__}", *libraries])
    return [
        f"## {title}",
        "",
        f"- Date: {datetime.date.today().isoformat()}",
        f"- Machine: {machine}",
        f"- Versions: {versions}",
    ]


def show_section(lines: list[str], *, write: bool) -> None:
    """Print a section; with `write` append it to RESULTS.md."""
    text = "\n".join(lines) + "\n"
    print(text)
    if write:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(f"\n{text}")
