"""`python -m refalign_ext ablate` as its users run it, in tiny numbers."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from refalign_ext.checkpoint.checkpointer import checkpoints_in, read_meta
from refalign_ext.cli import main
from refalign_ext.sprites.ablations import study as study_module
from tests.helpers.programs import Program

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(600)
# Enough steps to be interrupted in; arm D of table 2 is the one whose model is another.
ARMS = ("--arm", "A", "--arm", "D")
FOLDERS = {"A": "runs/seed-1/recipe", "D": "runs/seed-1/alignment.weight=0.0,teacher_input=True"}
QUICK = ("ablate", "--table", "2", "--quick", "--device", "cpu", "--threads", "1", *ARMS, "--steps", "4")
SETTINGS = (
    "--sample_steps",
    "1",
    "--save_every",
    "1",
    "--preview_every",
    "4",
    "--optimizer",
    "adamw",
    "--precision",
    "fp32",
)


def call(*arguments: object) -> Result:
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(main, [*map(str, arguments)])
    finally:
        torch.set_num_threads(threads)


def run(out: Path) -> Result:
    return call(*QUICK, "--out", out, *SETTINGS)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study whose process was killed in the middle of arm A."""
    out = tmp_path_factory.mktemp("ablate") / "study"
    folder = out / FOLDERS["A"]
    words = (*QUICK, "--out", out, *SETTINGS)
    with Program(main, *words, folder=ROOT, said=out.parent / "said") as process:
        deadline = time.monotonic() + 400
        while not checkpoints_in(folder / "checkpoints"):
            assert process.returncode is None, process.stderr
            assert time.monotonic() < deadline, "no checkpoint of arm A"
            time.sleep(0.05)
    assert not (folder / "result.json").exists()
    return out


@pytest.fixture(scope="module")
def finished(killed: Path) -> tuple[Path, Result, list[str]]:
    """The same study after the same command again, with what that said and logged."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        result = run(killed)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert result.exit_code == 0, (result.output, result.exception)
    return killed, result, messages


def test_a_killed_study_goes_on_where_it_was(finished: tuple[Path, Result, list[str]]) -> None:
    out, _, messages = finished
    resumed = [message for message in messages if message.startswith("resuming from")]
    assert len(resumed) == 1 and str(out / FOLDERS["A"] / "checkpoints") in resumed[0]
    assert "training the common text-to-video start" not in messages
    assert not any("resuming with" in message for message in messages)
    for letter in "AD":
        (checkpoint,) = checkpoints_in(out / FOLDERS[letter] / "checkpoints")
        assert read_meta(checkpoint)["step"] == 4


def test_arms_begin_with_the_same_weights_samples_noise_and_timesteps(
    finished: tuple[Path, Result, list[str]],
) -> None:
    out, _, _ = finished
    flows = []
    for letter in "AD":
        lines = (out / FOLDERS[letter] / "metrics.jsonl").read_text().splitlines()
        flows.append([row["loss/flow"] for row in map(json.loads, lines) if "loss/flow" in row])
    # Before the first update the model gives the same; D's teacher features are fed in with a weight of zero at first.
    assert flows[0][0] == flows[1][0]
    assert len(flows[0]) == len(flows[1]) == 4 and flows[0][-1] != flows[1][-1]


def test_table_plot_and_raw_figures_are_written(finished: tuple[Path, Result, list[str]]) -> None:
    out, result, _ = finished
    folder = out / "table-2"
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert text in result.stdout
    assert "| A | reference alignment | 1 |" in text
    assert "| D | teacher features as input, without alignment | 1 |" in text
    assert "| B | without the negative term | not finished |" in text
    summary = json.loads((folder / "table.json").read_text())
    starts = set()
    for letter in "AD":
        raw = json.loads((out / FOLDERS[letter] / "result.json").read_text())
        assert raw["study"]["seed"] == 1 and bool(raw["study"]["changes"]) == (letter == "D")
        starts.add(raw["start"])
        assert set(raw["judged"]) == {"one", "two", "shuffled"}
        assert [len(raw["judged"][job]["answers"]["colors"]) for job in raw["judged"]] == [2, 2, 2]
        assert set(raw["curve"]) == {"4"} and raw["clips_per_second"] > 0
        for job in ("one", "two"):
            figure = summary["arms"][letter]["figures"][job]["colors"]
            assert figure["mean"] == raw["judged"][job]["table"]["colors"]["share"]
        for name in ("one", "two", "shuffled"):
            assert (out / FOLDERS[letter] / f"{name}.png").is_file()
    assert len(starts) == 1
    assert [run["folder"] for run in summary["runs"]] == list(FOLDERS.values())
    for name in ("table.png", "clips.png"):
        assert f"({name})" in text
        with Image.open(folder / name) as plot:
            assert np.asarray(plot.convert("RGB")).std() > 10
    # One cache for the start and all arms: clips in palette and in free colours, and the teacher's features of both.
    assert sorted(path.name.split("-")[0] for path in (out / "cache").iterdir()) == 2 * ["features"] + 2 * [
        "sprites"
    ]
    assert [path for path in out.rglob("cache")] == [out / "cache"]


def test_a_second_call_repeats_nothing(
    finished: tuple[Path, Result, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first, _ = finished

    def never(*_: object, **__: object) -> None:
        raise AssertionError("done before")

    monkeypatch.setattr(study_module, "run_training", never)
    monkeypatch.setattr(study_module, "judge_checkpoint", never)
    again = run(out)
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout


def test_a_start_that_is_there_is_taken_in_any_layout(
    finished: tuple[Path, Result, list[str]], tmp_path: Path
) -> None:
    out, _, _ = finished
    (trained,) = checkpoints_in(out / "start-2" / "checkpoints")
    assert call("export", trained, "--out", tmp_path / "start").exit_code == 0
    (tmp_path / "study").mkdir()
    shutil.copytree(out / "cache", tmp_path / "study" / "cache")
    few = ("ablate", "--table", "2", "--quick", "--arm", "A", "--threads", "1", "--device", "cpu", *SETTINGS)
    result = call(*few, "--out", tmp_path / "study", "--start", tmp_path / "start")
    assert result.exit_code == 0, (result.output, result.exception)
    starts = [
        json.loads((study / FOLDERS["A"] / "result.json").read_text())["start"]
        for study in (out, tmp_path / "study")
    ]
    assert starts[0] == starts[1]
    assert not list((tmp_path / "study").glob("start-*"))
    # Begun from another model, a run is not gone on with.
    (tmp_path / "study" / FOLDERS["A"] / "result.json").unlink()
    other = call(*few, "--out", tmp_path / "study", "--start", ROOT / "assets" / "r2v-tiny")
    assert other.exit_code == 2 and "is of another study (start is" in other.stderr


def test_other_numbers_in_the_same_folder_are_refused(finished: tuple[Path, Result, list[str]]) -> None:
    out, _, _ = finished
    result = call(*QUICK, "--out", out, *SETTINGS, "--clips", 3)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "another study (clips is 2, asked for 3)" in line and "give another --out" in line


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConnectionError("a rank is gone"), 2, "refalign_ext: error: a rank is gone"),
        (KeyboardInterrupt(143), 143, "stopped; the same command goes on from there"),
    ],
)
def test_what_ends_training_ends_the_study_in_one_line(
    error: BaseException, code: int, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(study_module, "run_training", fails)
    result = run(tmp_path / "out")
    assert result.exit_code == code
    assert line in result.stderr.strip().splitlines()[-1]
    assert not list((tmp_path / "out").rglob("result.json"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--table", "2", "--arm", "Z"), "--arm Z: this table has A, B, C, D"),
        (("--table", "2", "--stepz", "3"), "'--stepz'"),
        (("--table", "2", "--seed", "3"), "--seed is set by the study itself"),
        (("--table", "2", "--batch_size", "x"), "'--batch_size': 'x'"),
        (("--table", "5"), "'5' is not one of '2', '3', '4', 'recipes', 'copying'"),
        (("--table", "2", "--clips", "1"), "1 is not in the range x>=2"),
        (("--table", "2", "--start", "nowhere"), "'nowhere' does not exist"),
        (("--table", "2", "--start", "assets/r2v-tiny", "--start_steps", "9"), "leave --start_steps out"),
    ],
)
def test_mistakes_are_told_in_one_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = call("ablate", *words, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
