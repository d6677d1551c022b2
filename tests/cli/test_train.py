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
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from refalign_ext.backbone import WAN_CONFIGS, load_dit, save_video
from refalign_ext.config import AlignmentConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "assets" / "r2v-tiny"
PARTS = [
    EMBEDDED / name
    for name in (WAN_CONFIGS["r2v-tiny"].vae_checkpoint, WAN_CONFIGS["r2v-tiny"].t5_checkpoint, "teacher")
]
needs_parts = pytest.mark.skipif(
    not all(part.exists() for part in PARTS), reason="assets/r2v-tiny lacks VAE, text encoder or teacher"
)
TINY = (
    "--device",
    "cpu",
    "--threads",
    "1",
    "--cache_clips",
    "8",
    "--cache_free_clips",
    "8",
    "--cache_views",
    "1",
    "--batch_size",
    "2",
)
EXACT = (
    "--precision",
    "fp32",
    "--log_every",
    "1",
    "--preview_every",
    "0",
    "--seed",
    "3",
    "--warmup_steps",
    "0",
)
EXACT += ("--schedule", "constant")
WEIGHTS = "raw_weights.safetensors"


def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train_refalign.py"), *map(str, arguments)]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=170, check=False
    )


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
        assert not caplog.messages
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("train_refalign.py: error: ")
        return lines[0].removeprefix("train_refalign.py: error: ")

    return call


@pytest.fixture(scope="module")
def sprite_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps with a preview, made by a process of its own; `stderr.txt` is what it said."""
    folder = tmp_path_factory.mktemp("sprites")
    settings = (*TINY, "--precision", "fp32", "--seed", "3", "--log_every", "1", "--warmup_steps", "0")
    previews = ("--preview_every", "2", "--preview_clips", "1")
    result = run(
        *settings, *previews, "--schedule", "constant", "--out", "run", "--steps", "2", folder=folder
    )
    assert result.returncode == 0, result.stderr
    (folder / "run" / "stderr.txt").write_text(result.stderr)
    return folder / "run"


def test_help_is_quick_imports_nothing_and_lists_every_field(tmp_path: Path) -> None:
    script = (
        "import sys, runpy, time\nsys.argv = ['train_refalign.py', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'train_refalign.py')!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'PIL', 'transformers', 'diffusers', 'av', 'refalign_ext', 'wan'}\n"
        "print(sorted(heavy & set(sys.modules)), time.process_time(), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    imported, seconds = result.stderr.rsplit(" ", 1)
    assert imported == "[]"
    assert float(seconds) < 0.5
    shown = set(re.findall(r"^  --([\w.]+)", result.stdout, flags=re.MULTILINE))
    wanted = {field.name for field in fields(TrainConfig)} - {"alignment"}
    wanted |= {f"alignment.{field.name}" for field in fields(AlignmentConfig)}
    assert shown == wanted | {"device", "resume", "threads"}


@needs_parts
def test_a_run_writes_logs_previews_and_checkpoints(sprite_run: Path) -> None:
    said = (sprite_run / "stderr.txt").read_text()
    for part in (
        "encoding clips: 100%",
        "training: 100%",
        "2/2",
        "loss ",
        "RA+ ",
        "RA- ",
        "clips/s",
        "INFO done: ",
    ):
        assert part in said
    assert [path.name for path in (sprite_run / "checkpoints").iterdir()] == ["step-00000002"]
    assert json.loads((sprite_run / "settings.json").read_text())["steps"] == 2

    with Image.open(sprite_run / "previews" / "step-00000002.png") as picture:
        assert picture.mode == "RGB" and min(picture.size) >= 48
        assert np.asarray(picture).std() > 10
    rows = metrics(sprite_run)
    assert [step for step, _ in curve(sprite_run)] == [1, 2]
    assert any("judge_1/colors" in row for row in rows) and any("judge_2/colors" in row for row in rows)
    assert all(row["gradient_norm"] > 0 for row in rows if "loss/total" in row)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(sprite_run / "tensorboard"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("loss/total")]
    assert written == [(step, pytest.approx(value)) for step, value in curve(sprite_run)]
    assert [event.step for event in events.Images("preview")] == [2]


@needs_parts
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
    assert start(*TINY, *EXACT, "--out", "run", "--steps", 4) == 0
    assert "encoding" not in capfd.readouterr().err  # the cache is there
    assert f"resuming from {Path('run') / 'checkpoints' / 'step-00000002'}" in caplog.messages
    assert "resuming with steps = 4 (the checkpoint has 2)" in caplog.messages

    shutil.copytree(sprite_run / "cache", tmp_path / "whole" / "cache")
    assert start(*TINY, *EXACT, "--out", "whole", "--steps", 4) == 0
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert [step for step, _ in curve(tmp_path / "run")] == [1, 2, 3, 4]
    state = [
        load_file(tmp_path / out / "checkpoints" / "step-00000004" / WEIGHTS) for out in ("run", "whole")
    ]
    assert all(torch.equal(value, state[1][key]) for key, value in state[0].items())

    old = curve(sprite_run)
    folder = tmp_path / "run" / "checkpoints"
    assert start(*TINY, *EXACT, "--out", "run", "--steps", 1, "--resume", "off") == 0
    names = ["abandoned-step-00000002", "abandoned-step-00000004", "step-00000001"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert sum("its checkpoint is now" in message for message in caplog.messages) == 2
    assert curve(tmp_path / "run") == old[:1]


@needs_parts
def test_ctrl_c_saves_where_it_was(
    sprite_run: Path,
    start: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from refalign_ext.trainer import Trainer

    shutil.copytree(sprite_run / "cache", tmp_path / "run" / "cache")
    original = Trainer.train_step

    def interrupted(self: Trainer) -> dict[str, float]:
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert start(*TINY, *EXACT, "--out", "run", "--steps", 50) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)
    error = capfd.readouterr().err
    assert "stopping after this step" in error
    assert error.strip().splitlines()[-1] == "stopped; the same command goes on from the last checkpoint"
    assert "Traceback" not in error
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


@needs_parts
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    sprite_run: Path,
    start: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(sprite_run / "cache", tmp_path / "run" / "cache")
    monkeypatch.setattr(
        "refalign_ext.trainer.flow_matching_loss", lambda *given, **weights: torch.tensor(float("nan"))
    )
    shutil.copytree(sprite_run / "checkpoints", tmp_path / "run" / "checkpoints")
    before = entries(tmp_path / "run" / "checkpoints")
    assert start(*TINY, *EXACT, "--out", "run", "--steps", 6) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert re.search(
        r"error: the loss of step 3 is nan \(samples sprite-\d+, sprite-\d+\): lower --learning_rate", last
    )
    assert entries(tmp_path / "run" / "checkpoints") == before


@needs_parts
def test_the_checkpoint_serves_generation(sprite_run: Path, tmp_path: Path) -> None:
    checkpoint = sprite_run / "checkpoints" / "step-00000002"
    load_dit(checkpoint, WAN_CONFIGS["r2v-tiny"])
    Image.new("RGB", (30, 40), "red").save(tmp_path / "red.png")
    arguments = ["--dit_ckpt", checkpoint, "--ref", tmp_path / "red.png", "--prompt", "a red square"]
    arguments += ["--sample_steps", 1, "--save_file", tmp_path / "a.mp4", "--device", "cpu"]
    load_script("generate").main([*map(str, arguments), "--ckpt_dir", str(folder_with_any_dit(tmp_path))])
    assert (tmp_path / "a.mp4").stat().st_size > 0
    assert str(checkpoint) in (tmp_path / "a.json").read_text()


def folder_with_any_dit(folder: Path) -> Path:
    """The embedded model, or links to its parts where its own transformer is not there yet."""
    if (EMBEDDED / "diffusion_pytorch_model.safetensors").exists():
        return EMBEDDED
    linked = folder / "embedded"
    linked.mkdir()
    for part in EMBEDDED.iterdir():
        (linked / part.name).symlink_to(part)
    return linked


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


@needs_parts
def test_a_manifest_trains_and_resumes(
    start: Callable[..., int],
    clips: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    common = ("--device", "cpu", "--threads", 1, "--data", clips, "--out", "run", "--batch_size", 2, *EXACT)
    assert start(*common, "--steps", 2) == 0
    assert "encoding" not in capfd.readouterr().err
    assert start(*common, "--steps", 4) == 0
    assert any(message.startswith("resuming from") for message in caplog.messages)
    assert sum("skipping clip bad" in message for message in caplog.messages) == 1
    found = curve(tmp_path / "run")
    assert [step for step, _ in found] == [1, 2, 3, 4]
    assert all(row["alignment/positive"] >= 0 for row in metrics(tmp_path / "run"))
    assert any(row["alignment/positive"] > 0 for row in metrics(tmp_path / "run"))
    assert not (tmp_path / "run" / "previews").exists()


@needs_parts
def test_other_starts_and_no_alignment(
    start: Callable[..., int], clips: Path, tmp_path: Path, sprite_run: Path
) -> None:
    checkpoint = sprite_run / "checkpoints" / "step-00000002"
    common = ("--device", "cpu", "--threads", 1, "--data", clips, "--batch_size", 1, *EXACT, "--steps", 1)
    # Neither the teacher nor the depth is looked at.
    without = ("--alignment.weight", 0, "--alignment.teacher_path", "none", "--alignment.depth", 99)
    assert start(*common, *without, "--out", "a", "--dit_ckpt", checkpoint) == 0
    assert metrics(tmp_path / "a")[0]["alignment/positive"] == 0
    folder = tmp_path / "a" / "checkpoints" / "step-00000001"
    assert not (folder / "projectors.safetensors").exists()
    started = load_dit(checkpoint, WAN_CONFIGS["r2v-tiny"]).state_dict()
    trained = load_dit(folder, WAN_CONFIGS["r2v-tiny"]).state_dict()
    key = "blocks.3.ffn.0.weight"
    assert 0 < (trained[key] - started[key]).abs().mean() < 0.1 * started[key].abs().mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size", "0"], "batch_size is 0: it must be at least 1"),
        (["--steps", "x"], "--steps x: expected a whole number"),
        (["--learning_rate", "fast"], "--learning_rate fast: expected a number"),
        (["--learning_rate", "nan"], "learning_rate is nan: give a finite number"),
        (["--betas", "0.9"], "betas is"),
        (["--betas", "0.9;0.99"], "--betas 0.9;0.99: expected 2 numbers with commas"),
        (["--from_scratch", "maybe"], "--from_scratch maybe: expected true or false"),
        (["--threads", "0"], "--threads 0: it must be at least 1"),
        (["--threads", "x"], "argument --threads: invalid int value: 'x'"),
        (["--batch", "2"], "unrecognized arguments: --batch 2"),
        (["--alignment.dept", "2"], "unrecognized arguments: --alignment.dept 2"),
        (["--steps"], "argument --steps: expected one argument"),
        (["--recipe", "papr"], "unknown recipe 'papr': choose one of paper, release, tiny"),
        (["--task", "r2v-7B"], "--task r2v-7B: .*r2v-1.3B, r2v-14B, r2v-tiny"),
        (["--task", "t2v-1.3B"], "--task t2v-1.3B: training is for reference-to-video"),
        (["--task", "r2v-1.3B"], "--task r2v-1.3B needs --ckpt_dir FOLDER"),
        (["--task", "r2v-1.3B", "--ckpt_dir", "none"], "none: no such checkpoint folder"),
        (["--ckpt_dir", "here"], "lacks .*Wan2.1_VAE_tiny.pth, .*google/umt5-tiny"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--data", "none.jsonl"], "--data none.jsonl: no such manifest"),
        (["--data", "here/bad.jsonl"], "here/bad.jsonl, line 1: not valid JSON"),
        (["--resume", "none"], "--resume none: no complete checkpoint there"),
        (["--alignment.tap", "ffn"], "alignment.tap is 'ffn': choose one of block, self_attn"),
        (["--alignment.teacher", "clip"], "unknown teacher 'clip'"),
        (["--alignment.teacher_path", "none"], "none: no such folder for teacher dinov3-tiny"),
        (["--alignment.depth", "7"], "--alignment.depth 7: r2v-tiny has 6 blocks"),
        (["--dit_ckpt", "none"], "none"),
        (["--dit_ckpt", "here/other.safetensors"], "other.safetensors: not the weights of a Wan transformer"),
        (["--out", "here/a.txt/run"], "--out here/a.txt/run cannot be written"),
        (["--out", "here/a.txt"], "--out here/a.txt cannot be written"),
        (["--out", "/proc/run"], "--out /proc/run cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    fails: Callable[..., str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    if not all(part.exists() for part in PARTS) and ("teacher" in message or "dit_ckpt" in arguments[0]):
        pytest.skip("assets/r2v-tiny lacks VAE, text encoder or teacher")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "bad.jsonl").write_text("{")
    (tmp_path / "here" / "a.txt").write_text("text")
    save_file({"a": torch.zeros(2)}, tmp_path / "here" / "other.safetensors")
    extra = [] if "--out" in arguments else ["--out", "out"]
    extra += [] if "--threads" in arguments else ["--threads", "1"]
    assert re.search(message, fails(*arguments, *extra))


def test_a_mistake_ends_the_process_with_code_2(tmp_path: Path) -> None:
    result = run("--batch_size", "two", folder=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "train_refalign.py: error: --batch_size two: expected a whole number\n"
    assert entries(tmp_path) == []


def test_missing_data_for_real_weights_is_asked_for(fails: Callable[..., str], tmp_path: Path) -> None:
    from refalign_ext.backbone import required_files

    for name in required_files(tmp_path, WAN_CONFIGS["r2v-1.3B"], dit=True):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert "--task r2v-1.3B needs --data MANIFEST.jsonl" in fails(
        "--task", "r2v-1.3B", "--ckpt_dir", tmp_path
    )


@needs_parts
def test_a_damaged_checkpoint_is_named_before_anything_is_written(
    sprite_run: Path,
    start: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(sprite_run / "checkpoints", tmp_path / "run" / "checkpoints")
    broken = tmp_path / "run" / "checkpoints" / "step-00000002" / "optimizer.pt"
    broken.write_bytes(broken.read_bytes()[:1000])
    before = entries(tmp_path)
    assert start(*TINY, "--out", "run") == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "step-00000002 is damaged or incomplete" in last and "--resume FOLDER" in last
    whole = sprite_run / "checkpoints" / "step-00000002"
    assert start(*TINY, "--out", "run", "--alignment.depth", 3, "--resume", whole) == 2
    assert "step-00000002 does not fit this run" in capfd.readouterr().err.strip().splitlines()[-1]
    assert entries(tmp_path) == before


def test_running_out_of_memory_names_the_flags() -> None:
    from refalign_ext.launch import explain

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    for error in (caught.value, MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory. Tried ...")):
        text = explain(error)
        assert text.startswith("out of memory: ") and "\n" not in text
        assert "--batch_size" in text and "--gradient_checkpointing" in text
    assert "REFALIGN_TRACEBACK" in explain(RuntimeError("something\nelse"))
