"""Device mesh and process groups: data parallel x sequence parallel (ring x Ulysses)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from refalign_ext.distributed.sizes import ParallelSizes

DATA, RING, ULYSSES = "data", "ring", "ulysses"
SHARDS = "shards"  # data, ring and ulysses flattened: over this FSDP shards and averages
SEQUENCE = "sequence"  # ring and ulysses flattened: these ranks share one sample


def gather_from_ranks(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank. Small things only: they are pickled between our ranks."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def failure_on_any_rank(reason: str | None) -> str | None:
    """Why something failed (None: it did not), on the first rank on which it did; the same on all ranks."""
    return next((text for text in gather_from_ranks(reason) if text is not None), None)


class Parallel:
    """This rank's place in the device mesh, and the process groups it belongs to. Without a mesh: a single process."""

    def __init__(
        self, sizes: ParallelSizes, device: torch.device, meshes: Mapping[str, DeviceMesh] | None = None
    ) -> None:
        self.sizes, self.device, self._meshes = sizes, device, dict(meshes or {})
        self._waits = 0

    @classmethod
    def single(cls, device: torch.device) -> Parallel:
        """One process, no process group."""
        return cls(ParallelSizes(), device)

    @classmethod
    def create(
        cls, sizes: ParallelSizes, device: torch.device, timeout_seconds: float | None = None
    ) -> Parallel:
        """The mesh for an initialised process group.

        Ulysses ranks are neighbours, because they exchange the most: on a machine of 8 GPUs they share its fast links.

        Args:
            timeout_seconds: how long ranks wait for each other in the mesh's groups, which do not inherit it from the
                process group; None: torch's default.
        """
        if sizes.world == 1:
            return cls.single(device)
        chosen = gather_from_ranks(sizes)
        if len(set(chosen)) > 1:
            raise ValueError(
                f"the ranks would divide the work differently ({', '.join(sorted({str(choice) for choice in chosen}))}), "
                "as devices of different memory do: give --ulysses_size and --ring_size"
            )
        shape = (sizes.data, sizes.ring, sizes.ulysses)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=(DATA, RING, ULYSSES))
        meshes = {name: mesh[name] for name in (DATA, RING, ULYSSES)}
        meshes[SEQUENCE] = mesh[RING, ULYSSES]._flatten(SEQUENCE)
        meshes[SHARDS] = mesh._flatten(SHARDS)
        if timeout_seconds is not None:
            for part in meshes.values():
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), part.get_group())
        return cls(sizes, device, meshes)

    @property
    def is_alone(self) -> bool:
        """True for one process without a process group."""
        return not self._meshes

    @property
    def rank(self) -> int:
        """Rank in the world."""
        return 0 if self.is_alone else dist.get_rank()

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes and logs."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which of the `sizes.data` groups this rank belongs to: ranks of one group see the same samples."""
        return 0 if self.is_alone else self._meshes[DATA].get_local_rank()

    @property
    def sequence_rank(self) -> int:
        """Which part of a sample's tokens this rank holds: number ring_rank * ulysses + ulysses_rank."""
        return 0 if self.is_alone else self._meshes[SEQUENCE].get_local_rank()

    @property
    def shards(self) -> DeviceMesh:
        """The flat mesh of all ranks, over which FSDP shards parameters and averages gradients."""
        return self._meshes[SHARDS]

    def group(self, name: str) -> dist.ProcessGroup:
        """The process group of one dimension (DATA, RING, ULYSSES, SEQUENCE or SHARDS)."""
        return self._meshes[name].get_group()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, on every rank, without gradient; not finite everywhere if it is so on one."""
        values = values.detach().to(self.device, copy=True)
        if not self.is_alone:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Average over all ranks; see `sum`."""
        return self.sum(values) / self.sizes.world

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank, see `gather_from_ranks`."""
        return [value] if self.is_alone else gather_from_ranks(value)

    def broadcast_from_rank0(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, however long it takes; its ValueError is raised on every rank."""
        found: list[Any] = [None, None]
        try:
            if self.is_main:
                found[0] = work()
        except ValueError as error:
            found[1] = str(error)
        finally:
            self.wait_for_main()
        if not self.is_alone:
            dist.broadcast_object_list(found, src=0)
        if found[1] is not None:
            raise ValueError(found[1])
        return found[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if not self.is_alone:
            dist.barrier()

    def wait_for_main(self) -> None:
        """Wait until rank 0 is here, however long that takes: for work of its own that may outlast the time-out."""
        if self.is_alone:
            return
        self._waits += 1
        store, key = dist.distributed_c10d._get_default_store(), f"refalign_waits/{self._waits}"
        if self.is_main:
            store.set(key, "")
        while not store.check([key]):
            time.sleep(0.1)
