"""generate.py as its users run it.

Cases that end before torch is imported, and one complete run, are processes of their own; those that need the
networks call the same `main` in this process, which spares each of them the imports.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a large circle moves right"


def run(*arguments: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "generate.py"), *map(str, arguments)]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=170, check=False
    )


def entries(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def error_line(stderr: str) -> str:
    """The one line that a mistake prints."""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("generate.py: error: ")
    return lines[0].removeprefix("generate.py: error: ")


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with reference pictures, good and bad, and `out`, which stays empty when nothing is written."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    Image.new("RGB", (30, 40), "blue").save(tmp_path / "blue.jpg")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.fixture
def fails(
    program: ModuleType,
    workplace: Path,
    tiny_checkpoint: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Runs `main` in the workplace; gives the error line after checking that nothing was written."""

    def call(*arguments: object, **options: object) -> str:
        settings = {
            "--ckpt_dir": tiny_checkpoint,
            "--prompt": PROMPT,
            "--save_file": "out/a.mp4",
            "--device": "cpu",
        }
        settings.update({"--sample_steps": "1", **options})
        flags = [text for name, value in settings.items() for text in (name, str(value))]
        before = entries(workplace)
        monkeypatch.chdir(workplace)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            program.main([*map(str, arguments), *flags])
        assert stop.value.code == 2
        assert entries(workplace) == before
        error = capfd.readouterr().err
        # A progress bar may stand before the error when sampling had begun.
        return error_line(re.sub(r"^.*sampling:.*\n", "", error.replace("\r", "\n"), flags=re.MULTILINE))

    return call


def test_help_is_quick_and_complete(tmp_path: Path) -> None:
    durations = []
    for _ in range(5):
        start = time.perf_counter()
        result = run("--help", folder=tmp_path)
        durations.append(time.perf_counter() - start)
    assert result.returncode == 0
    assert min(durations) < 0.5
    upstream = (
        "task size frame_num ckpt_dir offload_model ulysses_size ring_size t5_fsdp t5_cpu dit_fsdp save_file src_video "
        "src_mask src_ref_images prompt use_prompt_extend prompt_extend_method prompt_extend_model "
        "prompt_extend_target_lang base_seed image first_frame last_frame sample_solver sample_steps sample_shift "
        "sample_guide_scale"
    )
    ours = "ref ref_role matte ref_guide_scale text_guide_scale dit_ckpt device dtype save_references save_sheet magnify"
    shown = set(re.findall(r"--(\w+)", result.stdout))
    assert set(upstream.split()) | set(ours.split()) <= shown


def test_help_imports_nothing_heavy(program: ModuleType) -> None:
    script = (
        "import sys, runpy\nsys.argv = ['generate.py', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'generate.py')!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'PIL', 'transformers', 'diffusers', 'av'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stderr.strip() == "[]"


def test_tasks_are_those_of_the_configurations(program: ModuleType) -> None:
    from refalign_ext.backbone import WAN_CONFIGS
    from refalign_ext.references import MAX_REFERENCES, Role
    from wan.utils.media import IMAGE_SUFFIXES
    from wan.utils.runtime import DTYPE_NAMES

    assert set(program.TASKS) == set(WAN_CONFIGS)
    assert not set(program.TASKS) & set(program.LATER_TASKS)
    assert set(program.BUNDLED_CHECKPOINTS) | set(program.DOWNLOADS) == set(program.TASKS)
    assert program.MAX_REFERENCES == MAX_REFERENCES
    assert program.IMAGE_SUFFIXES == IMAGE_SUFFIXES
    assert tuple(role.value for role in Role) == program.ROLES
    assert set(DTYPE_NAMES) == {"auto", "bf16", "fp32"}


@pytest.mark.timeout(600)
def test_a_complete_run(workplace: Path, tiny_checkpoint: Path) -> None:
    result = run(
        *("--task", "r2v-tiny", "--ckpt_dir", tiny_checkpoint, "--ref", "red.png", "blue.jpg"),
        *(
            "--ref_role",
            "subject",
            "background",
            "--prompt",
            PROMPT,
            "--base_seed",
            "7",
            "--sample_steps",
            "2",
        ),
        *(
            "--save_file",
            "out/demo/video.mp4",
            "--save_references",
            "--offload_model",
            "True",
            "--device",
            "cpu",
        ),
        folder=workplace,
    )
    assert result.returncode == 0, result.stderr
    assert entries(workplace / "out") == [
        "demo",
        "demo/video.json",
        "demo/video.mp4",
        "demo/video.references",
        "demo/video.references/reference_1.png",
        "demo/video.references/reference_2.png",
        "demo/video.sheet.png",
    ]
    assert "2/2" in result.stderr
    assert "peak memory" in result.stdout
    assert "attention is computed by" in result.stdout

    folder = workplace / "out" / "demo"
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
    "unknown task": (["--task", "r2v-tny"], r"r2v-tny.*did you mean r2v-tiny\?"),
    "later task": (["--task", "i2v-14B"], "i2v-14B is not available yet"),
    "no reference": (["--prompt", "x"], r"r2v-tiny needs reference images: pass --ref"),
    "no prompt": (["--ref", "red.png"], "needs a prompt"),
    "missing reference": (["--ref", "red.png", "none.png", "--prompt", "x"], r"none\.png does not exist"),
    "nine references": (["--ref", *["red.png"] * 9, "--prompt", "x"], "9 references given, at most 8"),
    "roles": (
        ["--ref", *["red.png"] * 3, "--ref_role", "face", "face", "--prompt", "x"],
        "2 roles for 3 references",
    ),
    "reference for t2v": (["--task", "t2v-1.3B", "--ref", "red.png"], "t2v-1.3B takes no references"),
    "no weights": (["--task", "t2v-1.3B"], "needs --ckpt_dir.*hf download Wan-AI/Wan2.1-T2V-1.3B"),
    "no folder": (["--ref", "red.png", "--prompt", "x", "--ckpt_dir", "none"], "folder none does not exist"),
    "size": (["--size", "48"], r"'48' is not width\*height"),
    "steps": (["--ref", "red.png", "--prompt", "x", "--sample_steps", "0"], "--sample_steps is 0"),
    "guidance": (["--ref_guide_scale", "nan"], "'nan' is not a number"),
    "one scale": (
        ["--ref", "red.png", "--prompt", "x", "--sample_guide_scale", "4"],
        "--ref_guide_scale and --text_guide_scale",
    ),
    "suffix": (["--ref", "red.png", "--prompt", "x", "--save_file", "a.avi"], r"a\.avi.*\.mp4"),
    "not writable": (
        ["--ref", "red.png", "--prompt", "x", "--save_file", "red.png/a.mp4"],
        r"cannot write red\.png/a\.mp4: red\.png is not a folder",
    ),
    "later flag": (["--ulysses_size", "2"], "--ulysses_size: .* not available yet"),
    "later input": (["--image", "red.png"], "--image: .*--ref"),
    "unknown flag": (["--speed", "9"], "--speed"),
}


@pytest.mark.parametrize("case", EARLY_MISTAKES)
def test_early_mistakes(workplace: Path, case: str) -> None:
    arguments, message = EARLY_MISTAKES[case]
    if "--ckpt_dir" not in arguments and case not in ("no weights", "unknown task", "later task"):
        arguments = [*arguments, "--ckpt_dir", "out"]
    before = entries(workplace)
    result = run(*arguments, folder=workplace)
    assert result.returncode == 2
    assert re.search(message, error_line(result.stderr)), result.stderr
    assert result.stdout == ""
    assert entries(workplace) == before


def test_traceback_on_request(workplace: Path) -> None:
    result = run("--task", "r2v-tiny", "--prompt", "x", folder=workplace, REFALIGN_TRACEBACK="1")
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert (
        result.stderr.strip().splitlines()[-1].startswith("generate.py: error: task r2v-tiny needs reference")
    )


def test_bad_references(fails) -> None:
    assert "empty.png is empty" in fails("--ref", "red.png", "empty.png")
    assert "text.png is not a picture" in fails("--ref", "text.png")
    assert "--matte off" in fails("--ref", "red.png", **{"--matte": "auto"})


def test_sizes_and_frame_numbers(fails) -> None:
    assert "nearest valid size is 48*48" in fails("--ref", "red.png", **{"--size": "50*47"})
    assert "nearest valid is 9 or 13" in fails("--ref", "red.png", **{"--frame_num": "11"})
    t2v = {"--task": "t2v-1.3B", "--size": "1280*720"}
    assert "the nearest is 832*480" in fails(**t2v)
    t2i = {"--task": "t2i-14B", "--frame_num": "5", "--save_file": "out/a.png"}
    assert "makes one image" in fails(**t2i)


def test_absent_device(fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device cuda is not on this machine" in fails("--ref", "red.png", **{"--device": "cuda"})


def test_incomplete_and_damaged_checkpoints(fails, tiny_checkpoint: Path, workplace: Path) -> None:
    folder = workplace / "copy"
    folder.mkdir()
    (folder / "diffusion_pytorch_model.safetensors").touch()
    message = fails("--ref", "red.png", **{"--ckpt_dir": "copy"})
    assert all(
        name in message for name in ("umt5-tiny-enc-bf16.pth", "Wan2.1_VAE_tiny.pth", "tokenizer.json")
    )
    assert "diffusion" not in message

    content = (tiny_checkpoint / "diffusion_pytorch_model.safetensors").read_bytes()
    (workplace / "cut.safetensors").write_bytes(content[: len(content) // 2])
    assert "cut.safetensors" in fails("--ref", "red.png", **{"--dit_ckpt": "cut.safetensors"})


def test_weights_of_another_task(
    fails, workplace: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from refalign_ext.backbone import WAN_CONFIGS
    from tests.tiny_checkpoint import build, tiny_config

    monkeypatch.setitem(WAN_CONFIGS, "r2v-smaller", tiny_config())
    folder = shutil.copytree(tiny_checkpoint, workplace / "smaller")
    build(folder, tiny_config())
    message = fails("--ref", "red.png", **{"--ckpt_dir": "smaller"})
    assert "these weights fit r2v-smaller, not r2v-tiny" in message


def test_out_of_memory_names_the_flags_that_help(fails, monkeypatch: pytest.MonkeyPatch) -> None:
    from refalign_ext.pipeline import R2VPipeline

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
    program: ModuleType, tiny_checkpoint: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from refalign_ext.backbone import WAN_CONFIGS
    from wan.configs import SUPPORTED_SIZES

    monkeypatch.setitem(WAN_CONFIGS, "t2i-14B", WAN_CONFIGS["r2v-tiny"])
    monkeypatch.setitem(SUPPORTED_SIZES, "t2i-14B", ("48*48",))
    monkeypatch.chdir(workplace / "out")
    arguments = [
        "--task",
        "t2i-14B",
        "--size",
        "48*48",
        "--ckpt_dir",
        str(tiny_checkpoint),
        "--sample_steps",
        "1",
    ]
    assert program.main([*arguments, "--prompt", "a red circle: still/up?", "--device", "cpu"]) == 0
    names = entries(workplace / "out")
    stem = r"t2i-14B_48x48_1_1_a_red_circle_still_up__\d{8}_\d{6}"
    assert len(names) == 3
    for name, suffix in zip(names, (r"\.json", r"\.png", r"\.sheet\.png"), strict=True):
        assert re.fullmatch(stem + suffix, name)
    record = json.loads((workplace / "out" / names[0]).read_text(encoding="utf-8"))
    assert (record["sample_solver"], record["sample_guide_scale"], record["frame_num"]) == ("unipc", 5.0, 1)
    assert record["seed"] >= 0
    assert Image.open(workplace / "out" / names[1]).size == (384, 384)


def test_the_same_seed_writes_the_same_video(
    program: ModuleType, tiny_checkpoint: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    flags = [
        "--ckpt_dir",
        str(tiny_checkpoint),
        "--ref",
        "red.png",
        "--prompt",
        PROMPT,
        "--sample_steps",
        "1",
    ]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags_of_run = [*flags, "--device", "cpu", "--base_seed", str(seed), "--save_file", f"out/{name}.mp4"]
        assert program.main(flags_of_run) == 0
    first, again, other = ((workplace / "out" / f"{name}.mp4").read_bytes() for name in "abc")
    assert first == again
    assert first != other
