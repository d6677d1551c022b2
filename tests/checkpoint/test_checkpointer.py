"""Checkpoints: whole or not there, the newest is found, and broken ones are named."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from refalign_ext.backbone import WAN_CONFIGS, WanModel, build_dit, dit_arguments
from refalign_ext.checkpoint.checkpointer import (
    Checkpointer,
    abandon_checkpoints_after,
    checkpoints_in,
    read_meta,
    read_model_config,
    resolve_resume,
)
from refalign_ext.checkpoint.reading import read_any_dit
from refalign_ext.checkpoint.stored_tensors import StoredTensors
from refalign_ext.distributed.mesh import Parallel
from tests.helpers.checkpoints import read_dit, read_projectors
from tests.helpers.tiny_checkpoint import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STEP = "optimizers.AdamW.dit.a.step"


def save(
    folder: Path, step: int, *, keep_last: int = 2, average: dict[str, Tensor] | None = None, **changes: Any
) -> Path:
    given = {
        "dit": {"a": torch.full((2, 3), float(step)), "b": torch.arange(4)},
        "dit_config": {"dim": 3},
        "projectors": {"p": torch.ones(2)},
        "settings": {"steps": 9, "alignment": {"depth": 2}},
        **changes,
    }
    model = {f"dit.{name}": value for name, value in given["dit"].items()}
    model |= {f"projectors.{name}": value for name, value in given["projectors"].items()}
    state = {"model": model, "optimizers": {STEP.removeprefix("optimizers."): torch.tensor(1.0)}}
    checkpointer = Checkpointer(folder, Parallel.single(torch.device("cpu")), keep_last)
    meta = {"samples_seen": 8 * step, "settings": given["settings"]}
    checkpointer.save(
        step, state if average is None else {**state, "average": average}, meta, given["dit_config"]
    )
    return checkpointer.finish()


def read_everything(path: Path) -> dict[str, Any]:
    stored = StoredTensors(path)
    return {
        **read_meta(path),
        "dit_config": read_model_config(path),
        "dit": read_dit(path),
        "raw": read_dit(path, raw=True),
        "projectors": read_projectors(path),
        "optimizers": {name: stored.read(name) for name in stored.names("optimizers.")},
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert path == tmp_path / "step-00000007"
    state = read_everything(path)
    assert (state["step"], state["samples_seen"], state["settings"]["alignment"]) == (7, 56, {"depth": 2})
    assert torch.equal(state["dit"]["a"], torch.full((2, 3), 7.0))
    assert torch.equal(state["dit"]["b"], torch.arange(4)) and state["dit"].keys() == {"a", "b"}
    assert torch.equal(state["projectors"]["p"], torch.ones(2))
    assert state["optimizers"] == {STEP: torch.tensor(1.0)} and state["dit_config"] == {"dim": 3}
    assert names(path) == [".metadata", "__0_0.distcp", "config.json", "trainer.json"]
    assert read_projectors(save(tmp_path, 8, projectors={})) == {}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (999, 1000, 10000, 100000000):
        save(tmp_path, step, keep_last=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00010000", "step-100000000"]
    assert resolve_resume(tmp_path, "auto") == tmp_path / "step-100000000"
    save(tmp_path, 100000001, keep_last=1)
    assert names(tmp_path) == ["step-100000001"]


def test_leftovers_and_foreign_folders_are_not_checkpoints(tmp_path: Path) -> None:
    assert resolve_resume(tmp_path / "none", "auto") is None
    save(tmp_path, 5)
    shutil.copytree(tmp_path / "step-00000005", tmp_path / "step-00000009.part")
    shutil.copytree(tmp_path / "step-00000005", tmp_path / "step-best")
    (tmp_path / "step-00000008").mkdir()
    (tmp_path / "step-00000007").write_text("a file")
    for step, name in ((11, ".metadata"), (12, "trainer.json")):
        broken = shutil.copytree(tmp_path / "step-00000005", tmp_path / f"step-{step:08d}")
        (broken / name).unlink()
    assert resolve_resume(tmp_path, "auto") == tmp_path / "step-00000005"
    assert resolve_resume(tmp_path, "off") is None
    assert "step-00000009.part" in names(tmp_path)  # a reader removes nothing
    save(tmp_path, 10)
    assert "step-00000009.part" not in names(tmp_path)
    assert "step-best" in names(tmp_path)


@pytest.mark.parametrize("where", ["shards", "trainer.json", "rename"])
def test_an_interrupted_save_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    save(tmp_path, 5, keep_last=1)

    def full(*given: object, **named: object) -> None:
        raise RuntimeError("no space") if where == "shards" else OSError("No space left on device")

    write_text = "refalign_ext.checkpoint.checkpointer.write_text"
    targets = {"shards": "torch.save", "trainer.json": write_text, "rename": "pathlib.Path.rename"}
    with monkeypatch.context() as patch:
        patch.setattr(targets[where], full)
        with pytest.raises(
            OSError, match="(?i)step-00000006 could not be written .*no space.*choose another"
        ):
            save(tmp_path, 6, keep_last=1)
    assert resolve_resume(tmp_path, "auto") == tmp_path / "step-00000005"
    assert read_everything(tmp_path / "step-00000005")["step"] == 5
    save(tmp_path, 6, keep_last=1)
    assert names(tmp_path) == ["step-00000006"]


def test_resume_from_a_folder(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    assert resolve_resume(tmp_path / "elsewhere", str(path)) == path
    unfinished = shutil.copytree(path, tmp_path / "step-00000006.part")
    for wrong in (tmp_path, tmp_path / "none", tmp_path / "step-00000005" / "config.json", unfinished):
        with pytest.raises(ValueError, match=f"--resume {wrong}: no complete checkpoint .*name a step-"):
            resolve_resume(tmp_path, str(wrong))


def test_checkpoints_beyond_the_resumed_step_are_set_aside(tmp_path: Path) -> None:
    for step in (5, 6, 7):
        save(tmp_path, step, keep_last=3)
    moved = abandon_checkpoints_after(tmp_path, 5)
    assert [path.name for path in moved] == ["abandoned-step-00000006", "abandoned-step-00000007"]
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000005"]
    assert read_meta(moved[1])["step"] == 7
    save(tmp_path, 6, keep_last=1, settings={"steps": 2})
    assert resolve_resume(tmp_path, "auto") == tmp_path / "step-00000006"
    assert [path.name for path in abandon_checkpoints_after(tmp_path, 0)] == ["abandoned-step-00000006"]
    assert read_meta(moved[0])["settings"] == {"steps": 2}
    assert abandon_checkpoints_after(tmp_path / "none", 0) == []


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "trainer.json", "config.json"])
@pytest.mark.parametrize("how", ["cut", "empty", "rubbish", "absent"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, how: str) -> None:
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
        read_everything(path)
    assert "\n" not in str(error.value)


def test_tensor_files_run_no_code(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (marker,))

    torch.save([Evil()], path / "__0_0.distcp")
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, (path / "__0_0.distcp").stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="damaged or incomplete"):
        read_dit(path)
    assert not marker.exists()


def test_the_folder_is_a_model_for_generation(tmp_path: Path) -> None:
    config = tiny_config()
    model = WanModel(**dit_arguments(config))
    average = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    from refalign_ext.training.trainer import dit_settings

    path = save(tmp_path, 5, dit=model.state_dict(), average=average, dit_config=dit_settings(model))
    loaded = build_dit(read_any_dit(path), config, path)
    assert loaded.state_dict().keys() == average.keys()
    assert all(torch.equal(value, average[key]) for key, value in loaded.state_dict().items())
    written = json.loads((path / "config.json").read_text())
    assert written["_class_name"] == "WanModel" and written["dim"] == config.dim
    other = tiny_config()
    other.update(num_heads=4)
    with pytest.raises(ValueError, match="config.json says 2 attention heads"):
        build_dit(read_any_dit(path), other, path)
    with pytest.raises(ValueError, match="fit no known task"):
        build_dit(read_any_dit(path), WAN_CONFIGS["r2v-tiny"], path)
