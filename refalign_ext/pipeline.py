"""Generation in three steps: prepare the conditions, denoise, decode. Every task runs through it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from refalign_ext.backbone import (
    REFUSED_TASKS,
    WAN_CONFIGS,
    DiTCheckpoint,
    PeakMemory,
    ReferenceBackbone,
    T5EncoderModel,
    WanVAE,
    build_dit,
    choose_seed,
    encode_prompts,
    initial_noise,
    latent_shape,
    make_solver,
    placed,
    read_dit_checkpoint,
    release_cached_memory,
    require_files,
    resolve_device,
    resolve_dtype,
)
from refalign_ext.parallelism import SingleProcess
from refalign_ext.request import GenerationRequest, check_placement
from refalign_ext.sampler import GuidedModel, denoise
from refalign_ext.tasks import DEFAULT_TASK, Conditions, Task, find_task

if TYPE_CHECKING:
    from easydict import EasyDict

logger = logging.getLogger(__name__)

StepCallback = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Result:
    """A generated video and how it came about.

    Attributes:
        video: [3, F, H, W] float32 in [-1, 1] on the CPU; None on all but the first of several ranks.
        references: the prepared references, as the VAE saw them.
        settings: every setting that took effect, ready for json.
        timings: seconds per step.
        peak_memory: bytes, see `PeakMemory`.
    """

    video: Tensor | None
    references: list[Image.Image]
    settings: dict[str, Any]
    timings: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0


@dataclass(eq=False, kw_only=True)
class R2VPipeline:
    """Videos of the subjects on reference images (paper, section on inference), and every other task of the table.

    The steps are public: `prepare` -> `denoise` -> `decode`; `generate` runs them in order. The latents that travel
    between them hold the video only.

    Attributes:
        dtype: the number format of the DiT's matrix products.
        t5_cpu: keeps the text encoder on the CPU.
        offload_model: keeps only the part at work on the device and runs the guidance branches one by one.
        ranks: the ranks that have divided these parts.
    """

    task: Task
    config: EasyDict
    backbone: ReferenceBackbone
    vae: WanVAE
    text_encoder: T5EncoderModel
    device: torch.device
    dtype: torch.dtype = torch.float32
    t5_cpu: bool = False
    offload_model: bool = False
    ranks: SingleProcess = field(default_factory=SingleProcess)

    @classmethod
    def from_pretrained(
        cls,
        ckpt_dir: str | os.PathLike[str],
        *,
        task: str | Task = DEFAULT_TASK,
        config: EasyDict | None = None,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = "auto",
        dit_ckpt: str | os.PathLike[str] | None = None,
        t5_cpu: bool = False,
        offload_model: bool = False,
        ranks: SingleProcess | None = None,
        read_dit: Callable[[Path], DiTCheckpoint] = read_dit_checkpoint,
    ) -> R2VPipeline:
        """Loads a checkpoint folder in upstream's layout.

        Args:
            ckpt_dir: folder with the DiT, T5 and VAE weights and the tokenizer.
            task: a task of the table, or its name.
            config: sizes of the networks where they are not those of the task's entry of WAN_CONFIGS.
            device: "cpu", "cuda", "mps" or "auto".
            dtype: the DiT's number format: a dtype, "bf16", "fp32", or "auto" (the task's own on CUDA, float32
                elsewhere).
            dit_ckpt: DiT weights instead of the folder's: a file, a sharded index or a folder, under upstream's,
                RefAlign's or diffusers' names.
            t5_cpu, offload_model: see the class.
            ranks: the ranks to divide the work among; None: this process works alone.
            read_dit: what reads the DiT's weights; `refalign_ext.checkpoint.reading.read_any_dit` also takes the
                step-* folders of training.

        Raises:
            ValueError: for an unknown task, missing files (all are listed), weights that do not fit, an absent
                device, or places for weights that exclude each other.
        """
        if isinstance(task, str):
            task = find_task(task, refused=REFUSED_TASKS)
        config = WAN_CONFIGS[task.name] if config is None else config
        ranks = ranks or SingleProcess()
        check_placement(offload_model, t5_cpu, ranks.shards_model, ranks.shards_text_encoder)
        device, cpu = resolve_device(device), torch.device("cpu")
        if dtype == "auto" and device.type == "cuda":
            dtype = config.param_dtype
        dtype = resolve_dtype(dtype, device)
        folder = Path(ckpt_dir)
        require_files(folder, config, dit=dit_ckpt is None)

        source = Path(dit_ckpt or folder)
        logger.info("loading the DiT from %s", source)
        # Sharding casts block by block: weights that stay in their memory-mapped file until then need no memory of the host.
        stored = None if ranks.shards_model else dtype
        model = build_dit(read_dit(source), config, source, device="cpu", dtype=stored)
        model.eval().requires_grad_(False)
        backbone = ReferenceBackbone(model)
        ranks.divide_model(backbone, dtype)
        vae = WanVAE(vae_pth=folder / config.vae_checkpoint, device=cpu, config=config.vae)
        text_encoder = T5EncoderModel(
            text_len=config.text_len,
            dtype=config.t5_dtype,
            device=cpu,
            checkpoint_path=folder / config.t5_checkpoint,
            tokenizer_path=folder / config.t5_tokenizer,
            shard_fn=ranks.divide_text_encoder if ranks.shards_text_encoder else None,
            config=config.t5,
        )
        return cls(
            task=task,
            config=config,
            backbone=backbone,
            vae=vae,
            text_encoder=text_encoder,
            device=device,
            dtype=dtype,
            t5_cpu=t5_cpu,
            offload_model=offload_model,
            ranks=ranks,
        )

    def generate(
        self,
        prompt: str,
        references: Sequence[str | os.PathLike[str] | Image.Image] = (),
        *,
        progress: bool = True,
        callback: StepCallback | None = None,
        **settings: Any,
    ) -> Result:
        """Makes a video in which the references act out the prompt. Settings left out come from the task.

        Args:
            prompt: what happens.
            references: up to 8 pictures (files or Pillow images); none means ordinary text-to-video.
            progress: shows a bar on standard error.
            callback: called as `callback(step index, latents)` after each step.
            settings: `roles`, one per reference, and fields of `GenerationRequest`: `size` (each side divisible by VAE
                stride times DiT patch: 16 for the released models, 8 for r2v-tiny), `frame_num`, `sample_solver`,
                `sample_steps`, `sample_shift`, `ref_guide_scale`, `text_guide_scale`, `negative_prompt`, `matte`, `seed`.

        Raises:
            ValueError: naming the setting or file that does not work and the remedy.
        """
        request = self.task.request(prompt, references, **settings)
        self.latent_shape(request)
        return self.run(self.task.open(request), progress=progress, callback=callback)

    def run(
        self, request: GenerationRequest, *, progress: bool = True, callback: StepCallback | None = None
    ) -> Result:
        """Runs a request that `Task.open` has opened; see `generate`."""
        config = self.config
        if request.negative_prompt is None:
            request = replace(request, negative_prompt=config.sample_neg_prompt)
        request = replace(request, seed=self.ranks.same_seed(choose_seed(request.seed)))
        noise = initial_noise(self.latent_shape(request), request.seed)
        memory = PeakMemory(self.device)
        timings: dict[str, float] = {}
        with _timed(timings, "prepare"):
            conditions = self.prepare(request)
        with _timed(timings, "denoise"):
            latents = self.denoise(
                noise, conditions, request, progress=progress and self.ranks.is_main, callback=callback
            )
        video = None
        if self.ranks.is_main:
            with _timed(timings, "decode"):
                video = self.decode(latents)
        if self.offload_model or self.t5_cpu:
            logger.info(memory.describe())
        settings = request.settings() | {
            "device": str(self.device),
            "dtype": str(self.dtype)[len("torch.") :],
        }
        references = [reference.image for reference in request.references]
        return Result(video, references, settings, timings, memory.bytes())

    @torch.no_grad()
    def prepare(self, request: GenerationRequest) -> Conditions:
        """Encodes texts and pictures of an opened request, see `Task.prepare`."""
        if self.offload_model and self.device.type != "cpu":
            # The text encoder needs the memory of the DiT and the VAE.
            self.backbone.model.to("cpu")
            self.vae.model.to("cpu")
            release_cached_memory(self.device)
        found = self.task.prepare(request, self)
        texts = [found.prompt, found.negative_prompt, found.references]
        prompt, negative, references, *others = self.ranks.same([*texts, *found.model_inputs.values()])
        return Conditions(prompt, negative, references, dict(zip(found.model_inputs, others, strict=True)))

    @torch.no_grad()
    def denoise(
        self,
        noise: Tensor,
        conditions: Conditions,
        request: GenerationRequest,
        *,
        progress: bool = True,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Video latents [C, f, h, w] from noise [C, f, h, w], both float32, by the request's solver and guidance."""
        solver = make_solver(
            request.sample_solver,
            request.sample_steps,
            request.sample_shift,
            self.config.num_train_timesteps,
            self.device,
        )
        # Ranks that wait for each other inside a pass cannot fall back together when one of them runs out of memory.
        model = GuidedModel(
            self.backbone,
            conditions,
            *self.task.guidance(request),
            ranks=self.ranks,
            one_by_one=self.offload_model or not self.ranks.is_alone,
        )
        with placed(self.backbone.model, self.device, offload=self.offload_model):
            return denoise(model, noise.to(self.device), solver, progress=progress, callback=callback)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Turns latents [C, f, h, w] into a video [3, F, H, W], float32 in [-1, 1] on the CPU."""
        with placed(self.vae.model, self.device, offload=self.offload_model):
            return self.vae.decode([latents])[0].to(device="cpu", dtype=torch.float32)

    def encode_texts(self, texts: Sequence[str]) -> list[Tensor]:
        """Embeddings [L, text_dim] on the sampling device, one per text."""
        return encode_prompts(
            self.text_encoder, texts, self.device, t5_cpu=self.t5_cpu, offload=self.offload_model
        )

    @torch.no_grad()
    def encode_videos(self, videos: Sequence[Tensor]) -> list[Tensor]:
        """Latents [C, f, h, w] of videos [3, F, H, W] in [-1, 1], each encoded alone."""
        with placed(self.vae.model, self.device, offload=self.offload_model):
            return self.vae.encode([video.to(self.device) for video in videos])

    def latent_shape(self, request: GenerationRequest) -> tuple[int, int, int, int]:
        """[C, f, h, w] of the request's video.

        Raises:
            ValueError: naming the nearest size or number of frames that fits the model.
        """
        return latent_shape(request.size, request.frame_num, self.config)


@contextmanager
def _timed(timings: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[step] = round(time.perf_counter() - start, 3)
