"""Reading checkpoint files and loading them strictly.

Only formats that cannot run code are read: safetensors, and PyTorch files through ``weights_only=True``.
Every problem with a file is a ``ValueError`` of one line that names the file and the remedy.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)

SAFETENSORS_SUFFIXES = (".safetensors",)
PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
INDEX_SUFFIX = ".index.json"

_LISTED_KEYS = 8
_LFS_POINTER_START = b"version https://git-lfs"
_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "module")
_MALFORMED_PICKLE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    struct.error,
)
_digests: dict[tuple[str, int, int], str] = {}


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint onto the CPU, memory-mapped where the format allows it.

    Args:
        path: a ``.safetensors`` file; a ``.pth``, ``.pt`` or ``.bin`` file; a ``*.index.json`` whose shards
            lie beside it; or a folder that holds one index or one such file (safetensors are preferred).

    Returns:
        The tensors by name, in the file's own dtypes.

    Raises:
        ValueError: the file is absent, truncated, foreign, or holds more than tensors; or shards are missing.
    """
    path = Path(path)
    if path.is_dir():
        path = _only_checkpoint_in(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint file; check the path or download it")
    if path.name.endswith(INDEX_SUFFIX):
        return _read_sharded(path)
    if path.suffix in SAFETENSORS_SUFFIXES:
        return _read_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _read_pickle(path)
    known = ", ".join((*SAFETENSORS_SUFFIXES, *PICKLE_SUFFIXES, INDEX_SUFFIX))
    raise ValueError(f"{path}: unknown checkpoint format; use one of {known}")


def load_strict(
    module: Module,
    state_dict: Mapping[str, torch.Tensor],
    source: str,
    *,
    dtype: torch.dtype | None = None,
) -> Module:
    """Load a state dict into a module; every key must match, by name and shape.

    Parameters on the meta device are replaced by the given tensors (nothing is copied unless ``dtype`` asks
    for it), others are copied into. Parameters that the module shares under several names need only one.

    Args:
        module: the module, real or created under ``torch.device("meta")``.
        state_dict: tensors by the module's own names.
        source: what the tensors were read from, for messages.
        dtype: dtype that floating-point parameters end up in; ``None`` keeps the tensors' own dtype for a
            meta module and the module's dtype for a real one.

    Returns:
        ``module``.

    Raises:
        ValueError: missing, unexpected or differently shaped entries; at most eight of each kind are listed.
    """
    expected = module.state_dict(keep_vars=True)
    aliases: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        aliases.setdefault(id(tensor), []).append(name)
    shared_names = [names for names in aliases.values() if len(names) > 1]

    given = dict(state_dict)
    for names in shared_names:
        present = [name for name in names if name in given]
        for name in names:
            if present and name not in given:
                given[name] = given[present[0]]

    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    reshaped = [
        f"{name} is {list(given[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if missing or unexpected or reshaped:
        kinds = ((missing, "missing"), (unexpected, "unexpected"), (reshaped, "of another shape"))
        faults = "; ".join(f"{len(found)} {kind}: {_listed(found)}" for found, kind in kinds if found)
        raise ValueError(
            f"{source}: these weights do not fit {type(module).__name__} ({faults}); "
            f"use the file made for this model"
        )

    is_meta = any(tensor.is_meta for tensor in expected.values())
    if dtype is not None:
        if is_meta:
            given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in given.items()}
        else:
            module.to(dtype)
    module.load_state_dict(given, strict=True, assign=is_meta)
    if is_meta:
        for names in shared_names:  # assignment gives each name a parameter of its own
            _share(module, names)
    left = [name for name, tensor in _tensors(module) if tensor.is_meta]
    assert not left, f"still on the meta device after loading: {left}"
    return module


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a whole file, read in pieces; remembered while size and modification time stay.

    Raises:
        ValueError: the file is absent or cannot be read.
    """
    path = Path(path)
    try:
        status = path.stat()
        key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
        if key not in _digests:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while piece := file.read(1 << 22):
                    digest.update(piece)
            _digests[key] = digest.hexdigest()
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    return _digests[key]


def missing_files(folder: str | Path, names: Iterable[str]) -> list[str]:
    """Names (files or subfolders, relative to ``folder``) that do not exist, in the order given."""
    folder = Path(folder)
    return [name for name in names if not (folder / name).exists()]


def require_files(folder: str | Path, names: Iterable[str]) -> None:
    """Check that a checkpoint folder is complete.

    Raises:
        ValueError: the folder does not exist, or some of ``names`` are not in it (all of them are listed).
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such checkpoint folder; check the path or download the checkpoint")
    missing = missing_files(folder, names)
    if missing:
        raise ValueError(
            f"{folder}: the checkpoint folder lacks {', '.join(missing)}; download what is missing"
        )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _refuse_unreadable(path)
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise ValueError(
            f"{path}: truncated or not a safetensors file ({error}); download it again"
        ) from error


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    _refuse_unreadable(path)
    is_zip = zipfile.is_zipfile(path)  # the format before torch 1.6 is not, and cannot be memory-mapped
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except _MALFORMED_PICKLE as error:
        if is_zip and isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{path}: holds Python objects besides tensors, which are never loaded; "
                f"save its tensors as safetensors"
            ) from error
        raise ValueError(f"{path}: truncated or not a PyTorch checkpoint; download it again") from error
    return _only_tensors(path, content)


def _read_sharded(path: Path) -> dict[str, torch.Tensor]:
    _refuse_unreadable(path)
    try:
        shard_of = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(shard_of.values()))
        is_plain = all(Path(shard).name == shard for shard in shards)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a checkpoint index (no weight_map); download it again") from error
    if not is_plain:
        raise ValueError(f"{path}: names shards outside its own folder; download it again")
    absent = missing_files(path.parent, shards)
    if absent:
        raise ValueError(
            f"{path}: {len(absent)} of {len(shards)} shards missing: {_listed(absent)}; download them"
        )

    state_dict: dict[str, torch.Tensor] = {}
    for shard in shards:
        state_dict.update(read_state_dict(path.parent / shard))
    lacking = [name for name in shard_of if name not in state_dict]
    if lacking:
        raise ValueError(
            f"{path}: its shards lack {len(lacking)} tensors: {_listed(lacking)}; "
            f"download index and shards again"
        )
    return state_dict


def _only_checkpoint_in(folder: Path) -> Path:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    indices = [file for file in files if file.name.endswith(INDEX_SUFFIX)]
    groups = (
        [file for file in indices if ".safetensors" in file.name],
        [file for file in files if file.suffix in SAFETENSORS_SUFFIXES],
        indices,
        [file for file in files if file.suffix in PICKLE_SUFFIXES],
    )
    for candidates in groups:
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            names = [file.name for file in candidates]
            raise ValueError(
                f"{folder}: {len(names)} checkpoint files: {_listed(names)}; name the one to read"
            )
    raise ValueError(
        f"{folder}: no checkpoint file in this folder; check the path or download the checkpoint"
    )


def _refuse_unreadable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER_START))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if not start:
        raise ValueError(f"{path}: empty file; download it again")
    if start == _LFS_POINTER_START:
        raise ValueError(
            f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` where it was cloned"
        )


def _only_tensors(path: Path, content: object) -> dict[str, torch.Tensor]:
    if isinstance(content, Mapping):
        for key in _WRAPPER_KEYS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return dict(content)
    raise ValueError(f"{path}: not a state dict (names to tensors); use a file that holds model weights")


def _share(module: nn.Module, names: list[str]) -> None:
    first = module.get_parameter(names[0])
    for name in names[1:]:
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, first)


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED_KEYS])
    return shown if len(names) <= _LISTED_KEYS else f"{shown} and {len(names) - _LISTED_KEYS} more"
