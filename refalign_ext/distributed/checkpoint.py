"""Training checkpoints that every rank writes a part of and any number of ranks reads.

A checkpoint is a folder `step-00001000`: the tensors as torch.distributed.checkpoint writes them (`__*.distcp` and
`.metadata`), the DiT's `config.json` and `trainer.json`. It is written to `step-00001000.part` and renamed, so what has
its final name is whole. Only tensors are stored, never pickled objects.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from refalign_ext.distributed.adapted import (
    StoredDiT,
    Weight,
    adapter_scale_of,
    base_named_by,
    fingerprint,
    merged_weights,
    require_base,
    weight_of,
)
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.stored import METADATA_FILE, StoredReader, StoredTensors, damaged, one_line
from refalign_ext.lora import Adapter, base_key, is_adapter_key

if TYPE_CHECKING:
    from refalign_ext.backbone import DiTCheckpoint

STATE_FILE = "trainer.json"
CONFIG_FILE = "config.json"
LATEST_FILE = "latest"
MODEL, OPTIMIZERS, AVERAGE = "model", "optimizers", "average"
DIT, PROJECTORS = "dit.", "projectors."
_COUNT = "parameter_count"
_NAME = re.compile(r"step-(\d+)")
_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module)\.")
_SHARED_FOLDER_SECONDS = 15.0  # how long a network file system may take to show what other machines wrote

# One process without a group is a normal case here, not worth a warning at every save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def is_checkpoint(path: Path) -> bool:
    """True for a folder that holds a whole training checkpoint, whatever its name (but not one being written)."""
    return not path.name.endswith(".part") and not _lacking(path)


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if is_checkpoint(path)), key=_step_of)


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints beyond `step` to `abandoned-step-*`: the run goes on from there, and they are not its own.

    Otherwise `--resume auto` would later jump to them, and they would count as the newest to keep. For one rank only;
    returns the new names.
    """
    found = checkpoints_in(folder)
    kept = [path for path in found if _step_of(path) <= step]
    if len(kept) < len(found):
        _point_latest_at(folder, kept[-1].name if kept else None)
    moved = []
    for path in found[len(kept) :]:
        target = path.with_name(f"abandoned-{path.name}")
        shutil.rmtree(target, ignore_errors=True)
        moved.append(path.rename(target))
    return moved


def resolve_resume(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` names: `auto` (the newest or none), `off`, or a folder.

    Raises:
        ValueError: if a named folder is no complete checkpoint.
    """
    if resume == "off":
        return None
    if resume == "auto":
        found = checkpoints_in(folder)
        return found[-1] if found else None
    path = Path(resume)
    if not is_checkpoint(path):
        lacking = " and ".join(_lacking(path))
        reason = f"it lacks {lacking}" if lacking else "it is not finished"
        raise ValueError(f"--resume {path}: no complete checkpoint there ({reason}); name a step-* folder")
    return path


def read_meta(path: Path) -> dict[str, Any]:
    """What `trainer.json` says: `step`, `samples_seen` and the run's `settings`.

    Raises:
        ValueError: if it is missing or damaged.
    """
    meta = _read_json(path, STATE_FILE)
    for name, kind in (("step", int), ("samples_seen", int), ("settings", dict)):
        if not isinstance(meta.get(name), kind):
            raise damaged(path, ValueError(f"{STATE_FILE} lacks {name}"))
    return meta


def read_model_config(path: Path) -> dict[str, Any]:
    """The DiT's constructor arguments and `_class_name`.

    Raises:
        ValueError: if they are missing or damaged.
    """
    return _read_json(path, CONFIG_FILE)


class Checkpointer:
    """Writes the checkpoints of a run while it goes on. All ranks construct it and call it at the same points.

    A save copies the state to the CPU and returns. A thread on each rank then writes that rank's shards; the ranks talk
    over a gloo group of their own, because the training's collectives would interleave with theirs.

    That all ranks have written before the folder gets its name rests on two things. Rank 0 writes `.metadata` only after
    it has gathered the results of every rank's (synced) writes, or else every rank gets the error. And before renaming
    it looks for every file that `.metadata` names, at its full length: machines that do not share the folder fail here.

    Args:
        folder: where the checkpoints of the run go; created.
        parallel: the ranks.
        keep_last: how many checkpoints remain.
        timeout_seconds: how long ranks wait for each other's writing.
    """

    def __init__(
        self, folder: Path, parallel: Parallel, keep_last: int, timeout_seconds: float = 1800.0
    ) -> None:
        self.folder, self.keep_last = folder, keep_last
        self._is_main = parallel.is_main
        timeout = timedelta(seconds=timeout_seconds)
        self._group = None if parallel.is_alone else dist.new_group(backend="gloo", timeout=timeout)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[Path] | None = None

    def save(
        self,
        step: int,
        state: Mapping[str, Mapping[str, Tensor]],
        meta: Mapping[str, Any],
        model_config: Mapping[str, Any],
    ) -> None:
        """Begin to write the checkpoint of `step`; when this returns, the tensors may change.

        Args:
            step: optimizer steps done.
            state: what `build_state` returns.
            meta: `samples_seen` and `settings`, written to trainer.json beside the step.
            model_config: the DiT's constructor arguments and `_class_name`.

        Raises:
            OSError: on all ranks, if the previous checkpoint could not be written.
        """
        self.finish()
        # A copy even where the state lies on the CPU: the next step changes it in place.
        staged = {
            part: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for part, tensors in state.items()
        }
        texts = {
            CONFIG_FILE: json.dumps(dict(model_config), indent=2) + "\n",
            STATE_FILE: json.dumps({"step": step, **meta}, indent=2) + "\n",
        }
        self._running = self._thread.submit(self._write, f"step-{step:08d}", staged, texts)

    def finish(self) -> Path | None:
        """Wait for the last save; returns its folder, or None if there was none since the last call.

        Raises:
            OSError: on all ranks, if it could not be written.
        """
        running, self._running = self._running, None
        return None if running is None else running.result()

    def _write(self, name: str, staged: dict[str, Any], texts: Mapping[str, str]) -> Path:
        final = self.folder / name
        aside = final.with_name(f"{name}.part")
        try:
            self._on_main_rank(lambda: self._prepare(aside))
            metadata = dcp.save(staged, storage_writer=dcp.FileSystemWriter(aside), process_group=self._group)
            self._on_main_rank(lambda: self._complete(aside, final, metadata, texts))
        except CheckpointException as error:
            rank, (reason, _) = next(iter(error.failures.items()))
            where = "" if self._group is None else f"rank {rank}: "
            raise self._failure(final, where + one_line(reason)) from error
        except (OSError, RuntimeError) as error:
            raise self._failure(final, one_line(error)) from error
        return final

    def _failure(self, final: Path, reason: str) -> OSError:
        nearest = next(folder for folder in final.absolute().parents if folder.is_dir())
        free = shutil.disk_usage(nearest).free / 2**30
        return OSError(
            f"checkpoint {final} could not be written ({reason}): {free:.1f} GiB are free there, make room or choose "
            "another --out"
        )

    def _on_main_rank(self, work: Callable[[], None]) -> None:
        """Do something on rank 0; its OSError is raised on all ranks."""
        failure: list[str | None] = [None]
        if self._is_main:
            try:
                work()
            except OSError as error:
                failure = [one_line(error)]
        if self._group is not None:
            dist.broadcast_object_list(failure, src=0, group=self._group)
        if failure[0] is not None:
            raise OSError(failure[0])

    def _prepare(self, aside: Path) -> None:
        for leftover in self.folder.glob("*step-*.part"):
            _delete(leftover)
        aside.mkdir(parents=True)

    def _complete(self, aside: Path, final: Path, metadata: dcp.Metadata, texts: Mapping[str, str]) -> None:
        _require_written(aside, metadata)
        for name, text in texts.items():
            _write_text(aside / name, text)
        others = [path for path in checkpoints_in(self.folder) if path != final]
        if final.exists():
            # `latest` must not name a folder that is going away.
            _point_latest_at(self.folder, others[-1].name if others else None)
            _remove_whole(final)
        aside.rename(final)
        _sync_folder(self.folder)
        _point_latest_at(self.folder, final.name)
        for old in checkpoints_in(self.folder)[: -self.keep_last]:
            if old != final:
                _remove_whole(old)


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
        trained: the container of `dit` and `projectors`.
        optimizers: over its parameters; their class names become part of the names.
        average: moving average of the DiT by the DiT's own names, or None.
        trainable_only: leave out what does not require gradients (the base model of an adapter).

    Returns:
        {"model": ..., "optimizers": ..., "average": ...}, names to tensors; parts that are empty are left out.
    """
    parameters = _named_tensors(trained)
    states: dict[str, Tensor] = {}
    names = {id(tensor): name for name, tensor in parameters.items()}
    for kind, held in _parameters_by_kind(optimizers).items():
        states[f"{kind}.{_COUNT}"] = torch.tensor(len(held))
        for optimizer, parameter in held:
            for entry, value in optimizer.state.get(parameter, {}).items():
                assert isinstance(value, Tensor), f"{kind} keeps {entry}, which is no tensor"
                states[f"{kind}.{names[id(parameter)]}.{entry}"] = value
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
    plan = _on_all_ranks(lambda: _plan(path, _named_tensors(trained), optimizers, average))
    targets = {name: value.detach() for name, value in plan.targets.items()}
    try:
        dcp.load(targets, storage_reader=StoredReader(plan.stored))
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise damaged(path, reason) from error
    with torch.no_grad():
        for target, source in plan.copies:
            target.copy_(source)
    for optimizer in optimizers:
        own = {
            state.position: state.entries
            for state in plan.states
            if state.optimizer is optimizer and state.entries
        }
        # With this run's own groups (only states are loaded), and the optimizer places its states itself.
        optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})


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


def open_dit(path: Path, *, raw: bool = False, base: Path | None = None) -> StoredDiT:
    """What `read_dit` reads, one tensor at a time.

    Args:
        path: the checkpoint's folder.
        raw: what was trained, even if there is an average.
        base: the model that the checkpoint's adapter belongs to (a training checkpoint or any published layout), if it
            is not where the settings say.

    Raises:
        ValueError: as in `read_dit`, or for a base without an adapter.
    """
    stored = StoredTensors(path)
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


def open_projectors(path: Path) -> dict[str, Weight]:
    """What `read_projectors` reads, one tensor at a time."""
    stored = StoredTensors(path)
    return {name: _weight(stored, key) for name, key in projector_keys(stored).items()}


def dit_keys(stored: StoredTensors, *, raw: bool = False) -> dict[str, str]:
    """The DiT's own names of its tensors -> their names in the checkpoint; see `read_dit`."""
    average = {_dit_name(key.removeprefix(f"{AVERAGE}.")): key for key in stored.names(f"{AVERAGE}.")}
    average = {name: key for name, key in average.items() if not name.startswith(PROJECTORS)}
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


def read_any_dit(path: Path) -> DiTCheckpoint:
    """A DiT from a training checkpoint or from any published layout (see `wan.utils.dit_checkpoint`).

    Raises:
        ValueError: if nothing readable is there, or the base of an adapter is not.
    """
    from refalign_ext.backbone import DiTCheckpoint, read_dit_checkpoint

    if not is_checkpoint(path):
        return read_dit_checkpoint(path)
    found = open_dit(path)
    tensors = {name: weight.read() for name, weight in found.weights.items()}
    files = [*found.files, *(found.base.files if found.base else ())]
    return DiTCheckpoint(tensors, read_projectors(path), read_model_config(path), files)


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


@dataclass(frozen=True)
class _ParameterState:
    """Where the optimizer state of one parameter is loaded."""

    optimizer: Optimizer
    position: int  # of the parameter among the optimizer's
    entries: dict[str, Tensor]  # such as exp_avg -> memory for it
    keys: dict[str, str]  # exp_avg -> its name in the checkpoint


@dataclass(frozen=True)
class _Plan:
    """What is read from a checkpoint, and into which tensors."""

    stored: StoredTensors
    targets: dict[str, Tensor]  # name in the checkpoint -> tensor of this run
    states: list[_ParameterState]
    copies: list[tuple[Tensor, Tensor]]  # (average, trained weight that it starts from)


def _plan(
    path: Path, parameters: dict[str, Tensor], optimizers: list[Optimizer], average: dict[str, Tensor] | None
) -> _Plan:
    stored = StoredTensors(path)
    wanted = _wanted(stored, parameters)
    averaged = _averaged(average, wanted)
    copies = []
    targets = {f"{MODEL}.{name}": value for name, value in wanted.items()}
    if stored.names(f"{AVERAGE}."):
        targets.update({f"{AVERAGE}.{name}": value for name, value in averaged.items()})
    else:
        copies = [(value, _of_dit(wanted, name)) for name, value in averaged.items()]
    states = _parameter_states(stored, optimizers, parameters)
    for state in states:
        targets.update({state.keys[entry]: value for entry, value in state.entries.items()})
    given = {
        name
        for name in stored.tensors
        if not name.endswith(f".{_COUNT}") and (averaged or not name.startswith(f"{AVERAGE}."))
    }
    _require_same({name: value.shape for name, value in targets.items()}, stored, given)
    return _Plan(stored, targets, states, copies)


def _named_tensors(trained: nn.Module) -> dict[str, Tensor]:
    # By state_dict, not named_parameters: FSDP puts its shards back in place for it.
    return _without_wrappers(trained.state_dict(keep_vars=True))


def _without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}


def _dit_name(name: str) -> str:
    return name.removeprefix(DIT)


def _of_dit(model: Mapping[str, Tensor], name: str) -> Tensor:
    return model[name if name in model else DIT + name]


def _averaged(average: Mapping[str, Tensor] | None, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moving average of those weights that the checkpoint holds."""
    named = _without_wrappers(average or {})
    return {name: value for name, value in named.items() if name in model or DIT + name in model}


def _parameters_by_kind(optimizers: list[Optimizer]) -> dict[str, list[tuple[Optimizer, Tensor]]]:
    kinds: dict[str, list[tuple[Optimizer, Tensor]]] = {}
    for optimizer, _, parameter in _positions(optimizers):
        kinds.setdefault(type(optimizer).__name__, []).append((optimizer, parameter))
    return kinds


def _positions(optimizers: list[Optimizer]) -> Iterator[tuple[Optimizer, int, Tensor]]:
    for optimizer in optimizers:
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        for position, parameter in enumerate(parameters):
            yield optimizer, position, parameter


def _wanted(stored: StoredTensors, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of the model to load: all of it, unless the checkpoint holds nothing of what is frozen here."""
    frozen = {name for name, value in parameters.items() if not value.requires_grad}
    held = {name.removeprefix(f"{MODEL}.") for name in stored.names(f"{MODEL}.")}
    if frozen and held and held.isdisjoint(frozen):
        return {name: value for name, value in parameters.items() if name not in frozen}
    return dict(parameters)


def _parameter_states(
    stored: StoredTensors, optimizers: list[Optimizer], parameters: Mapping[str, Tensor]
) -> list[_ParameterState]:
    """Memory for the optimizer states that the checkpoint holds, sharded as the parameters are."""
    for kind, held in _parameters_by_kind(optimizers).items():
        count = f"{OPTIMIZERS}.{kind}.{_COUNT}"
        if count not in stored.tensors:
            raise _misfit(stored.path, f"it has no state of {kind}")
        if int(stored.read(count)) != len(held):
            saved = int(stored.read(count))
            raise _misfit(stored.path, f"its {kind} has {saved} parameters, this run's {len(held)}")
    entries_of: dict[str, list[str]] = {}
    for key in stored.names(f"{OPTIMIZERS}."):
        owner, _, entry = key.rpartition(".")
        entries_of.setdefault(owner, []).append(entry)
    names = {id(tensor): name for name, tensor in parameters.items()}
    states = []
    for optimizer, position, parameter in _positions(optimizers):
        owner = f"{OPTIMIZERS}.{type(optimizer).__name__}.{names[id(parameter)]}"
        keys = {entry: f"{owner}.{entry}" for entry in entries_of.get(owner, [])}
        entries = {}
        for entry, key in keys.items():
            dtype, is_scalar = stored.dtype(key), not stored.shape(key)
            value = torch.empty((), dtype=dtype) if is_scalar else torch.empty_like(parameter, dtype=dtype)
            entries[entry] = value.detach()
        states.append(_ParameterState(optimizer, position, entries, keys))
    return states


def _require_same(wanted: Mapping[str, torch.Size], stored: StoredTensors, given: set[str]) -> None:
    missing = [name for name in wanted if name not in given]
    unexpected = sorted(given - wanted.keys())
    misshapen = [
        f"{name} is {list(stored.shape(name))} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in given and stored.shape(name) != shape
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


def _on_all_ranks(work: Callable[[], _Plan]) -> _Plan:
    """Do something on every rank; if it fails on one, its ValueError is raised on all."""
    failure: ValueError | None = None
    try:
        result = work()
    except ValueError as error:
        failure = error
    if dist.is_initialized():
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, None if failure is None else str(failure))
        first = next((text for text in failures if text is not None), None)
        if first is not None:
            raise ValueError(first) from failure
    if failure is not None:
        raise failure
    return result


def _lacking(path: Path) -> list[str]:
    return [name for name in (STATE_FILE, METADATA_FILE) if not (path / name).is_file()]


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    if not isinstance(content, dict):
        raise damaged(path, ValueError(f"{name} is no JSON object"))
    return content


def _require_written(aside: Path, metadata: dcp.Metadata) -> None:
    """Every file that the metadata names is here at its full length; waits for slow network file systems."""
    lengths: dict[str, int] = {}
    for place in metadata.storage_data.values():
        end = place.offset + place.length
        lengths[place.relative_path] = max(end, lengths.get(place.relative_path, 0))
    deadline = time.monotonic() + _SHARED_FOLDER_SECONDS
    for name, length in lengths.items():
        while _length(aside / name) < length:
            if time.monotonic() > deadline:
                raise OSError(f"rank 0 does not see all of {name}: all machines need the same --out folder")
            time.sleep(0.2)


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # Without this a power failure could forget the rename.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _point_latest_at(folder: Path, name: str | None) -> None:
    latest = folder / LATEST_FILE
    if name is None:
        latest.unlink(missing_ok=True)
        return
    aside = folder / f"{LATEST_FILE}.part"
    _write_text(aside, f"{name}\n")
    os.replace(aside, latest)


def _remove_whole(path: Path) -> None:
    """Remove a checkpoint so that an interruption leaves nothing that looks like one."""
    doomed = path.with_name(f"removed-{path.name}.part")
    _delete(doomed)
    path.rename(doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """Remove a file or folder as far as possible; what stays is tried again at the next save."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
