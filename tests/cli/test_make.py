"""`sprites make`: from its parts to a folder that generates; the parts themselves are trained in tests of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from click.testing import CliRunner
from diffusers import AutoencoderKLWan

from refalign_ext.cli import main
from refalign_ext.sprites.text import random_encoder
from refalign_ext.sprites.train_vae import CONFIG
from refalign_ext.tasks import TASKS

EMBEDDED = Path(__file__).resolve().parents[2] / "assets" / "r2v-tiny"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SETTINGS = (
    *("--steps", "2", "--cache_clips", "4", "--cache_free_clips", "4", "--cache_views", "1"),
    *("--warmup_steps", "0", "--preview_every", "0", "--validate_every", "0", "--batch_size", "2"),
    *("--optimizer", "adamw", "--precision", "fp32"),  # bf16 takes seconds a step on processors without it
)


def run(*arguments: object):
    return CliRunner().invoke(main, ["sprites", *map(str, arguments)])


def test_make_goes_on_from_parts_that_are_there(tmp_path: Path) -> None:
    for part in ("vae", "text", "teacher"):
        (tmp_path / part).mkdir()
    torch.save(AutoencoderKLWan(**CONFIG).state_dict(), tmp_path / "vae" / "vae.pt")
    torch.save(
        random_encoder(**dict(TASKS["r2v-tiny"].configuration({}).t5)).state_dict(),
        tmp_path / "text" / "text.pt",
    )
    shutil.copytree(EMBEDDED / "teacher", tmp_path / "teacher" / "teacher")
    folder = tmp_path / "r2v-tiny"
    result = run("make", "--out", tmp_path, "--device", "cpu", *SETTINGS)
    assert result.exit_code == 0, result.output
    assert {path.name for path in folder.iterdir()} == {path.name for path in EMBEDDED.iterdir()}
    written = (folder / WEIGHTS).read_bytes()

    (folder / WEIGHTS).unlink()
    result = run("make", "--out", tmp_path, "--device", "cpu", *SETTINGS)
    assert result.exit_code == 0, result.output
    assert (folder / WEIGHTS).read_bytes() == written
    result = run(
        *("judge", "--ckpt_dir", folder, "--clips", 1, "--sample_steps", 1), "--out", tmp_path / "judge"
    )
    assert result.exit_code == 0, result.output


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    result = run("make", "--out", tmp_path / "out", "--stpes", 2)
    assert result.exit_code == 2 and "stpes" in result.output and not (tmp_path / "out").exists()
