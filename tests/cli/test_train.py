"""train_refalign.py as its users run it.

The complete runs are processes of their own; cases that need no process call the same `main` in this one, which spares each
of them the imports.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from refalign_ext.backbone import WAN_CONFIGS, build_dit
from refalign_ext.checkpoint.checkpointer import checkpoints_in, read_meta
from refalign_ext.checkpoint.reading import read_any_dit
from refalign_ext.media import save_video
from refalign_ext.training import trainer
from refalign_ext.training.trainer import StepReport, Trainer
from tests.helpers.checkpoints import read_dit, read_projectors
from tests.helpers.programs import Program

ROOT = Path(__file__).resolve().parents[2]
FEW_CLIPS = ("--cache_clips", "8", "--cache_free_clips", "8", "--cache_views", "1")
# Muon orthogonalises in bf16: seconds a step on processors without it.
ADAMW = ("--device", "cpu", "--threads", "1", "--optimizer", "adamw")
TINY = (*ADAMW, *FEW_CLIPS, "--batch_size", "2", "--validation_clips", "2")
EXACT = (
    *("--precision", "fp32", "--log_every", "1", "--preview_every", "0", "--seed", "3"),
    *("--warmup_steps", "0", "--schedule", "constant", "--validate_every", "0"),
)


def names(checkpoints: Path) -> list[str]:
    return [path.name for path in checkpoints_in(checkpoints)]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this project logged; torch's checkpoints log every call for themselves."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("refalign_ext")]


def entries(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss/total"]) for row in metrics(folder) if "loss/total" in row]


def load_script(name: str) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_script("train_refalign")


@pytest.fixture
def start(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[..., int]:
    """Runs `main` in a fresh folder; gives its exit code. What it logs is in `caplog`."""
    caplog.set_level(logging.INFO)

    def call(*arguments: object) -> int:
        monkeypatch.chdir(tmp_path)
        caplog.clear()
        threads = torch.get_num_threads()
        try:
            return program.main([*map(str, arguments)])
        except SystemExit as stop:
            return stop.code
        finally:
            torch.set_num_threads(threads)

    return call


@pytest.fixture
def fails(
    start: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Callable[..., str]:
    """Runs `main`; gives the one error line after checking that nothing else was said and nothing written."""

    def call(*arguments: object) -> str:
        before = entries(tmp_path)
        capfd.readouterr()
        assert start(*arguments) == 2
        assert entries(tmp_path) == before
        assert not said(caplog)
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("train_refalign.py: error: ")
        return lines[0].removeprefix("train_refalign.py: error: ")

    return call


@pytest.fixture(scope="module")
def sprite_run(program: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps with a preview, made by a process of its own; `said.err` beside it is what it said."""
    folder = tmp_path_factory.mktemp("sprites")
    settings = (*TINY, *EXACT, "--preview_every", 2, "--preview_clips", 1, "--validate_every", 2)
    settings = (*settings, "--preview_steps", 2, "--out", "run", "--steps", 2)
    with Program(program.main, *settings, folder=folder, said=folder / "said") as run:
        assert run.wait() == 0, run.stderr
    return folder / "run"


@pytest.fixture
def cached(sprite_run: Path, tmp_path: Path) -> Path:
    """The folder of a new run that finds its clips encoded."""
    shutil.copytree(sprite_run / "cache", tmp_path / "run" / "cache")
    return tmp_path / "run"


def test_a_run_writes_logs_previews_and_checkpoints(sprite_run: Path) -> None:
    shown = sprite_run.with_name("said.err").read_text()
    progress = ("training: 100%", "2/2", "loss ", "RA+ ", "RA- ", "step/s")
    for part in ("encoding clips: 100%", *progress, "INFO done: "):
        assert part in shown
    assert os.listdir(sprite_run / "checkpoints") == ["step-00000002"]
    meta = read_meta(sprite_run / "checkpoints" / "step-00000002")
    assert (meta["step"], meta["samples_seen"]) == (2, 4)
    assert meta["settings"] == json.loads((sprite_run / "settings.json").read_text())
    with Image.open(sprite_run / "previews" / "step-00000002.png") as picture:
        assert picture.mode == "RGB" and min(picture.size) >= 48
        assert np.asarray(picture).std() > 10
    rows = metrics(sprite_run)
    assert [step for step, _ in curve(sprite_run)] == [1, 2]
    assert any("judge_1/colors" in row for row in rows) and any("judge_2/colors" in row for row in rows)
    assert all(row["gradient_norm"] > 0 for row in rows if "loss/total" in row)
    for name in ("speed/clips_per_second", "speed/tokens_per_second", "memory/peak_gib"):
        assert all(row[name] > 0 for row in rows if "loss/total" in row)
    assert [row["step"] for row in rows if "validation/loss" in row] == [2]
    assert {key.split("/")[0] for key in rows[0]} == {
        *("step", "loss", "alignment", "alignment_by_block", "gradient_norm", "learning_rate"),
        *("speed", "memory", "loss_by_timestep"),
    }

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(sprite_run / "tensorboard"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("loss/total")]
    assert written == [(step, pytest.approx(value)) for step, value in curve(sprite_run)]
    assert [event.step for event in events.Images("preview")] == [2]


def test_a_stopped_run_has_the_uninterrupted_curve_and_starting_anew_keeps_the_old_one(
    sprite_run: Path,
    start: Callable[..., int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(sprite_run, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:  # logged after the checkpoint, then killed
        file.write('{"step": 3, "loss/total": 1.0}\n{"step": 4, "loss/to')
    assert start(*TINY, *EXACT, "--out", "run", "--steps", 3) == 0
    assert "encoding" not in capfd.readouterr().err  # the cache is there
    assert f"resuming from {Path('run') / 'checkpoints' / 'step-00000002'}" in caplog.messages
    assert "resuming with steps = 3 (the checkpoint has 2)" in caplog.messages

    shutil.copytree(sprite_run / "cache", tmp_path / "whole" / "cache")
    assert start(*TINY, *EXACT, "--out", "whole", "--steps", 3) == 0
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert [step for step, _ in curve(tmp_path / "run")] == [1, 2, 3]
    for raw in (True, False):
        run_state, whole_state = (
            read_dit(tmp_path / out / "checkpoints" / "step-00000003", raw=raw) for out in ("run", "whole")
        )
        assert run_state.keys() == whole_state.keys()
        assert all(torch.equal(value, whole_state[key]) for key, value in run_state.items())

    old = curve(sprite_run)
    folder = tmp_path / "run" / "checkpoints"
    assert start(*TINY, *EXACT, "--out", "run", "--steps", 1, "--resume", "off") == 0
    left = ["abandoned-step-00000002", "abandoned-step-00000003", "step-00000001"]
    assert sorted(path.name for path in folder.iterdir()) == left
    assert sum("its checkpoint is now" in message for message in caplog.messages) == 2
    assert curve(tmp_path / "run") == old[:1]


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_saves_where_it_was_and_a_second_one_stops_at_once(
    cached: Path,
    start: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    presses: int,
) -> None:
    original = Trainer.train_step

    def interrupted(self: Trainer) -> StepReport:
        if self.step == 1:
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
            assert presses == 1, "went on"
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert start(*TINY, *EXACT, "--out", "run", "--steps", 50) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)
    error = capfd.readouterr().err
    assert error.count("stopping after this step (Ctrl-C again: at once)") == 1 and "Traceback" not in error
    assert error.strip().splitlines()[-1] == "stopped; the same command goes on from the last checkpoint"
    assert names(cached / "checkpoints") == (["step-00000002"] if presses == 1 else [])


def test_a_signal_saves_and_the_run_goes_on_from_there(
    program: ModuleType,
    cached: Path,
    start: Callable[..., int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = (*TINY, *EXACT, "--out", "run", "--save_every", 10**6)
    words = (*settings, "--steps", 10**6)
    with Program(program.main, *words, folder=tmp_path, said=tmp_path / "said") as run:
        wait_for_step(cached, 2, run)
        run.send_signal(signal.SIGTERM)
        run.send_signal(signal.SIGTERM)  # a scheduler may repeat itself
        code, output, error = run.wait(120), run.stdout, run.stderr
    assert code == 143, error
    assert output == "" and "Traceback" not in error
    assert error.count("stopping after this step") == 1
    assert error.strip().splitlines()[-1] == "stopped; the same command goes on from the last checkpoint"
    (checkpoint,) = checkpoints_in(cached / "checkpoints")
    step = read_meta(checkpoint)["step"]
    assert step == curve(cached)[-1][0] >= 2
    assert list(checkpoint.parent.iterdir()) == [checkpoint]

    assert start(*settings, "--steps", step + 1) == 0
    assert f"resuming from {Path('run') / 'checkpoints' / checkpoint.name}" in caplog.messages
    assert [found for found, _ in curve(cached)] == list(range(1, step + 2))


def wait_for_step(out: Path, step: int, run: Program) -> None:
    """Until the run has logged `step`."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        assert run.returncode is None, run.stderr
        time.sleep(0.1)
    pytest.fail("the run does not get there")


def test_steps_that_are_not_finite_are_skipped_and_too_many_end_the_run(
    cached: Path,
    start: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls, original = [], trainer.flow_matching_errors

    def broken(*given: object) -> torch.Tensor:
        calls.append(given)
        return original(*given) * (1.0 if len(calls) in (1, 3) else float("nan"))

    monkeypatch.setattr(trainer, "flow_matching_errors", broken)
    settings = ("--steps", 60, "--max_skipped_steps", 3, "--save_every", 3)
    assert start(*TINY, *EXACT, "--out", "run", *settings) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "3 steps in a row gave a loss or gradient that is not finite" in last and "--learning_rate" in last
    files = sorted((cached / "skipped").iterdir())
    assert [path.name for path in files] == [f"step-0000000{step}.json" for step in (2, 4, 5, 6)]
    assert any(
        f"step 2 skipped, it is not finite: {Path('run', 'skipped')}" in line for line in caplog.messages
    )
    assert [value == "nan" for _, value in curve(cached)] == [False, True, False, True, True]
    report = json.loads(files[0].read_text())
    assert report["values"]["loss/total"] == "nan"
    rows = report["samples_by_rank"][0]
    assert all(re.fullmatch(r"sprite-\d+", row["sample"]) and row["flow_error"] == "nan" for row in rows)
    (checkpoint,) = checkpoints_in(cached / "checkpoints")
    assert checkpoint.name == "step-00000003"
    assert all(value.isfinite().all() for value in read_dit(checkpoint, raw=True).values())


def test_the_checkpoint_serves_generation(sprite_run: Path, tmp_path: Path) -> None:
    checkpoint = sprite_run / "checkpoints" / "step-00000002"
    Image.new("RGB", (30, 40), "red").save(tmp_path / "red.png")
    arguments = ["--dit_ckpt", checkpoint, "--ref", tmp_path / "red.png", "--prompt", "a red square"]
    arguments += ["--sample_steps", 1, "--save_file", tmp_path / "a.mp4", "--device", "cpu"]
    load_script("generate").main([*map(str, arguments)])
    assert (tmp_path / "a.mp4").stat().st_size > 0
    assert str(checkpoint) in (tmp_path / "a.json").read_text()


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A manifest of two clips and a bad one."""
    rows = []
    for index, name in enumerate(("one", "two")):
        ramp = torch.linspace(-1, 1, 12 + index)[None, :, None, None].expand(3, -1, 64, 64)
        save_video(ramp.contiguous(), tmp_path / f"{name}.mp4", 8)
        Image.new("RGB", (30, 20), ("red", "blue")[index]).save(tmp_path / f"{name}.png")
        references = [f"{name}.png", "one.png"][: index + 1]
        rows.append({"id": name, "video": f"{name}.mp4", "prompt": f"{name} grows", "references": references})
    (tmp_path / "bad.mp4").write_text("not a video")
    rows.append({**rows[0], "id": "bad", "video": "bad.mp4"})
    path = tmp_path / "manifest.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_manifest_trains_and_resumes(
    start: Callable[..., int],
    clips: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    common = (*ADAMW, *EXACT, "--data", clips, "--data_workers", 0, "--out", "run", "--batch_size", 2)
    assert start(*common, "--steps", 2) == 0
    assert "encoding" not in capfd.readouterr().err
    assert sum("skipping clip bad" in message for message in caplog.messages) == 1
    assert start(*common, "--steps", 4) == 0
    assert any(message.startswith("resuming from") for message in caplog.messages)
    assert any("1 of 3 clips cannot be used" in message for message in caplog.messages)
    found = curve(tmp_path / "run")
    assert [step for step, _ in found] == [1, 2, 3, 4]
    assert all(row["alignment/positive"] >= 0 for row in metrics(tmp_path / "run"))
    assert any(row["alignment/positive"] > 0 for row in metrics(tmp_path / "run"))
    assert not (tmp_path / "run" / "previews").exists()


def test_other_starts_and_no_alignment(
    start: Callable[..., int], clips: Path, tmp_path: Path, sprite_run: Path
) -> None:
    checkpoint = sprite_run / "checkpoints" / "step-00000002"
    common = (*ADAMW, *EXACT, "--data", clips, "--data_workers", 0, "--batch_size", 1, "--steps", 1)
    # Neither the teacher nor the depth is looked at.
    without = ("--alignment.weight", 0, "--alignment.teacher_path", "none", "--alignment.depth", 99)
    assert start(*common, *without, "--out", "a", "--dit_ckpt", checkpoint) == 0
    assert metrics(tmp_path / "a")[0]["alignment/positive"] == 0
    folder = tmp_path / "a" / "checkpoints" / "step-00000001"
    assert not read_projectors(folder) and read_projectors(checkpoint)
    started, trained = (
        build_dit(read_any_dit(path), WAN_CONFIGS["r2v-tiny"], path).state_dict()
        for path in (checkpoint, folder)
    )
    key = "blocks.3.ffn.0.weight"
    assert 0 < (trained[key] - started[key]).abs().mean() < 0.1 * started[key].abs().mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size", "0"], "batch_size is 0"),
        (["--learning_rate", "fast"], "--learning_rate.*: 'fast'"),
        (["--betas", "0.9"], "betas is"),
        (["--threads", "0"], "--threads.*: 0 "),
        (["--batch", "2"], "--batch'.*--batch_size"),
        (["--steps"], "'--steps'"),
        (["--recipe", "papr"], "unknown recipe 'papr': .*paper_stage1, paper_stage2, release, tiny"),
        (["--world_size", "4"], "--world_size 4: a number of devices, with --dry-run"),
        (["--batch_size", "2", "--global_batch_size", "5"], "give a multiple of it, such as 4 or 6"),
        (["--ulysses_size", "2"], "--ulysses_size 2 x --ring_size 1 is not possible with 1 ranks .*: choose"),
        (
            ["--lora_rank", "2", "--ema_decay", "0", "--lora_targets", "x"],
            "LoRA target 'x' matches no linear",
        ),
        (["--lora_rank", "2", "--from_scratch"], "--lora_rank adapts weights that exist"),
        (["--lora_rank", "2", "--teacher_input"], "--teacher_input trains all weights in one process"),
        (["--recipe", "paper_stage2", "--task", "r2v-tiny"], "paper_stage2 goes on from the first stage"),
        (["--validation_data", "none.jsonl"], "validation_data does nothing without data"),
        (["--task", "t2v-1.3B"], "--task t2v-1.3B: a task of the family r2v"),
        (["--ckpt_dir", "here"], "lacks .*Wan2.1_VAE_tiny.pth, .*google/umt5-tiny"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--data", "none.jsonl"], "--data: none.jsonl does not exist"),
        (["--resume", "none"], "--resume none: no complete checkpoint there"),
        (["--alignment.teacher", "clip"], "unknown teacher 'clip'"),
        (["--alignment.teacher_path", "none"], "none: no teacher dinov3-tiny"),
        (["--alignment.depth", "7"], "--alignment.depth 7: r2v-tiny has 6 blocks"),
        (["--dit_ckpt", "here/other.safetensors"], "other.safetensors: not the weights of a Wan transformer"),
        (["--out", "here/a.txt/run"], "--out here/a.txt/run cannot be written"),
        (["--out", "/proc/run"], "--out /proc/run cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    fails: Callable[..., str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.txt").write_text("text")
    save_file({"a": torch.zeros(2)}, tmp_path / "here" / "other.safetensors")
    extra = [] if "--out" in arguments else ["--out", "out"]
    extra += [] if "--threads" in arguments else ["--threads", "1"]
    assert re.search(message, fails(*arguments, *FEW_CLIPS, *extra))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["--world_size", 64, "--task", "r2v-14B"],
            [
                "training of r2v-14B on 64 ranks",
                "14.29 B parameters",
                "128 samples",
                " fits: ",
                "GiB  in all",
            ],
        ),
        (
            ["--world_size", 4, "--ulysses_size", 2],
            ["data parallel 2 x sequence parallel 2 (Ulysses 2 x ring 1)"],
        ),
        ([], ["training of r2v-tiny on 1 rank"]),
        (["--task", "r2v-14B", "--world_size", 2], ["DOES NOT FIT", "would fit: "]),
    ],
)
def test_a_dry_run_prints_the_plan_and_stops(
    start: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[object],
    parts: list[str],
) -> None:
    does_not_fit = "DOES NOT FIT" in parts
    assert start("--dry-run", *arguments) == (2 if does_not_fit else 0)
    shown = capfd.readouterr()
    for part in parts:
        assert part in shown.out
    assert len(shown.err.splitlines()) == does_not_fit
    assert entries(tmp_path) == []


def test_what_does_not_fit_is_refused_with_the_plan(
    start: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start("--task", "r2v-14B", "--device", "cpu", "--ckpt_dir", "none") == 2
    shown = capfd.readouterr()
    lines = shown.err.splitlines()
    assert lines[0].startswith("training of r2v-14B on 1 rank: ")
    assert any("DOES NOT FIT" in line for line in lines)
    assert re.search(
        r"r2v-14B does not fit on 1 device: it needs about \d+ GiB .*; use \d+ devices", lines[-1]
    )
    assert shown.out == "" and entries(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--task r2v-1.3B needs --ckpt_dir FOLDER"),
        (["--ckpt_dir", "none"], "none: no such checkpoint folder"),
        (["--ckpt_dir", "empty"], "--task r2v-1.3B needs --data MANIFEST.jsonl"),
    ],
)
def test_what_real_weights_need_is_asked_for_after_the_plan(
    start: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    from refalign_ext.backbone import required_files

    for name in required_files(tmp_path / "empty", WAN_CONFIGS["r2v-1.3B"], dit=True):
        path = tmp_path / "empty" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    before = entries(tmp_path)
    assert start("--task", "r2v-1.3B", "--device", "cpu", *arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("training of r2v-1.3B on 1 rank: ") and message in lines[-1]
    assert sum(line.startswith("train_refalign.py: error: ") for line in lines) == 1
    assert entries(tmp_path) == before


def test_wandb_that_is_not_there_is_said_before_anything_is_written(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *given: None if name == "wandb" else find(name, *given)
    )
    line = fails(*TINY, *EXACT, "--wandb", "project", "--out", "out")
    assert line == "Weights & Biases is not installed: pip install wandb or leave --wandb out"


def test_a_damaged_checkpoint_is_named_before_anything_is_written(
    sprite_run: Path,
    start: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(sprite_run / "checkpoints", tmp_path / "run" / "checkpoints")
    broken = tmp_path / "run" / "checkpoints" / "step-00000002" / "__0_0.distcp"
    broken.write_bytes(broken.read_bytes()[:1000])
    before = entries(tmp_path)
    assert start(*TINY, "--out", "run") == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "step-00000002 is damaged or incomplete" in last and "--resume FOLDER" in last
    whole = sprite_run / "checkpoints" / "step-00000002"
    assert start(*TINY, "--out", "run", "--alignment.depth", 2, "--resume", whole) == 2
    assert "step-00000002 does not fit this run" in capfd.readouterr().err.strip().splitlines()[-1]
    assert entries(tmp_path) == before
