"""Killed and pre-empted runs end with the weights of a run that was left alone, bit by bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.helpers.agents import agent, curve, state_hash, until

pytestmark = pytest.mark.timeout(400)

STEPS = 6  # two before the first signal, two after the second
LAST = f"step-{STEPS:08d}"
RUN = ("--steps", STEPS, "--save_every", 2, "--optimizer", "adamw")


class Undisturbed:
    """What a run on some number of ranks gives when nobody kills it."""

    def __init__(self, folder: Path, ranks: int) -> None:
        began = time.monotonic()
        with agent(folder, ranks, *RUN) as job:
            assert job.wait(180) == 0, job.said()
        self.ranks, self.seconds = ranks, time.monotonic() - began
        self.hash = state_hash(folder / "run" / "checkpoints" / LAST)
        self.curve = curve(folder / "run")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Undisturbed]:
    known: dict[int, Undisturbed] = {}

    def find(ranks: int) -> Undisturbed:
        if ranks not in known:
            known[ranks] = Undisturbed(tmp_path_factory.mktemp("undisturbed") / str(ranks), ranks)
        return known[ranks]

    return find


def assert_same(folder: Path, expected: Undisturbed) -> None:
    assert state_hash(folder / "run" / "checkpoints" / LAST) == expected.hash
    assert curve(folder / "run") == expected.curve
    assert not list((folder / "run" / "checkpoints").glob("*.part"))


def has_logged(run: Path, step: int) -> Callable[[], bool]:
    path = run / "metrics.jsonl"
    return lambda: path.exists() and path.read_bytes().count(b"\n") >= step


@pytest.mark.parametrize("whom", ["torchrun", pytest.param("one rank", marks=pytest.mark.slow)])
def test_a_run_that_is_preempted_and_then_loses_a_rank_loses_nothing(
    undisturbed: Callable[[int], Undisturbed], tmp_path: Path, whom: str
) -> None:
    settings = ("--steps", STEPS, "--save_every", 1000, "--optimizer", "adamw")
    with agent(tmp_path, 2, *settings, patch=linger) as job:
        until(has_logged(tmp_path / "run", 2), 150, job.said)
        os.kill(job.process.pid if whom == "torchrun" else job.pid(1), signal.SIGTERM)
        assert job.wait(180) == (-signal.SIGTERM if whom == "torchrun" else 1)
        assert job.own().count("the same command goes on from the last checkpoint") == 1, job.said()
        assert "error: " not in job.own() and "Traceback" not in job.own()
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    assert step <= STEPS - 2
    with agent(tmp_path / "again", 2, *RUN, "--out", tmp_path / "run", restarts=2, patch=linger) as job:
        until(has_logged(tmp_path / "run", step + 1), 150, job.said)
        assert job.kill(1)
        assert job.wait(180) == 0, job.said()
        assert job.attempts() == 2
        assert job.said().count("resuming from") == 2
        # One rank tells, or none if torchrun was quicker.
        assert job.said().count("error: ") <= 1 and "Traceback" not in job.own()
    assert_same(tmp_path, undisturbed(2))


def linger(rank: int) -> None:
    """Steps long enough for a signal to come in time."""
    from tests.helpers.tiny_training import Source

    sample = Source.sample

    def slowly(self: Source, index: int) -> object:
        time.sleep(0.1)
        return sample(self, index)

    Source.sample = slowly


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_random_moments_to_kill(
    undisturbed: Callable[[int], Undisturbed], tmp_path: Path, ranks: int
) -> None:
    expected, chance, told = undisturbed(ranks), random.Random(ranks), []
    seconds = expected.seconds
    for case in range(60):
        folder = tmp_path / str(case)
        with agent(folder, ranks, *RUN, restarts=3) as job:
            # From the first moment of a rank to the last; every third run is hit again while it recovers.
            for attempt in range(2 if case % 3 == 0 else 1):
                rank = chance.randrange(ranks)
                job.pid(rank, attempt)
                time.sleep(chance.uniform(0, seconds))
                log = folder / "run" / "metrics.jsonl"
                logged = log.read_bytes().count(b"\n") if log.exists() else 0
                if not job.kill(rank, attempt):
                    seconds *= 0.9
                    break
                told.append(logged)
            assert job.wait(180) == 0, job.said()
        assert_same(folder, expected)
        shutil.rmtree(folder)
        if len(told) >= 20:
            break
    assert len(told) >= 20
    print(f"{ranks} ranks, {expected.seconds:.1f} s: killed after {told} steps; all hashes {expected.hash}")
    assert len(set(told)) > 3, "too few different moments"


ROOT = Path(__file__).resolve().parents[2]
TINY = (
    *("--device", "cpu", "--threads", "1", "--precision", "fp32", "--log_every", "1", "--preview_every", "0"),
    *("--cache_clips", "24", "--cache_views", "2", "--cache_free_clips", "16", "--validate_every", "0"),
    *("--schedule", "constant", "--warmup_steps", "0", "--batch_size", "1", "--out", "run"),
)


class Torchrun:
    """torchrun and the ranks it started."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process, self.folder = process, folder

    def ranks(self) -> dict[int, int]:
        """Process id by rank, of those that run."""
        found = {}
        for tasks in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in tasks.read_text().split():
                with suppress(OSError):
                    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    found |= {int(word[5:]): int(pid) for word in variables if word.startswith(b"RANK=")}
        return found

    def said(self) -> str:
        return (self.folder / "said.txt").read_text(errors="replace").replace("\r", "\n")

    def wait(self) -> int:
        return self.process.wait(600)


@contextmanager
def torchrun(folder: Path, ranks: int, *arguments: object, restarts: int = 0) -> Iterator[Torchrun]:
    """`torchrun train_refalign.py` as users start it; nothing of it is left when the block ends."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += [f"--max-restarts={restarts}", str(ROOT / "train_refalign.py"), *TINY, *map(str, arguments)]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    variables.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", None)
    with (folder / "said.txt").open("ab") as said:
        process = subprocess.Popen(command, cwd=folder, env=variables, stdout=said, stderr=said)
    job = Torchrun(process, folder)
    try:
        yield job
    finally:
        for pid in (*job.ranks().values(), process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.mark.skipif(
    not (ROOT / "assets" / "r2v-tiny" / "teacher").exists(), reason="assets/r2v-tiny lacks its parts"
)
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_torchrun_restarts_the_program_and_passes_signals_on(tmp_path: Path) -> None:
    whole, killed, preempted = (tmp_path / name for name in ("whole", "killed", "preempted"))
    whole.mkdir()
    with torchrun(whole, 2, "--steps", STEPS, "--save_every", 2) as job:
        assert job.wait() == 0, job.said()
    for folder in (killed, preempted):
        shutil.copytree(whole / "run" / "cache", folder / "run" / "cache")
    with torchrun(killed, 2, "--steps", STEPS, "--save_every", 2, restarts=3) as job:
        until((killed / "run" / "checkpoints" / "step-00000002").exists, 600, job.said)
        os.kill(job.ranks()[1], signal.SIGKILL)
        assert job.wait() == 0, job.said()
        assert "resuming from" in job.said()
    with torchrun(preempted, 2, "--steps", STEPS, "--save_every", 1000) as job:
        until((preempted / "run" / "metrics.jsonl").exists, 600, job.said)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() != 0
        assert job.said().count("the same command goes on from the last checkpoint") == 1, job.said()
    with torchrun(preempted, 2, "--steps", STEPS, "--save_every", 2) as job:
        assert job.wait() == 0, job.said()
    for folder in (killed, preempted):
        assert curve(folder / "run") == curve(whole / "run")
        hashes = [state_hash(place / "run" / "checkpoints" / LAST) for place in (folder, whole)]
        assert hashes[0] == hashes[1]
