"""LoRA adapters in files: peft's folder, and the one file that diffusers loads.

peft's keys are those of an adapter (see `refalign_ext.lora`) behind `base_model.model.`; diffusers has its own names of the
layers, and no alpha.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from refalign_ext.atomic_io import atomic_open, atomic_path
from refalign_ext.lora import (
    ADAPTER_KEY,
    base_key,
    check_adapter,
    shapes_of,
)

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PEFT_PREFIX = "base_model.model."
# What peft can do and this project's checkpoints and merging do not.
_UNSUPPORTED = {
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
}
_UNSUPPORTED_WHEN_SET = ("modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters")
_TO_DIFFUSERS = (
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.([qkv])$", r".to_\1"),
    (r"\.o$", ".to_out.0"),
    (r"\.ffn\.0$", ".ffn.net.0.proj"),
    (r"\.ffn\.2$", ".ffn.net.2"),
    (r"^text_embedding\.0$", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2$", "condition_embedder.text_embedder.linear_2"),
)


@dataclass(frozen=True)
class Adapter:
    """An adapter without its model: float tensors `<module>.lora_A.weight` and `.lora_B.weight`, and its scale."""

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    base: str | None = None
    """What the adapter was trained on, as its file says."""
    base_sha256: str | None = None
    """Fingerprint of it, for a file's metadata; reading leaves it out."""


def write_adapter(folder: Path, adapter: Adapter) -> Path:
    """Write an adapter in peft's format (`PeftModel.from_pretrained(wan_model, folder)` takes it); returns the folder.

    The configuration is written last: a folder that has it is complete.

    Raises:
        ValueError: if the tensors are no adapter of this rank.
        OSError: if the folder cannot be written.
    """
    from peft import LoraConfig

    layers = check_adapter(shapes_of(adapter.tensors), adapter.rank)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=sorted(layers),
        base_model_name_or_path=adapter.base,
        inference_mode=True,
    ).to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    tensors = {_PEFT_PREFIX + key: tensor for key, tensor in adapter.tensors.items()}
    _save(folder / ADAPTER_FILE, tensors, base_note(adapter.base, adapter.base_sha256))
    with atomic_open(folder / CONFIG_FILE) as file:
        file.write((json.dumps(plain, indent=2, sort_keys=True) + "\n").encode("utf-8"))
    return folder


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter in peft's format.

    Raises:
        ValueError: if a file is missing, damaged, or uses a kind of LoRA that is not supported here.
    """
    from refalign_ext.backbone import read_state_dict

    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is no LoRA adapter (its {CONFIG_FILE} is missing or damaged): name a folder that `export` "
            "or peft wrote"
        ) from error
    unusual = [name for name, usual in _UNSUPPORTED.items() if config.get(name, usual) != usual]
    unusual += [name for name in _UNSUPPORTED_WHEN_SET if config.get(name)]
    if kind != "LORA" or unusual:
        what = f"uses {unusual[0]}" if kind == "LORA" else f"is of type {kind}"
        raise ValueError(f"the adapter in {folder} {what}: only plain LoRA is supported")
    tensors = {
        base_key(key.removeprefix(_PEFT_PREFIX)): tensor
        for key, tensor in read_state_dict(folder / ADAPTER_FILE).items()
    }
    check_adapter(shapes_of(tensors), rank)
    return Adapter(tensors, rank, alpha, base)


def diffusers_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter as diffusers' WanTransformer3DModel.load_lora_adapter takes it (prefix `transformer`).

    The scale is worked into B, as those files have no alpha.

    Raises:
        ValueError: if a layer has no counterpart in diffusers.
    """
    tensors: dict[str, Tensor] = {}
    for key, tensor in adapter.tensors.items():
        match = ADAPTER_KEY.match(key)
        layer = match["module"]
        for pattern, replacement in _TO_DIFFUSERS:
            layer = re.sub(pattern, replacement, layer)
        if layer == match["module"]:
            raise ValueError(
                f"diffusers has no counterpart of the adapter's layer {layer}: merge the adapter instead"
            )
        value = tensor * (adapter.alpha / adapter.rank) if match["factor"] == "B" else tensor
        tensors[f"transformer.{layer}.lora_{match['factor']}.weight"] = value
    return tensors


def save_diffusers_adapter(folder: Path, adapter: Adapter) -> Path:
    """Write `pytorch_lora_weights.safetensors` into `folder`; returns the file.

    In diffusers: `transformer.load_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors")`.

    Raises:
        ValueError: if a layer has no counterpart in diffusers.
        OSError: if the folder cannot be written.
    """
    tensors = diffusers_tensors(adapter)
    path = Path(folder) / DIFFUSERS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(path, tensors, base_note(adapter.base, adapter.base_sha256))
    return path


def base_note(base: str | None, sha256: str | None) -> dict[str, str]:
    """What a safetensors file's metadata says of the model that an adapter was trained on."""
    note = {"base_model": base, "base_model_sha256": sha256}
    return {name: value for name, value in note.items() if value is not None}


def _save(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain: dict[str, Any] = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
    try:
        with atomic_path(path) as aside:
            save_file(plain, aside, metadata={"format": "pt", **note})
            aside.chmod(path.parent.stat().st_mode & 0o666)  # the library keeps files from everyone else
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}): free some space") from error
