"""One generation as data: what to make (`GenerationRequest`) and where to run it (`RuntimeOptions`). Imports no torch."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

MAX_REFERENCES = 8
MATTE_MODES = ("off", "auto")
SOLVERS = ("unipc", "dpm++", "euler")
DTYPES = ("auto", "bf16", "fp32")
SEQUENCE_BACKENDS = ("auto", "torch", "xfuser")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class Role(str, Enum):
    """What a reference shows. A background keeps its surroundings: `matte="auto"` leaves it alone."""

    SUBJECT = "subject"
    FACE = "face"
    BACKGROUND = "background"


def parse_role(role: Role | str) -> Role:
    """The `Role` of a name.

    Raises:
        ValueError: for an unknown name.
    """
    try:
        return Role(role)
    except ValueError:
        names = ", ".join(known.value for known in Role)
        raise ValueError(f"unknown reference role {role!r}: choose one of {names}") from None


def split_loras(text: str | None) -> tuple[str, ...]:
    """The LoRAs of a setting that names several with commas."""
    return tuple(filter(None, map(str.strip, (text or "").split(","))))


def parse_lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE, as --lora takes it; the scale is 1.0 where none is given.

    Raises:
        ValueError: for a scale that is no finite number.
    """
    path, colon, scale = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            value = float(scale)
        except ValueError:
            return Path(text), 1.0
        if not math.isfinite(value):
            raise ValueError(f"--lora {text}: the scale is {scale}: give a finite number, such as 0.8")
        return Path(path), value
    return Path(text), 1.0


def environment_number(name: str, default: int) -> int:
    """A number that torchrun sets in the environment, such as WORLD_SIZE.

    Raises:
        ValueError: naming the variable, if it holds anything else.
    """
    text = os.environ.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError(f"the environment has {name}={text!r}: start with torchrun or unset it")
    return int(text)


@dataclass(frozen=True)
class Reference:
    """A picture of something that the video shows: a file, or the picture itself."""

    image: str | os.PathLike[str] | Image.Image
    role: Role = Role.SUBJECT


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate, every setting resolved; `Task.request` makes one from what a user gives.

    Attributes:
        task: name in the table of tasks.
        prompt: what happens.
        size: (width, height) in pixels.
        frame_num: number of frames, 4n + 1.
        sample_solver: one of `SOLVERS`.
        sample_steps: number of steps.
        sample_shift: how far the noise grid leans towards high noise.
        magnify: enlarges every pixel this many times in the files.
        sample_guide_scale: the one guidance scale of tasks without references, None elsewhere.
        ref_guide_scale, text_guide_scale: pull of references and prompt in eq. 5, None where a task takes no references.
        negative_prompt: stands for "no prompt" in guidance; None: the model's own.
        references: at most `MAX_REFERENCES`.
        matte: "auto" cuts subjects and faces out, "off" keeps the pictures.
        inputs: files that a task takes besides references, by the name of their flag ("image", "src_video", ...).
        seed: non-negative for a repeatable video, the same noise on every device; negative: a random one.
    """

    task: str
    prompt: str
    size: tuple[int, int]
    frame_num: int
    sample_solver: str
    sample_steps: int
    sample_shift: float
    magnify: int = 1
    sample_guide_scale: float | None = None
    ref_guide_scale: float | None = None
    text_guide_scale: float | None = None
    negative_prompt: str | None = None
    references: tuple[Reference, ...] = ()
    matte: str = "off"
    inputs: tuple[tuple[str, Any], ...] = ()
    seed: int = -1

    def settings(self) -> dict[str, Any]:
        """The settings that a result is recorded with, ready for json."""
        names = (
            *("prompt", "negative_prompt", "size", "frame_num", "sample_solver", "sample_steps"),
            *("sample_shift", "ref_guide_scale", "text_guide_scale", "sample_guide_scale", "seed"),
        )
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None} | {
            "size": list(self.size)
        }


@dataclass(frozen=True)
class RuntimeOptions:
    """Which weights are used, on which devices, and how they are divided; changes no result beyond rounding.

    Attributes:
        ckpt_dir: checkpoint folder in upstream's layout.
        dit_ckpt: DiT weights instead of the folder's: a file, an index or a folder.
        lora: LoRAs to merge into the DiT, each FILE or FILE:SCALE.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        dtype: of the DiT, one of `DTYPES`.
        offload_model: keeps idle parts on the CPU; None: on a single GPU.
        t5_cpu: keeps the text encoder on the CPU.
        dit_fsdp, t5_fsdp: shard those weights over all ranks.
        cfg_size: groups of ranks that evaluate the branches of the guidance.
        ulysses_size, ring_size: ranks that divide heads and tokens; 0: chosen.
        sp_backend: what exchanges tokens, one of `SEQUENCE_BACKENDS`.
        world_size: number of ranks.
    """

    ckpt_dir: Path
    dit_ckpt: Path | None = None
    lora: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    offload_model: bool | None = None
    t5_cpu: bool = False
    dit_fsdp: bool = False
    t5_fsdp: bool = False
    cfg_size: int = 1
    ulysses_size: int = 0
    ring_size: int = 0
    sp_backend: str = "auto"
    world_size: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError, naming the flag and the remedy, for what does not go together."""
        check_placement(self.offload_model, self.t5_cpu, self.dit_fsdp, self.t5_fsdp)
        for name, least in (("cfg_size", 1), ("ulysses_size", 0), ("ring_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}: give {least} or more")
        for name in ("cfg_size", "ulysses_size", "ring_size", "dit_fsdp", "t5_fsdp"):
            value = getattr(self, name)
            if self.world_size == 1 and (value is True or value > 1):
                raise ValueError(
                    f"--{name} needs several processes: run torchrun --nproc_per_node=N generate.py ..."
                )

    def lora_paths(self) -> list[Path]:
        """The files or folders in `lora`."""
        return [parse_lora(text)[0] for text in self.lora]

    def offloads(self, device: str) -> bool:
        """Whether idle parts are kept on the CPU, on this kind of device."""
        if self.offload_model is None:
            return device.startswith("cuda") and self.world_size == 1
        return self.offload_model

    def memory_advice(self) -> str:
        """One line that names the flags which are still left to save memory."""
        flags = []
        if self.world_size > 1:
            flags += [f"--{name}" for name in ("dit_fsdp", "t5_fsdp") if not getattr(self, name)]
            flags.append("more ranks with a larger --ulysses_size or --ring_size")
        if not (self.offloads(self.device.replace("auto", "cuda")) or self.dit_fsdp or self.t5_fsdp):
            flags.append("--offload_model True")
        if not (self.t5_cpu or self.t5_fsdp):
            flags.append("--t5_cpu")
        if self.dtype != "bf16":
            flags.append("--dtype bf16")
        flags += ["a smaller --size", "fewer frames (--frame_num)"]
        return f"out of memory: try {', '.join(flags)}"


def check_placement(offload_model: bool | None, t5_cpu: bool, dit_fsdp: bool, t5_fsdp: bool) -> None:
    """Refuses two places for the same weights.

    Raises:
        ValueError: naming the flags.
    """
    if offload_model and (dit_fsdp or t5_fsdp):
        raise ValueError(
            "--offload_model True does not go with --dit_fsdp or --t5_fsdp, whose weights stay where they are sharded: "
            "leave one out"
        )
    if t5_cpu and t5_fsdp:
        raise ValueError("--t5_cpu does not go with --t5_fsdp: leave one out")
