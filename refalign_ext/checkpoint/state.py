"""What a training checkpoint holds: everything that training changes, by name, and how it gets back into a run.

Names start with the part: `model.dit.*`, `model.projectors.*` and `model.<extra module>.*`, `optimizers.<class>.*`, and
`average.*` for the moving average of the DiT by its own names and of `<extra module>.*`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
        optimizers: over its parameters; their class names become part of the names.
        average: moving average of the DiT by the DiT's own names (and of extra modules), or None.
        trainable_only: leave out what does not require gradients (the base model of an adapter).

    Returns:
        {"model": ..., "optimizers": ..., "average": ...}, names to tensors; parts that are empty are left out.
    """
    parameters = _named_tensors(trained)
    states = {
        f"{kind}.{_COUNT}": torch.tensor(count) for kind, count in _parameter_counts(optimizers).items()
    }
    for optimizer, _, key, parameter in _owned_parameters(optimizers, parameters):
        for entry, value in optimizer.state.get(parameter, {}).items():
            assert isinstance(value, Tensor), f"{key} has {entry}, which is no tensor"
            states[f"{key}.{entry}"] = value
    model = {
        name: tensor.detach()
        for name, tensor in parameters.items()
        if tensor.requires_grad or not trainable_only
    }
    parts = {MODEL: model, OPTIMIZERS: states, AVERAGE: _averaged(average, model)}
    return {part: tensors for part, tensors in parts.items() if tensors}


def restore_state(
    path: Path,
    trained: nn.Module,
    optimizers: list[Optimizer],
    average: dict[str, Tensor] | None,
) -> None:
    """Load a checkpoint in place, whatever number of ranks wrote it. All ranks call it.

    Each rank reads the pieces it holds and nothing else. Learning rates, betas and weight decay stay this run's. A
    checkpoint without a moving average starts one from its weights. A checkpoint that holds only what was trainable
    (see `build_state`) leaves the rest as it is.

    Args:
        path: the checkpoint's folder.
        trained, optimizers: as given to `build_state`; loaded in place.
        average: tensors by the DiT's names, loaded in place; None ignores the checkpoint's.

    Raises:
        ValueError: on all ranks, if it is damaged, or if its names and shapes are not exactly this run's.
    """
    plan, reason = None, None
    try:
        plan = _plan(path, _named_tensors(trained), optimizers, average)
    except ValueError as error:
        reason = str(error)
    reason = failure_on_any_rank(reason)
    if reason is not None:
        raise ValueError(reason)
    assert plan is not None
    plan.stored.load({name: value.detach() for name, value in plan.targets.items()})
    with torch.no_grad():
        for target, source in plan.copies:
            target.copy_(source)
    for optimizer, states in zip(optimizers, plan.states, strict=True):
        # With this run's own groups (only states are loaded), and the optimizer places its states itself.
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


@dataclass(frozen=True)
class _LoadPlan:
    """What is read from a checkpoint, and into which tensors."""

    stored: StoredTensors
    targets: dict[
        str, Tensor
    ]  # name in the checkpoint -> tensor of this run, or memory for an optimizer's state
    states: list[
        dict[int, dict[str, Tensor]]
    ]  # of each optimizer: parameter's position -> entry -> that memory
    copies: list[tuple[Tensor, Tensor]]  # (average, trained weight that it starts from)


def _plan(
    path: Path, parameters: dict[str, Tensor], optimizers: list[Optimizer], average: dict[str, Tensor] | None
) -> _LoadPlan:
    stored = StoredTensors(path)
    wanted = _wanted(stored, parameters)
    averaged = _averaged(average, wanted)
    copies = []
    targets = {f"{MODEL}.{name}": value for name, value in wanted.items()}
    if stored.names(f"{AVERAGE}."):
        targets |= {f"{AVERAGE}.{name}": value for name, value in averaged.items()}
    else:
        copies = [(value, wanted.get(DIT + name, wanted.get(name))) for name, value in averaged.items()]
    states = _optimizer_states(stored, optimizers, parameters, targets)
    given = {
        name
        for name in stored.tensors
        if not name.endswith(f".{_COUNT}") and (averaged or not name.startswith(f"{AVERAGE}."))
    }
    _require_same(targets, stored, given)
    return _LoadPlan(stored, targets, states, copies)


def _named_tensors(trained: nn.Module) -> dict[str, Tensor]:
    # By state_dict, not named_parameters: FSDP puts its shards back in place for it.
    return trained.state_dict(keep_vars=True)


def _averaged(average: Mapping[str, Tensor] | None, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moving average of those weights that the checkpoint holds."""
    return {name: value for name, value in (average or {}).items() if name in model or DIT + name in model}


def _parameter_counts(optimizers: list[Optimizer]) -> Counter[str]:
    """Number of parameters by the optimizer's class."""
    return Counter(
        type(optimizer).__name__
        for optimizer in optimizers
        for group in optimizer.param_groups
        for _ in group["params"]
    )


def _owned_parameters(
    optimizers: list[Optimizer], parameters: Mapping[str, Tensor]
) -> Iterator[tuple[Optimizer, int, str, Tensor]]:
    """(optimizer, position of a parameter in it, name of the parameter's state, parameter)."""
    names = {id(tensor): name for name, tensor in parameters.items()}
    for optimizer in optimizers:
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for position, parameter in enumerate(held):
            yield optimizer, position, f"{type(optimizer).__name__}.{names[id(parameter)]}", parameter


def _wanted(stored: StoredTensors, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of the model to load: all of it, unless the checkpoint holds nothing of what is frozen here."""
    frozen = {name for name, value in parameters.items() if not value.requires_grad}
    held = {name.removeprefix(f"{MODEL}.") for name in stored.names(f"{MODEL}.")}
    if frozen and held and held.isdisjoint(frozen):
        return {name: value for name, value in parameters.items() if name not in frozen}
    return dict(parameters)


def _optimizer_states(
    stored: StoredTensors,
    optimizers: list[Optimizer],
    parameters: Mapping[str, Tensor],
    targets: dict[str, Tensor],
) -> list[dict[int, dict[str, Tensor]]]:
    """Memory for the optimizer states that the checkpoint holds, sharded as the parameters are; added to `targets`."""
    for kind, count in _parameter_counts(optimizers).items():
        key = f"{OPTIMIZERS}.{kind}.{_COUNT}"
        if key not in stored.tensors:
            raise _misfit(stored.path, f"it has no state of {kind}")
        if (saved := int(stored.read(key))) != count:
            raise _misfit(stored.path, f"its {kind} has {saved} parameters, this run's {count}")
    entries_of: dict[str, list[str]] = {}
    for key in stored.names(f"{OPTIMIZERS}."):
        owner, _, entry = key.rpartition(".")
        entries_of.setdefault(owner, []).append(entry)
    states: dict[Optimizer, dict[int, dict[str, Tensor]]] = {optimizer: {} for optimizer in optimizers}
    for optimizer, position, name, parameter in _owned_parameters(optimizers, parameters):
        owner = f"{OPTIMIZERS}.{name}"
        for entry in entries_of.get(owner, []):
            key = f"{owner}.{entry}"
            dtype, is_scalar = stored.dtype(key), not stored.shape(key)
            value = torch.empty((), dtype=dtype) if is_scalar else torch.empty_like(parameter, dtype=dtype)
            targets[key] = value.detach()
            states[optimizer].setdefault(position, {})[entry] = targets[key]
    return list(states.values())


def _require_same(wanted: Mapping[str, Tensor], stored: StoredTensors, given: set[str]) -> None:
    missing = [name for name in wanted if name not in given]
    unexpected = sorted(given - wanted.keys())
    misshapen = [
        f"{name} is {list(stored.shape(name))} instead of {list(value.shape)}"
        for name, value in wanted.items()
        if name in given and stored.shape(name) != value.shape
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
