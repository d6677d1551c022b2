"""The parallelism interface that `R2VPipeline` calls, for one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from refalign_ext.backbone import ReferenceBackbone


class SingleProcess:
    """One process generates alone.

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
