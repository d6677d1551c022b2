"""What goes wrong on one rank ends all of them, in time, with one line for the user."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import gather_full_tensors
from refalign_ext.distributed.sizes import ParallelSizes
from refalign_ext.training import run as launch
from tests.helpers.agents import agent
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_training import CPU, Source, build, change

pytestmark = pytest.mark.timeout(400)

RUN = ("--steps", 4, "--save_every", 2, "--optimizer", "adamw")


def at_sample(index: int, then: Callable[[], None]) -> None:
    """Do something on this rank before it gives the sample at a global position."""
    sample = Source.sample

    def patched(self: Source, position: int) -> object:
        if position == index:
            then()
        return sample(self, position)

    Source.sample = patched


def hang(rank: int) -> None:
    # Long enough for the others to give up, short enough for the test.
    at_sample(3, lambda: [time.sleep(0.1) for _ in range(60)])


def fill_disk(rank: int) -> None:
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def lack_a_file(rank: int) -> None:
    if rank == 1:
        launch.build_trainer = lambda *_, **others: raise_(
            FileNotFoundError("weights/dit.safetensors: no such file")
        )


def raise_(error: BaseException) -> None:
    raise error


def break_(rank: int) -> None:
    at_sample(3, lambda: raise_(RuntimeError("something\nbroke")))


def die(rank: int) -> None:
    at_sample(3, lambda: os.kill(os.getpid(), signal.SIGKILL))


def block_metrics(run: Path) -> None:
    run.mkdir()
    (run / "metrics.jsonl").symlink_to("/dev/full")


def block_checkpoints(run: Path) -> None:
    run.mkdir()
    (run / "checkpoints").write_text("a file")


CASES = {
    "a rank hangs": (hang, None, "a rank did not answer for 0.05 minutes"),
    "a rank is killed": (die, None, "a rank ended without saying why"),
    "a rank breaks": (break_, None, "RuntimeError: something"),
    "a rank lacks a file": (lack_a_file, None, "weights/dit.safetensors: no such file"),
    "no room for a rank's part of a checkpoint": (fill_disk, None, "could not be written (rank 1: "),
    "no room for the metrics": (None, block_metrics, "cannot be written (No space left on device)"),
    "a file where checkpoints go": (None, block_checkpoints, "checkpoints"),
    "a file where the run goes": (None, lambda run: run.write_text("a file"), "cannot be written"),
}


SLOW = ("a rank breaks", "no room for the metrics", "a file where checkpoints go")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES]
)
def test_one_line_and_the_end_of_all_ranks(tmp_path: Path, case: str) -> None:
    patch, prepare, message = CASES[case]
    if prepare is not None:
        prepare(tmp_path / "run")
    minutes = 0.05 if patch is hang else 1
    with agent(tmp_path, 2, *RUN, "--timeout_minutes", minutes, patch=patch) as job:
        assert job.wait(180) == 1, job.said()
        said = job.own()
    is_bug = patch is break_
    errors = [line for line in said.splitlines() if "error: " in line.lower()]
    assert len(errors) == 1 and message in errors[0], said
    assert errors[0].startswith("train_refalign.py: error: ") != is_bug
    assert said.count("Traceback") == is_bug
    assert not list((tmp_path / "run").glob("checkpoints/step-*[0-9]")) or patch in (hang, die, break_)


def test_ranks_that_do_not_come_are_named(tmp_path: Path) -> None:
    with agent(tmp_path, 2, *RUN, "--timeout_minutes", 0.03, patch=stay_away) as job:
        assert job.wait(180) == 1, job.said()
        assert "the 2 ranks did not find each other (ranks [1] did not come within 2 seconds)" in job.own()
        assert job.own().count("error: ") == 1


def stay_away(rank: int) -> None:
    if rank == 1:
        time.sleep(5)


POISONED = 3  # a global position: data rank 1's sample of the second step


class Poisoned(Source):
    """Latents that are not numbers, from `first` on, for one data rank."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.poisoned = range(first, last, 2)

    def sample(self, index: int):  # noqa: ANN201
        found = super().sample(index)
        if index in self.poisoned:
            found.latents.fill_(math.nan)
        return found


def poisoned_steps(rank: int, folder: Path) -> list[tuple[bool, dict[str, torch.Tensor], float]]:
    config = change(out=str(folder), batch_size=1, max_skipped_steps=2)
    trainer = build(config, Poisoned(POISONED, POISONED + 1), Parallel.create(ParallelSizes(2), CPU))
    found = []
    for _ in range(3):
        report = trainer.train_step()
        weights = gather_full_tensors({**trainer.trained.state_dict(), **trainer.ema.average})
        found.append((report.skipped, weights, report.values["loss/total"]))
    return found


def test_a_loss_that_is_no_number_on_one_rank_is_skipped_by_all(tmp_path: Path) -> None:
    ranks = run_ranks(poisoned_steps, 2, tmp_path)
    for steps in ranks:
        assert [skipped for skipped, _, _ in steps] == [False, True, False]
        assert math.isnan(steps[1][2]) and math.isfinite(steps[2][2])
        before, after, later = (weights for _, weights, _ in steps)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert any(not torch.equal(after[name], later[name]) for name in after)
        for weights, others in zip(steps, ranks[0], strict=True):
            assert all(torch.equal(weights[1][name], others[1][name]) for name in others[1])
    assert [path.name for path in (tmp_path / "skipped").iterdir()] == ["step-00000002.json"]
    told = json.loads((tmp_path / "skipped" / "step-00000002.json").read_text())
    names = [[row["sample"] for row in rows] for rows in told["samples_by_rank"]]
    assert names == [["sample-2"], ["sample-3"]]
    assert told["samples_by_rank"][1][0]["flow_error"] == "nan"
    assert isinstance(told["samples_by_rank"][0][0]["flow_error"], float)


def poison_all(rank: int) -> None:
    launch.build_trainer = lambda config, parallel, *_, **others: build(
        config, Poisoned(POISONED, 1000), parallel
    )


@pytest.mark.slow
def test_too_many_skipped_steps_end_the_run_on_all_ranks(tmp_path: Path) -> None:
    with agent(tmp_path, 2, *RUN, "--steps", 40, "--max_skipped_steps", 3, patch=poison_all) as job:
        assert job.wait(180) == 1, job.said()
        said = job.own()
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert "error: 3 steps in a row gave a loss or gradient that is not finite" in said
    assert sorted(path.name for path in (tmp_path / "run" / "skipped").iterdir()) == [
        f"step-0000000{step}.json" for step in (2, 3, 4)
    ]
