"""Mistakes are told in one line, bugs keep their traceback."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context

import click
import numpy as np
import pytest
import torch

from refalign_ext import config
from refalign_ext.data.loading.loader import ClipLoader
from refalign_ext.data.sampling.order import Order, SetOrder
from refalign_ext.data.sampling.sample_spec import Bucket
from refalign_ext.errors import describe_error


def caught(call, *arguments: object) -> BaseException:
    with pytest.raises(Exception) as found:  # noqa: B017 - any kind
        call(*arguments)
    return found.value


def in_a_process(call, *arguments: object) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(call, *arguments).result()


class Clips(torch.utils.data.Dataset):
    def __getitem__(self, entry: object) -> object:
        return config.recipe("papr")


def in_a_loader() -> None:
    rows = SetOrder(np.zeros(1, int), [Bucket(8, 8, 1)], [range(1)], 1, mixed_shards=1, seed=0, name="0")
    with closing(ClipLoader(Clips(), Order([rows]), batch_size=1, workers=1, start_method="fork")) as loader:
        next(loader)


def test_a_mistake_found_by_a_loader_process() -> None:
    assert "papr" in describe_error(caught(in_a_loader), "advice")


@pytest.mark.parametrize("carrier", [None, in_a_process])
def test_our_own_value_errors_are_mistakes_and_those_of_libraries_bugs(carrier) -> None:
    ours, numpys = (config.recipe, "papr"), (np.concatenate, [])
    for call, is_mistake in ((ours, True), (numpys, False)):
        error = caught(*call) if carrier is None else caught(carrier, *call)
        assert isinstance(error, ValueError)
        line = describe_error(error, "advice")
        assert ("papr" in line and "\n" not in line) if is_mistake else line is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file", "a.pt"), "[Errno 2] No such file: 'a.pt'"),
        (ConnectionError("a rank\nis gone"), "a rank is gone"),
        (click.UsageError("no such option"), "no such option"),
        (MemoryError(), "advice"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB."), "advice"),
        (RuntimeError("size mismatch"), None),
        (KeyError("x"), None),
        (ValueError("raised nowhere"), None),
    ],
)
def test_kinds_of_errors(error: BaseException, line: str | None) -> None:
    assert describe_error(error, "advice") == line


def test_an_allocation_that_fails_is_memory() -> None:
    assert describe_error(caught(torch.empty, 1 << 50), "advice") == "advice"


def test_the_traceback_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("REFALIGN_TRACEBACK", "1")
    assert describe_error(caught(config.recipe, "papr"), "advice")
    assert "in recipe" in capsys.readouterr().err
