"""Task configurations.

`WAN_CONFIGS` maps a task name to its `EasyDict`. The configurations hold torch dtypes, so torch is imported
only when they are first read; the size tables and `TASKS` stay importable in milliseconds (a `--help` needs
no more).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from easydict import EasyDict

    WAN_CONFIGS: dict[str, EasyDict]

TASKS: tuple[str, ...] = ("t2v-14B", "t2v-1.3B", "t2i-14B")

# "width*height" as typed on the command line -> (width, height) in pixels
SIZE_CONFIGS: dict[str, tuple[int, int]] = {
    "720*1280": (720, 1280),
    "1280*720": (1280, 720),
    "480*832": (480, 832),
    "832*480": (832, 480),
    "1024*1024": (1024, 1024),
}

# pixels per frame
MAX_AREA_CONFIGS: dict[str, int] = {
    "720*1280": 720 * 1280,
    "1280*720": 1280 * 720,
    "480*832": 480 * 832,
    "832*480": 832 * 480,
}

SUPPORTED_SIZES: dict[str, tuple[str, ...]] = {
    "t2v-14B": ("720*1280", "1280*720", "480*832", "832*480"),
    "t2v-1.3B": ("480*832", "832*480"),
    "t2i-14B": tuple(SIZE_CONFIGS),
}

__all__ = ["MAX_AREA_CONFIGS", "SIZE_CONFIGS", "SUPPORTED_SIZES", "TASKS", "WAN_CONFIGS", "extend_configs"]

_extensions: list[Callable[[dict, dict, dict], None]] = []


def extend_configs(extension: Callable[[dict, dict, dict], None]) -> None:
    """Adds a package's tasks, without importing torch before somebody reads `WAN_CONFIGS`.

    Args:
        extension: changes `WAN_CONFIGS`, `SIZE_CONFIGS` and `SUPPORTED_SIZES`, in this order; called once they are there.
    """
    _extensions.append(extension)
    if "WAN_CONFIGS" in globals():
        extension(globals()["WAN_CONFIGS"], SIZE_CONFIGS, SUPPORTED_SIZES)


def __getattr__(name: str) -> Any:
    if name != "WAN_CONFIGS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .wan_t2v_1_3B import t2v_1_3B
    from .wan_t2v_14B import t2i_14B, t2v_14B

    configs = dict(zip(TASKS, (t2v_14B, t2v_1_3B, t2i_14B), strict=True))
    globals()["WAN_CONFIGS"] = configs
    for extension in _extensions:
        extension(configs, SIZE_CONFIGS, SUPPORTED_SIZES)
    return configs
