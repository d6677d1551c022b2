"""Batches fetched ahead by worker processes, which go on anywhere: their state is one global position."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader

from refalign_ext.data.loading.dataset import ClipDataset, LoadedSample
from refalign_ext.data.sampling.order import Order, Place

_STOPS = (signal.SIGINT, signal.SIGTERM)


class PlaceBatches:
    """The batches of one data rank, endless, from a global position on.

    Args:
        order: of all ranks.
        start: global position of this rank's first batch.
        batch_size: samples of a batch.
        step: positions from one batch of this rank to its next.
    """

    def __init__(self, order: Order, start: int, batch_size: int, step: int) -> None:
        self.order, self.start, self.batch_size, self.step = order, start, batch_size, step

    def __iter__(self) -> PlaceIterator:
        return PlaceIterator(self)


class PlaceIterator:
    """Walks through the batches; its state is the position of the next one."""

    def __init__(self, batches: PlaceBatches) -> None:
        self.batches, self.next = batches, batches.start

    def __iter__(self) -> PlaceIterator:
        return self

    def __next__(self) -> list[Place]:
        first = self.next
        self.next += self.batches.step
        return [self.batches.order.at(first + offset) for offset in range(self.batches.batch_size)]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def stateful_loader(
    dataset: ClipDataset,
    batches: PlaceBatches,
    *,
    workers: int = 0,
    prefetch: int = 2,
    start_method: str = "spawn",
) -> StatefulDataLoader:
    """torchdata's loader of lists of `LoadedSample`; its own state goes on with the same number of workers and ranks."""
    options: dict[str, Any] = {}
    if workers:
        options = {"prefetch_factor": prefetch, "multiprocessing_context": start_method}
    with warnings.catch_warnings():
        # torchdata 0.11 calls what torch 2.8 and later deprecate, with no effect on either.
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        return StatefulDataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_begin_worker,
            **options,
        )


class ClipLoader:
    """Batches of `LoadedSample` for one data rank, in the order's order.

    Args:
        dataset, order: what is loaded, and when.
        batch_size: samples of a batch.
        data_rank, data_size: this rank among those that take turns.
        start: global position at which all ranks begin; this one begins `data_rank` batches later.
        workers: processes that load ahead; 0 loads when a batch is asked for.
        prefetch: batches that each worker loads ahead.
        start_method: how processes begin; forking one that uses threads or a GPU is not safe.
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
        prefetch: int = 2,
        start_method: str = "spawn",
    ) -> None:
        self.batch_size, self.data_rank, self.data_size = batch_size, data_rank, data_size
        self._dataset, self._order = dataset, order
        self._options: dict[str, Any] = {
            "workers": workers,
            "prefetch": prefetch,
            "start_method": start_method,
        }
        self._batches: Iterator[list[LoadedSample]] | None = None
        self.load_state_dict({"position": start})

    @property
    def position(self) -> int:
        """Global position of the first sample of this rank's next batch."""
        return self._start + (self._given * self.data_size + self.data_rank) * self.batch_size

    def __iter__(self) -> Iterator[list[LoadedSample]]:
        return self

    def __next__(self) -> list[LoadedSample]:
        if self._batches is None:
            with _deaf_children() if self._options["workers"] else nullcontext():
                self._batches = iter(self._loader)
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise OSError(
                f"a loader process was killed ({error}): with too little memory, or too little in /dev/shm, use fewer "
                "--data_workers"
            ) from error
        self._given += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Where all ranks are once each has given as many batches as this one; any number of ranks may go on there."""
        return {"position": self._start + self._given * self.data_size * self.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a state of this or another loader, of whatever number of ranks and workers."""
        self.close()
        self._start, self._given = state["position"], 0
        step = self.batch_size * self.data_size
        batches = PlaceBatches(self._order, self.position, self.batch_size, step)
        self._loader = stateful_loader(self._dataset, batches, **self._options)

    def close(self) -> None:
        """Ends the workers; the next batch starts new ones."""
        batches, self._batches = self._batches, None
        if batches is not None and hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


def _as_it_is(samples: list[LoadedSample]) -> list[LoadedSample]:
    return samples


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes that are started in the block do not hear `_STOPS`, from their first moment on.

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


def _begin_worker(_: int) -> None:
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
