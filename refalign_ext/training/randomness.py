"""Everything random about a training sample, from the seed and the sample's position alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from refalign_ext.config import TrainConfig
from refalign_ext.data.batch import EncodedSample
from refalign_ext.timesteps import TIMESTEP_RECIPES


@dataclass(frozen=True)
class SampleRandomness:
    """A sample's timestep, noise and kept conditions."""

    timestep: Tensor  # []
    noise: Tensor | None  # [C, F, h, w]
    keep_text: bool
    keep_references: bool


def sample_randomness(
    sample: EncodedSample, index: int, config: TrainConfig, *, purpose: str = ""
) -> SampleRandomness:
    """The randomness of the sample at global position `index`.

    Args:
        purpose: sets uses apart that share positions, such as validation.
    """
    digest = hashlib.sha256(f"{config.seed}/{purpose}{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    timestep = TIMESTEP_RECIPES[config.timesteps].sample(1, generator)[0]
    noise = torch.randn(sample.latents.shape, generator=generator)
    u = torch.rand((), generator=generator).item()
    drops_text = u < config.drop_text
    edge = config.drop_text + config.drop_references
    drops_references = config.drop_text <= u < edge
    drops_both = edge <= u < edge + config.drop_both
    return SampleRandomness(
        timestep, noise, not (drops_text or drops_both), not (drops_references or drops_both)
    )
