"""Text to video and text to image with Wan2.1 (upstream wan/text2video.py)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wan.sampling import (
    check_frame_num,
    check_size,
    choose_seed,
    denoise,
    encode_prompts,
    initial_noise,
    latent_shape,
    required_files,
    token_count,
)
from wan.utils.runtime import placed, release_cached_memory, resolve_device, resolve_dtype
from wan.utils.solvers import make_solver
from wan.utils.weights import require_files

if TYPE_CHECKING:
    from easydict import EasyDict

Prediction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

logger = logging.getLogger(__name__)


class WanT2V:
    """Wan2.1 text to video; with one frame, text to image.

    Attributes:
        text_encoder, vae, model: the three networks. Between calls they may lie on the CPU.
        device: where sampling runs.
    """

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
        dtype: torch.dtype | str | None = None,
        dit_ckpt: str | os.PathLike[str] | None = None,
    ) -> None:
        """Loads the networks from a folder in upstream's layout.

        Args:
            config: an entry of `WAN_CONFIGS`.
            checkpoint_dir: folder with the DiT, T5 and VAE weights and the tokenizer.
            device_id: CUDA device number, used when `device` is not given and CUDA is there.
            rank: this process's number; only rank 0 decodes.
            t5_fsdp, dit_fsdp, use_usp: upstream's modes for several processes, which `generate.py` has instead.
            t5_cpu: keeps the text encoder on the CPU.
            device: where to sample; None takes CUDA `device_id`, else MPS, else the CPU.
            dtype: the DiT's number format, a dtype or "auto", "bf16", "fp32"; None takes `config.param_dtype` on
                CUDA and float32 elsewhere.
            dit_ckpt: DiT weights to use instead of the folder's.

        Raises:
            ValueError: for missing files (all are listed), weights that do not fit, an absent device, or a mode
                for several processes.
        """
        from wan.modules.t5 import T5EncoderModel
        from wan.modules.vae import WanVAE
        from wan.utils.dit_checkpoint import load_dit

        asked = {"t5_fsdp": t5_fsdp, "dit_fsdp": dit_fsdp, "use_usp": use_usp}
        if any(asked.values()):
            names = ", ".join(name for name, value in asked.items() if value)
            raise ValueError(
                f"{names} need several processes, and this class works in one: run torchrun ... generate.py"
            )
        if device is None and torch.cuda.is_available():
            device = f"cuda:{device_id}"
        self.device = resolve_device(device)
        if dtype is None:
            dtype = config.param_dtype if self.device.type == "cuda" else torch.float32
        self.dtype = resolve_dtype(dtype, self.device)
        self.config = config
        self.rank = rank
        self.t5_cpu = t5_cpu
        self.sample_neg_prompt: str = config.sample_neg_prompt

        folder = Path(checkpoint_dir)
        require_files(folder, required_files(folder, config, dit=dit_ckpt is None))
        logger.info("loading the DiT from %s", dit_ckpt or folder)
        self.model = load_dit(dit_ckpt or folder, config, device=torch.device("cpu"), dtype=self.dtype)
        self.model.eval().requires_grad_(False)
        self.vae = WanVAE(
            vae_pth=folder / config.vae_checkpoint, device=torch.device("cpu"), config=config.vae
        )
        self.text_encoder = T5EncoderModel(
            text_len=config.text_len,
            dtype=config.t5_dtype,
            device=torch.device("cpu"),
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
            input_prompt: what to show.
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
        check_size(size, self.config)
        check_frame_num(frame_num, self.config)
        solver = make_solver(
            sample_solver, sampling_steps, shift, self.config.num_train_timesteps, self.device
        )
        shape = latent_shape(size, frame_num, self.config)
        noise = initial_noise(shape, choose_seed(seed)).to(self.device)

        if offload_model:
            self._park(self.model, self.vae.model)
        prompts = [input_prompt, n_prompt or self.sample_neg_prompt]
        context, null_context = encode_prompts(
            self.text_encoder, prompts, self.device, t5_cpu=self.t5_cpu, offload=offload_model
        )
        with placed(self.model, self.device, offload=offload_model):
            predict = self._guided_model(context, null_context, guide_scale, token_count(shape, self.config))
            latents = denoise(predict, noise, solver, progress=progress)
        if self.rank != 0:
            return None
        with placed(self.vae.model, self.device, offload=offload_model), torch.no_grad():
            return self.vae.decode([latents])[0]

    def _guided_model(
        self, context: torch.Tensor, null_context: torch.Tensor, guide_scale: float, seq_len: int
    ) -> Prediction:
        def evaluate(latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return self.model([latents], t=timestep.reshape(1), context=[text], seq_len=seq_len)[0]

        def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            conditional = evaluate(latents, timestep, context)
            if guide_scale == 1:
                return conditional
            unconditional = evaluate(latents, timestep, null_context)
            return unconditional + guide_scale * (conditional - unconditional)

        return predict

    def _park(self, *modules: torch.nn.Module) -> None:
        """Takes networks off the device before another one needs its memory."""
        if self.device.type == "cpu":
            return
        for module in modules:
            module.to("cpu")
        release_cached_memory(self.device)
