"""What the `data` commands say and leave behind, apart from what the functions do that they call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from refalign_ext.cli import main
from tests.helpers.clips import render


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["data", *(str(argument) for argument in arguments), "--workers", "0"])


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    render(tmp_path / "a.mp4", 12)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    row = {"id": "a", "video": "a.mp4", "prompt": "a box", "references": ["a.png"]}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path / "manifest.jsonl"


def test_a_folder_may_be_the_current_one(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(manifest.parent)
    name = manifest.parent.name
    assert call("check", ".").exit_code == 0 and call("stats", ".", "--no_measure").exit_code == 0
    for ending in ("check.png", "check.jsonl", "stats.png", "stats.json"):
        assert (manifest.parent.parent / f"{name}.{ending}").is_file(), ending


def test_pictures_are_png(manifest: Path) -> None:
    for command, flag in (("check", "--sheet"), ("stats", "--out")):
        result = call(command, manifest, flag, manifest.parent / "picture.jpg")
        assert result.exit_code == 2 and f"error: {flag} " in result.output and ".png" in result.output


def test_nothing_left_is_an_error(manifest: Path) -> None:
    (manifest.parent / "a.png").unlink()
    result = call("materialise", manifest, "--out", manifest.parent / "cut")
    assert result.exit_code == 2
    assert "no_references" in result.output and "no clip is left" in result.output


def test_work_that_is_not_shared_is_done_by_one_rank(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = manifest.parent / "other.jsonl"
    for command in (("stats", manifest), ("convert", "folder", manifest.parent, "--out", out)):
        result = call(*command)
        assert (result.exit_code, result.output) == (0, "")
    assert not out.exists() and not Path(f"{manifest}.stats.png").exists()
