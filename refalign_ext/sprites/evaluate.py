"""Generate sprite clips with a model and judge them: the embedded model's figures and the previews of its training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from refalign_ext.backbone import (
    WAN_CONFIGS,
    ReferenceBackbone,
    WanVAE,
    build_dit,
    make_solver,
    resolve_device,
)
from refalign_ext.checkpoint.reading import read_any_dit
from refalign_ext.encoders import text_encoder
from refalign_ext.guidance import NULL, TEXT_IMAGE, combine_branches, required_branches
from refalign_ext.sampler import denoise
from refalign_ext.sprites.ablations.teacher_input import NAME as TEACHER_INPUT
from refalign_ext.sprites.ablations.teacher_input import ReferenceContext, saved_reference_context
from refalign_ext.sprites.judge import Answers, judge_clip, tabulate
from refalign_ext.sprites.pixels import to_frames, to_video_tensor
from refalign_ext.sprites.vae_onepass import decode_latents, encode_latents, lay_channels_last
from refalign_ext.sprites.world import SpriteClip, render_clip, sample_clip, sample_reference, subjects_of

if TYPE_CHECKING:
    from easydict import EasyDict

SHEET_FRAMES = 5  # of a clip in a contact sheet
Reference = tuple[np.ndarray, float, float]  # image [H, W, 3] uint8, angle in radians, scale
AskedClip = tuple[SpriteClip, list[Reference]]


@dataclass(frozen=True)
class JudgingJob:
    """What to generate and how; the same job on two models is a paired comparison.

    `references` says whose the model is given: a clip's `own`, or as a control `shuffled`, those of another clip of the
    job with as few of its colours as there are. The verdict is about the clip's own subjects either way, so a shuffled
    job scores high only where a model guesses or a judge is lenient.
    """

    clips: int
    subjects: int = 1
    split: str = "held_out"
    pair: str = "cross"
    seed: int = 1000
    ref_guide_scale: float | None = None
    text_guide_scale: float | None = None
    sample_steps: int | None = None
    sample_shift: float | None = None
    references: str = "own"

    def __post_init__(self) -> None:
        assert self.references in ("own", "shuffled"), self.references
        if self.references == "shuffled" and self.clips < 2:
            raise ValueError("shuffled references are those of another clip: ask for 2 clips or more")


@dataclass
class Evaluation:
    """Judged clips [T, H, W, 3], the references that the model was given, and the judge's answers."""

    videos: list[np.ndarray] = field(default_factory=list)
    references: list[list[np.ndarray]] = field(default_factory=list)
    answers: Answers = field(default_factory=lambda: defaultdict(list))

    def add(self, video: np.ndarray, clip: SpriteClip, references: Sequence[Reference]) -> None:
        """Judge a video that was to show `clip`."""
        self.videos.append(video)
        self.references.append([image for image, _, _ in references])
        copied = [(angle, scale) for _, angle, scale in references]
        for name, answers in judge_clip(video, clip, copied).items():
            self.answers[name].append(answers)

    def table(self) -> dict[str, dict[str, float] | None]:
        """Shares of right answers with 95% intervals; see `judge.tabulate`."""
        return tabulate(self.answers)

    def contact_sheet(self, rows: int = 8, scale: int = 3) -> np.ndarray:
        """References, then evenly spaced frames, one clip a row: [H, W, 3] uint8."""
        most = max(len(images) for images in self.references)
        lines = []
        for video, references in list(zip(self.videos, self.references, strict=True))[:rows]:
            blank = np.full_like(references[0], 235)
            shown = video[np.linspace(0, len(video) - 1, SHEET_FRAMES).round().astype(int)]
            lines.append(np.concatenate([*references, *[blank] * (most - len(references)), *shown], 1))
        return np.concatenate(lines).repeat(scale, 0).repeat(scale, 1)


class SpriteEvaluator:
    """Generates in batches with the same guidance, solver and classes as the pipeline.

    Args:
        task: the r2v-tiny entry of WAN_CONFIGS.
        vae: its VAE.
        encode_text: prompts to text features.
        precision: of the DiT, `fp32` or `bf16` (autocast, as in training); the VAE keeps float32.
    """

    def __init__(
        self,
        task: EasyDict,
        vae: WanVAE,
        encode_text: Callable[[Sequence[str]], list[Tensor]],
        precision: str = "fp32",
    ) -> None:
        self.task, self.vae, self.encode_text, self.precision = task, vae, encode_text, precision

    def draw(self, job: JudgingJob, index: int) -> AskedClip:
        """Clip `index` of a job and its own references; cut-outs are tilted as in training, and so are their clips."""
        rng = np.random.default_rng([job.seed, job.subjects, index])
        clip = sample_clip(rng, subjects_of(job.split), job.subjects, tilted=job.pair == "regular")
        width, height = self.task.size
        return clip, [
            sample_reference(rng, performance, height, width, job.pair) for performance in clip.performances
        ]

    def draw_all(self, job: JudgingJob) -> list[AskedClip]:
        """Every clip of a job with the references that the model is given."""
        drawn = [self.draw(job, index) for index in range(job.clips)]
        if job.references == "own":
            return drawn
        colors = [[performance.subject.colors for performance in clip.performances] for clip, _ in drawn]

        def shared(index: int, other: int) -> int:
            return sum(len(mine & theirs) for mine in colors[index] for theirs in colors[other])

        given = []
        for index, (clip, _) in enumerate(drawn):
            others = [(index + step) % job.clips for step in range(1, job.clips)]
            given.append((clip, drawn[min(others, key=lambda other: shared(index, other))][1]))
        return given

    @torch.no_grad()
    def reconstruct(self, job: JudgingJob, through_vae: bool = True, progress: bool = False) -> Evaluation:
        """The judge's opinion of real clips, as rendered or after the VAE's own chunked encode and decode."""
        width, height = self.task.size
        result = Evaluation()
        for index in tqdm(range(job.clips), desc="judging", unit="clip", disable=not progress):
            clip, references = self.draw(job, index)
            video, _ = render_clip(clip, self.task.frame_num, height, width)
            if through_vae:
                latents = self.vae.encode([to_video_tensor(video).to(self.vae.device)])
                video = to_frames(self.vae.decode(latents)[0])
            result.add(video, clip, references)
        return result

    @torch.no_grad()
    def generate(
        self,
        model: nn.Module,
        job: JudgingJob,
        batch_size: int = 16,
        progress: bool = False,
        reference_context: ReferenceContext | None = None,
    ) -> Evaluation:
        """Generate and judge a job's clips; clip `index` has its own seed, whatever the batch size.

        Args:
            reference_context: of a model that was trained with `teacher_input`; see `ablations.teacher_input`.
        """
        backbone, result, asked = ReferenceBackbone(model.eval()), Evaluation(), self.draw_all(job)
        bar = tqdm(total=job.clips, desc="generating", unit="clip", disable=not progress)
        try:
            for start in range(0, job.clips, batch_size):
                batch = asked[start : start + batch_size]
                videos = self._sample(backbone, job, start, batch, reference_context)
                for (clip, references), video in zip(batch, videos, strict=True):
                    result.add(to_frames(video), clip, references)
                bar.update(len(batch))
        finally:
            backbone.detach()
            bar.close()
        return result

    def _sample(
        self,
        backbone: ReferenceBackbone,
        job: JudgingJob,
        start: int,
        batch: list[AskedClip],
        reference_context: ReferenceContext | None,
    ) -> Tensor:
        """Videos [B, 3, T, H, W] of the clips from number `start` on."""
        task, device = self.task, self.vae.device
        image_scale = task.ref_guide_scale if job.ref_guide_scale is None else job.ref_guide_scale
        text_scale = task.text_guide_scale if job.text_guide_scale is None else job.text_guide_scale
        pictures = [to_video_tensor(image[None]) for _, references in batch for image, _, _ in references]
        encoded = encode_latents(self.vae, torch.stack(pictures).to(device))  # [B * M, C, 1, h, w]
        references = encoded[:, :, 0].unflatten(0, (len(batch), -1)).transpose(1, 2)  # [B, C, M, h, w]
        frames = (task.frame_num - 1) // task.vae_stride[0] + 1
        shape = (references.shape[1], frames, *references.shape[3:])
        seeds = [job.seed * 100003 + start + offset for offset in range(len(batch))]
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        prompts = self.encode_text([clip.caption for clip, _ in batch])
        negative = self.encode_text([task.sample_neg_prompt]) * len(batch)
        names = required_branches(image_scale, text_scale)
        context = [text for name in names for text in (prompts if name == TEXT_IMAGE else negative)]
        clean = [row for name in names for row in references * (name != NULL)]
        around_pass = nullcontext
        if reference_context is not None:
            images = torch.stack(pictures).to(device)[:, :, 0].unflatten(0, (len(batch), -1))
            around_pass = reference_context(images, [name != NULL for name in names])

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            times = timestep.expand(len(clean)).to(device)
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")
            with autocast, around_pass():
                output = backbone(list(latents) * len(names), times, context, clean)
            chunks = torch.stack(output.prediction).float().chunk(len(names))
            return combine_branches(dict(zip(names, chunks, strict=True)), image_scale, text_scale)

        solver = make_solver(
            task.sample_solver,
            job.sample_steps or task.sample_steps,
            job.sample_shift or task.sample_shift,
            task.num_train_timesteps,
            device,
        )
        latents = denoise(predict, torch.stack(noise).to(device), solver, progress=False)
        return decode_latents(self.vae, latents)


def judge_folder(
    folder: Path,
    what: str,
    job: JudgingJob,
    *,
    dit_ckpt: Path | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    progress: bool = True,
) -> Evaluation:
    """Judge `"real"` clips, their `"reconstruction"` by a checkpoint folder's VAE, or its `"generation"`."""
    task = WAN_CONFIGS["r2v-tiny"]
    place = resolve_device(device)
    vae = WanVAE(vae_pth=folder / task.vae_checkpoint, device=place, config=task.vae)
    evaluator = SpriteEvaluator(task, vae, text_encoder(folder, task, place, place), precision)
    if what != "generation":
        if job.references != "own":
            raise ValueError(
                f"shuffled references are a control of generated clips: there are none in {what}"
            )
        return evaluator.reconstruct(job, through_vae=what == "reconstruction", progress=progress)
    lay_channels_last(vae.model)
    source = dit_ckpt or folder
    checkpoint = read_any_dit(source, extra=(TEACHER_INPUT,))
    model = build_dit(checkpoint, task, source, device=place, dtype=torch.float32).requires_grad_(False)
    context = saved_reference_context(source, folder, model, place)
    return evaluator.generate(model, job, progress=progress, reference_context=context)
