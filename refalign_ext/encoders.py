"""The frozen parts of a run (VAE, text encoder, teacher): found, loaded once, and identified by digests of their files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refalign_ext.backbone import (
    REFUSED_TASKS,
    WAN_CONFIGS,
    T5EncoderModel,
    WanVAE,
    file_sha256,
    require_files,
)
from refalign_ext.config import TrainConfig
from refalign_ext.tasks import find_task
from refalign_ext.teachers import Teacher, load_teacher, teacher_files

if TYPE_CHECKING:
    from easydict import EasyDict

EncodeText = Callable[[Sequence[str]], list[Tensor]]
"""Prompts to text features, one [L, text_dim] each."""
Features = Callable[[Tensor], Tensor]
"""Images [M, 3, H, W] in [-1, 1] to the teacher's features on the DiT's token grid, [M, N, D]."""

_CACHED_TEXT_BYTES = 8 << 30  # of host memory


def task_config(config: TrainConfig) -> EasyDict:
    """The task's entry of WAN_CONFIGS; ValueError for a task that is not reference-to-video."""
    return WAN_CONFIGS[find_task(config.task, family="r2v", refused=REFUSED_TASKS).name]


def checkpoint_folder(config: TrainConfig, *, dit: bool = True) -> Path:
    """Where the frozen parts lie, and with `dit` the DiT unless it comes from elsewhere; ValueError for missing files."""
    folder = config.ckpt_dir or find_task(config.task).bundled
    if folder is None:
        raise ValueError(
            f"--task {config.task} needs --ckpt_dir FOLDER with the Wan2.1 checkpoint (docs/real_weights.md)"
        )
    folder = Path(folder)
    needs_dit = dit and not config.from_scratch and config.dit_ckpt is None
    require_files(folder, task_config(config), dit=needs_dit)
    return folder


class Encoders:
    """The VAE, the text encoder and the teacher of a run, each loaded when it is first used and never twice.

    Args:
        device: where VAE and teacher compute, and the text encoder unless `t5_cpu` keeps it on the CPU.
        dit: see `checkpoint_folder`.
        cached_prompts: see `text_encoder`.

    Raises:
        ValueError: for missing files; a member raises it if its files are damaged or of another model.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        *,
        dit: bool = True,
        cached_prompts: int | None = None,
    ) -> None:
        self.config, self.device, self._cached_prompts = config, device, cached_prompts
        self.task = task_config(config)
        self.folder = checkpoint_folder(config, dit=dit)

    @cached_property
    def vae(self) -> WanVAE:
        """The video autoencoder."""
        return WanVAE(vae_pth=self.vae_path, device=self.device, config=self.task.vae)

    @property
    def vae_path(self) -> Path:
        """The video autoencoder's file."""
        return self.folder / self.task.vae_checkpoint

    @cached_property
    def encode_text(self) -> EncodeText:
        """Prompts to features on the device; frequent prompts are encoded once."""
        home = torch.device("cpu") if self.config.t5_cpu else self.device
        return text_encoder(self.folder, self.task, home, self.device, remember=self._cached_prompts)

    @cached_property
    def teacher(self) -> Teacher | None:
        """The vision model to align to; None if the run looks at none."""
        if not self.config.needs_teacher:
            return None
        return load_teacher(self.config.alignment.teacher, self.teacher_path, device=self.device)

    @property
    def teacher_path(self) -> Path | None:
        """The teacher's local folder; None: it comes from the hub."""
        alignment, task = self.config.alignment, self.task
        if alignment.teacher_path is not None:
            return Path(alignment.teacher_path)
        is_own = alignment.teacher == task.get("teacher") and "teacher_folder" in task
        return self.folder / task.teacher_folder if is_own else None

    @property
    def teacher_files(self) -> list[Path]:
        """The teacher's configuration and weights, fetched if they have to be; empty without a teacher."""
        if not self.config.needs_teacher:
            return []
        home, weights = teacher_files(self.config.alignment.teacher, self.teacher_path)
        return [home / "config.json", *weights]

    @cached_property
    def features(self) -> Features | None:
        """The teacher's features on the DiT's token grid; None without a teacher."""
        teacher = self.teacher
        if teacher is None:
            return None
        rows, columns = token_stride(self.task)
        return lambda images: teacher(images, (images.shape[-2] // rows, images.shape[-1] // columns))

    def fingerprint(self) -> dict[str, Any]:
        """What tells these encoders from others; reads the files of the weights once, to digest them.

        Returns:
            "files": digests of weights and tokenizer by what they are; "teacher": its name or None; "token_stride" and
            "text_length": the grid of the teacher's features, and tokens at which a prompt is cut.
        """
        task = self.task
        tokenizer = sorted(path for path in (self.folder / task.t5_tokenizer).iterdir() if path.is_file())
        files = {
            "VAE": file_sha256(self.vae_path),
            "text encoder": file_sha256(self.folder / task.t5_checkpoint),
            "tokenizer": _files_sha256(tokenizer),
        }
        if self.config.needs_teacher:
            files["teacher"] = _files_sha256(self.teacher_files)
        return {
            "files": files,
            "teacher": self.config.alignment.teacher if self.config.needs_teacher else None,
            "token_stride": token_stride(task),
            "text_length": task.text_len,
        }


def text_encoder(
    folder: Path, task: EasyDict, device: torch.device, target: torch.device, *, remember: int | None = None
) -> EncodeText:
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
        remember = _CACHED_TEXT_BYTES // (task.text_len * task.text_dim * task.t5_dtype.itemsize)

    @lru_cache(maxsize=remember)
    def encode_one(prompt: str) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            # A copy: the encoder gives a view of all positions, padding included.
            return encoder([prompt], device)[0].to("cpu", copy=True)

    return lambda prompts: [encode_one(prompt).to(target, torch.float32) for prompt in prompts]


def token_stride(task: EasyDict) -> tuple[int, int]:
    """Rows and columns of pixels per token of the DiT."""
    return task.vae_stride[1] * task.patch_size[1], task.vae_stride[2] * task.patch_size[2]


def _files_sha256(files: Sequence[Path]) -> str:
    """One digest of several files' names and contents."""
    parts = "".join(f"{path.name} {file_sha256(path)}\n" for path in files)
    return hashlib.sha256(parts.encode()).hexdigest()
