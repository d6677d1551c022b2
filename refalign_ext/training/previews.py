"""What training shows of itself: judged pictures in the sprite world, videos of validation clips elsewhere.

Every rank takes part, because a sharded model runs on all ranks or on none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from refalign_ext.atomic_io import atomic_open
from refalign_ext.backbone import WanModel, WanVAE, dit_arguments, make_solver
from refalign_ext.data.batch import EncodedSample
from refalign_ext.encoders import checkpoint_folder, on_grid, task_config, teacher_folder
from refalign_ext.guidance import NULL, branch_inputs, combine_branches, required_branches
from refalign_ext.media import save_video
from refalign_ext.sampler import denoise
from refalign_ext.sprites.dataset import to_frames
from refalign_ext.teachers import load_teacher
from refalign_ext.training.logging import SAMPLES_FOLDER, RunLog
from refalign_ext.training.trainer import Trainer, sample_randomness

PREVIEW_SEED = 7  # not that of the published figures (`Job.seed`): runs are steered by their previews

Preview = Callable[[int], dict[str, float]]


def make_preview(trainer: Trainer, log: RunLog) -> Preview | None:
    """The preview that fits the run's data, or None without `preview_every` or clips to make it from."""
    if not trainer.config.preview_every:
        return None
    if trainer.config.data is None:
        return _sprite_preview(trainer, log)
    return None if trainer.validation is None else _video_preview(trainer, log)


def _load_vae(trainer: Trainer) -> WanVAE:
    task = task_config(trainer.config)
    path = checkpoint_folder(trainer.config) / task.vae_checkpoint
    return WanVAE(vae_pth=path, device=trainer.device, config=task.vae)


def _sprite_preview(trainer: Trainer, log: RunLog) -> Preview:
    """Pictures and the judge's figures on subjects that training never shows, made with the averaged weights."""
    from PIL import Image

    from refalign_ext.sprites.evaluate import Job, SpriteEvaluator, contact_sheet
    from refalign_ext.sprites.vae_onepass import lay_channels_last

    config, task = trainer.config, task_config(trainer.config)
    folder = Path(config.out) / "previews"
    evaluator, features = None, None
    if trainer.parallel.is_main:
        vae = _load_vae(trainer)
        lay_channels_last(vae.model)
        evaluator = SpriteEvaluator(task, vae, trainer.encode_text, config.precision)
        if config.teacher_input:
            path = teacher_folder(config, task, checkpoint_folder(config))
            features = on_grid(load_teacher(config.alignment.teacher, path, device=trainer.device), task)
        folder.mkdir(parents=True, exist_ok=True)

    def preview(step: int) -> dict[str, float]:
        weights = trainer.generation_weights()
        values: dict[str, float] = {}
        if evaluator is not None:
            # A model of its own: the one in training may be sharded or compiled, and sampling must not disturb it.
            model = WanModel(**dit_arguments(task)).to(trainer.device)
            model.load_state_dict(weights)
            teacher_input = trainer.generation_input()
            reference_input = None if features is None else lambda images: teacher_input(features(images))
            sheets = []
            for subjects, clips in ((1, config.preview_clips), (2, max(1, config.preview_clips // 2))):
                job = Job(clips, subjects, seed=PREVIEW_SEED, sample_steps=config.preview_steps or None)
                evaluation = evaluator.generate(model, job, reference_input=reference_input)
                for key, row in evaluation.table().items():
                    if not np.isnan(row["share"]):
                        values[f"judge_{subjects}/{key}"] = row["share"]
                sheets.append(contact_sheet(evaluation, rows=6))
            picture = _stack(sheets)
            with atomic_open(folder / f"step-{step:08d}.png") as file:
                Image.fromarray(picture).save(file, format="PNG")
            log.image(step, "preview", picture)
        trainer.parallel.barrier()
        return values

    return preview


def _stack(sheets: list[np.ndarray]) -> np.ndarray:
    width = max(sheet.shape[1] for sheet in sheets)
    return np.concatenate(
        [np.pad(s, ((0, 6), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in sheets]
    )


def _video_preview(trainer: Trainer, log: RunLog) -> Preview:
    """Videos of the first validation clips' prompts and references; data-parallel groups share them out."""
    config, task = trainer.config, task_config(trainer.config)
    data, leads = trainer.parallel.sizes.data, trainer.parallel.sequence_rank == 0
    vae = _load_vae(trainer) if leads else None
    assert trainer.validation is not None

    @torch.no_grad()
    def preview(step: int) -> dict[str, float]:
        with trainer.averaged_weights():
            for first in range(0, config.preview_clips, data):
                place = first + trainer.parallel.data_rank
                sample = trainer.validation.samples(place, range(place, place + 1))[0]
                latents = _generate(trainer, sample, place)
                if vae is None or place >= config.preview_clips:
                    continue
                video = vae.decode([latents])[0].float().cpu()  # [3, T, H, W]
                if trainer.parallel.is_main:
                    log.video(step, f"clip_{place}", to_frames(video), task.sample_fps)
                else:
                    path = Path(config.out) / SAMPLES_FOLDER / f"step-{step:08d}-clip_{place}.mp4"
                    save_video(video, path, task.sample_fps)
        trainer.parallel.barrier()
        return {}

    return preview


def _generate(trainer: Trainer, sample: EncodedSample, place: int) -> Tensor:
    """Latents [C, F, h, w] for a clip's prompt and references, with the task's solver and guidance."""
    config, task, device = trainer.config, task_config(trainer.config), trainer.device
    scales = (task.ref_guide_scale, task.text_guide_scale)
    references = sample.references.to(device)
    prompt, negative = trainer.encode_text([sample.prompt, task.sample_neg_prompt])
    inputs = branch_inputs(prompt, negative, references)
    added = None
    if trainer.trained.teacher_input is not None:
        added = trainer.trained.teacher_input(sample.features[None].to(device))  # [1, M, N, d]

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        found = {}
        for name in required_branches(*scales):
            text, images = inputs[name]
            own = None if name == NULL else added
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                found[name] = trainer.backbone(
                    [latents], timestep.reshape(1), [text], [images], reference_input=own
                ).prediction[0]
        return combine_branches(found, *scales)

    solver = make_solver(
        task.sample_solver, task.sample_steps, task.sample_shift, task.num_train_timesteps, device
    )
    noise = sample_randomness(sample, place, config, purpose="preview/").noise.to(device)
    return denoise(predict, noise, solver, progress=trainer.parallel.is_main)
