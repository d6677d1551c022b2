"""generate.py as its users run it.

Cases that need torch call `main` in this process or in forked ones, which spares each of them the imports.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from refalign_ext.cli import generate as program
from refalign_ext.pipeline import R2VPipeline, Result
from refalign_ext.tasks import TASKS, Task
from tests.helpers.programs import Program
from wan.modules.attention import announce_kernel

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a large circle moves right"


def words(line: str) -> list[str]:
    return line.split()


def entries(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def error_line(stderr: str) -> str:
    """The one line that a mistake prints."""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("generate.py: error: ")
    return lines[0].removeprefix("generate.py: error: ")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A folder with reference pictures, good and bad, and `out`, which stays empty when nothing is written."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    Image.new("RGB", (30, 40), "blue").save(tmp_path / "blue.jpg")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.fixture
def fails(
    run_folder: Path,
    tiny_checkpoint: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Runs `main` in the folder; gives the error line after checking that nothing was written."""

    def call(*arguments: object, **options: object) -> str:
        settings = {
            "--ckpt_dir": tiny_checkpoint,
            "--prompt": PROMPT,
            "--save_file": "out/a.mp4",
            "--device": "cpu",
        }
        settings.update({"--sample_steps": "1", "--magnify": "1", **options})
        flags = [text for name, value in settings.items() for text in (name, str(value))]
        before = entries(run_folder)
        monkeypatch.chdir(run_folder)
        capfd.readouterr()
        assert program.main([*map(str, arguments), *flags]) == 2
        assert entries(run_folder) == before
        error = capfd.readouterr().err
        # A progress bar may stand before the error when sampling had begun.
        return error_line(re.sub(r"^.*sampling:.*\n", "", error.replace("\r", "\n"), flags=re.MULTILINE))

    return call


def test_every_flag_of_upstream_is_there() -> None:
    upstream = (
        "task size frame_num ckpt_dir offload_model ulysses_size ring_size t5_fsdp t5_cpu dit_fsdp save_file src_video "
        "src_mask src_ref_images prompt use_prompt_extend prompt_extend_method prompt_extend_model "
        "prompt_extend_target_lang base_seed image first_frame last_frame sample_solver sample_steps sample_shift "
        "sample_guide_scale"
    )
    assert set(upstream.split()) <= {option.name for option in program.command.params}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_defaults_in_the_help_are_those_that_are_used(task: Task) -> None:
    request = task.request("a prompt")
    for option in program.command.params:
        value = getattr(request, option.name, None)
        if option.name not in (*task.SETTINGS, *task.scales):
            continue
        words = option.help.partition("default: ")[2].split(", ")
        shown = dict(word.split(" ") for word in words[1:]).get(task.name, words[0])
        assert shown == ("{}*{}".format(*value) if option.name == "size" else str(value)), option.name


def test_values_are_read_as_upstreams() -> None:
    words = ["--ref", "a.png", "b.png", "--offload_model", "no", "--save_references", "--ref_role=face"]
    flags = program.command.make_context("x", [*words, "--base_seed", "-1", "--size", "64x48"]).params
    assert flags["ref"] == (Path("a.png"), Path("b.png")) and flags["ref_role"] == ("face",)
    assert (flags["offload_model"], flags["save_references"], flags["size"]) == (False, "", (64, 48))
    flags = program.command.make_context("x", ["--save_references", "out", "--offload_model", "T"]).params
    assert (flags["offload_model"], flags["save_references"], flags["base_seed"]) == (True, "out", -1)


@pytest.mark.timeout(600)
def test_a_complete_run(run_folder: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = (
        "--task r2v-tiny --ref red.png blue.jpg --ref_role subject background --base_seed 7 --sample_steps 2 "
        "--save_file out/demo/video.mp4 --save_references --offload_model True --device cpu"
    )
    flags = [*flags.split(), "--ckpt_dir", tiny_checkpoint, "--prompt", PROMPT]
    once = announce_kernel.cache_clear  # what is logged once may have been here
    with Program(program.main, *flags, folder=run_folder, said=tmp_path / "said", before=once) as run:
        assert run.wait() == 0, run.stderr
    assert entries(run_folder / "out") == [
        "demo",
        "demo/video.json",
        "demo/video.mp4",
        "demo/video.references",
        "demo/video.references/reference_1.png",
        "demo/video.references/reference_2.png",
        "demo/video.sheet.png",
    ]
    assert "2/2" in run.stderr
    assert "peak memory" in run.stdout
    assert "attention is computed by" in run.stdout

    folder = run_folder / "out" / "demo"
    with av.open(str(folder / "video.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 8
    assert np.stack(frames).shape == (9, 384, 384, 3)
    assert Image.open(folder / "video.references" / "reference_1.png").size == (48, 48)
    assert Image.open(folder / "video.sheet.png").width > 1000

    record = json.loads((folder / "video.json").read_text(encoding="utf-8"))
    assert (record["task"], record["seed"], record["prompt"]) == ("r2v-tiny", 7, PROMPT)
    assert (record["size"], record["frame_num"], record["sample_solver"]) == ([48, 48], 9, "euler")
    assert record["flags"]["ref_role"] == ["subject", "background"]
    assert record["versions"]["torch"] == torch.__version__
    assert {Path(name).name for name in record["weights"]} == {
        "diffusion_pytorch_model.safetensors",
        "models_t5_umt5-tiny-enc-bf16.pth",
        "Wan2.1_VAE_tiny.pth",
    }
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in record["weights"].values())
    assert set(record["seconds"]) == {"load", "prepare", "denoise", "decode"}


EARLY_MISTAKES = {
    "--task r2v-tny": r"r2v-tny.*did you mean r2v-tiny\?",
    "--task i2v-14B": "i2v-14B is not available yet",
    "--prompt x": "r2v-tiny needs references: pass --ref",
    "--ref red.png": "needs a prompt",
    "--ref red.png none.png --prompt x": r"--ref none\.png does not exist",
    "--ref red.png red.png --ref_role face face face --prompt x": "3 roles for 2 references",
    "--task t2v-1.3B --ref red.png": "--ref: task t2v-1.3B does not take it",
    "--task t2v-1.3B": "needs --ckpt_dir.*hf download Wan-AI/Wan2.1-T2V-1.3B",
    "--ref red.png --prompt x --ckpt_dir none": "folder none does not exist",
    "--size 48": r"'48' is not width\*height",
    "--ref red.png --prompt x --sample_steps 0": "sample_steps is 0",
    "--ref_guide_scale nan": "'nan' is not a number",
    "--ref red.png --prompt x --sample_guide_scale 4": "--ref_guide_scale and --text_guide_scale",
    "--ref red.png --prompt x --save_file a.avi": r"a\.avi.*\.mp4",
    "--ref red.png --prompt x --save_file red.png/a.mp4": r"cannot write red\.png/a\.mp4: red\.png is not a folder",
    "--use_prompt_extend": "--use_prompt_extend: not available yet",
    "--ulysses_size 2": "--ulysses_size needs several processes: run torchrun",
    "--dit_fsdp": "--dit_fsdp needs several processes: run torchrun",
    "--cfg_size 0": "--cfg_size is 0: give 1 or more",
    "--world_size 8": "--world_size 8: a number of devices, with --dry-run",
    "--offload_model True --t5_fsdp": "does not go with --dit_fsdp or --t5_fsdp",
    "--t5_cpu --t5_fsdp": "--t5_cpu does not go with --t5_fsdp",
    "--dry-run --task r2v-14B --world_size 4 --cfg_size 3": "choose cfg x Ulysses x ring from 1 x 1 x 4, 1 x 2 x 2",
    "--image red.png": "--image: task r2v-tiny does not take it",
    "--speed 9": "--speed",
}


@pytest.mark.parametrize("flags", EARLY_MISTAKES)
def test_early_mistakes(
    run_folder: Path, flags: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = flags.split()
    if "--ckpt_dir" not in arguments and "--task" not in arguments:
        arguments += ["--ckpt_dir", "out"]
    before = entries(run_folder)
    monkeypatch.chdir(run_folder)
    assert program.main(arguments) == 2
    out, error = capfd.readouterr()
    assert re.search(EARLY_MISTAKES[flags], error_line(error)), error
    assert out == ""
    assert entries(run_folder) == before


def test_mistakes_cost_no_torch(run_folder: Path) -> None:
    script = (
        "import sys\nfrom refalign_ext.cli.generate import main\n"
        "for arguments in (['--task', 'r2v-tny'], ['--prompt', 'x'], ['--size', '48'],\n"
        "                  ['--ref', 'red.png', '--prompt', 'x', '--save_file', 'red.png/a.mp4']):\n"
        "    assert main(arguments) == 2\n"
        "sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=run_folder, env=environment, check=False)
    assert done.returncode == 0


def test_traceback_on_request(
    run_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFALIGN_TRACEBACK", "1")
    assert program.main(["--prompt", "x", "--ckpt_dir", str(run_folder)]) == 2
    error = capfd.readouterr().err
    assert "Traceback" in error
    assert error.strip().splitlines()[-1].startswith("generate.py: error: task r2v-tiny needs references")


def test_bad_references(fails) -> None:
    assert "empty.png is empty" in fails("--ref", "red.png", "empty.png")
    assert "text.png is not a picture" in fails("--ref", "text.png")
    assert "--matte off" in fails("--ref", "red.png", **{"--matte": "auto"})


def test_sizes_and_frame_numbers(fails) -> None:
    assert "nearest valid size is 48*48" in fails("--ref", "red.png", **{"--size": "50*47"})
    assert "nearest valid is 9 or 13" in fails("--ref", "red.png", **{"--frame_num": "11"})
    t2v = {"--task": "t2v-1.3B", "--size": "1280*720"}
    assert "give 480*832 or 832*480" in fails(**t2v)
    t2i = {"--task": "t2i-14B", "--frame_num": "5", "--save_file": "out/a.png"}
    assert "makes one image" in fails(**t2i)


def test_absent_device(fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device cuda is not on this machine" in fails("--ref", "red.png", **{"--device": "cuda"})


def test_incomplete_and_damaged_checkpoints(fails, tiny_checkpoint: Path, run_folder: Path) -> None:
    folder = run_folder / "copy"
    folder.mkdir()
    (folder / "diffusion_pytorch_model.safetensors").touch()
    message = fails("--ref", "red.png", **{"--ckpt_dir": "copy"})
    assert all(
        name in message for name in ("umt5-tiny-enc-bf16.pth", "Wan2.1_VAE_tiny.pth", "tokenizer.json")
    )
    assert "diffusion" not in message

    content = (tiny_checkpoint / "diffusion_pytorch_model.safetensors").read_bytes()
    (run_folder / "cut.safetensors").write_bytes(content[: len(content) // 2])
    assert "cut.safetensors" in fails("--ref", "red.png", **{"--dit_ckpt": "cut.safetensors"})


def test_weights_of_another_task(
    fails, run_folder: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from refalign_ext.backbone import WAN_CONFIGS
    from tests.helpers.tiny_checkpoint import build, tiny_config

    monkeypatch.setitem(WAN_CONFIGS, "r2v-smaller", tiny_config())
    folder = shutil.copytree(tiny_checkpoint, run_folder / "smaller")
    build(folder, tiny_config())
    message = fails("--ref", "red.png", **{"--ckpt_dir": "smaller"})
    assert "these weights fit r2v-smaller, not r2v-tiny" in message


def test_out_of_memory_names_the_flags_that_help(fails, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*args: object, **kwargs: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB.")

    monkeypatch.setattr(R2VPipeline, "denoise", exhaust)
    message = fails("--ref", "red.png")
    assert all(flag in message for flag in ("--offload_model True", "--t5_cpu", "--dtype bf16", "--size"))
    message = fails("--ref", "red.png", "--t5_cpu", "--offload_model", "true")
    assert "--t5_cpu" not in message
    assert "--offload_model" not in message


def test_a_failure_while_writing_leaves_nothing(fails, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", no_space)
    assert "No space left on device" in fails(
        "--ref", "red.png", "--save_references", **{"--save_file": "out/new/a.mp4"}
    )


def test_text_to_image_and_default_names(
    tiny_checkpoint: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from refalign_ext.backbone import WAN_CONFIGS

    monkeypatch.setitem(WAN_CONFIGS, "t2i-14B", WAN_CONFIGS["r2v-tiny"])
    small = replace(TASKS["t2i-14B"], sizes=("48*48",), size=(48, 48), magnify=8)
    monkeypatch.setitem(TASKS, "t2i-14B", small)
    monkeypatch.chdir(run_folder / "out")
    flags = words("--task t2i-14B --size 48*48 --sample_steps 1 --device cpu --ckpt_dir")
    assert program.main([*flags, str(tiny_checkpoint), "--prompt", "a red circle: still/up?"]) == 0
    names = entries(run_folder / "out")
    stem = r"t2i-14B_48x48_1_1_a_red_circle_still_up__\d{8}_\d{6}"
    assert len(names) == 3
    for name, suffix in zip(names, (r"\.json", r"\.png", r"\.sheet\.png"), strict=True):
        assert re.fullmatch(stem + suffix, name)
    record = json.loads((run_folder / "out" / names[0]).read_text(encoding="utf-8"))
    assert (record["sample_solver"], record["sample_guide_scale"], record["frame_num"]) == ("unipc", 5.0, 1)
    assert record["seed"] >= 0
    assert Image.open(run_folder / "out" / names[1]).size == (384, 384)


def test_a_dry_run_needs_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert program.main(words("--dry-run --task r2v-14B --world_size 6 --cfg_size 3 --dit_fsdp")) == 0
    out = capfd.readouterr().out
    assert "guidance 3 x sequence parallel 2 (Ulysses 2 x ring 1)" in out
    assert entries(tmp_path) == []


def run_on_ranks(
    world_size: int,
    arguments: list[object],
    folder: Path,
    before: Callable[[int], None] = lambda rank: None,
) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of `main` on ranks that are forked from this process."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": found.getsockname()[1]}
    with ExitStack() as ranks, tempfile.TemporaryDirectory() as said:
        started = [
            ranks.enter_context(
                Program(
                    program.main,
                    *arguments,
                    folder=folder,
                    said=Path(said) / str(rank),
                    variables={**address, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size},
                    before=partial(before, rank),
                )
            )
            for rank in range(world_size)
        ]
        return [(one.wait(120), one.stdout, one.stderr) for one in started]


def only_error(results: list[tuple[int, str, str]]) -> str:
    """The one line that all ranks together print."""
    assert [code for code, _, _ in results] == [2] * len(results), results
    # A progress bar may stand before the error when sampling had begun.
    text = "".join(error for _, _, error in results).replace("\r", "\n")
    return error_line(re.sub(r"^.*sampling:.*\n", "", text, flags=re.MULTILINE))


def keep_values(name: str) -> Callable[[int], None]:
    """Have a rank that writes a video also save its values, which the codec blurs, as `name` beside the folder's files."""

    def before(rank: int) -> None:
        from refalign_ext.serving import generation

        write = generation.write_outputs

        def write_and_keep(paths: object, result: Result, **others: object) -> None:
            np.save(name, result.video.numpy())
            write(paths, result, **others)

        generation.write_outputs = write_and_keep

    return before


def assert_same_values(folder: Path) -> None:
    one, two = (np.load(folder / f"{name}.npy") for name in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-4, rtol=0)


COMMON = ["--prompt", PROMPT, "--sample_steps", "1", "--device", "cpu", "--base_seed", "5"]


def test_ranks_write_the_video_of_one(tiny_checkpoint: Path, run_folder: Path) -> None:
    flags = ["--ref", "red.png", "blue.jpg", "--ckpt_dir", tiny_checkpoint, *COMMON]
    from refalign_ext.distributed.parallelize import can_shard_on_cpu

    divided = ["--cfg_size", "2", *(("--dit_fsdp", "--t5_fsdp") if can_shard_on_cpu() else ())]
    ((code, _, error),) = run_on_ranks(
        1, [*flags, "--save_file", "out/a.mp4"], run_folder, keep_values("one")
    )
    assert code == 0, error
    (main, other) = run_on_ranks(
        2, [*flags, *divided, "--save_file", "out/b.mp4"], run_folder, keep_values("two")
    )
    assert (main[0], other[0]) == (0, 0), main[2] + other[2]
    assert "guidance 2 x sequence parallel 1" in main[1] and "1/1" in main[2]
    assert other[1:] == ("", "")
    assert_same_values(run_folder)
    record = json.loads((run_folder / "out/b.json").read_text(encoding="utf-8"))
    assert record["ranks"] == "2: guidance 2 x Ulysses 1 x ring 1"


def test_text_to_video_on_ranks(
    tiny_checkpoint: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from refalign_ext.backbone import WAN_CONFIGS

    monkeypatch.setitem(WAN_CONFIGS, "t2v-1.3B", WAN_CONFIGS["r2v-tiny"])
    monkeypatch.setitem(TASKS, "t2v-1.3B", replace(TASKS["t2v-1.3B"], sizes=("48*48",), size=(48, 48)))
    flags = [*words("--task t2v-1.3B --size 48*48 --frame_num 5 --ckpt_dir"), tiny_checkpoint, *COMMON]
    monkeypatch.chdir(run_folder / "out")
    results = [
        run_on_ranks(ranks, flags, run_folder / "out", keep_values(name))
        for ranks, name in ((1, "one"), (2, "two"))
    ]
    assert [code for ranks in results for code, _, _ in ranks] == [0] * 3, results
    one, two = (run_folder / "out" / name for name in entries(run_folder / "out") if name.endswith(".mp4"))
    assert "_1_1_" in one.name and "_2_1_" in two.name
    assert_same_values(run_folder / "out")


def test_a_mistake_is_told_once(tiny_checkpoint: Path, run_folder: Path) -> None:
    flags = ["--ckpt_dir", tiny_checkpoint, "--save_file", "out/a.mp4", *COMMON]
    before = entries(run_folder)
    cases = {
        "text.png is not a picture": ["--ref", "text.png"],
        "choose cfg x Ulysses x ring from": ["--ref", "red.png", "--ulysses_size", "4"],
        "needs references": [],
    }
    for message, wrong in cases.items():
        assert message in only_error(run_on_ranks(2, [*flags, *wrong], run_folder))
        assert entries(run_folder) == before


def test_what_one_rank_lacks_ends_all(tiny_checkpoint: Path, run_folder: Path) -> None:
    flags = ["--ref", "red.png", "--ckpt_dir", tiny_checkpoint, "--save_file", "out/a.mp4", *COMMON]
    before = entries(run_folder)

    def exhaust(rank: int) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB.")

        if rank == 1:
            R2VPipeline.prepare = fail

    line = only_error(run_on_ranks(2, flags, run_folder, exhaust))
    assert line.startswith("out of memory: try --dit_fsdp, --t5_fsdp")

    def no_space(rank: int) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise OSError(28, "No space left on device")

        Image.Image.save = fail

    assert "No space left" in only_error(run_on_ranks(2, flags, run_folder, no_space))
    assert entries(run_folder) == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_makes_the_embedded_models_video(run_folder: Path) -> None:
    flags = [*words("--task r2v-tiny --ref red.png --base_seed 1 --device cpu --prompt"), PROMPT]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for start, name in (([sys.executable], "one"), (launch, "two")):
        command = [*start, str(ROOT / "generate.py"), *flags, "--save_file", f"out/{name}.mp4"]
        result = subprocess.run(
            command, cwd=run_folder, capture_output=True, text=True, timeout=290, check=False
        )
        assert result.returncode == 0, result.stderr
    frames = []
    for name in ("one", "two"):
        with av.open(str(run_folder / "out" / f"{name}.mp4")) as container:
            frames.append([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    one, two = np.array(frames, dtype=int)
    # Not all equal: rounding to 8 bits tips a few values over, and the codec spreads them.
    assert one.shape == (9, 384, 384, 3)
    assert np.abs(one - two).mean() < 0.1
