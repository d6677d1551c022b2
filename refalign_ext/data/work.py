"""Long work cut into pieces: shares for several machines, chunks that are finished one by one, and a pool of processes."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 4  # pieces per worker that are handed out or wait for an earlier one to finish


@dataclass(frozen=True)
class Share:
    """The part of the work that one of several machines or processes does.

    Attributes:
        index: which part, from 0.
        count: how many parts there are.

    Raises:
        ValueError: naming --shard, if there is no such part.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ValueError(
                f"--shard {self.index}/{self.count}: there is no such part; of n parts give 0/n to n-1/n"
            )

    @classmethod
    def parse(cls, text: str) -> Share:
        """The share of "2/8": the third of eight.

        Raises:
            ValueError: naming --shard, for anything else.
        """
        if not re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", text):
            raise ValueError(f"--shard {text!r}: give part/parts counted from 0, such as 0/8 to 7/8")
        index, count = text.split("/")
        return cls(int(index), int(count))

    @classmethod
    def from_environment(cls) -> Share:
        """RANK of WORLD_SIZE as torchrun sets them; the whole if it does not.

        Raises:
            ValueError: if they are not numbers that fit together.
        """
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        try:
            return cls.parse(f"{rank}/{size}")
        except ValueError:
            raise ValueError(
                f"the environment has RANK={rank!r} and WORLD_SIZE={size!r}: start with torchrun or unset both"
            ) from None

    def take(self, items: Sequence[T]) -> list[T]:
        """Every item whose position leaves the remainder `index` when divided by `count`."""
        return list(items[self.index :: self.count])


def chunks(rows: int, size: int) -> list[range]:
    """The rows 0 to `rows` - 1 in pieces of `size`; the last may be shorter.

    Raises:
        ValueError: if `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"a piece of {size} rows is none: give at least 1")
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def run_each(
    work: Callable[[T], R],
    items: Sequence[T],
    *,
    workers: int,
    description: str,
    weight: Callable[[T], int] = lambda item: 1,
    unit: str = "row",
) -> Iterator[tuple[T, R]]:
    """Does `work` for every item and yields (item, result) in the order of the items, behind a progress bar.

    A few results per worker are held back at most. What `work` raises comes out here, after the results before it.
    If the consumer stops, or the user presses Ctrl-C, pieces that are under way are finished or broken off, and no
    process is left behind, not even if this one is killed.

    Args:
        work: with `workers` above 0 it, its items and its results have to be picklable.
        workers: processes to start (by spawning, with one thread of arithmetic each); 0 works in this process.
        description: what the progress bar says.
        weight: how many of `unit` an item counts for in the bar.

    Raises:
        ValueError: if `workers` is negative.
        OSError: if a worker is killed from outside, such as for want of memory.
    """
    if workers < 0:
        raise ValueError(f"--workers {workers}: give 0 (this process alone) or more")
    return _run_each(work, items, workers, description, weight, unit)


def _run_each(
    work: Callable[[T], R],
    items: Sequence[T],
    workers: int,
    description: str,
    weight: Callable[[T], int],
    unit: str,
) -> Iterator[tuple[T, R]]:
    from tqdm import tqdm

    total = sum(weight(item) for item in items)
    with tqdm(
        total=total, desc=description, unit=unit, unit_scale=unit == "B", dynamic_ncols=True, disable=None
    ) as bar:
        pairs = _in_pool(work, items, min(workers, len(items))) if workers else _here(work, items)
        try:
            for item, result in pairs:
                bar.update(weight(item))
                yield item, result
        finally:
            pairs.close()


def _here(work: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[T, R]]:
    for item in items:
        yield item, work(item)


def _in_pool(work: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[tuple[T, R]]:
    import multiprocessing

    if not items:
        return
    # Forking a process whose libraries run threads may leave a lock taken for ever.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    try:
        rest, waiting = iter(items), deque[tuple[T, "Future[R]"]]()
        for item in rest:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) >= _AHEAD * workers:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)
    except BrokenProcessPool:  # told when work is handed out, or when a result is asked for
        raise OSError(
            "a worker process was killed (too little memory?): run again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _first(waiting: deque[tuple[T, Future[R]]]) -> tuple[T, R]:
    item, future = waiting.popleft()
    return item, future.result()


def _begin_worker() -> None:
    import signal
    from multiprocessing import parent_process

    from tqdm import tqdm

    # Ctrl-C reaches every process of a terminal: workers end at once and say nothing.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["OMP_NUM_THREADS"] = "1"
    # A lock between processes, which tqdm would make, is reported as leaked when Ctrl-C ends this one.
    tqdm.set_lock(threading.RLock())
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Ends this process once its parent is gone: a worker waiting for work would not notice."""
    from multiprocessing.connection import wait

    wait([sentinel])
    os._exit(1)
