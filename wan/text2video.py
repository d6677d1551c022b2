"""Text to video and text to image with Wan2.1 (upstream wan/text2video.py)."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wan.sampling import (
    choose_seed,
    denoise,
    encode_prompts,
    initial_noise,
    latent_shape,
    require_files,
    token_count,
)
from wan.utils.runtime import placed, release_cached_memory, resolve_device, resolve_dtype
from wan.utils.solvers import make_solver

if TYPE_CHECKING:
    from easydict import EasyDict

logger = logging.getLogger(__name__)


class WanT2V:
    """Wan2.1 text to video, with one frame text to image, under upstream's name and signature."""

    def __init__(
        self,
        config: EasyDict,
        checkpoint_dir: str | os.PathLike[str],
        device_id: int = 0,
        rank: int = 0,
        t5_fsdp: bool = False,
        dit_fsdp: bool = False,
        use_usp: bool = False,
        t5_cpu: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "auto",
        dit_ckpt: str | os.PathLike[str] | None = None,
    ) -> None:
        """Loads the networks from a folder in upstream's layout.

        Args:
            config: an entry of `WAN_CONFIGS`.
            device_id: CUDA device number, used when `device` is not given and CUDA is there.
            rank: this process's number; only rank 0 decodes.
            t5_fsdp, dit_fsdp, use_usp: upstream's modes for several processes, which `generate.py` has instead.
            t5_cpu: keeps the text encoder on the CPU.
            device: where to sample; None takes CUDA `device_id`, else MPS, else the CPU.
            dtype: the DiT's number format: "bf16", "fp32" or "auto" (bf16 on CUDA).
            dit_ckpt: DiT weights to use instead of the folder's.

        Raises:
            ValueError: for missing files (all are listed), weights that do not fit, an absent device, or a mode
                for several processes.
        """
        from wan.modules.t5 import T5EncoderModel
        from wan.modules.vae import WanVAE
        from wan.utils.dit_checkpoint import load_dit

        modes = {"t5_fsdp": t5_fsdp, "dit_fsdp": dit_fsdp, "use_usp": use_usp}
        if any(modes.values()):
            names = ", ".join(name for name, value in modes.items() if value)
            raise ValueError(
                f"{names} need several processes, and this class works in one: run torchrun ... generate.py"
            )
        if device is None and torch.cuda.is_available():
            device = f"cuda:{device_id}"
        self.device, cpu = resolve_device(device), torch.device("cpu")
        self.config, self.rank, self.t5_cpu = config, rank, t5_cpu
        folder = Path(checkpoint_dir)
        require_files(folder, config, dit=dit_ckpt is None)
        logger.info("loading the DiT from %s", dit_ckpt or folder)
        dtype = resolve_dtype(dtype, self.device)
        self.model = load_dit(dit_ckpt or folder, config, device=cpu, dtype=dtype)
        self.model.eval().requires_grad_(False)
        self.vae = WanVAE(vae_pth=folder / config.vae_checkpoint, device=cpu, config=config.vae)
        self.text_encoder = T5EncoderModel(
            text_len=config.text_len,
            dtype=config.t5_dtype,
            device=cpu,
            checkpoint_path=folder / config.t5_checkpoint,
            tokenizer_path=folder / config.t5_tokenizer,
            config=config.t5,
        )

    def generate(
        self,
        input_prompt: str,
        size: tuple[int, int] = (1280, 720),
        frame_num: int = 81,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
        *,
        progress: bool = True,
    ) -> torch.Tensor | None:
        """Makes a video from a prompt.

        Args:
            size: (width, height) in pixels.
            frame_num: number of frames, 4n + 1; 1 gives an image.
            shift: how far the noise grid leans towards high noise.
            sample_solver: "unipc", "dpm++" or "euler".
            sampling_steps: number of steps; each evaluates the model twice, or once when `guide_scale` is 1.
            guide_scale: classifier-free guidance, `uncond + guide_scale * (cond - uncond)`.
            n_prompt: what to avoid; empty takes the configuration's negative prompt.
            seed: non-negative for a repeatable result (the same noise on every device), negative for a random one.
            offload_model: keeps only the network at work on the device.
            progress: shows a bar on standard error.

        Returns:
            [3, F, H, W] float32 in [-1, 1] on rank 0, None on others.

        Raises:
            ValueError: for a size, number of frames, solver or number of steps that does not work.
        """
        shape = latent_shape(size, frame_num, self.config)
        solver = make_solver(
            sample_solver, sampling_steps, shift, self.config.num_train_timesteps, self.device
        )
        noise = initial_noise(shape, choose_seed(seed)).to(self.device)
        if offload_model and self.device.type != "cpu":
            self.model.to("cpu")
            self.vae.model.to("cpu")
            release_cached_memory(self.device)
        prompts = [input_prompt, n_prompt or self.config.sample_neg_prompt]
        context, null_context = encode_prompts(
            self.text_encoder, prompts, self.device, t5_cpu=self.t5_cpu, offload=offload_model
        )
        seq_len = token_count(shape, self.config)

        def evaluate(latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return self.model([latents], t=timestep.reshape(1), context=[text], seq_len=seq_len)[0]

        def guided(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            conditional = evaluate(latents, timestep, context)
            if guide_scale == 1:
                return conditional
            unconditional = evaluate(latents, timestep, null_context)
            return unconditional + guide_scale * (conditional - unconditional)

        with placed(self.model, self.device, offload=offload_model):
            latents = denoise(guided, noise, solver, progress=progress)
        if self.rank != 0:
            return None
        with placed(self.vae.model, self.device, offload=offload_model), torch.no_grad():
            return self.vae.decode([latents])[0]
