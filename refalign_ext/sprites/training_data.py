"""The sprite world as training data: cached clips, and previews that the judge rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from refalign_ext.backbone import WanModel, dit_arguments, file_sha256
from refalign_ext.config import TrainConfig
from refalign_ext.data.batch import Source
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.encoders import Encoders
from refalign_ext.sprites.ablations.teacher_input import trained_reference_context
from refalign_ext.sprites.dataset import MixedSprites, SpriteSettings, SpriteSource
from refalign_ext.sprites.evaluate import JudgingJob, SpriteEvaluator
from refalign_ext.sprites.pixels import save_picture
from refalign_ext.sprites.vae_onepass import encode_latents, lay_channels_last
from refalign_ext.training.clip_data import require_clip_sets
from refalign_ext.training.data_source import Preview, TrainingData
from refalign_ext.training.run_log import RunLog
from refalign_ext.training.trainer import Trainer

PREVIEW_SEED = 7  # not that of the published figures (`JudgingJob.seed`): runs are steered by their previews
# Shares of cached clips with one, two and three subjects; which ones a step draws is a setting.
CACHED_COUNTS = (0.45, 0.48, 0.07)


class SpriteData:
    """r2v-tiny without `--data`: the row of the table of data sources."""

    def accepts(self, config: TrainConfig) -> bool:
        return config.data is None and config.task == "r2v-tiny"

    def complete(self, config: TrainConfig) -> TrainConfig:
        require_clip_sets(config)  # a mistyped --validation_data is told here too
        return config

    def open(self, config: TrainConfig, encoders: Encoders, parallel: Parallel) -> TrainingData:
        """Training clips, and validation clips of subjects that training never shows."""
        lay_channels_last(encoders.vae.model)
        cache = Path(config.out) / "cache" if config.cache in (None, "off") else Path(config.cache)

        def encode(videos: Tensor) -> Tensor:
            return encode_latents(encoders.vae, videos).cpu()

        settings = SpriteSettings(
            clips=config.cache_clips,
            views=config.cache_views,
            frames=encoders.task.frame_num,
            height=encoders.task.size[1],
            width=encoders.task.size[0],
            regular_pairs=config.regular_pairs,
            counts=CACHED_COUNTS,
        )
        vae_digest = file_sha256(encoders.vae_path)
        teacher_digest = "".join(map(file_sha256, encoders.teacher_files))

        def sprites(split: str, **changes: Any) -> SpriteSource:
            return SpriteSource(
                replace(settings, **changes),
                config.seed,
                encode,
                encoders.features,
                cache,
                vae_digest,
                teacher_digest,
                tuple(config.subject_counts),
                split=split,
            )

        training: Source = sprites("train")
        if config.free_colors:
            free = sprites("train", clips=config.cache_free_clips, views=2, free_colors=True)
            training = MixedSprites(training, free, config.free_colors)
        validation = None
        if config.validate_every:
            validation = sprites("held_out", clips=config.validation_clips, views=2)
        return TrainingData(training, validation, encoders.encode_text)

    def make_preview(self, trainer: Trainer, encoders: Encoders, log: RunLog) -> Preview:
        """Pictures and the judge's figures on subjects that training never shows, with the averaged weights."""
        config, task = trainer.config, encoders.task
        folder = Path(config.out) / "previews"
        evaluator = None
        if trainer.parallel.is_main:
            evaluator = SpriteEvaluator(task, encoders.vae, trainer.encode_text, config.precision)

        def preview(step: int) -> dict[str, float]:
            weights = trainer.ema.full_state_dict()
            values: dict[str, float] = {}
            if evaluator is not None:
                # A model of its own: the one in training may be sharded or compiled, and sampling must not disturb it.
                model = WanModel(**dit_arguments(task)).to(trainer.device)
                model.load_state_dict(weights)
                context = trained_reference_context(trainer, encoders, model)
                sheets = []
                for subjects, clips in ((1, config.preview_clips), (2, max(1, config.preview_clips // 2))):
                    job = JudgingJob(
                        clips, subjects, seed=PREVIEW_SEED, sample_steps=config.preview_steps or None
                    )
                    evaluation = evaluator.generate(model, job, reference_context=context)
                    for key, row in evaluation.table().items():
                        if row is not None:
                            values[f"judge_{subjects}/{key}"] = row["share"]
                    sheets.append(evaluation.contact_sheet(rows=6))
                picture = _stacked(sheets)
                save_picture(folder / f"step-{step:08d}.png", picture)
                log.image(step, "preview", picture)
            trainer.parallel.barrier()
            return values

        return preview


SPRITE_DATA = SpriteData()


def _stacked(sheets: list[np.ndarray]) -> np.ndarray:
    width = max(sheet.shape[1] for sheet in sheets)
    return np.concatenate(
        [np.pad(s, ((0, 6), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in sheets]
    )
