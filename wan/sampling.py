"""The sampling core that the plain Wan tasks share: requests, noise, prompts and the denoising loop.

Upstream repeats these lines in each of its task classes (wan/text2video.py and its siblings).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wan.modules.functional import MAX_POSITIONS
from wan.utils.dit_checkpoint import DIT_STEM
from wan.utils.runtime import placed
from wan.utils.solvers import Solver
from wan.utils.weights import INDEX_SUFFIX, SAFETENSORS_SUFFIX, index_shards

if TYPE_CHECKING:
    from easydict import EasyDict

    from wan.modules.t5 import T5EncoderModel

_APPENDED_FRAMES = 8  # that a task may add to the video's: references
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


def check_size(size: tuple[int, int], config: EasyDict) -> None:
    """Refuses a (width, height) that does not divide into VAE cells and DiT patches.

    Raises:
        ValueError: naming the nearest valid size.
    """
    units = tuple(config.vae_stride[axis] * config.patch_size[axis] for axis in (2, 1))
    width, height = (max(u, (value + u // 2) // u * u) for value, u in zip(size, units, strict=True))
    if (width, height) != tuple(size):
        by = str(units[0]) if units[0] == units[1] else f"{units[0]} (width) and {units[1]} (height)"
        raise ValueError(
            f"size {size[0]}*{size[1]} does not divide by {by}: the nearest valid size is {width}*{height}"
        )


def check_frame_num(frame_num: int, config: EasyDict) -> None:
    """Refuses a number of frames that is not `stride * n + 1`, which the causal VAE would silently cut short.

    Raises:
        ValueError: naming the nearest valid numbers.
    """
    stride = config.vae_stride[0]
    below = max(1, (frame_num - 1) // stride * stride + 1)
    if frame_num != below:
        choices = str(below) if frame_num < 1 else f"{below} or {below + stride}"
        raise ValueError(
            f"frame number {frame_num} is not of the form {stride}n+1: the nearest valid is {choices}"
        )


def latent_shape(size: tuple[int, int], frame_num: int, config: EasyDict) -> tuple[int, int, int, int]:
    """The latents' [channels, frames, height, width] for a (width, height) in pixels and a number of frames.

    Raises:
        ValueError: for a size or number of frames that does not fit the model.
    """
    check_size(size, config)
    check_frame_num(frame_num, config)
    stride, patch = config.vae_stride, config.patch_size
    most = MAX_POSITIONS - _APPENDED_FRAMES
    if (frame_num - 1) // stride[0] >= most:
        raise ValueError(
            f"frame_num is {frame_num}: give at most {(most - 1) * stride[0] + 1}, as the model has {MAX_POSITIONS} positions"
        )
    sides = {"height": stride[1] * patch[1] * MAX_POSITIONS, "width": stride[2] * patch[2] * MAX_POSITIONS}
    if size[1] > sides["height"] or size[0] > sides["width"]:
        raise ValueError(f"size {size[0]}*{size[1]}: give at most {sides['width']}*{sides['height']}")
    return (config.vae.z_dim, (frame_num - 1) // stride[0] + 1, size[1] // stride[1], size[0] // stride[2])


def token_count(shape: Sequence[int], config: EasyDict) -> int:
    """How many tokens the DiT makes of latents [C, F, H, W]."""
    _, frames, height, width = shape
    patch = config.patch_size
    return (frames // patch[0]) * (height // patch[1]) * (width // patch[2])


def choose_seed(seed: int) -> int:
    """Gives `seed`, or a fresh random one when it is negative, as upstream."""
    return seed if seed >= 0 else secrets.randbelow(2**63)


def initial_noise(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Standard normal float32 noise from a CPU generator, so that a seed means the same on every device.

    Upstream draws from the GPU's generator instead; its seeds therefore give other (equally good) videos.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float32, device="cpu", generator=generator)


def required_files(folder: Path, config: EasyDict, *, dit: bool = True) -> list[str]:
    """Names what a checkpoint folder in upstream's layout must hold, the shards that an index lists included.

    Args:
        folder: the folder.
        config: the task's configuration.
        dit: whether the DiT's weights are wanted there too.

    Raises:
        ValueError: when the folder's index cannot be read.
    """
    present = [name for name in _TOKENIZER_FILES if (folder / config.t5_tokenizer / name).is_file()]
    tokenizer = (present or _TOKENIZER_FILES)[0]
    names = [config.t5_checkpoint, config.vae_checkpoint, f"{config.t5_tokenizer}/{tokenizer}"]
    index = folder / f"{DIT_STEM}{SAFETENSORS_SUFFIX}{INDEX_SUFFIX}"
    if dit and index.is_file():
        names += sorted(set(index_shards(index).values()))
    elif dit and not any(folder.glob(f"{DIT_STEM}*{SAFETENSORS_SUFFIX}")):
        names.append(f"{DIT_STEM}{SAFETENSORS_SUFFIX}")
    return names


def require_files(folder: Path, config: EasyDict, *, dit: bool = True) -> None:
    """Refuses a checkpoint folder that lacks some of its `required_files`.

    Raises:
        ValueError: naming the folder, or every file that is not there.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such checkpoint folder; check the path or download the checkpoint")
    missing = [name for name in required_files(folder, config, dit=dit) if not (folder / name).exists()]
    if missing:
        raise ValueError(
            f"{folder}: the checkpoint folder lacks {', '.join(missing)}; download what is missing"
        )


def encode_prompts(
    text_encoder: T5EncoderModel,
    prompts: Sequence[str],
    device: torch.device,
    *,
    t5_cpu: bool = False,
    offload: bool = False,
) -> list[torch.Tensor]:
    """Encodes prompts one by one, so that each costs and gives what it does alone.

    Args:
        text_encoder: the T5 encoder.
        prompts: any number of prompts.
        device: where the embeddings go and, without `t5_cpu`, where the encoder runs.
        t5_cpu: runs the encoder on the CPU.
        offload: takes the encoder off the device afterwards.

    Returns:
        One tensor [L, text_dim] per prompt on `device`, padding cut off.
    """
    place = torch.device("cpu") if t5_cpu else device
    with placed(text_encoder.model, place, offload=offload), torch.no_grad():
        return [text_encoder([prompt], place)[0].to(device) for prompt in prompts]


@torch.no_grad()
def denoise(
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    solver: Solver,
    *,
    progress: bool = True,
    callback: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Integrates the flow from noise to data: the one sampling loop.

    Args:
        model: `(latents, timestep) -> velocity`, guidance included; `timestep` is a float32 scalar tensor and the
            velocity has the shape of the latents.
        noise: the starting latents on the device to sample on, any shape with at least two axes, usually [C, F, H, W]
            in float32.
        solver: a fresh one, because multistep solvers remember earlier steps.
        progress: shows a bar on standard error.
        callback: called as `callback(step index, latents)` after each step.

    Returns:
        The latents at noise level 0, shaped like `noise`.

    Raises:
        ValueError: when the result holds values that are not numbers.
    """
    from tqdm.auto import tqdm

    latents = noise
    steps = tqdm(solver.timesteps, desc="sampling", unit="step", disable=not progress, dynamic_ncols=True)
    for index, timestep in enumerate(steps):
        latents = solver.step(model(latents, timestep), timestep, latents)
        if callback is not None:
            callback(index, latents)
    if not torch.isfinite(latents).all():
        raise ValueError(
            "sampling ended in values that are not numbers: try --dtype fp32 or smaller guidance scales"
        )
    return latents
