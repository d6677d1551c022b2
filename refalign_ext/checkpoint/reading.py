"""A DiT, its projectors or its adapter out of a training checkpoint: whole tensors on the CPU, without a process group.

`read_*` reads everything, `open_*` one tensor at a time. Adapters are merged into the model that they were trained on.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from refalign_ext.checkpoint.adapters import Adapter
from refalign_ext.checkpoint.checkpointer import is_checkpoint, read_meta, read_model_config
from refalign_ext.checkpoint.lazy_tensors import (
    StoredDiT,
    Weight,
    adapter_scale_of,
    base_named_by,
    fingerprint,
    merged_weights,
    require_base,
    weight_of,
)
from refalign_ext.checkpoint.state import AVERAGE, DIT, MODEL, PROJECTORS
from refalign_ext.checkpoint.stored_tensors import StoredTensors
from refalign_ext.lora import base_key, is_adapter_key

if TYPE_CHECKING:
    from refalign_ext.backbone import DiTCheckpoint


def read_dit(path: Path, *, raw: bool = False) -> dict[str, Tensor]:
    """The DiT's weights by upstream's names on the CPU: the moving average if there is one, else what was trained.

    Adapters are merged into the model that they were trained on. Needs no process group.

    Args:
        path: the checkpoint's folder.
        raw: what was trained, even if there is an average.

    Raises:
        ValueError: if the checkpoint is damaged or holds no DiT, or the base of its adapter is not there.
    """
    return {name: weight.read() for name, weight in open_dit(path, raw=raw).weights.items()}


def open_dit(
    path: Path, *, raw: bool = False, base: Path | None = None, extra: Collection[str] = ()
) -> StoredDiT:
    """What `read_dit` reads, one tensor at a time.

    Args:
        path: the checkpoint's folder.
        raw: what was trained, even if there is an average.
        base: the model that the checkpoint's adapter belongs to (a training checkpoint or any published layout), if it
            is not where the settings say.
        extra: extra modules that the caller loads too (see `read_extra_module`): without them the DiT is another model.

    Raises:
        ValueError: as in `read_dit`, for a base without an adapter, or for a DiT whose extra module would be ignored.
    """
    stored = StoredTensors(path)
    ignored = {key.split(".")[1] for key in stored.names(f"{MODEL}.")} - {"dit", "projectors", *extra}
    if ignored:
        name = min(ignored)
        raise ValueError(
            f"{path} was trained with --{name} and is another model without it: only `sprites judge` and "
            f"train_refalign.py --{name} true use such a checkpoint"
        )
    weights = {name: _weight(stored, key) for name, key in dit_keys(stored, raw=raw).items()}
    files = _tensor_files(path)
    if not any(map(is_adapter_key, weights)):
        if base is not None:
            raise ValueError(f"{path} holds a whole DiT, no adapter: leave --base out")
        return StoredDiT(path, weights, files)
    settings = read_meta(path)["settings"]
    rank, alpha = adapter_scale_of(settings, path)
    under = _open_any_dit(require_base(path, settings, base))
    adapter = {base_key(name): weight for name, weight in weights.items() if is_adapter_key(name)}
    return StoredDiT(path, merged_weights(under.weights, adapter, rank=rank, alpha=alpha), files, under)


def read_any_dit(path: Path, *, extra: Collection[str] = ()) -> DiTCheckpoint:
    """A DiT from a training checkpoint or from any published layout (see `wan.utils.dit_checkpoint`).

    Raises:
        ValueError: if nothing readable is there, or the base of an adapter is not, or as `open_dit`.
    """
    from refalign_ext.backbone import DiTCheckpoint, read_dit_checkpoint

    if not is_checkpoint(path):
        return read_dit_checkpoint(path)
    found = open_dit(path, extra=extra)
    tensors = {name: weight.read() for name, weight in found.weights.items()}
    files = [*found.files, *(found.base.files if found.base else ())]
    return DiTCheckpoint(tensors, read_projectors(path), read_model_config(path), files)


def read_trained_adapter(path: Path, *, raw: bool = False, base: Path | None = None) -> Adapter:
    """The adapter that a LoRA run trained, on the CPU; its base need not be there.

    Args:
        path: the checkpoint's folder.
        raw: what was trained, even if there is an average.
        base: what the adapter belongs to, if it is not where the settings say.

    Raises:
        ValueError: if the checkpoint is damaged or holds no adapter, or `base` does not exist.
    """
    from refalign_ext.backbone import checkpoint_files

    stored = StoredTensors(path)
    keys = {base_key(name): key for name, key in dit_keys(stored, raw=raw).items() if is_adapter_key(name)}
    if not keys:
        raise ValueError(f"{path} holds a whole DiT, no adapter: export it without --adapter")
    settings = read_meta(path)["settings"]
    rank, alpha = adapter_scale_of(settings, path)
    under = base_named_by(settings) if base is None else require_base(path, settings, base)
    digest = None
    if under is not None and under.exists():
        files = _tensor_files(under) if is_checkpoint(under) else checkpoint_files(under)
        digest = fingerprint(files) if files else None
    tensors = {name: stored.read(key) for name, key in keys.items()}
    return Adapter(tensors, rank, alpha, None if under is None else str(under), digest)


def read_projectors(path: Path) -> dict[str, Tensor]:
    """The projectors' weights `blocks.{i}.input_mlp.proj.{0,2}.weight` on the CPU; empty without projectors.

    Raises:
        ValueError: if the checkpoint is damaged.
    """
    return {name: weight.read() for name, weight in open_projectors(path).items()}


def read_extra_module(path: Path, name: str) -> dict[str, Tensor]:
    """The weights of an extra module by its own names on the CPU, their moving average if there is one.

    Empty for a checkpoint without it and for any other layout.

    Raises:
        ValueError: if the checkpoint is damaged.
    """
    if not is_checkpoint(path):
        return {}
    stored = StoredTensors(path)
    for prefix in (f"{AVERAGE}.{name}.", f"{MODEL}.{name}."):
        if found := stored.names(prefix):
            return {key.removeprefix(prefix): stored.read(key) for key in found}
    return {}


def open_projectors(path: Path) -> dict[str, Weight]:
    """What `read_projectors` reads, one tensor at a time."""
    stored = StoredTensors(path)
    return {name: _weight(stored, key) for name, key in projector_keys(stored).items()}


def dit_keys(stored: StoredTensors, *, raw: bool = False) -> dict[str, str]:
    """The DiT's own names of its tensors -> their names in the checkpoint; see `read_dit`."""
    average = {key.removeprefix(f"{AVERAGE}.").removeprefix(DIT): key for key in stored.names(f"{AVERAGE}.")}
    average = {name: key for name, key in average.items() if f"{MODEL}.{name}" not in stored.tensors}
    prefix = f"{MODEL}.{DIT}"
    found = {} if raw else average
    found = found or {key.removeprefix(prefix): key for key in stored.names(prefix)}
    if not found:
        raise ValueError(f"checkpoint {stored.path} holds no DiT: name a step-* folder of train_refalign.py")
    return found


def projector_keys(stored: StoredTensors) -> dict[str, str]:
    """The release's names of the projectors' tensors -> their names in the checkpoint."""
    prefix = f"{MODEL}.{PROJECTORS}"
    return {key.removeprefix(prefix): key for key in stored.names(prefix)}


def _open_any_dit(path: Path) -> StoredDiT:
    from refalign_ext.backbone import read_dit_checkpoint

    if is_checkpoint(path):
        return open_dit(path)
    found = read_dit_checkpoint(path)
    return StoredDiT(
        path, {name: weight_of(tensor) for name, tensor in found.state_dict.items()}, found.files
    )


def _weight(stored: StoredTensors, key: str) -> Weight:
    return Weight(stored.shape(key), stored.dtype(key), lambda: stored.read(key))


def _tensor_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.distcp"))
