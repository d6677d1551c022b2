"""Batches fetched ahead by worker processes, which go on anywhere: their state is one global position."""

from __future__ import annotations

import atexit
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader

from refalign_ext.data.loading.dataset import ClipDataset, LoadedSample
from refalign_ext.data.sampling.order import Order, Place


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
            with suppress(RuntimeError):  # a worker that was killed is not missed any more
                batches._shutdown_workers()


def _as_it_is(samples: list[LoadedSample]) -> list[LoadedSample]:
    return samples


def _begin_worker(_: int) -> None:
    # Ctrl-C reaches every process of a terminal; the training process decides when it is time to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker that is ended while its samples are being passed on must not wait for Python to clean up: the thread that
    # passes them would be stopped inside of C++ code, which aborts the process.
    atexit.register(os._exit, 0)
