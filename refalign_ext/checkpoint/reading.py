"""Reading any DiT: a training checkpoint, by one process without a process group, or a published layout.

`open_*` reads one tensor at a time, when it is asked for. An adapter is merged into the model that it was trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from refalign_ext.backbone import DiTCheckpoint, checkpoint_files, read_dit_checkpoint
from refalign_ext.checkpoint.adapters import (
    Adapter,
    adapter_scale_of,
    base_named_by,
    files_sha256,
    loras_of,
    require_base,
)
from refalign_ext.checkpoint.checkpointer import checkpoints_in, is_checkpoint, read_meta, read_model_config
from refalign_ext.checkpoint.lora_files import LoRAFile, lora_path, read_lora, with_loras
from refalign_ext.checkpoint.state import AVERAGE, DIT, MODEL, PROJECTORS
from refalign_ext.checkpoint.stored_tensors import StoredTensors
from refalign_ext.checkpoint.weights import Weight, read_weights
from refalign_ext.lora import adapted_layers, merged_weight, shapes_of, split_state_dict
from refalign_ext.request import parse_lora

logger = logging.getLogger(__name__)
_LISTED_KEYS = 5


@dataclass(frozen=True)
class StoredDiT:
    """A DiT in files."""

    path: Path  # what was named
    weights: dict[str, Weight]  # by upstream's names; with an adapter, merged when they are read
    files: list[Path]  # those that hold them
    config: dict[str, Any] | None  # `WanModel` arguments stated beside the weights
    projectors: dict[str, Weight] = field(default_factory=dict)  # blocks.{i}.input_mlp.proj.{0,2}.weight
    base: StoredDiT | None = None  # the model that an adapter was merged into


def read_any_dit(path: Path, *, extra: Collection[str] = (), loras: Sequence[str] = ()) -> DiTCheckpoint:
    """A DiT from a training checkpoint (see `open_dit`) or from any published layout (see `wan.utils.dit_checkpoint`).

    Args:
        loras: LoRAs to merge into it, each FILE or FILE:SCALE; see `add_loras`.
    """
    path = newest_of_run(path)
    if not loras and not is_checkpoint(path):
        return read_dit_checkpoint(path)
    found = add_loras(_open_any_dit(path, extra), loras)
    files = [*found.files, *(found.base.files if found.base else ())]
    return DiTCheckpoint(read_weights(found.weights), read_weights(found.projectors), found.config, files)


def add_loras(dit: StoredDiT, loras: Sequence[str]) -> StoredDiT:
    """A DiT with LoRAs merged into its weights when they are read.

    Args:
        loras: each FILE or FILE:SCALE; a file or folder of any tool (see `lora_files`), or a step-* folder of a run that
            trained an adapter.

    Raises:
        ValueError: if one of them cannot be read or is of a model of another size. What a file has for layers that the
            model lacks is left out with a warning, and so is one that was trained on another model.
    """
    shapes = shapes_of(dit.weights)
    opened, files = [], list(dit.files)
    for path, strength in map(parse_lora, loras):
        lora = _trained_lora(path) if is_checkpoint(path) else read_lora(path, shapes)
        files += lora_files_of(path)
        if lora.unknown:
            listed = ", ".join(lora.unknown[:_LISTED_KEYS])
            logger.warning(
                "%s: this model has no layer for %d of its tensors: %s", path, len(lora.unknown), listed
            )
        if lora.base_sha256 not in (None, files_sha256(dit.files) if lora.base_sha256 else None):
            logger.warning(
                "%s was trained on %s, which is not %s", path, lora.base or "another model", dit.path
            )
        opened.append((lora, strength))
    return replace(dit, weights=with_loras(dit.weights, opened), files=files)


def lora_files_of(path: Path) -> list[Path]:
    """The files that hold a LoRA."""
    return dit_files(path) if is_checkpoint(path) else [lora_path(path)]


def _trained_lora(path: Path) -> LoRAFile:
    adapter = read_trained_adapter(path)
    layers = {key.removesuffix(".lora_A.weight") for key in adapter.tensors if key.endswith(".lora_A.weight")}
    scale = adapter.alpha / adapter.rank
    factors = {
        layer: (adapter.tensors[f"{layer}.lora_A.weight"], adapter.tensors[f"{layer}.lora_B.weight"], scale)
        for layer in layers
    }
    return LoRAFile(path, factors, base=adapter.base, base_sha256=adapter.base_sha256)


def newest_of_run(path: Path) -> Path:
    """The newest step-* folder where a path means a run, its `checkpoints` or `latest` in there; else the path itself."""
    for folder in (path / "checkpoints", path, path.parent if path.name == "latest" else path):
        if folder.is_dir() and (found := checkpoints_in(folder)):
            return found[-1]
    return path


def dit_files(path: Path) -> list[Path]:
    """The files that hold a DiT's tensors; empty where nothing readable is."""
    path = newest_of_run(path)
    return sorted(path.glob("*.distcp")) if is_checkpoint(path) else checkpoint_files(path)


def open_dit(
    path: Path, *, raw: bool = False, base: Path | None = None, extra: Collection[str] = ()
) -> StoredDiT:
    """A training checkpoint's DiT: the moving average if there is one, else what was trained.

    Args:
        raw: what was trained, even if there is an average.
        base: the model that the checkpoint's adapter belongs to (a training checkpoint or any published layout), if it
            is not where the settings say.
        extra: extra modules that the caller loads too (see `read_extra_module`): without them the DiT is another model.

    Raises:
        ValueError: if the checkpoint is damaged or holds no DiT, if the base of its adapter is not there, for a base
            without an adapter, or for a DiT whose extra module would be ignored.
    """
    stored = StoredTensors(path)
    ignored = {key.split(".")[1] for key in stored.names(f"{MODEL}.")} - {"dit", "projectors", *extra}
    if ignored:
        name = min(ignored)
        raise ValueError(
            f"{path} was trained with --{name} and is another model without it: only `sprites judge` and "
            f"train_refalign.py --{name} true use such a checkpoint"
        )
    weights, under = _stored_dit(stored, raw=raw), None
    _, adapter = split_state_dict(weights)
    if adapter:
        settings = read_meta(path)["settings"]
        scale = adapter_scale_of(settings, path)
        under = add_loras(_open_any_dit(require_base(path, settings, base)), loras_of(settings))
        weights = merge_adapter(under.weights, adapter, *scale)
    elif base is not None:
        raise ValueError(f"{path} holds a whole DiT, no adapter: leave --base out")
    projectors = stored.weights(f"{MODEL}.{PROJECTORS}")
    return StoredDiT(path, weights, dit_files(path), read_model_config(path), projectors, under)


def read_trained_adapter(path: Path, *, raw: bool = False, base: Path | None = None) -> Adapter:
    """The adapter that a LoRA run trained, on the CPU; arguments as in `open_dit`, but its base need not be there."""
    tensors = read_weights(split_state_dict(_stored_dit(StoredTensors(path), raw=raw))[1])
    if not tensors:
        raise ValueError(f"{path} holds a whole DiT, no adapter: export it without --adapter")
    settings = read_meta(path)["settings"]
    rank, alpha = adapter_scale_of(settings, path)
    under = base_named_by(settings) if base is None else require_base(path, settings, base)
    if under is None:
        return Adapter(tensors, rank, alpha)
    files = dit_files(under)
    return Adapter(tensors, rank, alpha, str(under), files_sha256(files) if files else None)


def read_extra_module(path: Path, name: str) -> dict[str, Tensor]:
    """The weights of an extra module by its own names on the CPU, averaged ones first; empty where there are none."""
    if not is_checkpoint(path):
        return {}
    stored = StoredTensors(path)
    return read_weights(stored.weights(f"{AVERAGE}.{name}.") or stored.weights(f"{MODEL}.{name}."))


def _stored_dit(stored: StoredTensors, *, raw: bool) -> dict[str, Weight]:
    """The DiT's tensors by its own names; see `open_dit`."""
    # Of extra modules the average has the names that they have in the model.
    average = {} if raw else stored.weights(f"{AVERAGE}.")
    average = {name: weight for name, weight in average.items() if f"{MODEL}.{name}" not in stored.tensors}
    found = average or stored.weights(f"{MODEL}.{DIT}")
    if not found:
        raise ValueError(f"checkpoint {stored.path} holds no DiT: name a step-* folder of train_refalign.py")
    return found


def _open_any_dit(path: Path, extra: Collection[str] = ()) -> StoredDiT:
    path = newest_of_run(path)
    if is_checkpoint(path):
        return open_dit(path, extra=extra)
    found = read_dit_checkpoint(path)  # memory-mapped
    weights, projectors = (
        {name: Weight.of(tensor) for name, tensor in tensors.items()}
        for tensors in (found.state_dict, found.projectors)
    )
    return StoredDiT(path, weights, found.files, found.config, projectors)


def merge_adapter(
    base: Mapping[str, Weight], adapter: Mapping[str, Weight], rank: int, alpha: float
) -> dict[str, Weight]:
    """The base's weights, those of adapted layers merged when they are read; ValueError if the adapter does not fit."""

    def merged(layer: str) -> Weight:
        weight = base[f"{layer}.weight"]
        a, b = (adapter[f"{layer}.lora_{factor}.weight"] for factor in "AB")
        read = lambda: merged_weight(weight.read(), a.read(), b.read(), alpha / rank)  # noqa: E731
        return Weight(weight.shape, weight.dtype, read)

    layers = adapted_layers(shapes_of(base), shapes_of(adapter), rank)
    return {**base, **{f"{layer}.weight": merged(layer) for layer in layers}}
