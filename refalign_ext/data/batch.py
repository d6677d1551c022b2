"""What a training step gets: an encoded batch, from any source of clips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncodedSample:
    """One clip ready for the model; all tensors on the CPU or the training device.

    Attributes:
        name: what logs call it.
        prompt: its caption.
        latents: [C, F, h, w], normalised.
        references: [C, M, h, w], each encoded alone as one frame.
        features: teacher features [M, N, D], or None when training runs without alignment.
    """

    name: str
    prompt: str
    latents: Tensor
    references: Tensor
    features: Tensor | None


class Source(Protocol):
    """An endless, seekable stream: sample `index` of step `step` is the same whenever and wherever it is asked for."""

    def prepare(self) -> None:
        """Slow work before the first sample, such as filling a cache; called once, before training."""
        ...

    def samples(self, step: int, indices: range) -> list[EncodedSample]:
        """Samples of the global positions `indices`, which belong to optimizer step `step`."""
        ...


def stack_features(samples: list[EncodedSample], device: torch.device) -> tuple[Tensor, Tensor]:
    """Teacher features [B, M, N, D] padded with zeros to the most references, and their mask [B, M] (True: real)."""
    features = [sample.features for sample in samples]
    most = max(feature.shape[0] for feature in features)
    padded = [torch.cat([f, f.new_zeros(most - f.shape[0], *f.shape[1:])]) for f in features]
    counts = torch.tensor([feature.shape[0] for feature in features], device=device)
    return torch.stack(padded).to(device), torch.arange(most, device=device) < counts[:, None]
