"""Shares, chunks and pools of processes: the same results in the same order however the work is spread."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refalign_ext.data import worker_pool
from refalign_ext.data.pieces import Share, chunks
from refalign_ext.data.worker_pool import run_each


def test_shares_take_every_item_once() -> None:
    items = list(range(23))
    for count in (1, 2, 3, 8, 30):
        taken = [Share(index, count).take(items) for index in range(count)]
        assert sorted(sum(taken, [])) == items
        assert max(map(len, taken)) - min(map(len, taken)) <= 1
    assert Share.parse("2/8") == Share(2, 8)
    assert Share().take("abc") == ["a", "b", "c"]


@pytest.mark.parametrize("text", ["8/8", "1/0", "-1/2", "1", "1/2/3", "a/b", "", "1.0/2", "٣/٤"])
def test_a_share_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="--shard .*0/"):
        Share.parse(text)


def test_share_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Share.from_environment() == Share(0, 1)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="RANK='3' and WORLD_SIZE='1'"):
        Share.from_environment()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Share.from_environment() == Share(3, 4)


def test_chunks() -> None:
    assert chunks(7, 3) == [range(0, 3), range(3, 6), range(6, 7)]
    assert chunks(0, 3) == []


SCRIPT = """
import os, signal, sys, time
from worker_pool import begin_row, run_each

def late(number):
    time.sleep(0.02 * (5 - number % 5))  # earlier items take longer
    if number == 99:
        raise ValueError("item 99 is bad")
    if number >= 200:
        try:
            begin_row(number)
        except ValueError as error:
            return "the process that read this row died" in str(error), 0
    if number in (98, 205, 209):
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 97:
        os.write(1, f"process {os.getpid()}\\n".encode())  # at once: two processes write to one pipe
        time.sleep(60)
    return number * number, os.getpid()

if __name__ == "__main__":
    processes = set()
    try:
        for item, (result, process) in run_each(late, eval(sys.argv[1]), workers=2, description=""):
            processes.add(process)
            print(item, result)
    except (ValueError, OSError) as error:
        print(type(error).__name__, error)
    print(os.getpid() not in processes and len(processes))
"""


def start(folder: Path, items: str) -> subprocess.Popen[str]:
    """A pool at work on `items`, by a script that imports nothing but the module: workers start quickly."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), items]
    environment = os.environ | {"PYTHONPATH": str(Path(worker_pool.__file__).parent)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def lines(folder: Path, items: str) -> list[str]:
    return start(folder, items).communicate(timeout=60)[0].splitlines()


def test_results_come_in_order_and_errors_after_those_before_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--workers -1"):
        next(run_each(abs, [1], workers=-1, description=""))
    assert list(run_each(abs, [-2, 1, -3], workers=0, description="")) == [(-2, 2), (1, 1), (-3, 3)]
    assert list(run_each(abs, [], workers=2, description="")) == []
    squares = [f"{n} {n * n}" for n in range(12)]
    assert lines(tmp_path, "range(12)") == [*squares, "2"]
    assert lines(tmp_path, "[*range(12), 99, 1, 2]") == [*squares, "ValueError item 99 is bad", "2"]
    *before, message, _ = lines(tmp_path, "[0, 98]")
    assert (
        message == "OSError a worker process was killed (too little memory?): run again with fewer --workers"
    )
    assert before in ([], squares[:1])


def test_rows_that_crash_a_worker_are_isolated(tmp_path: Path) -> None:
    *results, _ = lines(tmp_path, "range(200, 212)")
    assert results == [f"{n} {True if n in (205, 209) else n * n}" for n in range(200, 212)]


def test_no_process_outlives_one_that_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "[97, 97]")
    workers = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    process.kill()
    process.wait()
    process.stdout.close()
    limit = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < limit, "a worker is still there"
        time.sleep(0.05)
