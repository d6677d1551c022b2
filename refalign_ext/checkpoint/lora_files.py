"""LoRA files of any tool, read as changes of a WanModel's weights.

Tools name the same layer differently: `blocks.0.self_attn.q` (upstream, peft, DiffSynth, ComfyUI, LightX2V),
`blocks.0.attn1.to_q` (diffusers), `blocks_0_self_attn_q` (musubi-tuner, sd-scripts), behind various prefixes. With dots
written as underscores and without the prefix, each has one of two names, which are looked up among the model's layers.

A file may hold, of a layer: low-rank factors with an alpha, whole differences of its weight (`diff`) and of its bias
(`diff_b`). Without an alpha the factors' product is taken as it is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from refalign_ext.backbone import diffusers_key, read_metadata, read_state_dict
from refalign_ext.checkpoint.weights import Weight

_PREFIXES = (
    *("base_model.model.", "diffusion_model.", "transformer.", "pipe.", "dit.", "unet.", "model.", "module."),
    *("lora_unet_", "lora_transformer_", "lora_dit_"),
)
_FACTOR = re.compile(r"\.lora[._](?P<factor>A|B|down|up)(?:\.[^.]+)?\.weight$")
_OTHER = re.compile(r"\.(?P<part>alpha|diff|diff_b|lora_B(?:\.[^.]+)?\.bias)$")
_FOREIGN = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    "oft_blocks": "OFT",
}
_FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_LISTED = 5


@dataclass(frozen=True)
class LoRAFile:
    """What a LoRA file adds to a model.

    Attributes:
        path: the file.
        factors: (A [rank, in], B [out, rank], scale) by layer; the layer's weight gains scale * B A.
        differences: tensors to add, by the parameter's name.
        unknown: keys in the file that belong to no layer of the model.
        base, base_sha256: the model that it was trained on, if the file says so.
    """

    path: Path
    factors: dict[str, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    differences: dict[str, Tensor] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    base: str | None = None
    base_sha256: str | None = None


def lora_path(path: Path) -> Path:
    """The file that a path to a LoRA means: itself, or the one in a folder; ValueError if that is unclear."""
    if not path.is_dir():
        return path
    files = [path / name for name in _FOLDER_FILES if (path / name).is_file()] or sorted(
        path.glob("*.safetensors")
    )
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:_LISTED]) or "none"
        raise ValueError(
            f"--lora {path}: a folder with one LoRA file is needed, found {names}: name the file"
        )
    return files[0]


def read_lora(path: Path, parameters: Mapping[str, Sequence[int]]) -> LoRAFile:
    """Reads a LoRA file for a model.

    Args:
        path: a safetensors or PyTorch file, or a folder that peft or diffusers wrote.
        parameters: shapes of the model's parameters by upstream's names.

    Raises:
        ValueError: if it is no LoRA file, is damaged, is of a kind that is not read, or fits no layer of the model.
    """
    file = lora_path(path)
    layers = _layers_by_flat_name(parameters)
    alphas, note = _Alphas.beside(file), read_metadata(file)
    found = LoRAFile(file, base=note.get("base_model"), base_sha256=note.get("base_model_sha256"))
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_state_dict(file).items():
        kind = _FOREIGN.get(key.removesuffix(".weight").rpartition(".")[2])
        if kind is not None:
            raise ValueError(
                f"{file}: {kind} weights, which are not read: use a LoRA, or merge them into a model"
            )
        match = _FACTOR.search(key) or _OTHER.search(key)
        layer = match and layers.get(_flat(key[: match.start()]))
        if not layer:
            found.unknown.append(key)
            continue
        groups = match.groupdict()
        part = {"down": "A", "up": "B"}.get(groups.get("factor", ""), groups.get("factor") or groups["part"])
        parts.setdefault(layer, {})["diff_b" if part.endswith("bias") else part] = tensor
        if part in ("A", "B"):
            alphas.names[layer] = key[: match.start()]
    if not parts:
        listed = ", ".join(found.unknown[:_LISTED])
        raise ValueError(
            f"{file}: no LoRA of this model: none of its layers is named by {listed}; use one made for it"
        )
    for layer, tensors in parts.items():
        _add_layer(found, layer, tensors, alphas, parameters)
    return found


def with_loras(weights: Mapping[str, Weight], loras: Sequence[tuple[LoRAFile, float]]) -> dict[str, Weight]:
    """A model's weights with LoRAs worked in, each times its scale: summed in float32, rounded to the weight's dtype once.

    They are computed when they are read.
    """
    touched = dict.fromkeys(
        name
        for lora, _ in loras
        for name in (*(f"{layer}.weight" for layer in lora.factors), *lora.differences)
    )
    return {**weights, **{name: _changed(name, weights[name], loras) for name in touched}}


def _changed(name: str, weight: Weight, loras: Sequence[tuple[LoRAFile, float]]) -> Weight:
    def read() -> Tensor:
        value = weight.read()
        total = value.float()
        layer = name.removesuffix(".weight")
        for lora, strength in loras:
            if name != layer and layer in lora.factors:
                a, b, scale = lora.factors[layer]
                product = b.float().flatten(1) @ a.float().flatten(
                    1
                )  # [out, in], a convolution's kernel flattened
                total = total + strength * scale * product.view(total.shape)
            if name in lora.differences:
                total = total + strength * lora.differences[name].float()
        return total.to(value.dtype)

    return Weight(weight.shape, weight.dtype, read)


def _add_layer(
    found: LoRAFile,
    layer: str,
    parts: Mapping[str, Tensor],
    alphas: _Alphas,
    parameters: Mapping[str, Sequence[int]],
) -> None:
    """Checks and keeps what a file has of one layer."""
    weight = f"{layer}.weight"
    if ("A" in parts) != ("B" in parts):
        raise ValueError(f"{found.path}: it lacks a factor of {layer}: it is damaged, download it again")
    if "A" in parts:
        a, b = parts["A"], parts["B"]
        rank = len(a)
        if b.shape[1] != rank or (len(b), a[0].numel()) != _rows_and_columns(parameters[weight]):
            raise ValueError(
                f"{found.path}: its factors {list(b.shape)} x {list(a.shape)} of {layer} do not make the "
                f"{list(parameters[weight])} of this model: use a LoRA made for a model of this size"
            )
        stated = float(parts["alpha"]) if "alpha" in parts else None
        found.factors[layer] = (a, b, alphas.scale(layer, rank, stated))
    for part, name in (("diff", weight), ("diff_b", f"{layer}.bias")):
        if part not in parts:
            continue
        shape = parameters.get(name)
        if shape is None or math.prod(shape) != parts[part].numel():
            raise ValueError(
                f"{found.path}: its difference of {name} is {list(parts[part].shape)} and the model has "
                f"{None if shape is None else list(shape)}: use a LoRA made for a model of this size"
            )
        found.differences[name] = parts[part].view(*shape)


def _rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _flat(layer: str) -> str:
    """A layer's name without a tool's prefixes and with underscores for dots."""
    while prefix := next((prefix for prefix in _PREFIXES if layer.startswith(prefix)), None):
        layer = layer.removeprefix(prefix)
    return layer.replace(".", "_")


def _layers_by_flat_name(parameters: Collection[str]) -> dict[str, str]:
    """The model's layers by upstream's and by diffusers' names, with underscores for dots."""
    found = {}
    for name in parameters:
        layer = name.removesuffix(".weight").removesuffix(".bias")
        for alias in (layer, diffusers_key(f"{layer}.weight").removesuffix(".weight")):
            found[alias.replace(".", "_")] = layer
    return found


@dataclass
class _Alphas:
    """Scales of layers, from a file's own alphas or from peft's settings beside or inside the file."""

    settings: Mapping[str, Any]
    names: dict[str, str] = field(default_factory=dict)  # the file's name of each layer

    @classmethod
    def beside(cls, file: Path) -> _Alphas:
        config = file.parent / "adapter_config.json"
        if file.name == "adapter_model.safetensors" and config.is_file():
            text = config.read_text(encoding="utf-8")
        else:
            text = read_metadata(file).get("lora_adapter_metadata", "{}")
        try:
            settings = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{config if config.is_file() else file}: no JSON object of a LoRA's settings"
            ) from error
        if settings.get("use_dora"):
            raise ValueError(
                f"{file}: DoRA weights, which are not read: use a LoRA, or merge them into a model"
            )
        return cls(settings)

    def scale(self, layer: str, rank: int, stated: float | None) -> float:
        """What B A is multiplied with."""
        alpha = stated
        if alpha is None:
            alpha = self.settings.get("lora_alpha", rank)
            for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", self.names[layer]):
                    alpha = value
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)
