"""The tensors in the files of a distributed checkpoint (torch.distributed.checkpoint), read without trusting the files.

A checkpoint's `.metadata` is a pickle, and torch's reader runs whatever it names. Ours builds only the few plain classes
that such a file consists of, accepts tensors only, and follows no path out of the folder.
"""

from __future__ import annotations

import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from refalign_ext.checkpoint.weights import Weight
from refalign_ext.errors import one_line

METADATA_FILE = ".metadata"
_METADATA_CLASSES = (
    *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
    *("TensorProperties", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
)
_PATH_CLASSES = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_HARMLESS = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA_CLASSES),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in _PATH_CLASSES),
}
_UNREADABLE = (
    *(OSError, RuntimeError, EOFError, pickle.UnpicklingError, struct.error, AssertionError),
    *(LookupError, AttributeError, TypeError, ValueError, ImportError),
)

# One process without a group is a normal case, not worth a warning at every save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def damaged(path: Path, error: BaseException) -> ValueError:
    """The error for a checkpoint that cannot be read, in one line."""
    return ValueError(
        f"checkpoint {path} is damaged or incomplete ({one_line(error, 200)}): name an earlier one with --resume FOLDER"
    )


class StoredTensors:
    """The tensors of one checkpoint, by name; ValueError if its `.metadata` is missing, damaged or not of our making."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with (path / METADATA_FILE).open("rb") as file:
                self._metadata = _MetadataUnpickler(file).load()
            self.tensors = _checked_tensors(self._metadata)
        except _UNREADABLE as error:
            raise damaged(path, error) from error

    def names(self, prefix: str) -> list[str]:
        """Names of all tensors that start with `prefix`, in the order of writing."""
        return [name for name in self.tensors if name.startswith(prefix)]

    def weight(self, name: str) -> Weight:
        """What is known of a tensor without reading it, and how to read it."""
        stored = self.tensors[name]
        return Weight(stored.size, stored.properties.dtype, lambda: self.read(name))

    def weights(self, prefix: str) -> dict[str, Weight]:
        """Those that start with `prefix`, by the rest of their names."""
        return {name.removeprefix(prefix): self.weight(name) for name in self.names(prefix)}

    def read(self, name: str) -> Tensor:
        """The whole tensor on the CPU, read by this process alone; ValueError if a piece is missing or damaged."""
        stored = self.tensors[name]
        whole = torch.empty(stored.size, dtype=stored.properties.dtype)
        reader, planner = _Reader(self.path, self._metadata), dcp.DefaultLoadPlanner()
        try:
            reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            planner.set_up_planner({name: whole}, self._metadata, is_coordinator=True)
            reader.read_data(planner.create_local_plan(), planner).wait()
        except _UNREADABLE as error:
            raise damaged(self.path, error) from error
        return whole

    def load(self, targets: dict[str, Tensor]) -> None:
        """Fill tensors in place, each rank the pieces that it holds; all ranks call it, and all get a ValueError of one."""
        try:
            dcp.load(targets, storage_reader=_Reader(self.path, self._metadata))
        except CheckpointException as error:
            reason, _ = next(iter(error.failures.values()))
            raise damaged(self.path, reason) from error


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(
                f"{METADATA_FILE} wants to load {module}.{name}, which is not allowed"
            )
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """torch's reader, which loads tensors with `weights_only`, but never unpickles the metadata itself."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def _checked_tensors(metadata: Any) -> dict[str, TensorStorageMetadata]:
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{METADATA_FILE} describes no checkpoint")
    for name, stored in metadata.state_dict_metadata.items():
        # Anything but a tensor would be unpickled without restrictions when it is loaded.
        if not isinstance(name, str) or not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"{name} is no tensor")
        # Memory that no piece covers would keep whatever was in it.
        if sum(chunk.sizes.numel() for chunk in stored.chunks) != stored.size.numel():
            raise ValueError(f"pieces of {name} are missing")
    for piece in metadata.storage_data.values():
        is_here = Path(piece.relative_path).name == piece.relative_path
        if not is_here or getattr(piece, "transform_descriptors", None):
            raise ValueError(f"{piece.relative_path} is no file of this folder")
    return metadata.state_dict_metadata
