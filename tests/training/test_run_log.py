"""What a run writes about itself, read back from its files."""

from __future__ import annotations

import importlib.machinery
import json
import logging
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from refalign_ext.training import run_log
from refalign_ext.training.run_log import RunLog


def open_log(out: Path, first_step: int = 0, wandb: str | None = None, is_main: bool = True) -> RunLog:
    return RunLog(out, first_step=first_step, wandb_project=wandb, settings={"seed": 3}, is_main=is_main)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def tensorboard(out: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def test_numbers_go_to_both_files_and_a_resumed_run_forgets_what_it_does_again(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, {"loss/total": float(step), "speed": 0.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss/to')  # cut short by a crash
    with open_log(tmp_path, first_step=1) as log:
        log.log(2, {"loss/total": 20.0, "a": math.nan, "b": -math.inf})
    assert metrics(tmp_path) == [
        {"step": 1, "loss/total": 1.0, "speed": 0.5},
        {"step": 2, "loss/total": 20.0, "a": "nan", "b": "-inf"},
    ]
    scalars = tensorboard(tmp_path).Scalars("loss/total")
    assert [(event.step, event.value) for event in scalars] == [(1, 1.0), (2, 20.0)]
    assert not list(tmp_path.glob("*.part"))


def test_pictures_and_videos(tmp_path: Path) -> None:
    import av

    frames = np.zeros((5, 16, 24, 3), np.uint8)
    frames[:, :, :12, 0] = 255
    with open_log(tmp_path) as log:
        log.image(4, "preview", frames[0])
        video = torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1  # [3, T, H, W]
        log.video(4, "samples/first", video, fps=8)
    images = tensorboard(tmp_path)
    (picture,), (moving,) = images.Images("preview"), images.Images("samples/first")
    assert (picture.step, picture.width, picture.height) == (4, 24, 16)
    assert moving.encoded_image_string[:4] == b"GIF8" and moving.step == 4
    with av.open(str(tmp_path / "samples" / "step-00000004-samples-first.mp4")) as file:
        decoded = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert file.streams.video[0].average_rate == 8
    assert len(decoded) == 5
    assert np.abs(decoded[2][:, 2:8].astype(int) - [255, 0, 0]).max() < 12


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with open_log(tmp_path / "run", is_main=False) as log:
        log.log(1, {"a": 1.0})
        log.image(1, "i", np.zeros((2, 2, 3), np.uint8))
        log.video(1, "v", torch.zeros(3, 1, 2, 2), 8)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(
            OSError, match=r"metrics\.jsonl cannot be written \(No space left on device\): free"
        ):
            log.log(1, {"a": 1.0})


class FakeRun:
    def __init__(self, module: FakeWandb, options: dict[str, Any]) -> None:
        self.module, self.options, self.rows, self.exit_code = module, options, [], None

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, row: dict[str, Any]) -> None:
        if self.module.fails_on_log:
            raise self.module.failure
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


class FakeWandb(ModuleType):
    """As much of the package as is used; `runs` are those that were opened."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.errors = ModuleType("wandb.errors")
        error = type("Error", (Exception,), {"__module__": "wandb.errors.errors"})
        self.errors.UsageError = type("UsageError", (error,), {"__module__": "wandb.errors.errors"})
        self.failure: Exception = error("connection refused")
        self.fails_online = self.fails_on_log = self.lacks_key = False
        self.torn_down = 0
        self.runs: list[FakeRun] = []
        self.Image = lambda picture: ("image", picture.shape)
        self.Video = lambda path, format: ("video", Path(path).name, format)  # noqa: A002

    def init(self, **options: Any) -> FakeRun:
        if self.lacks_key:
            raise self.errors.UsageError("No API key configured.")
        if self.fails_online and options.get("mode") != "offline":
            raise self.failure
        self.runs.append(FakeRun(self, options))
        return self.runs[-1]

    def teardown(self) -> None:
        self.torn_down += 1


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"):
        monkeypatch.setenv(name, "5")
    return module


def test_wandb_gets_the_same_and_resumes_the_same_run(tmp_path: Path, fake_wandb: FakeWandb) -> None:
    with open_log(tmp_path, wandb="project") as log:
        log.log(1, {"a": 1.0})
        log.image(1, "i", np.zeros((2, 4, 3), np.uint8))
        log.video(1, "v", torch.zeros(3, 1, 2, 2), 8)
    with pytest.raises(KeyError), open_log(tmp_path, first_step=1, wandb="project"):
        raise KeyError
    first, second = fake_wandb.runs
    assert first.rows == [
        {"step": 1, "a": 1.0},
        {"step": 1, "i": ("image", (2, 4, 3))},
        {"step": 1, "v": ("video", "step-00000001-v.mp4", "mp4")},
    ]
    assert first.options["id"] == second.options["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert first.options["project"] == "project" and first.options["resume"] == "allow"
    assert first.options["config"] == {"seed": 3}
    assert (first.exit_code, second.exit_code) == (0, 1)


def test_wandb_without_network_goes_offline(
    tmp_path: Path, fake_wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb.fails_online = True
    with open_log(tmp_path, wandb="project") as log:
        log.log(1, {"a": 1.0})
    (run,) = fake_wandb.runs
    assert run.options["mode"] == "offline" and run.rows and fake_wandb.torn_down == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "wandb sync" in caplog.text


@pytest.mark.parametrize("failure", [None, OSError("broken pipe"), RuntimeError("closed")])
def test_a_failing_network_warns_once_and_the_rest_goes_on(
    tmp_path: Path, fake_wandb: FakeWandb, caplog: pytest.LogCaptureFixture, failure: Exception | None
) -> None:
    fake_wandb.failure = failure or fake_wandb.failure
    with open_log(tmp_path, wandb="project") as log:
        log.log(1, {"a": 1.0})
        fake_wandb.fails_on_log = True
        for step in (2, 3):
            log.log(step, {"a": 1.0})
    fake_wandb.failure = TypeError("a mistake of the caller")
    with pytest.raises(TypeError), open_log(tmp_path / "other", wandb="project") as log:
        log.log(1, {"a": 1.0})
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
    assert len(caplog.records) == 1 and "the training goes on" in caplog.text


def test_wandb_that_cannot_start_says_what_to_do(
    tmp_path: Path, fake_wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_wandb.lacks_key = True
    with pytest.raises(ValueError, match="wandb login.*WANDB_MODE=offline"), open_log(tmp_path, wandb="p"):
        pass
    monkeypatch.delitem(sys.modules, "wandb")
    find_spec = run_log.importlib.util.find_spec
    monkeypatch.setattr(
        run_log.importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name)
    )
    for is_main in (True, False):
        with pytest.raises(ValueError, match="pip install wandb or leave --wandb out"):
            open_log(tmp_path, wandb="p", is_main=is_main)
