"""Wan2.1 text-to-video in upstream's layout: models and plain tasks. Importing it loads nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .text2video import WanT2V

__all__ = ["WanT2V"]


def __getattr__(name: str) -> Any:
    if name == "WanT2V":
        from .text2video import WanT2V

        return WanT2V
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
