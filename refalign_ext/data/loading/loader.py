"""Batches loaded ahead by worker processes, from any global position on."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker

from torch.utils.data import DataLoader

from refalign_ext.data.loading.dataset import ClipDataset, LoadedSample
from refalign_ext.data.sampling.order import Order, OrderEntry

_STOPS = (signal.SIGINT, signal.SIGTERM)


class ClipLoader:
    """Endless batches of `LoadedSample` for one data rank, in the order's order.

    Args:
        data_rank, data_size: this rank among those that take turns.
        start: global position at which all ranks begin; this one begins `data_rank` batches later.
        workers: processes that load ahead; 0 loads when a batch is asked for.
        start_method: how processes begin; forking one that uses threads or a GPU is not safe.

    Attributes:
        position: global position of the first sample of the next batch.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        order: Order,
        *,
        batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        start: int = 0,
        workers: int = 0,
        start_method: str = "spawn",
    ) -> None:
        self.batch_size, self._step = batch_size, batch_size * data_size
        self.position = start + data_rank * batch_size
        loader = DataLoader(
            dataset,
            batch_sampler=_batches(order, self.position, batch_size, self._step),
            num_workers=workers,
            collate_fn=list,
            worker_init_fn=begin_worker,
            multiprocessing_context=start_method if workers else None,
        )
        with workers_ignore_signals() if workers else nullcontext():
            self._loaded = iter(loader)

    def __iter__(self) -> Iterator[list[LoadedSample]]:
        return self

    def __next__(self) -> list[LoadedSample]:
        try:
            batch = next(self._loaded)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise OSError(
                f"a loader process was killed ({error}): with too little memory, or too little in /dev/shm, use fewer "
                "--data_workers"
            ) from error
        self.position += self._step
        return batch

    def close(self) -> None:
        """Ends the workers."""
        if hasattr(self._loaded, "_shutdown_workers"):
            self._loaded._shutdown_workers()


def _batches(order: Order, start: int, batch_size: int, step: int) -> Iterator[list[OrderEntry]]:
    while True:
        yield [order.at(start + offset) for offset in range(batch_size)]
        start += step


@contextmanager
def workers_ignore_signals() -> Iterator[None]:
    """Processes that are started in the block ignore SIGINT and SIGTERM, from their first moment on.

    Ctrl-C in a terminal and SIGTERM from torchrun reach the workers too, but the training process decides when to stop:
    it needs them for the step that it finishes and saves.
    """
    resource_tracker.ensure_running()  # starting it later would end the block
    on_death = signal.getsignal(signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # torch would raise in the middle of whatever runs when a worker dies; asking for a batch finds out as well.
        if on_death is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_death)


def begin_worker(_: int) -> None:
    """Ties a worker to its parent: the signals that it ignores would else let it live on."""
    if hasattr(signal, "sigtimedwait"):
        threading.Thread(target=_end_with_parent, daemon=True).start()
    else:  # macOS: without a way to tell who sends it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    # A worker that is ended while its samples are being passed on must not wait for Python to clean up: the thread that
    # passes them would be stopped inside of C++ code, which aborts the process.
    atexit.register(os._exit, 0)


def _end_with_parent() -> None:
    """Ends this process when its parent says so with SIGTERM, or is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == parent.pid:
        heard = signal.sigtimedwait([signal.SIGTERM], 1.0)
        if heard is not None and heard.si_pid == parent.pid:
            break
    os._exit(0)
