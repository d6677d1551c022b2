"""Reading checkpoint files and loading them strictly.

Only formats that cannot run code are read: safetensors, and PyTorch files through ``weights_only=True``.
Every problem with a file is a ``ValueError`` of one line that names the file and the remedy.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
INDEX_SUFFIX = ".index.json"

_LISTED_KEYS = 8
_LFS_POINTER_START = b"version https://git-lfs"
_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "module")
_MALFORMED_PICKLE = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, struct.error),
    *(ValueError, TypeError, LookupError, AttributeError),
)


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint onto the CPU, memory-mapped where the format allows it.

    Args:
        path: a ``.safetensors`` file; a ``.pth``, ``.pt`` or ``.bin`` file; or a ``*.index.json`` whose shards
            lie beside it.

    Returns:
        The tensors by name, in the file's own dtypes.

    Raises:
        ValueError: the file is absent, truncated, foreign, or holds more than tensors; or shards are missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint file; check the path or download it")
    _refuse_unreadable(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _read_sharded(path)
    if path.suffix == SAFETENSORS_SUFFIX or _is_safetensors(path):
        return _read_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _read_pickle(path)
    known = ", ".join((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES, INDEX_SUFFIX))
    raise ValueError(f"{path}: unknown checkpoint format; use one of {known}")


def read_metadata(path: str | Path) -> dict[str, str]:
    """What the header of a safetensors file says besides names and shapes; empty for other files.

    Raises:
        ValueError: the file is truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.suffix != SAFETENSORS_SUFFIX:
        return {}
    _refuse_unreadable(path)
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: truncated or not a safetensors file ({error}); download it again"
        ) from error


def check_values(
    state_dict: Mapping[str, torch.Tensor], source: str | Path, *, may_be_zero: Collection[str] = ()
) -> None:
    """Refuses weights of the right shape and wrong content, such as a download with a hole in it.

    One pass at the speed of memory: a tensor's least and greatest value tell both.

    Args:
        may_be_zero: matrices that a model starts with as zeros.

    Raises:
        ValueError: a tensor is no floating-point number or has values that are not finite, or a matrix is all zeros.
    """
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{source}: {name} is {kind}: weights are floating-point numbers; use another file"
            )
        values = tensor.float() if tensor.itemsize == 1 else tensor  # no kernels for numbers of eight bits
        least, greatest = (float(bound) for bound in values.aminmax()) if values.numel() else (1.0, 1.0)
        if not (math.isfinite(least) and math.isfinite(greatest)):
            raise ValueError(f"{source}: {name} has values that are not finite; download or save it again")
        if least == greatest == 0 and tensor.dim() > 1 and name not in may_be_zero:
            raise ValueError(f"{source}: {name} is all zeros: the file is damaged; download it again")


def load_strict(
    module: Module,
    state_dict: Mapping[str, torch.Tensor],
    source: str,
    *,
    dtype: torch.dtype | None = None,
    may_be_zero: Collection[str] = (),
) -> Module:
    """Give a module made under ``torch.device("meta")`` its tensors; every key must match, by name and shape.

    Args:
        module: the module; its parameters become the given tensors, which are copied only if ``dtype`` asks for it.
        state_dict: tensors by the module's own names.
        source: what the tensors were read from, for messages.
        dtype: dtype that floating-point parameters end up in; ``None`` keeps the tensors' own.
        may_be_zero: see `check_values`.

    Returns:
        ``module``.

    Raises:
        ValueError: missing, unexpected or differently shaped entries (at most eight of each kind are listed), or values
            that `check_values` refuses.
    """
    expected = module.state_dict(keep_vars=True)
    faults = {
        "missing": [name for name in expected if name not in state_dict],
        "unexpected": [name for name in state_dict if name not in expected],
        "of another shape": [
            f"{name} is {list(state_dict[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state_dict and state_dict[name].shape != tensor.shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(
            f"{len(names)} {kind}: {_listed(names)}" for kind, names in faults.items() if names
        )
        raise ValueError(
            f"{source}: these weights do not fit {type(module).__name__} ({listed}); "
            f"use the file made for this model"
        )
    check_values(state_dict, source, may_be_zero=may_be_zero)
    if dtype is not None:
        state_dict = {name: tensor.to(dtype) for name, tensor in state_dict.items()}
    module.load_state_dict(state_dict, strict=True, assign=True)
    return module


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a whole file, read in pieces; remembered while size and modification time stay.

    Raises:
        ValueError: the file is absent or cannot be read.
    """
    path = Path(path).resolve()
    try:
        status = path.stat()
        return _sha256(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error


@lru_cache(maxsize=4096)
def _sha256(path: Path, _size: int, _modified: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def index_shards(path: Path) -> dict[str, str]:
    """The file name of each tensor's shard, from a ``*.index.json``.

    Raises:
        ValueError: it is no such index, or names files outside its own folder.
    """
    try:
        shard_of = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        is_plain = all(Path(shard).name == shard for shard in shard_of.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a safetensors index (no weight_map in it); download it again"
        ) from error
    if not is_plain:
        raise ValueError(f"{path}: names shards outside its own folder; download it again")
    return shard_of


def _is_safetensors(path: Path) -> bool:
    """Whether a file of another name begins as a safetensors file: with the length of a header, and the header."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise ValueError(
            f"{path}: truncated or not a safetensors file ({error}); download it again"
        ) from error


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
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
    if isinstance(content, Mapping):
        wrapped = (content[key] for key in _WRAPPER_KEYS if isinstance(content.get(key), Mapping))
        content = next(wrapped, content)
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return dict(content)
    raise ValueError(f"{path}: not a state dict (names to tensors); use a file that holds model weights")


def _read_sharded(path: Path) -> dict[str, torch.Tensor]:
    shard_of = index_shards(path)
    shards = sorted(set(shard_of.values()))
    absent = [shard for shard in shards if not (path.parent / shard).is_file()]
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


def _refuse_unreadable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER_START))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if not start:
        raise ValueError(f"{path}: empty file; download it again")
    if start.startswith(b"GGUF"):
        raise ValueError(f"{path}: a GGUF file, which is not read; use the safetensors file it was made from")
    if start == _LFS_POINTER_START:
        raise ValueError(
            f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` where it was cloned"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED_KEYS])
    return shown if len(names) <= _LISTED_KEYS else f"{shown} and {len(names) - _LISTED_KEYS} more"
