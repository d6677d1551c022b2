"""Process group: joining the ranks that torchrun started, leaving them, and reporting a failure once."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from refalign_ext.request import environment_number

_SECONDS_TO_REPORT = 5.0


def environment_world_size() -> int:
    """Number of processes that torchrun started (1 without torchrun)."""
    return environment_number("WORLD_SIZE", 1)


def environment_rank() -> int:
    """This process's rank among those that torchrun started (0 without torchrun)."""
    return environment_number("RANK", 0)


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
        store = _store_of_this_start(store, rank, world_size, timeout_seconds)
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


def _store_of_this_start(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> dist.Store:
    """The rendezvous store under a prefix that rank 0 chooses and only the processes of this start know.

    torchrun keeps one store for all its restarts: under the same keys, restarted ranks would wait for those that died. Its
    count of restarts differs between machines. So every rank leaves a new name for itself, and rank 0 replies until every
    rank has acknowledged.
    """
    if rank > 0:
        name = secrets.token_hex(8)
        store.set(f"refalign/rank/{rank}", name)
        prefix = store.get(f"refalign/reply/{name}").decode()
        store.set(f"refalign/{prefix}/{rank}", "acknowledged")
        return dist.PrefixStore(f"refalign/{prefix}", store)
    prefix, missing, replied = secrets.token_hex(8), set(range(1, world_size)), dict[int, bytes]()
    deadline = time.monotonic() + timeout_seconds
    while missing:
        for other in sorted(missing):
            if store.check([f"refalign/rank/{other}"]):
                name = store.get(f"refalign/rank/{other}")
                if replied.get(other) != name:
                    replied[other] = name
                    store.set(f"refalign/reply/{name.decode()}", prefix)
            if store.check([f"refalign/{prefix}/{other}"]):
                missing.remove(other)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(missing)} did not come within {timeout_seconds:.0f} seconds")
        time.sleep(0.02)
    return dist.PrefixStore(f"refalign/{prefix}", store)


def report_error_once(report: Callable[[], None]) -> None:
    """Have the first of the ranks that end early tell the user.

    The others wait until it has told, because torchrun ends all ranks as soon as one is gone. Before the ranks have met
    they mostly fail alike: rank 0 tells, and a rank that is still there some seconds later failed for a reason of its own.
    """
    if not dist.is_initialized():
        if environment_rank() > 0:
            time.sleep(_SECONDS_TO_REPORT)
        report()
        return
    store = dist.distributed_c10d._get_default_store()
    try:
        is_first = store.add("refalign_failures", 1) == 1
    except (dist.DistError, RuntimeError):
        is_first = True  # the rank that holds the store is gone: better twice than not at all
    if is_first:
        report()
    with suppress(dist.DistError, RuntimeError):  # the store or the first rank may be gone
        if is_first:
            store.set("refalign_reported", "")
        else:
            store.wait(["refalign_reported"], timedelta(seconds=_SECONDS_TO_REPORT))


# What torch.distributed raises for a lost rank is a RuntimeError that only its text tells apart.
_GONE = ("connection closed", "connection reset", "connection refused", "broken pipe")
_NO_ANSWER = ("timed out", "timeout")
_LOST = (*_GONE, "socket", "remote process exited", "nccl communicator was aborted", "ncclremoteerror")


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error means that another rank went away, so that a rank that meets it may leave the telling to rank 0.

    Narrower than `lost_rank`: who has waited in vain for gloo's time-out must speak, as rank 0 may be the one that hangs.
    """
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _GONE)


def lost_rank(error: BaseException, timeout_seconds: float) -> str | None:
    """What to say if an error, or what it came from, means that another rank is gone or does not answer; else None."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).lower() if isinstance(cause, RuntimeError) else ""
        if any(sign in text for sign in _NO_ANSWER):
            return (
                f"a rank did not answer for {timeout_seconds / 60:g} minutes (training: --timeout_minutes): it hangs "
                "or is much slower than the others"
            )
        if any(sign in text for sign in _LOST):
            return (
                "a rank ended without saying why: it may have been killed, for instance for want of memory "
                "(torchrun names it below, the system's log tells more)"
            )
        cause = cause.__cause__
    return None
