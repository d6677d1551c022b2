"""Takes the snapshots: what the programs accept, write and compute, through command lines, file formats and public names only.

Nothing here depends on where a function lives inside the packages, so the same code runs before and after a change of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

import generate
import train_refalign
from tests.helpers.clips import render
from tests.helpers.opens2v_fixture import FRAMES, SIZE, write_native_set
from tests.helpers.phantom_fixture import info_row, pair, referred, seen, write_info, write_pairs
from tests.helpers.programs import Program

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "assets" / "r2v-tiny"
REFERENCES = sorted((ROOT / "assets" / "demo").glob("*.png"))
RECORDED = Path(__file__).with_name("recorded")
SECONDS = 500  # that a program may take on a busy machine
DIGITS = 5

_SHOWN = re.compile(r"^  (-\S.*?)(?:  |$)", re.MULTILINE)  # an option's place in the help of argparse
_FLAG = re.compile(r"(?<![\w-])--?[A-Za-z][\w.-]*")
_WALK = """
import json, click
from refalign_ext.cli import main

found = {}

def walk(name, command):
    context = click.Context(command)
    found[name] = sorted(
        word
        for option in command.get_params(context)
        if isinstance(option, click.Option)
        for word in (*option.opts, *option.secondary_opts)
    )
    if isinstance(command, click.Group):
        for sub in command.list_commands(context):
            walk(f"{name} {sub}", command.get_command(context, sub))

walk("refalign_ext", main)
print(json.dumps(found))
"""

_TINY = {
    "device": "cpu",
    "threads": 1,
    "cache_clips": 8,
    "cache_free_clips": 8,
    "cache_views": 1,
    "batch_size": 2,
    "validation_clips": 2,
    "precision": "fp32",
    "log_every": 1,
    "preview_every": 0,
    "validate_every": 0,
    "warmup_steps": 0,
    "schedule": "constant",
    "seed": 3,
    "steps": 3,
    "cache": "sprites",
}
# A fresh model with the recipe's optimizer on one rank; the embedded weights with another optimizer on two; adapters.
_RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "one_rank": (1, {"validate_every": 3}),
    "two_ranks": (
        2,
        {"dit_ckpt": EMBEDDED, "optimizer": "adamw", "alignment.margin": 1.5, "subject_counts": "0,1,0"},
    ),
    "adapter": (1, {"dit_ckpt": EMBEDDED, "lora_rank": 2, "steps": 1}),
}


def recorded(kind: str) -> dict[str, Any]:
    """What `record.py` wrote."""
    return json.loads((RECORDED / f"{kind}.json").read_text(encoding="utf-8"))


def variables() -> dict[str, str]:
    """The environment of the programs: this checkout, no GPU, one thread, and no rank of an outer launch."""
    left_out = {"WAN_ROOT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line has them."""
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


class Taking:
    """Takes snapshots in a folder; training starts at once, beside the rest, and is waited for where it is needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: dict[tuple[str, int], Program] = {}
        for name in _RUNS:
            self._start_training(name)

    def close(self) -> None:
        """Ends what still runs."""
        for process in self._processes.values():
            process.kill()

    def take(self, kind: str) -> dict[str, Any]:
        """The present state of one of KINDS, ready for json."""
        return KINDS[kind](self)

    def flags(self) -> dict[str, list[str]]:
        """The option names of every program and subcommand."""
        found = {
            script: sorted(
                set(_FLAG.findall(" ".join(_SHOWN.findall(self._python(ROOT / script, "--help")))))
            )
            for script in ("generate.py", "train_refalign.py")
        }
        return found | json.loads(self._python("-c", _WALK))

    def keys(self) -> dict[str, Any]:
        """Names, formats and shapes of the tensors in checkpoints and exports, and what is written beside them."""
        names = {
            "DiT": "diffusion_pytorch_model.safetensors",
            "VAE": "Wan2.1_VAE_tiny.pth",
            "T5": "models_t5_umt5-tiny-enc-bf16.pth",
        }
        found: dict[str, Any] = {f"embedded {part}": _shapes(EMBEDDED / name) for part, name in names.items()}
        for run in _RUNS:
            checkpoint = self._checkpoint(run)
            found[f"{run} checkpoint"] = _distributed_shapes(checkpoint)
            found[f"{run} files"] = _files(checkpoint)
        exports = {
            "upstream": ("one_rank", ["--projectors"]),
            "diffusers": ("one_rank", ["--layout", "diffusers"]),
            "merged adapter": ("adapter", []),
            "adapter upstream": ("adapter", ["--adapter"]),
            "adapter diffusers": ("adapter", ["--adapter", "--layout", "diffusers"]),
        }
        for name, (run, options) in exports.items():
            out = self.folder / f"export {name}"
            self._command("export", self._checkpoint(run), "--out", out, *options)
            (file,) = out.glob("*.safetensors")
            found[f"export {name}"] = _shapes(file)
            found[f"export {name} metadata"] = sorted(_header(file).get("__metadata__", {}))
            found[f"export {name} files"] = _files(out)
            if (out / "config.json").exists():
                config = json.loads((out / "config.json").read_text(encoding="utf-8"))
                found[f"export {name} config"] = {
                    key: value for key, value in config.items() if "version" not in key
                }
        return found

    def settings(self) -> dict[str, Any]:
        """What stands beside the tensors of every run's checkpoint."""
        found = {}
        for run in _RUNS:
            text = (self._checkpoint(run) / "trainer.json").read_text(encoding="utf-8")
            found[run] = json.loads(text.replace(str(ROOT), "ROOT"))
        return found

    def losses(self) -> dict[str, list[dict[str, float]]]:
        """What metrics.jsonl says about losses and gradients, step by step."""
        found = {}
        for run in _RUNS:
            self._checkpoint(run)
            lines = (self.folder / run / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            found[run] = [
                {key: value for key, value in json.loads(line).items() if not re.match("speed|memory", key)}
                for line in lines
            ]
        return found

    def latents(self) -> dict[str, Any]:
        """Three small videos from Python."""
        from refalign_ext.pipeline import R2VPipeline

        pipeline = R2VPipeline.from_pretrained(EMBEDDED, task="r2v-tiny", device="cpu")
        requests: dict[str, dict[str, Any]] = {
            "one reference": {
                "prompt": "a red triangle moves to the left",
                "references": REFERENCES[:1],
                "seed": 7,
            },
            "two references": {
                "prompt": "a blue cross and a red triangle",
                "references": REFERENCES,
                "roles": ["subject", "background"],
                "sample_solver": "unipc",
                "ref_guide_scale": 3.0,
                "text_guide_scale": 5.0,
                "seed": 8,
            },
            "no reference": {
                "prompt": "a green circle",
                "size": (64, 32),
                "frame_num": 5,
                "sample_solver": "dpm++",
                "seed": 9,
            },
        }
        found = {}
        for name, request in requests.items():
            result = pipeline.generate(sample_steps=4, progress=False, **request)
            found[name] = describe(result.video)
        return found

    def generated(self) -> dict[str, Any]:
        """What generate.py writes."""
        out = self.folder / "generated"
        out.mkdir()
        arguments = {"task": "r2v-tiny", "prompt": "a red triangle", "sample_steps": 4, "frame_num": 5}
        arguments |= {"base_seed": 3, "device": "cpu", "save_file": out / "video.mp4"}
        flags = (*words(arguments), "--ref", *REFERENCES, "--ref_role", "subject", "face")
        with Program(generate.main, *flags, folder=self.folder, said=self.folder / "generate") as program:
            assert program.wait(SECONDS) == 0, program.stderr[-4000:]
        with av.open(str(out / "video.mp4")) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        levels = np.stack(frames).astype(np.float64)
        with Image.open(out / "video.sheet.png") as sheet:
            size = list(sheet.size)
        return {
            "files": _files(out),
            "shape": list(levels.shape),
            "sheet": size,
            "means": levels.mean((1, 2)).round(1).tolist(),
            "settings": sorted(json.loads((out / "video.json").read_text(encoding="utf-8"))),
        }

    def manifests(self) -> dict[str, Any]:
        """Manifests that are converted from small data sets, and what is cut, packed and cached of one."""
        root = self.folder / "data"
        opens2v = write_native_set(root / "opens2v")
        out = opens2v.root / "manifest.jsonl"
        self._command(
            *("data", "convert", "opens2v", *opens2v.parts, "--out", out, "--video_root", opens2v.videos),
            *("--cross_pairs", opens2v.cross_pairs, "--backgrounds", opens2v.backgrounds),
            *("--min_frames", 20, "--workers", 0),
        )
        packed, cut, cache = root / "packed", root / "cut", root / "cache"
        self._command("data", "materialise", out, "--out", cut, "--workers", 0)
        self._command(
            "data", "materialise", out, "--out", packed, "--pack", "--shard_size", 2, "--workers", 0
        )
        self._command(
            *("data", "cache", "--data", packed, "--out", cache, "--device", "cpu", "--workers", 0),
            *("--chunk_rows", 3, "--sampling.clip_variants", 2, "--sampling.reference_variants", 2),
            *("--precision", "fp32"),
        )
        shards = {}
        for path in sorted(packed.rglob("*.tar")):
            with tarfile.open(path) as shard:
                shards[path.relative_to(packed).as_posix()] = shard.getnames()
        return {
            "opens2v": self._rows(out),
            "opens2v report": self._rows(Path(f"{out}.report.json")),
            "phantom": self._rows(self._phantom(root / "phantom")),
            "folder": self._rows(self._folder_of_clips(root / "folder")),
            "cut": self._rows(cut / "manifest.jsonl"),
            "cut files": _files(cut),
            "packed files": _files(packed),
            "packed shards": shards,
            "cache files": _files(cache),
            "cache header": json.loads((cache / "cache.json").read_text(encoding="utf-8")),
            "cache tensors": {path.name: _shapes(path) for path in sorted(cache.glob("*.safetensors"))},
        }

    def _phantom(self, root: Path) -> Path:
        names, box = ("uuid-a_0_3", "uuid-b_4_7"), (10, 8, 60, 50)
        (root / "videos").mkdir(parents=True)
        rows = [
            (
                own,
                "A person walks.",
                {"the person": pair([seen(own, "0.25", box)], [referred(other, "0.5", box)])},
            )
            for own, other in (names, names[::-1])
        ]
        pairs = write_pairs(root / "pairs.parquet", rows)
        info = write_info(root / "info.parquet", [info_row(name, SIZE, FRAMES, 8.0) for name in names])
        self._command(
            *("data", "convert", "phantom", pairs, info, "--out", root / "manifest.jsonl"),
            *("--video_root", root / "videos", "--frames", 9, "--fps", 8, "--workers", 0),
        )
        return root / "manifest.jsonl"

    def _folder_of_clips(self, root: Path) -> Path:
        """By a process of its own, as users start it."""
        for name in ("a/one", "two"):
            render(root / f"{name}.mp4", 12)
            (root / f"{name}.txt").write_text(f"A box, {name}.\n", encoding="utf-8")
            for number in (1, 2):
                Image.new("RGB", (20, 30), "red").save(root / f"{name}.ref{number}.png")
        (root / "lonely.mp4").write_bytes(b"")
        options = ("--group", "folder", "--frames", "5", "--workers", "0")
        self._python("-m", "refalign_ext", "data", "convert", "folder", root, *options)
        return root / "manifest.jsonl"

    def _rows(self, path: Path) -> list[Any]:
        """The lines of a JSON Lines file, or the one object of a JSON file, without this machine's folders."""
        text = path.read_text(encoding="utf-8").replace(str(self.folder), "FOLDER")
        return list(map(json.loads, text.splitlines())) if path.suffix == ".jsonl" else [json.loads(text)]

    def _start_training(self, name: str) -> None:
        ranks, changes = _RUNS[name]
        folder = self.folder / name
        folder.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        for rank in range(ranks):
            place = {**variables, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks} if ranks > 1 else {}
            self._processes[name, rank] = Program(
                train_refalign.main,
                *words(_TINY | changes | {"out": name}),
                folder=folder,
                said=folder / f"rank{rank}",
                variables=place,
            )

    def _checkpoint(self, run: str) -> Path:
        """The one checkpoint of a run, once it is done."""
        for rank in range(_RUNS[run][0]):
            process = self._processes[run, rank]
            assert process.wait(SECONDS) == 0, process.stderr[-4000:]
        (checkpoint,) = (self.folder / run / run / "checkpoints").glob("step-*")
        return checkpoint

    def _python(self, *arguments: object) -> str:
        """What a program prints."""
        result = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=self.folder,
            env=variables(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        return result.stdout

    def _command(self, *arguments: object) -> None:
        """A subcommand of `python -m refalign_ext`, in this process to save its imports."""
        from refalign_ext.cli import main

        result = CliRunner().invoke(main, [*map(str, arguments)])
        assert result.exit_code == 0, f"{result.output[-4000:]} {result.exception!r}"


KINDS = {
    name: getattr(Taking, name)
    for name in ("flags", "latents", "generated", "manifests", "settings", "losses", "keys")
}


def write(kind: str, found: Mapping[str, Any]) -> Path:
    """Records a snapshot: a line for every entry of the second level, so that changes can be read."""
    lines = []
    for name, value in found.items():
        entries: list[str]
        if isinstance(value, dict):
            entries = [f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()]
            brackets = "{}"
        elif isinstance(value, list):
            entries, brackets = [json.dumps(entry) for entry in value], "[]"
        else:
            entries, brackets = [json.dumps(value)], "  "
        inside = ",\n  ".join(entries)
        lines.append(f" {json.dumps(name)}: {brackets[0]}\n  {inside}\n {brackets[1]}".rstrip())
    RECORDED.mkdir(exist_ok=True)
    path = RECORDED / f"{kind}.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    assert recorded(kind) == json.loads(json.dumps(found))
    return path


def describe(video: Tensor) -> dict[str, Any]:
    """Shape, mean, deviation and about a hundred values of a video, and the hash of all of it for the same machine."""
    video = video.double()
    values = video.flatten()
    step = max(values.numel() // 100, 1) | 1  # odd, so that it does not stay in some columns of the picture
    whole = (values * 10**DIGITS).round().to(torch.int32).numpy()
    return {
        "shape": list(video.shape),
        "mean": round(values.mean().item(), DIGITS),
        "std": round(values.std().item(), DIGITS),
        "sample": [round(value, DIGITS) for value in values[::step].tolist()],
        "sha256": hashlib.sha256(whole.astype("<i4").tobytes()).hexdigest(),
    }


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: eight bytes with its length, then JSON."""
    with file.open("rb") as stream:
        return json.loads(stream.read(int.from_bytes(stream.read(8), "little")))


def _text(dtype: object, shape: Iterable[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}".strip()


def _shapes(file: Path) -> dict[str, str]:
    """Format and shape of every tensor of a safetensors or .pth file, by its name."""
    if file.suffix == ".pth":
        state = torch.load(file, map_location="cpu", weights_only=True)
        return {name: _text(tensor.dtype, tensor.shape) for name, tensor in sorted(state.items())}
    header = sorted(_header(file).items())
    return {name: _text(entry["dtype"], entry["shape"]) for name, entry in header if name != "__metadata__"}


def _distributed_shapes(checkpoint: Path) -> dict[str, str]:
    """The same for a folder that torch.distributed.checkpoint wrote."""
    from torch.distributed.checkpoint import FileSystemReader

    entries = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    return {name: _text(entry.properties.dtype, entry.size) for name, entry in sorted(entries.items())}


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
