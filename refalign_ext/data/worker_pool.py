"""A pool of worker processes: results come in the order of the items, and rows that crash a worker are isolated."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)

_AHEAD = 4  # items per worker that are handed out or wait for an earlier one to finish


class RowCrashedWorker(ValueError):
    """A worker died while it worked on this row."""


class _Worker(NamedTuple):
    work: Callable[[Any], Any]
    row_file: Path  # outlives the process, and says which row it is at
    crashed: frozenset[int]


_worker: _Worker | None = None  # of this process, if it is one


def begin_row(row: int) -> None:
    """Notes that this process is about to work on a row, so that the pool knows which row a worker died of.

    Raises:
        RowCrashedWorker: if a worker already did: go on without the row.
    """
    if _worker is None:
        return
    if row in _worker.crashed:
        raise RowCrashedWorker(
            "the process that read this row died (a fault in a decoder, or too little memory): remove the row"
        )
    _worker.row_file.write_text(str(row))


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
    If the consumer stops, or the user presses Ctrl-C, items that are under way are finished or broken off, and no
    process is left behind, not even if this one is killed.

    If a worker dies while `work` is at a row (see `begin_row`), the items under way are done again by one process alone;
    the row that it dies of again is known from then on.

    Args:
        work: with `workers` above 0 it, the items and the results have to be picklable; a worker gets it once.
        workers: processes to start (by spawning, with one thread of arithmetic each); 0 works in this process.
        weight: how many of `unit` an item counts for in the bar.

    Raises:
        ValueError: if `workers` is negative.
        OSError: if a worker is killed, such as for want of memory, without having begun a row.
    """
    from tqdm import tqdm

    if workers < 0:
        raise ValueError(f"--workers {workers}: give 0 (this process alone) or more")
    results = _isolating_pool(work, items, min(workers, len(items))) if workers else map(work, items)
    with tqdm(
        total=sum(map(weight, items)),
        desc=description,
        unit=unit,
        unit_scale=unit == "B",
        dynamic_ncols=True,
        disable=None,
    ) as bar:
        try:
            for item, result in zip(items, results):
                bar.update(weight(item))
                yield item, result
        finally:
            if workers:
                results.close()


def _isolating_pool(work: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    crashed, done, alone_until = set[int](), 0, 0
    with tempfile.TemporaryDirectory(prefix="refalign-workers-") as name:
        folder = Path(name)
        while done < len(items):
            is_alone = done < alone_until
            todo = items[done : alone_until if is_alone else None]
            try:
                for result in _pool(work, todo, 1 if is_alone else workers, folder, frozenset(crashed)):
                    done += 1
                    yield result
            except BrokenProcessPool:  # told when work is handed out, or when a result is asked for
                begun = {int(text) for file in folder.iterdir() if (text := file.read_text())}
                for file in folder.iterdir():
                    file.unlink()
                if not begun:
                    raise OSError(
                        "a worker process was killed (too little memory?): run again with fewer --workers"
                    ) from None
                if is_alone:
                    crashed |= begun
                else:
                    logger.warning("a worker process died: looking for the row that it died of")
                    alone_until = done + _AHEAD * workers


def _pool(
    work: Callable[[T], R], items: Sequence[T], workers: int, folder: Path, crashed: frozenset[int]
) -> Iterator[R]:
    import multiprocessing

    # Forking a process whose libraries run threads may leave a lock taken for ever.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (work, folder, crashed))
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_work_on, item))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(work: Callable[[Any], Any], folder: Path, crashed: frozenset[int]) -> None:
    import signal
    from multiprocessing import parent_process

    from tqdm import tqdm

    global _worker
    _worker = _Worker(work, folder / str(os.getpid()), crashed)
    # Ctrl-C reaches every process of a terminal: workers end at once and say nothing.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["OMP_NUM_THREADS"] = "1"
    # A lock between processes, which tqdm would make, is reported as leaked when Ctrl-C ends this one.
    tqdm.set_lock(threading.RLock())
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent_process().sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Ends this process once its parent is gone: a worker waiting for work would not notice."""
    from multiprocessing.connection import wait

    wait([sentinel])
    os._exit(1)


def _work_on(item: Any) -> Any:
    try:
        return _worker.work(item)
    finally:
        _worker.row_file.unlink(missing_ok=True)
