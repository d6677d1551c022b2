"""Who works on what: data parallel x sequence parallel (ring x Ulysses), and the groups that talk to each other."""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from refalign_ext.guidance import BRANCHES

DATA, RING, ULYSSES = "data", "ring", "ulysses"
SHARDS = "shards"  # data, ring and ulysses flattened: over this FSDP shards and averages
SEQUENCE = "sequence"  # ring and ulysses flattened: these ranks share one sample
_SECONDS_TO_TELL = 5.0


@dataclass(frozen=True)
class ParallelSizes:
    """How many ranks share what; their product is the world size.

    Attributes:
        data: groups of ranks with different samples.
        ring: ranks among which the keys and values of a sample are gathered.
        ulysses: ranks among which a sample's attention heads are divided.
    """

    data: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def sequence(self) -> int:
        """Ranks that share one sample."""
        return self.ring * self.ulysses

    @property
    def world(self) -> int:
        """All ranks."""
        return self.data * self.sequence

    def __str__(self) -> str:
        return (
            f"data parallel {self.data} x sequence parallel {self.sequence} "
            f"(Ulysses {self.ulysses} x ring {self.ring})"
        )


def split_sequence(sequence: int, num_heads: int) -> tuple[int, int]:
    """(ring, ulysses) for `sequence` ranks: as much Ulysses as the heads allow, which moves the fewest bytes.

    12 heads on 8 ranks give Ulysses 4 and a ring of 2: balanced, where 8-way Ulysses would leave ranks idle.
    """
    ulysses = math.gcd(sequence, num_heads)
    return sequence // ulysses, ulysses


def valid_pairs(world_size: int, num_heads: int) -> list[tuple[int, int]]:
    """All (ulysses, ring) that a world of this size and a model with these heads can use."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    return [
        (ulysses, ring)
        for ulysses in divisors
        for ring in divisors
        if num_heads % ulysses == 0 and world_size % (ulysses * ring) == 0
    ]


def fixed_sizes(world_size: int, num_heads: int, ulysses: int | None, ring: int | None) -> ParallelSizes:
    """The sizes that `--ulysses_size` and `--ring_size` name (None: 1), the other ranks being data parallel.

    Raises:
        ValueError: listing the pairs that are possible.
    """
    ulysses, ring = ulysses or 1, ring or 1
    pairs = valid_pairs(world_size, num_heads)
    if (ulysses, ring) not in pairs:
        listed = ", ".join(f"{u} x {r}" for u, r in pairs)
        raise ValueError(
            f"--ulysses_size {ulysses} x --ring_size {ring} is not possible with {world_size} ranks and {num_heads} "
            f"heads (Ulysses divides the heads, the product divides the ranks): choose Ulysses x ring from {listed}"
        )
    return ParallelSizes(world_size // (ulysses * ring), ring, ulysses)


def generation_sizes(
    world_size: int, num_heads: int, *, cfg: int = 1, ulysses: int = 0, ring: int = 0
) -> ParallelSizes:
    """How the ranks divide one video; `data` of the result are the groups that the guidance's branches are dealt to.

    All ranks work: a size that is 0 follows from the others, both from the heads (`split_sequence`).

    Raises:
        ValueError: listing every combination that is possible.
    """
    if 1 <= cfg <= len(BRANCHES) and world_size % cfg == 0:
        branch = world_size // cfg
        if ulysses or ring:
            pair = (ulysses or max(1, branch // ring), ring or max(1, branch // ulysses))
        else:
            pair = split_sequence(branch, num_heads)[::-1]
        if pair[0] * pair[1] == branch and num_heads % pair[0] == 0:
            return ParallelSizes(cfg, ring=pair[1], ulysses=pair[0])
    choices = [
        f"{groups} x {u} x {r}"
        for groups in range(1, len(BRANCHES) + 1)
        if world_size % groups == 0
        for u, r in valid_pairs(world_size // groups, num_heads)
        if groups * u * r == world_size
    ]
    raise ValueError(
        f"--cfg_size {cfg}, --ulysses_size {ulysses or 'auto'}, --ring_size {ring or 'auto'} do not divide {world_size} "
        f"ranks and {num_heads} heads: choose cfg x Ulysses x ring from {', '.join(choices)}"
    )


class Parallel:
    """What the rest of the program needs to know about its place among the ranks. Without a mesh: alone."""

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

        Raises:
            ValueError: if the ranks have chosen different sizes.
        """
        if sizes.world == 1:
            return cls.single(device)
        chosen: list[Any] = [None] * sizes.world
        dist.all_gather_object(chosen, sizes)
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
        """`value` of every rank, in rank order, on every rank. Small things only: they are pickled between our ranks."""
        if self.is_alone:
            return [value]
        gathered: list[Any] = [None] * self.sizes.world
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast_from_rank0(self, find: Callable[[], Any]) -> Any:
        """What `find` returns on rank 0, however long it takes, on every rank; so is a ValueError that it raises."""
        found: list[Any] = [None, None]
        try:
            if self.is_main:
                found[0] = find()
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


def environment_world_size() -> int:
    """Number of processes that torchrun started (1 without torchrun)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def environment_rank() -> int:
    """This process's rank among those that torchrun started (0 without torchrun)."""
    return int(os.environ.get("RANK", "0"))


def rank_device(name: str) -> str:
    """The device of this rank: `cuda` becomes `cuda:LOCAL_RANK` under torchrun."""
    if environment_world_size() > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name


def start_process_group(device: torch.device, timeout_seconds: float) -> None:
    """Join the ranks that torchrun started: NCCL between GPUs, gloo between CPUs and for objects.

    Raises:
        ValueError: if the ranks do not find each other in time.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        store = _own_part(store, rank, world_size, timeout_seconds)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (dist.DistError, RuntimeError) as error:
        raise ValueError(
            f"the {environment_world_size()} ranks did not find each other "
            f"({' '.join(str(error).split())[:160]}): are all of them started, and is MASTER_ADDR reachable?"
        ) from error


def stop_process_group(*, together: bool = False) -> None:
    """Leave the ranks, all of which do so; `together`: when all of them have come here."""
    if together:
        dist.barrier()
    dist.destroy_process_group()


def _own_part(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> dist.Store:
    """A part of the store that only these processes use, agreed on among them.

    torchrun keeps one store for all its restarts. Under the same keys, ranks that it starts again would read the addresses
    of those that died, and wait for them. Its count of restarts does not tell starts apart: on several machines it differs.
    So every rank leaves a name that is new, and rank 0 answers to names until one of every rank has thanked.

    Raises:
        RuntimeError: if ranks are missing when the time is over.
    """
    if rank > 0:
        name = secrets.token_hex(8)
        store.set(f"refalign/rank/{rank}", name)
        part = store.get(f"refalign/answer/{name}").decode()
        store.set(f"refalign/{part}/{rank}", "here")
        return dist.PrefixStore(f"refalign/{part}", store)
    part, missing, answered = secrets.token_hex(8), set(range(1, world_size)), dict[int, bytes]()
    deadline = time.monotonic() + timeout_seconds
    while missing:
        for other in sorted(missing):
            if store.check([f"refalign/rank/{other}"]):
                name = store.get(f"refalign/rank/{other}")
                if answered.get(other) != name:
                    answered[other] = name
                    store.set(f"refalign/answer/{name.decode()}", part)
            if store.check([f"refalign/{part}/{other}"]):
                missing.remove(other)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(missing)} did not come within {timeout_seconds:.0f} seconds")
        time.sleep(0.02)
    return dist.PrefixStore(f"refalign/{part}", store)


def is_first_to_fail() -> bool:
    """True on one rank of those that fail, the one to tell the user: what follows elsewhere follows from it.

    Before the ranks have met they all fail alike, and rank 0 tells.
    """
    if not dist.is_initialized():
        return environment_rank() == 0
    try:
        return dist.distributed_c10d._get_default_store().add("refalign_failures", 1) == 1
    except (dist.DistError, RuntimeError):
        return True  # the rank that holds the store is gone: better twice than not at all


def report_error_once(tell: Callable[[], None]) -> None:
    """Have one of the ranks that end early tell the user, the first; what follows elsewhere follows from it.

    The others wait until it has told, because torchrun ends all ranks as soon as one is gone. Before the ranks have met
    they mostly fail alike: rank 0 tells, and a rank that is still there some seconds later failed for a reason of its own.
    """
    if not dist.is_initialized():
        if environment_rank() > 0:
            time.sleep(_SECONDS_TO_TELL)
        tell()
        return
    is_first = is_first_to_fail()
    if is_first:
        tell()
    # The store may be gone, or the first rank before it could tell.
    with suppress(dist.DistError, RuntimeError):
        store = dist.distributed_c10d._get_default_store()
        if is_first:
            store.set("refalign_told", "")
        else:
            store.wait(["refalign_told"], timedelta(seconds=_SECONDS_TO_TELL))


_GONE = ("connection closed", "connection reset", "connection refused", "broken pipe")
_LOST = (
    *_GONE,
    *("timed out", "timeout", "socket", "remote process exited"),
    *("nccl communicator was aborted", "ncclremoteerror"),
)


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error means that another rank went away, so that a rank that meets it may leave the telling to rank 0.

    Narrower than `lost_rank`: who has waited in vain for gloo's time-out must speak, as rank 0 may be the one that hangs.
    """
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _GONE)


def lost_rank(error: BaseException, timeout_seconds: float) -> str | None:
    """What to say if an error of torch.distributed means that another rank is gone or does not answer; else None.

    What it raises for that is a RuntimeError that only its text tells apart; it may be the cause of what came up.
    """
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).lower()
        if isinstance(cause, RuntimeError) and any(sign in text for sign in _LOST):
            if "timed out" in text or "timeout" in text:
                return (
                    f"a rank did not answer for {timeout_seconds / 60:g} minutes (--timeout_minutes): it hangs or is "
                    "much slower than the others"
                )
            return (
                "a rank ended without saying why: it may have been killed, for instance for want of memory "
                "(torchrun names it below, the system's log tells more)"
            )
        cause = cause.__cause__
    return None
