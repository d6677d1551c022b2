"""Reading the files of a distributed checkpoint, tensor by tensor, by one process and without trusting them.

A checkpoint's `.metadata` is a pickle, and torch's reader runs whatever it names. Ours builds only the few plain classes
that such a file consists of, accepts tensors only, and follows no path out of the folder.
"""

from __future__ import annotations

import io
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

METADATA_FILE = ".metadata"
_METADATA_CLASSES = (
    *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
    *("TensorProperties", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
)
_HARMLESS = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA_CLASSES),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *(
        (module, name)
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    ),
}
UNREADABLE = (
    *(OSError, RuntimeError, EOFError, pickle.UnpicklingError, struct.error, AssertionError),
    *(LookupError, AttributeError, TypeError, ValueError, ImportError),
)

# One process without a group is a normal case, not worth a warning at every save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def damaged(path: Path, error: BaseException) -> ValueError:
    """The error for a checkpoint that cannot be read, in one line."""
    return ValueError(
        f"checkpoint {path} is damaged or incomplete ({one_line(error)}): name an earlier one with --resume FOLDER"
    )


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks and at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(
                f"{METADATA_FILE} wants to load {module}.{name}, which is not allowed"
            )
        return super().find_class(module, name)


class StoredTensors:
    """The tensors of a distributed checkpoint, read one at a time, whole, whatever number of ranks wrote them.

    Args:
        path: the checkpoint's folder.

    Raises:
        ValueError: the folder has no readable `.metadata`, or it describes anything but tensors in this folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with (path / METADATA_FILE).open("rb") as file:
                self.metadata = _MetadataUnpickler(file).load()
            self.tensors = _checked(self.metadata)
        except UNREADABLE as error:
            raise damaged(path, error) from error

    def names(self, prefix: str) -> list[str]:
        """Names of all tensors that start with `prefix`, in the order of writing."""
        return [name for name in self.tensors if name.startswith(prefix)]

    def shape(self, name: str) -> torch.Size:
        """Shape of the whole tensor."""
        return self.tensors[name].size

    def dtype(self, name: str) -> torch.dtype:
        """Type of the tensor's elements."""
        return self.tensors[name].properties.dtype

    def size_in_bytes(self, name: str) -> int:
        """Bytes of the whole tensor in memory."""
        return self.shape(name).numel() * self.dtype(name).itemsize

    def read(self, name: str) -> Tensor:
        """The whole tensor on the CPU, put together from the pieces of all ranks.

        Raises:
            ValueError: a piece is missing or cannot be read.
        """
        try:
            whole = torch.empty(self.shape(name), dtype=self.dtype(name))
            found = 0
            for chunk in self.tensors[name].chunks:
                if chunk.sizes.numel() == 0 and whole.numel():
                    continue
                place = self.metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                with (self.path / place.relative_path).open("rb") as file:
                    file.seek(place.offset)
                    content = io.BytesIO(file.read(place.length))
                piece = torch.load(content, map_location="cpu", weights_only=True)
                target = whole
                for dimension, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                    target = target.narrow(dimension, start, length)
                if piece.shape != target.shape or piece.dtype != target.dtype:
                    raise ValueError(f"a piece of {name} is not what {METADATA_FILE} says")
                target.copy_(piece)
                found += piece.numel()
            if found != whole.numel():
                raise ValueError(f"pieces of {name} are missing")
        except UNREADABLE as error:
            raise damaged(self.path, error) from error
        return whole


class StoredReader(FileSystemReader):
    """torch's reader for loading on many ranks, with metadata that `StoredTensors` has read."""

    def __init__(self, stored: StoredTensors) -> None:
        super().__init__(stored.path)
        self._metadata = stored.metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, never unpickled again."""
        return self._metadata


def _checked(metadata: Any) -> dict[str, TensorStorageMetadata]:
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{METADATA_FILE} describes no checkpoint")
    for name, stored in metadata.state_dict_metadata.items():
        # Anything but a tensor would be unpickled without restrictions when it is loaded.
        if not isinstance(name, str) or not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"{name} is no tensor")
    for place in metadata.storage_data.values():
        if Path(place.relative_path).name != place.relative_path or getattr(
            place, "transform_descriptors", None
        ):
            raise ValueError(f"{place.relative_path} is no file of this folder")
    return metadata.state_dict_metadata
