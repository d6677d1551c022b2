"""Videos of validation clips, with which a run on clips shows what it generates.

Every rank takes part, because a sharded model runs on all ranks or on none.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from refalign_ext.backbone import make_solver
from refalign_ext.data.batch import EncodedSample
from refalign_ext.encoders import Encoders, task_config
from refalign_ext.guidance import NULL, branch_inputs, combine_branches, required_branches
from refalign_ext.media import save_video
from refalign_ext.sampler import denoise
from refalign_ext.training.data_source import Preview
from refalign_ext.training.randomness import sample_randomness
from refalign_ext.training.run_log import SAMPLES_FOLDER, RunLog
from refalign_ext.training.trainer import Trainer


def video_preview(trainer: Trainer, encoders: Encoders, log: RunLog) -> Preview:
    """Videos of the first validation clips' prompts and references; data-parallel groups share them out."""
    config, fps = trainer.config, encoders.task.sample_fps
    data, is_leading = trainer.parallel.sizes.data, trainer.parallel.sequence_rank == 0
    vae = encoders.vae if is_leading else None
    assert trainer.validation is not None

    @torch.no_grad()
    def preview(step: int) -> dict[str, float]:
        with trainer.ema.applied():
            for first in range(0, config.preview_clips, data):
                index = first + trainer.parallel.data_rank
                sample = trainer.validation.samples(index, range(index, index + 1))[0]
                latents = generate_latents(trainer, sample, index)
                if vae is None or index >= config.preview_clips:
                    continue
                video = vae.decode([latents])[0].float().cpu()  # [3, T, H, W]
                if trainer.parallel.is_main:
                    log.video(step, f"clip_{index}", video, fps)
                else:
                    path = Path(config.out) / SAMPLES_FOLDER / f"step-{step:08d}-clip_{index}.mp4"
                    save_video(video, path, fps)
        trainer.parallel.barrier()
        return {}

    return preview


def generate_latents(trainer: Trainer, sample: EncodedSample, index: int) -> Tensor:
    """Latents [C, F, h, w] for a clip's prompt and references, with the task's solver and guidance."""
    config, task, device = trainer.config, task_config(trainer.config), trainer.device
    scales = (task.ref_guide_scale, task.text_guide_scale)
    references = sample.references.to(device)
    prompt, negative = trainer.encode_text([sample.prompt, task.sample_neg_prompt])
    inputs = branch_inputs(prompt, negative, references)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        found = {}
        for name in required_branches(*scales):
            text, images = inputs[name]
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
            with autocast, trainer.hooks.around_forward([sample], [name != NULL]):
                output = trainer.backbone([latents], timestep.reshape(1), [text], [images])
            found[name] = output.prediction[0]
        return combine_branches(found, *scales)

    solver = make_solver(
        task.sample_solver, task.sample_steps, task.sample_shift, task.num_train_timesteps, device
    )
    noise = sample_randomness(sample, index, config, purpose="preview/").noise.to(device)
    return denoise(predict, noise, solver, progress=trainer.parallel.is_main)
