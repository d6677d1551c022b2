"""Weights that are read when they are asked for, and those of a base model with an adapter merged into them.

A checkpoint of a LoRA run holds the adapter only. Its base is the model that the run's settings name, read from where
it lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refalign_ext.lora import adapted_layers, merged_weight

EMBEDDED_TASK = "r2v-tiny"
EMBEDDED = Path(__file__).resolve().parents[2] / "assets" / EMBEDDED_TASK


@dataclass(frozen=True)
class Weight:
    """A tensor in a file: what is known without reading it, and how to read it (whole, on the CPU)."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def size_in_bytes(self) -> int:
        """Bytes of the tensor in memory."""
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class StoredDiT:
    """A DiT in files.

    Attributes:
        path: what was named.
        weights: by upstream's names.
        files: those that hold them.
        base: the model that these weights were made from with an adapter, or None.
    """

    path: Path
    weights: dict[str, Weight]
    files: list[Path]
    base: StoredDiT | None = None


def weight_of(tensor: Tensor) -> Weight:
    """A tensor that is there already, for example in a memory-mapped file."""
    return Weight(tensor.shape, tensor.dtype, lambda: tensor)


def merged_weights(
    base: Mapping[str, Weight], adapter: Mapping[str, Weight], *, rank: int, alpha: float
) -> dict[str, Weight]:
    """The base's weights, in its order and dtypes; those of adapted layers are merged when they are read.

    Args:
        base: by upstream's names.
        adapter: `<layer>.lora_A.weight` [rank, in] and `<layer>.lora_B.weight` [out, rank].
        rank: the adapter's rank.
        alpha: the adapter is scaled by alpha / rank.

    Raises:
        ValueError: if the adapter was made for another model.
    """

    def merged(layer: str) -> Weight:
        weight = base[f"{layer}.weight"]
        a, b = (adapter[f"{layer}.lora_{factor}.weight"] for factor in "AB")
        read = lambda: merged_weight(weight.read(), a.read(), b.read(), alpha / rank)  # noqa: E731
        return Weight(weight.shape, weight.dtype, read)

    layers = adapted_layers(
        {key: weight.shape for key, weight in base.items()},
        {key: weight.shape for key, weight in adapter.items()},
        rank,
    )
    return {**base, **{f"{layer}.weight": merged(layer) for layer in layers}}


def adapter_scale_of(settings: Mapping[str, Any], source: Path) -> tuple[int, float]:
    """(rank, alpha) that a run's settings name; `source` is what the error names.

    Raises:
        ValueError: if they name none.
    """
    rank, alpha = settings.get("lora_rank"), settings.get("lora_alpha", 0)
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise ValueError(
            f"checkpoint {source} holds an adapter, and its settings have no lora_rank and lora_alpha: use another copy"
        )
    return rank, float(alpha or rank)


def base_named_by(settings: Mapping[str, Any]) -> Path | None:
    """The model that a run with these settings started from; None: random weights."""
    if settings.get("from_scratch"):
        return None
    named = settings.get("dit_ckpt") or settings.get("ckpt_dir")
    if named is None and settings.get("task") == EMBEDDED_TASK:
        return EMBEDDED
    return None if named is None else Path(named)


def require_base(path: Path, settings: Mapping[str, Any], base: Path | None) -> Path:
    """Where the base of the adapter in checkpoint `path` lies: `base` if given, else what its settings say.

    Raises:
        ValueError: if it is not there, with the command that helps.
    """
    remedy = f"python -m refalign_ext export {path} --base MODEL --out FOLDER"
    if base is not None and not base.exists():
        raise ValueError(f"--base {base} does not exist: name the model that {path} was trained on")
    found = base or base_named_by(settings)
    if found is None:
        raise ValueError(
            f"{path} is an adapter of random weights: name the model it belongs to with {remedy}"
        )
    if not found.exists():
        raise ValueError(
            f"{path} is an adapter of {found}, which is not here (relative paths start where the training ran): merge it "
            f"with {remedy}"
        )
    if found.resolve() == path.resolve():
        raise ValueError(f"{path} is an adapter and cannot be its own base: name another with {remedy}")
    return found


def fingerprint(files: Sequence[Path]) -> str:
    """SHA-256 of a file; of several, that of their digests in hexadecimal, in order of the names."""
    from refalign_ext.backbone import file_sha256

    digests = [file_sha256(file) for file in sorted(files, key=lambda file: file.name)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
