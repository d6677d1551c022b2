from __future__ import annotations

import json
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


def test_all_files_appear_or_the_old_ones_stay(tmp_path: Path) -> None:
    request = TASKS["t2i-14B"].request("a star")
    paths = OutputPaths.choose(
        request, RuntimeOptions(tmp_path), tmp_path / "new" / "a.jpg", sheet=tmp_path / "sheet.webp"
    )
    sheet = Image.new("RGB", (9, 9), "red")
    record: dict[str, object] = {"seed": 1}
    result = Result(torch.zeros(3, 1, 8, 8), [], {})
    write_outputs(paths, result, sheet=sheet, record=record, fps=16, magnify=2)
    assert Image.open(paths.result).size == (16, 16)
    record["seed"] = record  # cannot be written
    with pytest.raises(ValueError, match="Circular"):
        write_outputs(paths, result, sheet=sheet, record=record, fps=16)
    assert json.loads(paths.settings.read_text()) == {"seed": 1}
    assert Image.open(paths.result).size == (16, 16)
    names = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*.*"))]
    assert names == ["new/a.jpg", "new/a.json", "sheet.webp"]
