"""The parts that training does not change (VAE, text encoder, teacher): where they lie, how they are used, and digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refalign_ext.backbone import (
    REFUSED_TASKS,
    WAN_CONFIGS,
    T5EncoderModel,
    file_sha256,
    require_files,
    required_files,
)
from refalign_ext.checkpoint.lazy_tensors import EMBEDDED
from refalign_ext.config import TrainConfig
from refalign_ext.data.cache.names import cache_fingerprint
from refalign_ext.data.sampling.sample_spec import Sampling
from refalign_ext.tasks import find_task
from refalign_ext.teachers import Teacher, teacher_files

if TYPE_CHECKING:
    from easydict import EasyDict

_REMEMBERED_BYTES = 8 << 30


def task_config(config: TrainConfig) -> EasyDict:
    """The task's entry of WAN_CONFIGS.

    Raises:
        ValueError: for a task that is not reference-to-video.
    """
    return WAN_CONFIGS[find_task(config.task, family="r2v", refused=REFUSED_TASKS).name]


def checkpoint_folder(config: TrainConfig, *, dit: bool = True) -> Path:
    """Where the frozen parts lie.

    Args:
        dit: whether the DiT is wanted too, where the configuration takes it from there.

    Raises:
        ValueError: if files are missing (all are listed) or no folder is given.
    """
    if config.ckpt_dir is None and config.task != "r2v-tiny":
        raise ValueError(
            f"--task {config.task} needs --ckpt_dir FOLDER with the Wan2.1 checkpoint (docs/real_weights.md)"
        )
    folder = EMBEDDED if config.ckpt_dir is None else Path(config.ckpt_dir)
    needs_dit = dit and not config.from_scratch and config.dit_ckpt is None
    require_files(folder, required_files(folder, task_config(config), dit=needs_dit))
    return folder


def text_encoder(
    folder: Path, task: EasyDict, device: torch.device, target: torch.device, *, remember: int | None = None
) -> Callable[[Sequence[str]], list[Tensor]]:
    """Prompts to features on `target`, float32, each encoded alone.

    Args:
        device: where the encoder works.
        remember: prompts whose features are kept, as captions repeat and the encoder is frozen; None: what fits into
            8 GiB of host memory.
    """
    encoder = T5EncoderModel(
        text_len=task.text_len,
        dtype=task.t5_dtype,
        device=device,
        checkpoint_path=folder / task.t5_checkpoint,
        tokenizer_path=folder / task.t5_tokenizer,
        config=task.t5,
    )
    if remember is None:
        remember = _REMEMBERED_BYTES // (task.text_len * task.text_dim * task.t5_dtype.itemsize)

    @lru_cache(maxsize=remember)
    def encode_one(prompt: str) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            # A copy: the encoder gives a view of all positions, padding included.
            return encoder([prompt], device)[0].to("cpu", copy=True)

    return lambda prompts: [encode_one(prompt).to(target, torch.float32) for prompt in prompts]


def teacher_folder(config: TrainConfig, task: EasyDict, folder: Path) -> Path | None:
    """The teacher's local folder; None: it comes from the hub."""
    alignment = config.alignment
    if alignment.teacher_path is not None:
        return Path(alignment.teacher_path)
    is_own = alignment.teacher == task.get("teacher") and "teacher_folder" in task
    return folder / task.teacher_folder if is_own else None


def token_stride(task: EasyDict) -> tuple[int, int]:
    """Rows and columns of pixels per token of the DiT."""
    return task.vae_stride[1] * task.patch_size[1], task.vae_stride[2] * task.patch_size[2]


def on_grid(teacher: Teacher | None, task: EasyDict) -> Callable[[Tensor], Tensor] | None:
    """The teacher's features of images [M, 3, H, W] on the DiT's grid: [M, N, D]."""
    if teacher is None:
        return None
    rows, columns = token_stride(task)
    return lambda images: teacher(images, (images.shape[-2] // rows, images.shape[-1] // columns))


def frozen_fingerprint(
    config: TrainConfig, sampling: Sampling, *, dtype: str | None = None
) -> dict[str, Any]:
    """What a cache for this run must have been made from; reads the weights' files once, to digest them.

    Args:
        dtype: of what a cache is to store; None: a run takes any.

    Raises:
        ValueError: if files are missing.
    """
    task, folder = task_config(config), checkpoint_folder(config, dit=False)
    files = {
        "VAE": file_sha256(folder / task.vae_checkpoint),
        "text encoder": file_sha256(folder / task.t5_checkpoint),
        "tokenizer": _digest(
            sorted(path for path in (folder / task.t5_tokenizer).iterdir() if path.is_file())
        ),
    }
    teacher = None
    if config.needs_teacher:
        teacher, path = config.alignment.teacher, teacher_folder(config, task, folder)
        home, weights = teacher_files(teacher, path)
        files["teacher"] = _digest([home / "config.json", *weights])
    return cache_fingerprint(
        sampling,
        files,
        teacher=teacher,
        token_stride=token_stride(task),
        text_length=task.text_len,
        dtype=dtype,
    )


def _digest(files: Sequence[Path]) -> str:
    """One digest of several files' names and contents."""
    parts = "".join(f"{path.name} {file_sha256(path)}\n" for path in files)
    return hashlib.sha256(parts.encode()).hexdigest()
