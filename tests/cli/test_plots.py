"""`plot-features`, `sprites report`, `sprites guidance` and `sprites judge` as their users call them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from refalign_ext.cli import main
from refalign_ext.sprites import report as report_module
from tests.helpers import tiny_checkpoint as checkpoints


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_features_of_two_checkpoints(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = checkpoints.build(tmp_path / "other", seed=1)
    result = run(
        *("plot-features", "--ckpt_dir", tiny_checkpoint, "--compare", other, "--labels", "a,b"),
        *("--clips", 1, "--views", 2, "--blocks", "0,5", "--timestep", "500", "--device", "cpu"),
        *("--out", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.output
    assert written(tmp_path / "out") == ["features-t500.png", "features.json"]
    assert "b, noise level 500" in result.output and " white" in result.output
    entry = json.loads((tmp_path / "out" / "features.json").read_text())
    assert entry["settings"]["checkpoints"] == {"a": None, "b": str(other)}
    assert Image.open(tmp_path / "out" / "features-t500.png").width > 800
    first, second, gap = (
        found["500"]["5"]["variance_ratio"]["mean"]
        for found in (entry["checkpoints"]["a"], entry["checkpoints"]["b"], entry["difference"])
    )
    assert gap == pytest.approx(first - second, abs=1e-6) and first != second


def test_report_and_single_row(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row for row in report_module.ROWS if row.name in ("reconstruction-1", "generation-2")]
    monkeypatch.setattr(report_module, "ROWS", rows)
    gates = [gate for gate in report_module.GATES if gate.row in {row.name for row in rows}]
    monkeypatch.setattr(report_module, "GATES", gates)
    result = run(
        *("sprites", "report", "--ckpt_dir", tiny_checkpoint, "--clips", 2, "--sample_steps", 1),
        *("--out", tmp_path),
    )
    assert result.exit_code == 0, result.output
    assert "gates met; 2 clips a row" in result.output and "![" not in result.output
    names = {Path(name).stem for name in written(tmp_path / "rows")}
    assert {"report.md", "report.json"} < set(written(tmp_path)) and names == {row.name for row in rows}
    report = json.loads((tmp_path / "report.json").read_text())
    result = run(
        *("sprites", "judge", "--ckpt_dir", tiny_checkpoint, "--clips", 2, "--sample_steps", 1),
        *("--subjects", 2, "--out", tmp_path / "judge"),
    )
    assert result.exit_code == 0, result.output
    alone = json.loads((tmp_path / "judge" / "generation-2-held_out-cross-1000.json").read_text())
    assert alone["table"] == report["rows"]["generation-2"]["table"]


def test_grid(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = (
        *("sprites", "guidance", "--ckpt_dir", tiny_checkpoint, "--clips", 2, "--sample_steps", 1),
        *("--image_scales", "1,5", "--text_scales", "5,1", "--out", tmp_path),
    )
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "| image 1 to 5 | colors |" in result.output
    assert {"guidance.json", "guidance.md", "guidance.png", "cells/image-1-text-5.json"} < set(
        written(tmp_path)
    )
    before = (tmp_path / "cells" / "image-1-text-5.json").stat().st_mtime_ns
    assert run(*arguments).exit_code == 0
    assert (tmp_path / "cells" / "image-1-text-5.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plot-features", "--blocks", "first"), "numbers with commas between them"),
        (("plot-features", "--labels", "a,b"), "--labels: 1 different names"),
        (("plot-features", "--task", "r2v-1.3B"), "needs --ckpt_dir FOLDER"),
        (("sprites", "guidance", "--image_scales", "5"), "--image_scales 5"),
        (("sprites", "guidance", "--text_scales", "1;5"), "give numbers with commas between them"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.output
    assert not (tmp_path / "out").exists()


def test_pictures_that_show_nothing_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name, color in (("red", (220, 40, 40)), ("white", (255, 255, 255))):
        Image.new("RGB", (40, 40), color).save(tmp_path / f"{name}.png")
    result = run(
        *("plot-features", "--ckpt_dir", tiny_checkpoint, "--device", "cpu", "--out", tmp_path / "out"),
        *("--ref", tmp_path / "red.png", "--ref", tmp_path / "white.png"),
    )
    assert result.exit_code == 2 and "reference 2 shows" in result.output
