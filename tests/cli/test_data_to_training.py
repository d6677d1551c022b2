"""From native files to training steps with the commands that users type: convert, materialise, check, cache, train."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from refalign_ext.cli import main
from refalign_ext.training.clip_data import CLIP_DATA
from refalign_ext.training.run import run_training
from tests.helpers.opens2v_fixture import BLUE, FRAMES, RED, SIZE, NativeSet, render_video, write_native_set
from tests.helpers.phantom_fixture import info_row, pair, referred, seen, write_info, write_pairs

EXACT = {
    **{"precision": "fp32", "log_every": 1, "preview_every": 0, "validate_every": 0, "warmup_steps": 0},
    **{"schedule": "constant", "batch_size": 2, "data_workers": 0, "seed": 3, "save_every": 5},
    "optimizer": "adamw",  # Muon orthogonalises in bf16: seconds a step on processors without it
}
VARIANTS = {"sampling.clip_variants": 2, "sampling.reference_variants": 2}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads on few busy cores wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def flags(settings: dict[str, object]) -> list[object]:
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss/total"] for row in rows if "loss/total" in row]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> NativeSet:
    return write_native_set(tmp_path_factory.mktemp("opens2v"))


@pytest.fixture(scope="module")
def manifest(native: NativeSet) -> Path:
    """OpenS2V converted; its references are still to be cut."""
    path = native.root / "manifest.jsonl"
    text = done(
        *("data", "convert", "opens2v", *native.parts, "--out", path, "--video_root", native.videos),
        *("--cross_pairs", native.cross_pairs, "--backgrounds", native.backgrounds),
        *("--min_frames", 20, "--workers", 0),
    )
    assert "clips: 4 of 4 kept" in text and str(path) in text
    return path


@pytest.fixture(scope="module")
def cut(manifest: Path) -> Path:
    """The same with pictures."""
    done("data", "materialise", manifest, "--out", manifest.parent / "cut", "--workers", 0)
    return manifest.parent / "cut" / "manifest.jsonl"


@pytest.fixture(scope="module")
def packed(manifest: Path) -> Path:
    """The same in tar shards."""
    folder = manifest.parent / "packed"
    done("data", "materialise", manifest, "--out", folder, "--pack", "--shard_size", 2, "--workers", 0)
    return folder


@pytest.fixture(scope="module")
def train_on(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[float]]:
    """Losses of some training steps of r2v-tiny."""

    def run(data: Path, steps: int, **settings: object) -> list[float]:
        out = tmp_path_factory.mktemp("run")
        settings = {name.replace("__", "."): value for name, value in settings.items()}
        run_training(
            None,
            EXACT | VARIANTS | settings | {"data": str(data), "out": str(out), "steps": steps},
            sources=(CLIP_DATA,),
            device="cpu",
            threads=1,
        )
        return losses(out)

    return run


def test_every_step_finds_the_data_in_order(cut: Path, packed: Path, manifest: Path) -> None:
    for clips in (manifest, cut, packed):
        text = done("data", "check", clips, "--frames", 9, "--fps", 8, "--workers", 0)
        assert "4 rows; 4 checked, 0 with errors" in text
        with Image.open(f"{clips}.check.png") as sheet:
            assert min(sheet.size) > 200
    assert "4" in done("data", "stats", packed, "--workers", 0)
    assert Path(f"{packed}.stats.png").stat().st_size > 1000
    assert json.loads(Path(f"{packed}.stats.json").read_text())["clips"] == 4


def test_errors_are_named_and_end_with_code_2(cut: Path, tmp_path: Path) -> None:
    rows = cut.read_text().splitlines()
    broken = cut.parent / "broken.jsonl"
    broken.write_text("\n".join([rows[0], rows[1].replace(".png", ".jpg"), "{", rows[0]]) + "\n")
    result = call("data", "check", broken, "--workers", 0, "--samples", 2)
    assert result.exit_code == 2
    assert "row 2" in result.output and "row 3" in result.output and "row 4" in result.output
    found = [json.loads(line) for line in Path(f"{broken}.check.jsonl").read_text().splitlines()]
    assert {entry["row"] for entry in found if entry["level"] == "error"} == {2, 3, 4}


def test_losses_are_the_same_with_and_without_cache(
    cut: Path, packed: Path, train_on: Callable[..., list[float]], tmp_path: Path
) -> None:
    caches = {}
    for name, clips in (("cut", cut), ("packed", packed)):
        caches[name] = tmp_path / name
        command = (
            "data",
            "cache",
            "--out",
            caches[name],
            "--workers",
            0,
            "--device",
            "cpu",
            "--chunk_rows",
            3,
        )
        settings = EXACT | VARIANTS | {"data": clips}
        text = done(*command, *flags(settings))
        assert "4 clips in 2 chunks (2 new)" in text and "0 failures" in text
    assert "(0 new)" in done(*command, *flags(settings))  # a second run finds it done
    plain = train_on(cut, 4)
    assert len(plain) == 4 and len(set(plain)) == 4
    assert train_on(cut, 4, cache=str(caches["cut"])) == pytest.approx(plain, abs=1e-5)
    in_shards = train_on(packed, 2)
    assert train_on(packed, 2, cache=str(caches["packed"])) == pytest.approx(in_shards, abs=1e-5)
    with pytest.raises(ValueError, match="changed since|does not fit"):
        train_on(cut, 1, cache=str(caches["cut"]), sampling__clip_variants=3)
    with pytest.raises(ValueError, match="--cache names 2 folders"):
        train_on(cut, 1, cache=f"{caches['cut']},{caches['packed']}")


def test_references_still_to_be_cut_and_workers_do_not_change_what_is_trained(
    manifest: Path, cut: Path, train_on: Callable[..., list[float]]
) -> None:
    plain = train_on(cut, 2)
    assert train_on(manifest, 2) == pytest.approx(plain, abs=1e-5)
    assert train_on(cut, 2, data_workers=2) == plain


@pytest.mark.slow
def test_a_signal_to_all_processes_saves_and_ends(cut: Path, tmp_path: Path) -> None:
    settings = EXACT | VARIANTS | {"data": cut, "out": tmp_path, "steps": 10**6, "data_workers": 2}
    command = [sys.executable, "train_refalign.py", "--device", "cpu", "--threads", 1, *flags(settings)]
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=Path(__file__).parents[2],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 150
        while not ((tmp_path / "metrics.jsonl").exists() and losses(tmp_path)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 143 and "Traceback" not in error, error
        assert error.strip().splitlines()[-1].startswith("stopped; the same command goes on")
        steps = losses(tmp_path)
        assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == [f"step-{len(steps):08d}"]
        deadline = time.monotonic() + 20
        while True:  # nothing is left behind
            os.killpg(process.pid, 0)
            assert time.monotonic() < deadline
            time.sleep(0.1)
    except ProcessLookupError:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_two_sets_in_stages_and_a_share_that_validates(
    cut: Path, packed: Path, train_on: Callable[..., list[float]]
) -> None:
    settings = {"data_mix": (6.0, 4.0), "sampling__cross_pairs": 0.0}
    staged = train_on(f"{cut},{packed}", 3, data_schedule="stages", **settings)
    assert staged[:1] == train_on(cut, 1, sampling__cross_pairs=0.0)
    assert len(train_on(f"{cut},{packed}", 1, **settings)) == 1
    assert len(train_on(cut, 1, validation_share=0.5, validate_every=1, validation_clips=2, seed=1)) == 1


def test_phantom_to_training(tmp_path: Path, train_on: Callable[..., list[float]]) -> None:
    names, box = ("uuid-a_0_3", "uuid-b_4_7"), (10, 8, 60, 50)
    for name, colour in zip(names, (RED, BLUE), strict=True):
        render_video(tmp_path / "videos" / f"{name}.mp4", [(box, colour)])
    rows = [
        (
            own,
            "A person walks.",
            {"the person": pair([seen(own, "0.25", box)], [referred(other, "0.5", box)])},
        )
        for own, other in (names, names[::-1])
    ]
    pairs = write_pairs(tmp_path / "pairs.parquet", rows)
    info = write_info(tmp_path / "info.parquet", [info_row(name, SIZE, FRAMES, 8.0) for name in names])
    path = tmp_path / "manifest.jsonl"
    text = done(
        *("data", "convert", "phantom", pairs, info, "--out", path, "--video_root", tmp_path / "videos"),
        *("--frames", 9, "--fps", 8, "--workers", 0),
    )
    assert "clips: 2 of 2 kept" in text and "references: 4 of 4 kept" in text
    assert len(train_on(path, 1)) == 1


def test_a_folder_of_clips_to_training(
    native: NativeSet, tmp_path: Path, train_on: Callable[..., list[float]]
) -> None:
    for number, video in enumerate(sorted(native.videos.rglob("*.mp4"))):
        (tmp_path / f"{number}.mp4").write_bytes(video.read_bytes())
        (tmp_path / f"{number}.txt").write_text("A person walks.\n")
        Image.new("RGB", (20, 30), "red").save(tmp_path / f"{number}.ref1.png")
    (tmp_path / "lonely.mp4").write_bytes(b"")
    text = done("data", "convert", "folder", tmp_path, "--workers", 0)
    assert "clips: 4 of 5 kept" in text and "lonely" in text
    assert "4 rows; 4 checked, 0 with errors" in done(
        "data", "check", tmp_path / "manifest.jsonl", "--workers", 0
    )
    assert len(train_on(tmp_path / "manifest.jsonl", 1)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "folder", "."], "no video"),
        (["check", "none.jsonl"], "none.jsonl"),
        (["cache"], "--data"),
        (
            ["cache", "--out", "c", "--data", "a", "--sampling.clip_variant", "1"],
            "--sampling.clip_variant",
        ),
        (["convert", "folder", ".", "--fps", "8"], "--frames"),
        (["stats", ".", "--frames", "0"], "--frames"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("data", *arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert message in " ".join(result.output.split())
    assert not [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"]
