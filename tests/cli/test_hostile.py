"""Hostile command lines and files: each ends in one line that names the thing, with exit code 2, and writes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from refalign_ext.cli import generate, train

DIT = "diffusion_pytorch_model.safetensors"
VAE, T5 = "Wan2.1_VAE_tiny.pth", "models_t5_umt5-tiny-enc-bf16.pth"
FAST = ("--device", "cpu", "--sample_steps", "1", "--magnify", "1")


def entries(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("red.png")
    Image.new("RGB", (40, 30), "red").save("Blue Ball.png")
    os.mkfifo("pipe.png")
    os.symlink("/dev/zero", "endless.png")
    os.symlink("loop", "loop")
    Path("config.json").write_text('{"dim": 1536}')
    Path("clip.mp4").write_bytes(b"a video of the user's")
    Path("weights").mkdir()
    return tmp_path


@pytest.fixture
def fails(folder: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a program; gives its one error line after checking that nothing was written."""

    def call(main: Callable[[list[str]], int], *words: object) -> str:
        before = entries(folder)
        capfd.readouterr()
        assert main([str(word) for word in words]) == 2
        assert entries(folder) == before
        error = capfd.readouterr().err
        lines = [line for line in error.replace("\r", "\n").splitlines() if line.strip()]
        assert len(lines) == 1 and ": error: " in lines[0], error
        return lines[0].partition(": error: ")[2]

    return call


# What is told before anything is loaded: (words, what the line names).
EARLY = {
    # paths
    "a pipe": ("--ref pipe.png", r"pipe\.png is no regular file"),
    "a link to a device": ("--ref endless.png", r"endless\.png is no regular file"),
    "a device as weights": ("--ref red.png --dit_ckpt /dev/zero", "/dev/zero is no regular file"),
    "a pipe as a LoRA": ("--ref red.png --lora pipe.png:0.5", r"--lora pipe\.png is no regular file"),
    "a folder as a picture": ("--ref weights", "--ref weights is a folder"),
    "a link in a circle": ("--ref loop", "--ref loop cannot be reached"),
    "a folder in a circle": ("--ref loop/a.png", "cannot be reached"),
    "a file as a checkpoint folder": (
        "--ref red.png --ckpt_dir red.png",
        r"red\.png is a file: name its folder",
    ),
    "a folder's near miss": ("--ref red.png --ckpt_dir weight", "did you mean weights"),
    "another case": ("--ref RED.png", r"did you mean red\.png\?"),
    "a list with commas": ("--ref red.png,red.png", r"blanks between them: red\.png red\.png"),
    "a LoRA that is not there": (
        "--ref red.png --lora red.pgn:0.5",
        r"--lora red\.pgn does not exist.*red\.png",
    ),
    "a scale that is no number": ("--ref red.png --lora red.png:nan", "the scale is nan"),
    # outputs
    "the sheet is an input": (
        "--ref red.png --save_sheet red.png",
        r"red\.png would be written and is an input",
    ),
    "the record is foreign": (
        "--ref red.png --save_file config.mp4",
        r"config\.json is there and no earlier result",
    ),
    "the video is foreign": (
        "--ref red.png --save_file clip.mp4",
        r"clip\.mp4 is there and no earlier result",
    ),
    "references in the video": (
        "--ref red.png --save_file a.mp4 --save_references a.mp4",
        "--save_references a.mp4 is also a file",
    ),
    "an output in a circle": ("--ref red.png --save_file loop/a.mp4", "loop is a link that leads nowhere"),
}


@pytest.mark.parametrize("what", EARLY)
def test_told_before_anything_is_loaded(what: str, fails: Callable[..., str]) -> None:
    words, expected = EARLY[what]
    line = fails(generate.main, *words.split(), "--prompt", "a red ball", *FAST)
    assert re.search(expected, line), line


ABSURD = {
    "frames": ("--frame_num 1000001", "frame_num is 1000001: give at most"),
    "a size": ("--size 99968*48", r"size 99968\*48: give at most"),
    "steps": ("--sample_steps 100000000", "sample_steps is 100000000: give 1 to 1000"),
    "a shift": ("--sample_shift 1e308", "sample_shift is .*: give 0.01 to 100"),
    "a tiny shift": ("--sample_shift 1e-308", "sample_shift is .*: give 0.01 to 100"),
    "magnify": ("--magnify 100000", "magnify is 100000: give 1 to 64"),
}


@pytest.mark.parametrize("what", ABSURD)
def test_absurd_numbers_of_generation(what: str, fails: Callable[..., str], tiny_checkpoint: Path) -> None:
    words, expected = ABSURD[what]
    given = ("--ref", "red.png", "--prompt", "x", "--device", "cpu", "--ckpt_dir", tiny_checkpoint)
    line = fails(generate.main, *given, *words.split())
    assert re.search(expected, line), line


# What training is told to do that it cannot, or that does nothing.
TRAINING = {
    "steps": ("--steps 99999999999999999999", "steps is 9+: it must be at most 2147483647"),
    "threads": ("--threads 99999", "99999 is not in the range 1<=x<=1024"),
    "no folder": (["--out", ""], "out is : give the name of a folder"),
    "a rate of zero": ("--learning_rate 0", "learning_rate is 0.0: give a number above 0"),
    "targets without a rank": ("--lora_targets q", "lora_targets does nothing without lora_rank"),
    "a mix without data": ("--data_mix 1,2", "data_mix does nothing without data"),
    "a LoRA of random weights": ("--lora red.png --from_scratch true", "--lora adapts weights that exist"),
}


@pytest.mark.parametrize("what", TRAINING)
def test_absurd_and_idle_settings_of_training(what: str, fails: Callable[..., str]) -> None:
    words, expected = TRAINING[what]
    line = fails(train.train.run, *(words.split() if isinstance(words, str) else words))
    assert re.search(expected, line), line


@pytest.mark.parametrize("name, value", [("WORLD_SIZE", "abc"), ("WORLD_SIZE", "-1"), ("RANK", "1.5")])
@pytest.mark.parametrize("program", [generate.main, train.train.run], ids=["generate", "train"])
def test_an_environment_that_torchrun_did_not_make(
    name: str,
    value: str,
    program: Callable[[list[str]], int],
    fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, value)
    if name == "RANK":
        monkeypatch.setenv("WORLD_SIZE", "1")
    words = ("--ref", "red.png", "--prompt", "x") if program is generate.main else ("--out", "out")
    assert f"the environment has {name}={value!r}" in fails(program, *words)


def test_a_prompt_that_is_no_text(fails: Callable[..., str]) -> None:
    line = fails(generate.main, "--ref", "red.png", "--prompt", os.fsdecode(b"ch\xe2teau"), *FAST)
    assert "prompt holds bytes that are no UTF-8 text" in line


def test_names_that_are_no_text_make_a_result(folder: Path, tiny_checkpoint: Path) -> None:
    picture, video = (os.fsdecode(name) for name in (b"ch\xe2teau.png", b"vid\xe9o.mp4"))
    shutil.copy("red.png", picture)
    words = ["--ref", picture, "--prompt", "a red ball", "--save_file", video, "--frame_num", "5", *FAST]
    for _ in range(2):  # the second replaces its own
        assert generate.main([*words, "--ckpt_dir", str(tiny_checkpoint)]) == 0
    record = json.loads(Path(video).with_suffix(".json").read_text())
    assert record["flags"]["ref"] == [picture] and video in record["files"]


def change_dit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / DIT)
    change(weights)
    save_file(weights, folder / DIT)


def zero_half(weights: dict[str, torch.Tensor]) -> None:
    for name in sorted(weights)[: len(weights) // 2]:
        weights[name] = torch.zeros_like(weights[name])


def one_nan(weights: dict[str, torch.Tensor]) -> None:
    weights["blocks.1.ffn.2.weight"].view(-1)[7] = float("nan")


def one_infinity(folder: Path) -> None:
    weights = torch.load(folder / T5, weights_only=True)
    weights["token_embedding.weight"].view(-1)[3] = float("inf")
    torch.save(weights, folder / T5)


def integers(folder: Path) -> None:
    weights = torch.load(folder / VAE, weights_only=True)
    name = next(name for name, tensor in weights.items() if tensor.dim() > 1)
    weights[name] = weights[name].to(torch.int32)
    torch.save(weights, folder / VAE)


def deep(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def wrong_byte(folder: Path) -> None:
    file = next(folder.rglob("tokenizer.json"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] = 0xFF
    file.write_bytes(bytes(content))


# How a checkpoint is damaged: (what is done to its folder, what the line names).
DAMAGE = {
    "zeros": (lambda folder: change_dit(folder, zero_half), r"is all zeros.*download it again"),
    "a NaN": (
        lambda folder: change_dit(folder, one_nan),
        r"blocks\.1\.ffn\.2\.weight has values that are not finite",
    ),
    "an infinity": (one_infinity, f"{T5}: token_embedding.weight|{T5}: .* has values that are not finite"),
    "integers": (integers, f"{VAE}: .* is int32"),
    "deep JSON": (deep, r"config\.json: not a JSON object"),
    "a wrong byte": (wrong_byte, "not a readable tokenizer folder"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_weights_are_named(
    what: str, folder: Path, tiny_checkpoint: Path, fails: Callable[..., str]
) -> None:
    damage, expected = DAMAGE[what]
    shutil.copytree(tiny_checkpoint, "weights", dirs_exist_ok=True)
    damage(folder / "weights")
    line = fails(
        generate.main,
        *("--ref", "red.png", "--prompt", "a red ball", "--ckpt_dir", "weights", "--frame_num", 5, *FAST),
    )
    assert re.search(expected, line), line
