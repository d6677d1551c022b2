"""LoRA adapters outside a checkpoint: the model that they belong to, and their files for peft and diffusers.

peft's keys are those of an adapter (see `refalign_ext.lora`) behind `base_model.model.`; diffusers has its own names of the
layers, and no alpha.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from refalign_ext.backbone import diffusers_key, file_sha256
from refalign_ext.checkpoint.weights import Weight, write_safetensors
from refalign_ext.lora import ADAPTER_KEY, check_adapter, shapes_of
from refalign_ext.tasks import TASKS


@dataclass(frozen=True)
class Adapter:
    """An adapter without its model: float tensors `<module>.lora_A.weight` and `.lora_B.weight`, and its scale."""

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    base: str | None = None  # the model that it was trained on, as the run's settings name it
    base_sha256: str | None = None  # of its files, see `files_sha256`; None where they are not at hand


def adapter_scale_of(settings: Mapping[str, Any], source: Path) -> tuple[int, float]:
    """(rank, alpha) that the settings of the run behind `source` name; ValueError if they name none."""
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
    task = TASKS.get(settings.get("task", ""))
    named = settings.get("dit_ckpt") or settings.get("ckpt_dir") or (task and task.bundled)
    return None if named is None else Path(named)


def require_base(path: Path, settings: Mapping[str, Any], base: Path | None) -> Path:
    """The base of the adapter in checkpoint `path`: `base`, else what its settings say; ValueError if it is not there."""
    found = base or base_named_by(settings)
    if base is not None and not base.exists():
        problem = f"--base {base} does not exist"
    elif found is None:
        problem = f"{path} is an adapter of random weights"
    elif not found.exists():
        problem = f"{path} is an adapter of {found}, which is not here (relative paths start where the training ran)"
    elif found.resolve() == path.resolve():
        problem = f"{path} is an adapter and cannot be its own base"
    else:
        return found
    raise ValueError(
        f"{problem}: name the model with python -m refalign_ext export {path} --base MODEL --out FOLDER"
    )


def files_sha256(files: Sequence[Path]) -> str:
    """SHA-256 of a file; of several, that of their digests in hexadecimal, in order of the names."""
    digests = [file_sha256(file) for file in sorted(files, key=lambda file: file.name)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def write_peft_adapter(folder: Path, adapter: Adapter) -> Path:
    """Write an adapter as `PeftModel.from_pretrained(wan_model, folder)` takes it; returns the file with the tensors.

    Raises:
        ValueError: if the tensors are no adapter of this rank.
        OSError: if the folder cannot be written.
    """
    from peft import LoraConfig

    layers = check_adapter(shapes_of(adapter.tensors), adapter.rank)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=sorted(layers),
        base_model_name_or_path=adapter.base,
        inference_mode=True,
    ).to_dict()
    listed = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    text = json.dumps(listed, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    tensors = {f"base_model.model.{key}": tensor for key, tensor in adapter.tensors.items()}
    return _write(folder / "adapter_model.safetensors", tensors, adapter)


def write_diffusers_adapter(folder: Path, adapter: Adapter) -> Path:
    """Write an adapter as `WanTransformer3DModel.load_lora_adapter(folder, weight_name=...)` takes it; returns the file.

    The scale is worked into B, as those files have no alpha.

    Raises:
        ValueError: if a layer has no counterpart in diffusers.
        OSError: if the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for key, tensor in adapter.tensors.items():
        match = ADAPTER_KEY.match(key)
        layer = diffusers_key(f"{match['module']}.weight").removesuffix(".weight")
        if layer == match["module"]:
            raise ValueError(
                f"diffusers has no counterpart of the adapter's layer {layer}: merge the adapter instead"
            )
        value = tensor * (adapter.alpha / adapter.rank) if match["factor"] == "B" else tensor
        tensors[f"transformer.{layer}.lora_{match['factor']}.weight"] = value
    return _write(folder / "pytorch_lora_weights.safetensors", tensors, adapter)


def base_note(base: str | None, sha256: str | None) -> dict[str, str]:
    """What a safetensors file's metadata says of the model that an adapter was trained on."""
    note = {"base_model": base, "base_model_sha256": sha256}
    return {name: value for name, value in note.items() if value is not None}


def _write(path: Path, tensors: Mapping[str, Tensor], adapter: Adapter) -> Path:
    weights = {key: Weight.of(tensor) for key, tensor in tensors.items()}
    write_safetensors(path, weights, base_note(adapter.base, adapter.base_sha256))
    return path
