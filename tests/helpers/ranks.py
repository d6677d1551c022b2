"""Run a function on several ranks: forked processes that meet through a file, so a case costs tenths of a second.

Every case is isolated: its own processes, its own rendezvous and a time limit, after which all ranks are killed.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 150.0) -> list[Any]:
    """What `function(rank, *args)` returns on each of `world_size` gloo ranks; results are pickled.

    Raises:
        AssertionError: if a rank fails (with its traceback) or the time limit passes (naming the ranks still running).
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        queues = [context.SimpleQueue() for _ in range(world_size)]
        store = os.path.join(folder, "store")
        ranks = [
            context.Process(
                target=_main, args=(function, rank, world_size, store, queues[rank], timeout, args)
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        results: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(results) < world_size:
                for rank, queue in enumerate(queues):
                    if rank not in results and not queue.empty():
                        results[rank] = pickle.loads(queue.get())
                    elif rank not in results and not ranks[rank].is_alive() and queue.empty():
                        results[rank] = (False, f"rank {rank} died with exit code {ranks[rank].exitcode}")
                failed = [text for succeeded, text in results.values() if not succeeded]
                if failed:
                    raise AssertionError("\n".join(failed))
                if time.monotonic() > deadline:
                    running = [rank for rank in range(world_size) if rank not in results]
                    raise AssertionError(f"ranks {running} still run after {timeout} s")
                time.sleep(0.005)
        finally:
            for process in ranks:
                process.join(timeout=5 if len(results) == world_size else 0)
                if process.is_alive():
                    process.kill()
                    process.join()
        return [results[rank][1] for rank in range(world_size)]


def _main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    queue: Any,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        # Pickled here: the queue would pass tensors as handles to memory that dies with this process.
        queue.put(pickle.dumps((True, function(rank, *args))))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - whatever happened on the rank is the test's result
        queue.put(pickle.dumps((False, f"rank {rank}:\n{traceback.format_exc()}")))
    finally:
        os._exit(0)
