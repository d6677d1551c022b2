"""Reference-to-video generation: prepare the conditions, denoise, decode. Without references it is text-to-video."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

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
    required_files,
    resolve_device,
    resolve_dtype,
)
from refalign_ext.errors import is_out_of_memory
from refalign_ext.guidance import branch_inputs, combine_branches, required_branches
from refalign_ext.references import prepare_reference, reference_to_tensor
from refalign_ext.request import MAX_REFERENCES, Role
from refalign_ext.sampler import ModelFunction, SolverProtocol, denoise
from refalign_ext.tasks import find_task

if TYPE_CHECKING:
    from easydict import EasyDict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conditions:
    """What the model is told, on the device that samples.

    Attributes:
        prompt, negative_prompt: text embeddings [L, text_dim].
        references: clean latents [C, M, h, w], one latent frame per reference; M may be 0.
    """

    prompt: Tensor
    negative_prompt: Tensor
    references: Tensor


@dataclass(frozen=True)
class R2VResult:
    """A generated video and how it came about.

    Attributes:
        video: [3, F, H, W] float32 in [-1, 1] on the CPU; None on all but the first of several ranks.
        references: the prepared references, as the VAE saw them.
        settings: every setting that took effect, ready for json.
        timings: seconds per stage.
        peak_memory: bytes (see `PeakMemory`), or None when the system does not tell.
    """

    video: Tensor | None
    references: list[Image.Image]
    settings: dict[str, Any]
    timings: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None


class SingleProcess:
    """Makes a video alone: what `R2VPipeline` asks of the ranks that make one together.

    `refalign_ext.distributed.inference.VideoRanks` divides the work; every method is then called on all ranks together.

    Attributes:
        is_alone: False if other ranks take part.
        is_main: True on the rank that decodes.
        shards_model, shards_text_encoder: whether each rank keeps a part of those weights only.
    """

    is_alone = True
    is_main = True
    shards_model = False
    shards_text_encoder = False

    def divide_model(self, backbone: ReferenceBackbone, dtype: torch.dtype) -> None:
        """Prepares a freshly loaded transformer; one that is sharded comes in its file's dtype and gets `dtype` here."""

    def divide_text_encoder(self, model: nn.Module, *, sync_module_states: bool = False) -> nn.Module:
        """Shards a freshly loaded text encoder and gives it back (`shard_fn` of `T5EncoderModel`)."""
        return model

    def same_seed(self, seed: int) -> int:
        """The first rank's seed."""
        return seed

    def same(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The first rank's tensors, of the same shapes and dtypes."""
        return list(tensors)

    def share(self, branches: Sequence[str]) -> list[str]:
        """Which branches of the guidance this rank evaluates, in which order."""
        return list(branches)

    def exchange(self, branches: Sequence[str], own: Sequence[Tensor]) -> dict[str, Tensor]:
        """Predictions [C, F, H, W] of all branches by name, from this rank's in the order of its `share`."""
        return dict(zip(branches, own, strict=True))


class R2VPipeline:
    """Makes videos of the subjects on reference images (paper, section on inference).

    The stages are public: `prepare` -> `denoise` -> `decode`; `generate` runs them in order. The model appends the
    references behind the video on the frame axis and `ReferenceBackbone` crops them off every prediction, so the
    latents that travel between the stages hold the video only.
    """

    def __init__(
        self,
        config: EasyDict,
        *,
        backbone: ReferenceBackbone,
        vae: WanVAE,
        text_encoder: T5EncoderModel,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        t5_cpu: bool = False,
        offload_model: bool = False,
        ranks: SingleProcess | None = None,
    ) -> None:
        """Puts loaded parts together; `from_pretrained` loads them.

        Args:
            config: an entry of `WAN_CONFIGS`.
            backbone: the DiT with references attached.
            vae: the video autoencoder.
            text_encoder: the T5 encoder.
            device: where to sample.
            dtype: the number format of the DiT's matrix products.
            t5_cpu: keeps the text encoder on the CPU.
            offload_model: keeps only the part at work on the device and runs the guidance branches one by one.
            ranks: the ranks that have divided these parts; None: this process works alone.
        """
        self.ranks = ranks or SingleProcess()
        self.config = config
        self.backbone = backbone
        self.vae = vae
        self.text_encoder = text_encoder
        self.device = resolve_device(device)
        self.dtype = dtype
        self.t5_cpu = t5_cpu
        self.offload_model = offload_model

    @classmethod
    def from_pretrained(
        cls,
        ckpt_dir: str | os.PathLike[str],
        *,
        task: str = "r2v-tiny",
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
            task: "r2v-tiny", "r2v-1.3B" or "r2v-14B".
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
            ValueError: for an unknown task, missing files (all are listed), weights that do not fit or an absent
                device.
        """
        return cls.load(
            r2v_config(task),
            ckpt_dir,
            device=device,
            dtype=dtype,
            dit_ckpt=dit_ckpt,
            t5_cpu=t5_cpu,
            offload_model=offload_model,
            ranks=ranks,
            read_dit=read_dit,
        )

    @classmethod
    def load(
        cls,
        config: EasyDict,
        ckpt_dir: str | os.PathLike[str],
        *,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = "auto",
        dit_ckpt: str | os.PathLike[str] | None = None,
        t5_cpu: bool = False,
        offload_model: bool = False,
        ranks: SingleProcess | None = None,
        read_dit: Callable[[Path], DiTCheckpoint] = read_dit_checkpoint,
    ) -> R2VPipeline:
        """What `from_pretrained` does, for any entry of `WAN_CONFIGS`: text-to-video is a video without references.

        Raises:
            ValueError: as there, and if offloading and sharding are asked for together.
        """
        ranks = ranks or SingleProcess()
        if offload_model and (ranks.shards_model or ranks.shards_text_encoder):
            raise ValueError(
                "--offload_model True does not go with --dit_fsdp or --t5_fsdp, whose weights stay where they are divided: "
                "leave one out"
            )
        if t5_cpu and ranks.shards_text_encoder:
            raise ValueError("--t5_cpu does not go with --t5_fsdp: leave one out")
        device = resolve_device(device)
        if dtype == "auto" and device.type == "cuda":
            dtype = config.param_dtype
        dtype = resolve_dtype(dtype, device)
        folder = Path(ckpt_dir)
        require_files(folder, required_files(folder, config, dit=dit_ckpt is None))

        source = Path(dit_ckpt or folder)
        logger.info("loading the DiT from %s", source)
        # Sharding casts block by block: weights that stay in their memory-mapped file until then need no memory of the host.
        stored = None if ranks.shards_model else dtype
        model = build_dit(read_dit(source), config, source, device="cpu", dtype=stored)
        model.eval().requires_grad_(False)
        backbone = ReferenceBackbone(model)
        ranks.divide_model(backbone, dtype)
        vae = WanVAE(vae_pth=folder / config.vae_checkpoint, device=torch.device("cpu"), config=config.vae)
        text_encoder = T5EncoderModel(
            text_len=config.text_len,
            dtype=config.t5_dtype,
            device=torch.device("cpu"),
            checkpoint_path=folder / config.t5_checkpoint,
            tokenizer_path=folder / config.t5_tokenizer,
            shard_fn=ranks.divide_text_encoder if ranks.shards_text_encoder else None,
            config=config.t5,
        )
        return cls(
            config,
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
        roles: Sequence[Role | str] | None = None,
        matte: str = "off",
        size: tuple[int, int] | None = None,
        frame_num: int | None = None,
        sample_solver: str | None = None,
        sample_steps: int | None = None,
        sample_shift: float | None = None,
        ref_guide_scale: float | None = None,
        text_guide_scale: float | None = None,
        negative_prompt: str | None = None,
        seed: int = -1,
        progress: bool = True,
    ) -> R2VResult:
        """Makes a video in which the references act out the prompt. Settings left at None come from the task.

        Args:
            prompt: what happens.
            references: up to 8 pictures (files or Pillow images); none means ordinary text-to-video.
            roles: one role per reference; None means that all are subjects.
            matte: "auto" cuts subjects and faces out, "off" keeps the pictures.
            size: (width, height) in pixels, each divisible by VAE stride times DiT patch (16 for the released
                models, 8 for r2v-tiny).
            frame_num: number of frames, 4n + 1.
            sample_solver: "euler", "unipc" or "dpm++".
            sample_steps: number of steps.
            sample_shift: how far the noise grid leans towards high noise.
            ref_guide_scale: pull of the references in eq. 5; unused without references.
            text_guide_scale: pull of the prompt in eq. 5; the one guidance scale without references.
            negative_prompt: stands for "no prompt" in both e(0, .) terms of eq. 5.
            seed: non-negative for a repeatable video, the same noise on every device; negative for a random one.
            progress: shows a bar on standard error.

        Raises:
            ValueError: naming the setting or file that does not work and the remedy.
        """
        config = self.config
        settings: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": config.sample_neg_prompt if negative_prompt is None else negative_prompt,
            "size": list(config.size if size is None else size),
            "frame_num": config.frame_num if frame_num is None else frame_num,
            "sample_solver": sample_solver or config.sample_solver,
            "sample_steps": config.sample_steps if sample_steps is None else sample_steps,
            "sample_shift": config.sample_shift if sample_shift is None else sample_shift,
            "ref_guide_scale": config.ref_guide_scale if ref_guide_scale is None else ref_guide_scale,
            "text_guide_scale": config.text_guide_scale if text_guide_scale is None else text_guide_scale,
            "seed": self.ranks.same_seed(choose_seed(seed)),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        size = (settings["size"][0], settings["size"][1])
        shape = latent_shape(size, settings["frame_num"], config)
        solver = make_solver(
            settings["sample_solver"],
            settings["sample_steps"],
            settings["sample_shift"],
            config.num_train_timesteps,
            self.device,
        )
        images = prepare_references(references, size, roles=roles, matte=matte)

        memory = PeakMemory(self.device)
        timings: dict[str, float] = {}
        with _timed(timings, "prepare"):
            conditions = self.prepare(prompt, images, size=size, negative_prompt=settings["negative_prompt"])
        with _timed(timings, "denoise"):
            latents = self.denoise(
                initial_noise(shape, settings["seed"]),
                conditions,
                solver,
                ref_guide_scale=settings["ref_guide_scale"],
                text_guide_scale=settings["text_guide_scale"],
                progress=progress and self.ranks.is_main,
            )
        video = None
        if self.ranks.is_main:
            with _timed(timings, "decode"):
                video = self.decode(latents)
        if self.offload_model or self.t5_cpu:
            logger.info(memory.describe())
        return R2VResult(video, images, settings, timings, memory.bytes())

    @torch.no_grad()
    def prepare(
        self,
        prompt: str,
        images: Sequence[Image.Image],
        *,
        size: tuple[int, int],
        negative_prompt: str | None = None,
    ) -> Conditions:
        """Encodes the texts, and each prepared reference alone as a video of a single frame.

        Args:
            prompt: what happens.
            images: prepared references, each of the video's size.
            size: the video's (width, height) in pixels.
            negative_prompt: None takes the task's.
        """
        negative = self.config.sample_neg_prompt if negative_prompt is None else negative_prompt
        if self.offload_model:
            self._park()
        texts = encode_prompts(
            self.text_encoder, [prompt, negative], self.device, t5_cpu=self.t5_cpu, offload=self.offload_model
        )
        if images:
            frames = [
                reference_to_tensor(image).unsqueeze(1).to(self.device) for image in images
            ]  # M x [3, 1, H, W]
            with placed(self.vae.model, self.device, offload=self.offload_model):
                latents = torch.cat(self.vae.encode(frames), dim=1)  # [C, M, h, w]
        else:
            channels, _, height, width = latent_shape(size, 1, self.config)
            latents = torch.zeros(channels, 0, height, width, device=self.device)
        return Conditions(*self.ranks.same([*texts, latents.float()]))

    @torch.no_grad()
    def denoise(
        self,
        noise: Tensor,
        conditions: Conditions,
        solver: SolverProtocol,
        *,
        ref_guide_scale: float = 5.0,
        text_guide_scale: float = 7.5,
        progress: bool = True,
    ) -> Tensor:
        """Samples video latents with the guidance of eq. 5, or with ordinary guidance without references.

        Args:
            noise: [C, f, h, w], float32.
            conditions: from `prepare`, for the same h and w.
            solver: a fresh solver.
            ref_guide_scale, text_guide_scale: see `generate`.
            progress: shows a bar on standard error.

        Returns:
            [C, f, h, w] float32.
        """
        predict = self._guided_model(conditions, ref_guide_scale, text_guide_scale)
        with placed(self.backbone.model, self.device, offload=self.offload_model):
            return denoise(predict, noise.to(self.device), solver, progress=progress)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Turns latents [C, f, h, w] into a video [3, F, H, W], float32 in [-1, 1] on the CPU."""
        with placed(self.vae.model, self.device, offload=self.offload_model):
            return self.vae.decode([latents])[0].to(device="cpu", dtype=torch.float32)

    def _guided_model(
        self, conditions: Conditions, ref_guide_scale: float, text_guide_scale: float
    ) -> ModelFunction:
        references = conditions.references
        has_references = references.shape[1] > 0
        # Without references "image" says nothing beyond "null", and eq. 5 becomes ordinary guidance.
        image_scale = ref_guide_scale if has_references else text_guide_scale
        names = required_branches(image_scale, text_guide_scale)
        inputs = branch_inputs(conditions.prompt, conditions.negative_prompt, references)
        own = self.ranks.share(names)
        # Ranks that wait for each other inside a pass cannot fall back together when one of them runs out of memory.
        one_by_one = self.offload_model or not self.ranks.is_alone
        batches = [[name] for name in own] if one_by_one else [own]

        def evaluate(latents: Tensor, timestep: Tensor, batch: list[str]) -> list[Tensor]:
            texts, clean = zip(*(inputs[name] for name in batch), strict=True)
            times = timestep.expand(len(batch))  # [B]
            return self.backbone([latents] * len(batch), times, list(texts), list(clean)).prediction

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            nonlocal batches
            try:
                outputs = [evaluate(latents, timestep, batch) for batch in batches]
            except RuntimeError as error:
                if len(batches) == len(own) or not is_out_of_memory(error):
                    raise
                outputs = None
            if outputs is None:
                # Outside the handler, so that the failed batch's tensors are free before the next attempt.
                logger.info("the guidance branches do not fit into memory together: running them one by one")
                release_cached_memory(self.device)
                batches = [[name] for name in own]
                outputs = [evaluate(latents, timestep, batch) for batch in batches]
            predictions = self.ranks.exchange(names, [tensor for batch in outputs for tensor in batch])
            return combine_branches(predictions, image_scale, text_guide_scale)

        return predict

    def _park(self) -> None:
        """Takes the DiT and the VAE off the device before the text encoder needs its memory."""
        if self.device.type != "cpu":
            self.backbone.model.to("cpu")
            self.vae.model.to("cpu")
            release_cached_memory(self.device)


def r2v_config(task: str) -> EasyDict:
    """The configuration of a reference-to-video task.

    Raises:
        ValueError: for an unknown task or one that takes no references.
    """
    return WAN_CONFIGS[find_task(task, family="r2v", refused=REFUSED_TASKS).name]


def prepare_references(
    references: Sequence[str | os.PathLike[str] | Image.Image],
    size: tuple[int, int],
    *,
    roles: Sequence[Role | str] | None = None,
    matte: str = "off",
) -> list[Image.Image]:
    """Prepares all references of one video; see `prepare_reference`.

    Raises:
        ValueError: for more than 8 references, a number of roles that is not that of the references, or a picture
            or role that does not work.
    """
    if len(references) > MAX_REFERENCES:
        raise ValueError(
            f"{len(references)} references given: at most {MAX_REFERENCES} are possible, drop some"
        )
    if roles is None:
        roles = [Role.SUBJECT] * len(references)
    if len(roles) != len(references):
        raise ValueError(f"{len(roles)} roles for {len(references)} references: give one role each")
    return [
        prepare_reference(reference, size, role=role, matte=matte)
        for reference, role in zip(references, roles, strict=True)
    ]


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[stage] = round(time.perf_counter() - start, 3)
