"""Clips of the sprite world whose reference tokens are plotted (`refalign_ext.evaluation.feature_plots`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from refalign_ext.evaluation.features import Sample
from refalign_ext.sprites.pixels import to_video_tensor
from refalign_ext.sprites.world import render_clip, render_cross_reference, sample_clip, subjects_of

if TYPE_CHECKING:
    from easydict import EasyDict


def sprite_samples(
    task: EasyDict, *, clips: int, subjects: int, views: int, seed: int, split: str = "held_out"
) -> list[Sample]:
    """Clips of the sprite world with several views of each of their subjects.

    Raises:
        ValueError: for fewer than 2 subjects, which leaves nothing to tell apart, or more than 3.
    """
    if not 2 <= subjects <= 3:
        raise ValueError(f"--subjects {subjects}: references are told apart between 2 or 3")
    width, height = task.size
    samples = []
    for index in range(clips):
        rng = np.random.default_rng([seed, index])
        clip = sample_clip(rng, subjects_of(split), subjects)
        video, _ = render_clip(clip, task.frame_num, height, width)
        pictures = [
            [
                Image.fromarray(render_cross_reference(rng, performance.subject, height, width)[0])
                for performance in clip.performances
            ]
            for _ in range(views)
        ]
        samples.append(Sample(clip.caption, pictures, to_video_tensor(video)))
    return samples
