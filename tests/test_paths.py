"""Paths that users give: what is refused, and what is said to have been meant."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from refalign_ext.paths import require_file, require_file_or_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name in ("dog.png", "cat.png", "pictures/Red Ball.png", unicodedata.normalize("NFD", "café.png")):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_what_is_there_is_taken(folder: Path) -> None:
    assert require_file("dog.png", "--ref dog.png") == Path("dog.png")
    assert require_file_or_folder("pictures", "--dit_ckpt pictures") == Path("pictures")
    os.symlink("dog.png", "link.png")
    assert require_file("link.png", "--ref link.png") == Path("link.png")


@pytest.mark.parametrize(
    "path, meant",
    [
        ("pictures\\Red Ball.png", "pictures/Red Ball.png"),
        ("pictures/red ball.png", "pictures/Red Ball.png"),
        ("pictures/Red Bal.png", "pictures/Red Ball.png"),
        ("DOG.PNG", "dog.png"),
        ("dog.png ", "dog.png"),
        ("'dog.png'", "dog.png"),
        ("dog.jpg", "dog.png"),
        (unicodedata.normalize("NFC", "café.png"), unicodedata.normalize("NFD", "café.png")),
    ],
)
def test_near_misses_say_what_was_meant(folder: Path, path: str, meant: str) -> None:
    with pytest.raises(ValueError, match="does not exist") as error:
        require_file(path, f"--ref {path}")
    assert f"did you mean {meant}?" in str(error.value)


def test_a_list_with_commas_is_explained(folder: Path) -> None:
    with pytest.raises(ValueError, match="blanks between them: dog.png cat.png"):
        require_file("dog.png,cat.png", "--ref dog.png,cat.png")


@pytest.mark.parametrize("path", ["nothing.png", "nowhere/dog.png", "dog.png/x", "a" * 300, "a\0b", "loop"])
def test_nothing_like_it_is_an_ordinary_mistake(folder: Path, path: str) -> None:
    os.symlink("loop", "loop")
    for require in (require_file, require_file_or_folder):
        with pytest.raises(ValueError, match="correct the path"):
            require(path, "--ref x")


def test_only_regular_files_are_opened(folder: Path) -> None:
    os.mkfifo("pipe")
    os.symlink("/dev/zero", "endless.png")
    for path in ("pipe", "endless.png", "/dev/zero"):
        for require in (require_file, require_file_or_folder):
            with pytest.raises(ValueError, match="no regular file"):
                require(path, f"--ref {path}")
    with pytest.raises(ValueError, match="is a folder"):
        require_file("pictures", "--ref pictures")
