from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from refalign_ext.pipeline import Result
from refalign_ext.request import RuntimeOptions
from refalign_ext.serving.outputs import OutputPaths, check_writable, write_outputs
from refalign_ext.tasks import TASKS


def test_places_that_take_no_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.mp4", tmp_path / "folder", Path("/proc/nothing/a.mp4")):
        with pytest.raises(ValueError, match=r"cannot write .*a\.mp4|it is a folder"):
            check_writable(path)
    check_writable(tmp_path / "new" / "deep" / "a.mp4")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


RECORD = {"task": "r2v-tiny", "seed": 1, "versions": {}}


def choose(result: Path, **settings: object) -> OutputPaths:
    request = TASKS["r2v-tiny"].request("a star", ["a.png"])
    return OutputPaths.choose(request, RuntimeOptions(result.parent), result, **settings)


def write(paths: OutputPaths, record: dict[str, object] = RECORD, video: torch.Tensor | None = None) -> None:
    sheet = Image.new("RGB", (9, 9), "red")
    result = Result(torch.zeros(3, 5, 16, 16) if video is None else video, [sheet], {})
    write_outputs(paths, result, sheet=sheet, record=record, fps=16, magnify=2)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_result_is_written_and_may_be_written_again(tmp_path: Path) -> None:
    for _ in range(2):
        write(
            choose(tmp_path / "new" / "a.mp4", sheet=tmp_path / "s.webp", references=str(tmp_path / "refs"))
        )
    assert names(tmp_path) == ["new/a.json", "new/a.mp4", "refs/reference_1.png", "s.webp"]
    record = json.loads((tmp_path / "new" / "a.json").read_text())
    assert record == RECORD | {"files": ["a.mp4", "../s.webp", "a.json", "../refs/reference_1.png"]}


def test_an_image_is_the_first_frame(tmp_path: Path) -> None:
    paths = OutputPaths.choose(
        TASKS["t2i-14B"].request("a star"), RuntimeOptions(tmp_path), tmp_path / "a.jpg"
    )
    write(paths, video=torch.zeros(3, 1, 8, 8))
    assert Image.open(tmp_path / "a.jpg").size == (16, 16)


@pytest.mark.parametrize("what", ["no space", "a record that cannot be written"])
def test_a_result_is_saved_though_its_record_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    record: dict[str, object] = dict(RECORD)
    if what == "no space":
        monkeypatch.setattr(
            Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space"))
        )
    else:
        record["seed"] = record
    with pytest.raises(OSError, match=r"a\.mp4 is saved.*(No space|Circular)"):
        write(choose(tmp_path / "new" / "a.mp4"), record)
    assert names(tmp_path) == ["new/a.mp4"]


def test_a_result_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not numbers"):
        write(choose(tmp_path / "new" / "a.mp4"), video=torch.full((3, 5, 16, 16), float("nan")))
    assert not list(tmp_path.iterdir())


def test_names_need_not_be_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"ch\xe2teau")
    write(choose(tmp_path / f"{name}.mp4"), {**RECORD, "flags": {"ref": [name]}})
    assert json.loads((tmp_path / f"{name}.json").read_text())["flags"] == {"ref": [name]}
    choose(tmp_path / f"{name}.mp4")  # recognised as its own


def test_no_input_and_no_foreign_file_is_overwritten(tmp_path: Path) -> None:
    picture, link = tmp_path / "a.png", tmp_path / "link.png"
    Image.new("RGB", (4, 4)).save(picture)
    link.symlink_to(picture)
    result = tmp_path / "video.mp4"
    for sheet in (picture, link):
        with pytest.raises(ValueError, match=f"{sheet.name} would be written and is an input"):
            choose(result, sheet=sheet, inputs=[picture])
        with pytest.raises(ValueError, match=f"{sheet.name} is there and no earlier result"):
            choose(result, sheet=sheet)
    for name, content in (("config.json", '{"dim": 1536}'), ("list.json", "[]"), ("text.json", "no JSON")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} is there and no earlier result"):
            choose((tmp_path / name).with_suffix(".mp4"))
        assert (tmp_path / name).read_text() == content
    result.write_bytes(b"a video of the user's")
    with pytest.raises(ValueError, match=r"video\.mp4 is there and no earlier result"):
        choose(result)
    # A record whose result was at other places does not make this one replaceable.
    other = tmp_path / "other.mp4"
    write(choose(other))
    with pytest.raises(ValueError, match=r"a\.png is there and no earlier result"):
        choose(other, sheet=picture)
    choose(other)


def test_the_folder_of_references_is_no_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--save_references .* is also a file to write"):
        choose(tmp_path / "a.mp4", references=str(tmp_path / "a.mp4"))
    with pytest.raises(ValueError, match="--save_file and --save_sheet name the same file"):
        OutputPaths.choose(
            TASKS["t2i-14B"].request("a star"),
            RuntimeOptions(tmp_path),
            tmp_path / "a.png",
            sheet=tmp_path / "a.png",
        )
