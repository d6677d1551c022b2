"""Where a model runs: devices, number formats, moving parts in and out of memory, peak memory."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PACKAGES = ("diffusers", "transformers", "safetensors", "tokenizers", "numpy", "pillow", "av")


def resolve_device(device: torch.device | str | None = "auto") -> torch.device:
    """Gives the device for a name; "auto" and None mean CUDA, else MPS, else CPU, whichever is there.

    Raises:
        ValueError: when the device is unknown or not on this machine.
    """
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}: choose one of auto, cuda, mps, cpu") from None
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise ValueError(
                f"device {resolved} is not on this machine ({count} CUDA devices seen): use --device cpu"
            )
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps is not on this machine: use --device cpu")
    return resolved


def resolve_dtype(name: torch.dtype | str, device: torch.device) -> torch.dtype:
    """Gives the number format for a name; "auto" means bfloat16 on CUDA and float32 elsewhere.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(name, torch.dtype):
        return name
    known = DTYPES | {"auto": DTYPES["bf16" if device.type == "cuda" else "fp32"]}
    if name not in known:
        raise ValueError(f"unknown dtype {name!r}: choose one of {', '.join(known)}")
    return known[name]


def release_cached_memory(device: torch.device) -> None:
    """Hands unused memory of the allocator back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


@contextmanager
def placed(module: torch.nn.Module, device: torch.device, *, offload: bool) -> Iterator[torch.nn.Module]:
    """Has `module` on `device` inside the block and, with `offload`, back on the CPU after it."""
    module.to(device)
    try:
        yield module
    finally:
        if offload and device.type != "cpu":
            module.to("cpu")
            release_cached_memory(device)


class PeakMemory:
    """Measures the largest amount of memory in use since it was made.

    On CUDA that is what torch allocated on the device; elsewhere it is the resident set of the whole process since
    it started, the only figure the operating system keeps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int:
        """The peak in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def describe(self) -> str:
        """One line for a log."""
        where = f"on {self.device}" if self.device.type == "cuda" else "resident in this process"
        return f"peak memory: {self.bytes() / 2**30:.2f} GiB {where}"


def describe_versions() -> dict[str, str]:
    """Versions of Python, the system and the packages that results depend on."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    versions["torch"] = str(torch.__version__)  # names the build, which the package's metadata may leave out
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
