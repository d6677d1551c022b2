"""Low-rank adapters (LoRA, Hu et al. 2021) on a WanModel, as an alternative to training every weight.

peft puts the adapters into the model in place: the model stays a WanModel, hooks on its blocks keep working, and only
the adapted linear layers' keys change (`q.weight` becomes `q.base_layer.weight`, beside `q.lora_A.default.weight` and
`q.lora_B.default.weight`). Two sets of keys occur:

- the injected model's own state dict, as above;
- upstream's keys of the base, and of an adapter `blocks.0.self_attn.q.lora_A.weight` [rank, in] and `.lora_B.weight`
  [out, rank]; everything here that takes plain dicts of tensors means these.

An adapted layer computes W x + (alpha / rank) B A x.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

TARGETS = "q,k,v,o,ffn"
_NAME = "default"  # peft's name for the only adapter
ADAPTER_KEY = re.compile(rf"^(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.{_NAME})?\.weight$")
_PATTERN = "re:"
Stored = TypeVar("Stored")  # a tensor, or what reads one


def add_lora(
    model: nn.Module, rank: int, alpha: float, targets: str = TARGETS, *, seed: int = 0
) -> list[str]:
    """Put adapters on linear layers of `model` and freeze everything else; returns the layers' names.

    The model then computes exactly what it did before, as every B starts at zero; A is uniform within 1 / sqrt(in), as
    peft and Linear start. Call it before anything shards, compiles or checkpoints the model.

    Args:
        model: a WanModel, ours or upstream's, on any device; its weights' dtype does not matter, the adapters are
            float32.
        rank: columns of B, at least 1.
        alpha: the adapters are scaled by alpha / rank.
        targets: which layers, separated by commas: a part of the name between dots (`q`, `ffn`, `self_attn`,
            `cross_attn.v`, `blocks.3`), or `re:` and one regular expression that fits the whole name.
        seed: the adapters' start depends on it and on the layers' names alone; torch's generators are left alone.

    Raises:
        ValueError: if nothing matches (what there is gets listed), for a rank below 1 or an alpha of 0, or if the model has
            adapters.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = matching_layers(model, targets)
    if adapter_parameters(model):
        raise ValueError("this model already has LoRA adapters: start from a new one")
    if rank < 1 or not alpha > 0:
        raise ValueError(
            f"LoRA rank {rank} and alpha {alpha} do not make an adapter: use --lora_rank 16 --lora_alpha 16"
        )
    smallest = min(min(model.get_submodule(name).weight.shape) for name in names)
    if rank > smallest:
        raise ValueError(f"LoRA rank {rank} is more than the smallest layer has: give at most {smallest}")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    parameters = adapter_parameters(model)
    assert list(parameters) == [f"{name}.lora_{factor}.weight" for name in names for factor in "AB"], (
        "peft adapted other layers than it was told"
    )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.data = parameter.data.float().zero_()
            if key.endswith(".lora_A.weight"):
                digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
                generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
                uniform = torch.rand(parameter.shape, generator=generator, device="cpu")  # [rank, in]
                parameter.copy_((2 * uniform - 1) / math.sqrt(parameter.shape[1]))
    return names


def matching_layers(model: nn.Module, targets: str) -> list[str]:
    """Names of the plain linear layers that `targets` means; see `select_layers`.

    Layers that must compute in float32 whatever the precision (a subclass of Linear) are not offered.
    """
    layers = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return select_layers(layers, targets)


def select_layers(layers: list[str], targets: str) -> list[str]:
    """Those of a model's linear layers that `targets` (see `add_lora`) means, in their order, or a ValueError."""
    wanted: set[str] = set()
    entries = [targets] if targets.startswith(_PATTERN) else [entry.strip() for entry in targets.split(",")]
    for entry in entries:
        if entry.startswith(_PATTERN):
            try:
                pattern = re.compile(entry.removeprefix(_PATTERN))
            except re.error as error:
                raise ValueError(f"LoRA target {entry!r} is no regular expression: {error}") from error
            found = {name for name in layers if pattern.fullmatch(name)}
        else:
            found = {name for name in layers if entry and f".{entry}." in f".{name}."}
        if not found:
            kinds = sorted({re.sub(r"\.\d+\.", ".*.", name, count=1) for name in layers})
            raise ValueError(f"LoRA target {entry!r} matches no linear layer: there are {', '.join(kinds)}")
        wanted |= found
    return [name for name in layers if name in wanted]


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by plain key; empty without adapters."""
    return {base_key(name): value for name, value in model.named_parameters() if is_adapter_key(name)}


def adapter_scale(model: nn.Module) -> tuple[int, float]:
    """(rank, alpha) of the adapters of a model that has some."""
    config = model.peft_config[_NAME]
    return config.r, config.lora_alpha


def is_adapter_key(name: str) -> bool:
    """Whether a state-dict key, injected or plain, belongs to an adapter."""
    return ADAPTER_KEY.match(name) is not None


def base_key(name: str) -> str:
    """The plain name of a key of an injected model: upstream's for the base, `*.lora_A.weight` for an adapter."""
    match = ADAPTER_KEY.match(name)
    if match:
        return f"{match['module']}.lora_{match['factor']}.weight"
    return name.replace(".base_layer.", ".")


def split_state_dict(state: Mapping[str, Stored]) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """An injected model's state dict as (base under upstream's keys, adapter), sharing the tensors."""
    base = {base_key(name): tensor for name, tensor in state.items() if not is_adapter_key(name)}
    adapter = {base_key(name): tensor for name, tensor in state.items() if is_adapter_key(name)}
    return base, adapter


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W [out, in] + scale B [out, rank] A [rank, in] in W's dtype, computed in at least float32; W itself if B A is zero."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    change = (b.to(weight.device, dtype) @ a.to(weight.device, dtype)) * scale
    if not change.any():
        return weight  # adding zero would turn -0.0 into 0.0
    return (weight.to(dtype) + change).to(weight.dtype)


def adapted_layers(base: Mapping[str, torch.Size], adapter: Mapping[str, torch.Size], rank: int) -> list[str]:
    """The layers that an adapter changes, from the shapes of both; ValueError if it was made for another model."""
    layers = sorted(check_adapter(adapter, rank))
    left = [layer for layer in layers if f"{layer}.weight" not in base]
    if left:
        raise ValueError(
            f"the model lacks {len(left)} layers of the adapter, such as {left[0]}: use the model that it was trained on"
        )
    for layer in layers:
        (rows, _), (_, columns) = (adapter[f"{layer}.lora_{factor}.weight"] for factor in "BA")
        if tuple(base[f"{layer}.weight"]) != (rows, columns):
            raise ValueError(
                f"the adapter of {layer} is for a layer of {[rows, columns]} and this one has "
                f"{list(base[f'{layer}.weight'])}: use the model that the adapter was trained on"
            )
    return layers


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Shapes of tensors, or of what stands for them, by name."""
    return {key: tensor.shape for key, tensor in tensors.items()}


def check_adapter(shapes: Mapping[str, torch.Size], rank: int) -> set[str]:
    """The adapted layers, from the shapes of an adapter's tensors; ValueError if it is none of this rank or incomplete."""
    factors: dict[str, set[str]] = {}
    for key, shape in shapes.items():
        match = ADAPTER_KEY.match(key)
        if match is None or len(shape) != 2:
            raise ValueError(f"{key} is no LoRA tensor of a linear layer: use an adapter made for a WanModel")
        factor = match["factor"]
        if shape[0 if factor == "A" else 1] != rank:
            raise ValueError(
                f"{key} has shape {list(shape)}, which is not of rank {rank}: the adapter is damaged"
            )
        factors.setdefault(match["module"], set()).add(factor)
    lone = sorted(layer for layer, found in factors.items() if len(found) < 2)
    if lone or not factors:
        what = f"lacks a factor of {lone[0]}" if lone else "is empty"
        raise ValueError(f"the LoRA adapter {what}: it is damaged, use another copy")
    return set(factors)
