"""Networks of Wan2.1, resolved on first use, so that importing one does not pay for the others."""

from __future__ import annotations

import importlib
from typing import Any

_SOURCES = {
    "WanModel": "model",
    "WanVAE": "vae",
    "T5EncoderModel": "t5",
    "HuggingfaceTokenizer": "tokenizers",
    "flash_attention": "attention",
}

__all__ = ["HuggingfaceTokenizer", "T5EncoderModel", "WanModel", "WanVAE", "flash_attention"]


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_SOURCES[name]}", __name__), name)
