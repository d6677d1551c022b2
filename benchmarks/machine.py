"""What results say about the machine they were measured on."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """Model name of the CPU, or what the platform says."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
