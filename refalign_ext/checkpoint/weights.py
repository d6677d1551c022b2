"""Weights that are read when they are needed, and safetensors files written from them one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SAFETENSORS_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Weight:
    """A tensor in a file: what is known without reading it, and how to read it (whole, on the CPU)."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Weight:
        """One that is read already, or memory-mapped."""
        return cls(tensor.shape, tensor.dtype, lambda: tensor)

    @property
    def size_in_bytes(self) -> int:
        """Bytes of the tensor in memory."""
        return self.shape.numel() * self.dtype.itemsize


def read_weights(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """All of them at once."""
    return {name: weight.read() for name, weight in weights.items()}


def write_safetensors(
    path: Path, weights: Mapping[str, Weight], note: Mapping[str, str], progress: Callable[[int], Any] = int
) -> None:
    """A safetensors file, tensor by tensor; the library's own writer takes all tensors of a file at once.

    Eight bytes with the header's length, a JSON header, then the data. Format: the safetensors README, "Format".

    Args:
        note: the file's metadata besides `format`.
        progress: told the bytes of each tensor when it is written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **note}}
    end = 0
    for name, weight in weights.items():
        begin, end = end, end + weight.size_in_bytes
        kind = str(weight.dtype).removeprefix("torch.")
        if kind not in _SAFETENSORS_TYPES:
            raise ValueError(f"{name} is {kind}: weights that can be exported are floating-point numbers")
        entry = {"dtype": _SAFETENSORS_TYPES[kind], "shape": list(weight.shape), "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights.values():
            content = weight.read().contiguous().reshape(-1).view(torch.uint8)
            file.write(content.numpy().data)
            progress(content.numel())
