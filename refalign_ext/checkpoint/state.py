"""What a training checkpoint holds: everything that training changes, by name, and how it gets back into a run.

Names start with the part: `model.dit.*`, `model.projectors.*` and `model.<extra module>.*`, `optimizers.<class>.*`, and
`average.*` for the moving average of the DiT by its own names and of `<extra module>.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from refalign_ext.checkpoint.stored_tensors import StoredTensors
from refalign_ext.distributed.mesh import failure_on_any_rank

MODEL, OPTIMIZERS, AVERAGE = "model", "optimizers", "average"
DIT, PROJECTORS = "dit.", "projectors."
_COUNT = "parameter_count"


def build_state(
    trained: nn.Module,
    optimizers: list[Optimizer],
    average: Mapping[str, Tensor] | None,
    *,
    trainable_only: bool = False,
) -> dict[str, dict[str, Tensor]]:
    """Everything that training changes, by name, sharded as it is; nothing is copied or gathered.

    Optimizer states go by the names of their parameters, so they can be read on any number of ranks. Learning rates and
    the like are not state: they are the run's settings. The state of a parameter that never had a gradient is absent,
    as in the optimizer itself (torch's own `get_optimizer_state_dict` would take a step to make one up).

    Args:
        trained: the container of `dit`, `projectors` and extra modules.
        optimizers: over its parameters, of different classes, whose names become part of the names.
        trainable_only: leave out what does not require gradients (the base model of an adapter).

    Returns:
        {"model": ..., "optimizers": ..., "average": ...}, names to tensors; parts that are empty are left out.
    """
    tensors = _named_tensors(trained)
    names = {id(tensor): name for name, tensor in tensors.items()}
    states: dict[str, Tensor] = {}
    for optimizer in optimizers:
        kind, parameters = type(optimizer).__name__, _parameters(optimizer)
        states[f"{kind}.{_COUNT}"] = torch.tensor(len(parameters))
        for parameter in parameters:
            for entry, value in optimizer.state.get(parameter, {}).items():
                states[f"{kind}.{names[id(parameter)]}.{entry}"] = value
    model = {name: t.detach() for name, t in tensors.items() if t.requires_grad or not trainable_only}
    parts = {MODEL: model, OPTIMIZERS: states, AVERAGE: dict(average or {})}
    return {part: tensors for part, tensors in parts.items() if tensors}


def restore_state(
    path: Path,
    trained: nn.Module,
    optimizers: list[Optimizer],
    average: dict[str, Tensor] | None,
) -> None:
    """Load a checkpoint in place, whatever number of ranks wrote it. All ranks call it.

    Each rank reads the pieces it holds and nothing else. Learning rates, betas and weight decay stay this run's. A
    checkpoint without a moving average starts one from its weights; with `average` None the checkpoint's is ignored. A
    checkpoint that holds only what was trainable (see `build_state`) leaves the rest as it is.

    Raises:
        ValueError: on all ranks, if it is damaged, or if its names and shapes are not exactly this run's.
    """
    model, reason = _named_tensors(trained), None
    try:
        stored = StoredTensors(path)
        targets = _model_targets(stored, model)
        if average and stored.names(f"{AVERAGE}."):
            targets |= {f"{AVERAGE}.{name}": value for name, value in average.items()}
        states = [_new_states(stored, optimizer, model, targets) for optimizer in optimizers]
        _require_same_tensors(stored, targets, with_average=bool(average))
    except ValueError as error:
        reason = str(error)
    reason = failure_on_any_rank(reason)
    if reason is not None:
        raise ValueError(reason)
    stored.load({name: value.detach() for name, value in targets.items()})
    if average and not stored.names(f"{AVERAGE}."):
        with torch.no_grad():
            for name, value in average.items():
                value.copy_(model[DIT + name] if DIT + name in model else model[name])
    for optimizer, state in zip(optimizers, states, strict=True):
        # With this run's own groups (only states are loaded), and the optimizer places its states itself.
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _named_tensors(trained: nn.Module) -> dict[str, Tensor]:
    # By state_dict, not named_parameters: FSDP puts its shards back in place for it.
    return trained.state_dict(keep_vars=True)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _model_targets(stored: StoredTensors, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of the model to load: all of it, unless the checkpoint holds nothing of what is frozen here."""
    targets = {f"{MODEL}.{name}": tensor for name, tensor in model.items()}
    frozen = {name for name, tensor in targets.items() if not tensor.requires_grad}
    held = stored.names(f"{MODEL}.")
    if held and frozen.isdisjoint(held):
        targets = {name: tensor for name, tensor in targets.items() if name not in frozen}
    return targets


def _new_states(
    stored: StoredTensors, optimizer: Optimizer, model: Mapping[str, Tensor], targets: dict[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    """Memory for the checkpoint's states of an optimizer, sharded as the parameters are; also added to `targets`.

    Returns the tensors by the parameter's position and the state's name.
    """
    kind, parameters = type(optimizer).__name__, _parameters(optimizer)
    count = f"{OPTIMIZERS}.{kind}.{_COUNT}"
    if count not in stored.tensors:
        raise _misfit(stored.path, f"it has no state of {kind}")
    if (saved := int(stored.read(count))) != len(parameters):
        raise _misfit(stored.path, f"its {kind} has {saved} parameters, this run's {len(parameters)}")
    names = {id(tensor): f"{OPTIMIZERS}.{kind}.{name}" for name, tensor in model.items()}
    positions = {names[id(parameter)]: position for position, parameter in enumerate(parameters)}
    states: dict[int, dict[str, Tensor]] = {}
    for key, weight in stored.weights("").items():
        owner, _, entry = key.rpartition(".")
        if owner not in positions:
            continue
        like = parameters[positions[owner]].detach() if weight.shape else torch.empty(())
        targets[key] = torch.empty_like(like, dtype=weight.dtype)
        states.setdefault(positions[owner], {})[entry] = targets[key]
    return states


def _require_same_tensors(
    stored: StoredTensors, targets: Mapping[str, Tensor], *, with_average: bool
) -> None:
    """Raises ValueError unless the checkpoint has exactly these tensors (and perhaps an average that is not wanted)."""
    sizes = {
        name: weight.shape
        for name, weight in stored.weights("").items()
        if not name.endswith(f".{_COUNT}") and (with_average or not name.startswith(f"{AVERAGE}."))
    }
    missing = [name for name in targets if name not in sizes]
    unexpected = sorted(sizes.keys() - targets.keys())
    misshapen = [
        f"{name} is {list(sizes[name])} instead of {list(value.shape)}"
        for name, value in targets.items()
        if name in sizes and sizes[name] != value.shape
    ]
    kinds = ((missing, "missing"), (unexpected, "unexpected"), (misshapen, "of another shape"))
    faults = [f"{len(found)} {kind}, first {found[0]}" for found, kind in kinds if found]
    if faults:
        raise _misfit(stored.path, "; ".join(faults))


def _misfit(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"checkpoint {path} does not fit this run ({reason}): use the settings it was trained with, --resume off or "
        "another --out"
    )
