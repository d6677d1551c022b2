"""Checkpoints: whole or not there, the newest is found, and broken ones are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from refalign_ext.backbone import WAN_CONFIGS, WanModel, dit_arguments, load_dit
from refalign_ext.checkpoint import (
    checkpoints_in,
    read_checkpoint,
    resolve_resume,
    save_checkpoint,
    set_aside_after,
)
from tests.tiny_checkpoint import tiny_config


def save(
    folder: Path, step: int, *, keep_last: int = 2, average: dict | None = None, **changes: object
) -> Path:
    given = {
        "dit": {"a": torch.full((2, 3), float(step)), "b": torch.arange(4)},
        "dit_config": {"dim": 3},
        "average": average,
        "projectors": {"p": torch.ones(2)},
        "optimizers": [
            {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        ],
        "settings": {"steps": 9, "alignment": {"depth": 2}},
        **changes,
    }
    return save_checkpoint(folder, step, keep_last=keep_last, **given)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert path == tmp_path / "step-00000007"
    state = read_checkpoint(path)
    assert (state["step"], state["settings"]["alignment"]) == (7, {"depth": 2})
    assert torch.equal(state["dit"]["a"], torch.full((2, 3), 7.0))
    assert state["average"] is None
    assert torch.equal(state["projectors"]["p"], torch.ones(2))
    assert state["optimizers"][0]["param_groups"] == [{"lr": 0.1, "params": [0]}]
    assert names(path) == [
        *("config.json", "diffusion_pytorch_model.safetensors", "optimizer.pt", "projectors.safetensors"),
        "trainer.json",
    ]
    assert read_checkpoint(save(tmp_path, 8, projectors=None))["projectors"] is None


def test_an_average_is_what_one_generates_with(tmp_path: Path) -> None:
    average: dict[str, Tensor] = {"a": torch.zeros(2, 3), "b": torch.arange(4)}
    path = save(tmp_path, 7, average=average)
    state = read_checkpoint(path)
    assert torch.equal(state["average"]["a"], torch.zeros(2, 3))
    assert torch.equal(state["dit"]["a"], torch.full((2, 3), 7.0))
    from safetensors.torch import load_file

    assert torch.equal(load_file(path / "diffusion_pytorch_model.safetensors")["a"], torch.zeros(2, 3))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (999, 1000, 10000, 100000000):
        save(tmp_path, step, keep_last=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00010000", "step-100000000"]
    assert resolve_resume(tmp_path, "auto") == tmp_path / "step-100000000"
    save(tmp_path, 100000001, keep_last=1)
    assert names(tmp_path) == ["step-100000001"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = save(tmp_path, 5, settings={"steps": 1})
    assert read_checkpoint(path)["settings"] == {"steps": 1}
    assert names(tmp_path) == ["step-00000005"]


def test_leftovers_and_foreign_folders_are_not_checkpoints(tmp_path: Path) -> None:
    assert resolve_resume(tmp_path / "none", "auto") is None
    save(tmp_path, 5)
    shutil.copytree(tmp_path / "step-00000005", tmp_path / "step-00000009.part")
    shutil.copytree(tmp_path / "step-00000005", tmp_path / "step-best")
    (tmp_path / "step-00000008").mkdir()
    (tmp_path / "step-00000007").write_text("a file")
    assert resolve_resume(tmp_path, "auto") == tmp_path / "step-00000005"
    assert resolve_resume(tmp_path, "off") is None
    save(tmp_path, 10)
    assert "step-00000009.part" not in names(tmp_path)
    assert "step-best" in names(tmp_path)


@pytest.mark.parametrize("where", ["diffusion_pytorch_model.safetensors", "optimizer.pt"])
def test_an_interrupted_save_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    save(tmp_path, 5, keep_last=1)

    def full(*given: object, **named: object) -> None:
        raise (
            SafetensorError("I/O error: No space left on device")
            if "model" in where
            else RuntimeError("no space")
        )

    monkeypatch.setattr("safetensors.torch.save_file" if "model" in where else "torch.save", full)
    with pytest.raises(OSError if "model" in where else RuntimeError, match="(?i)no space"):
        save(tmp_path, 6, keep_last=1)
    assert resolve_resume(tmp_path, "auto") == tmp_path / "step-00000005"
    assert read_checkpoint(tmp_path / "step-00000005")["step"] == 5


def test_resume_from_a_folder(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    assert resolve_resume(tmp_path / "elsewhere", str(path)) == path
    for wrong in (tmp_path, tmp_path / "none", tmp_path / "step-00000005" / "config.json"):
        with pytest.raises(ValueError, match=f"--resume {wrong}: no complete checkpoint .*name a step-"):
            resolve_resume(tmp_path, str(wrong))


def test_checkpoints_beyond_the_resumed_step_are_set_aside(tmp_path: Path) -> None:
    for step in (5, 6, 7):
        save(tmp_path, step, keep_last=3)
    moved = set_aside_after(tmp_path, 5)
    assert [path.name for path in moved] == ["abandoned-step-00000006", "abandoned-step-00000007"]
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000005"]
    assert read_checkpoint(moved[1])["step"] == 7
    save(tmp_path, 6, keep_last=1, settings={"steps": 2})
    assert resolve_resume(tmp_path, "auto") == tmp_path / "step-00000006"
    assert [path.name for path in set_aside_after(tmp_path, 0)] == ["abandoned-step-00000006"]
    assert read_checkpoint(moved[0])["settings"] == {"steps": 2}
    assert set_aside_after(tmp_path / "none", 0) == []


@pytest.mark.parametrize(
    "name",
    [
        *("diffusion_pytorch_model.safetensors", "raw_weights.safetensors", "projectors.safetensors"),
        *("optimizer.pt", "trainer.json"),
    ],
)
@pytest.mark.parametrize("how", ["cut", "empty", "rubbish", "absent"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, how: str) -> None:
    if how == "absent" and name in ("raw_weights.safetensors", "projectors.safetensors"):
        return  # a checkpoint may lack these
    path = save(tmp_path, 5, average={"a": torch.zeros(2, 3), "b": torch.arange(4)})
    content = (path / name).read_bytes()
    if how == "absent":
        (path / name).unlink()
    else:
        (path / name).write_bytes(
            {"cut": content[: len(content) // 2], "empty": b"", "rubbish": b"\xff[1]"}[how]
        )
    with pytest.raises(
        ValueError, match=f"checkpoint {path} is damaged or incomplete .*--resume FOLDER"
    ) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


def test_optimizer_files_run_no_code(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (marker,))

    torch.save([Evil()], path / "optimizer.pt")
    with pytest.raises(ValueError, match="damaged or incomplete"):
        read_checkpoint(path)
    assert not marker.exists()


def test_the_folder_is_a_model_for_generation(tmp_path: Path) -> None:
    config = tiny_config()
    model = WanModel(**dit_arguments(config))
    average = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    from refalign_ext.trainer import _plain_config

    path = save(tmp_path, 5, dit=model.state_dict(), average=average, dit_config=_plain_config(model))
    loaded = load_dit(path, config)
    assert loaded.state_dict().keys() == average.keys()
    assert all(torch.equal(value, average[key]) for key, value in loaded.state_dict().items())
    written = json.loads((path / "config.json").read_text())
    assert written["_class_name"] == "WanModel" and written["dim"] == config.dim
    other = tiny_config()
    other.update(num_heads=4)
    with pytest.raises(ValueError, match="config.json says 2 attention heads"):
        load_dit(path, other)
    with pytest.raises(ValueError, match="fit no known task"):
        load_dit(path, WAN_CONFIGS["r2v-tiny"])
