"""The seam for modules that train beside the DiT and change its passes from outside, such as an ablation's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from refalign_ext.config import TrainConfig
from refalign_ext.data.batch import EncodedSample
from refalign_ext.encoders import Encoders


@dataclass(frozen=True)
class AttachedModule:
    """An extra module in place: its weights are trained, averaged and saved with the DiT's."""

    module: nn.Module
    around_forward: Callable[[Sequence[EncodedSample], Sequence[bool]], AbstractContextManager]
    """See `trainer.TrainerHooks`."""


class ExtraModule(Protocol):
    """One kind of extra module; `name` is that of the boolean setting that asks for it and of its part of checkpoints."""

    name: str

    def attach(self, config: TrainConfig, model: nn.Module, encoders: Encoders) -> AttachedModule:
        """Put a new one, or that of the checkpoint that the run starts from, onto a DiT; ValueError if it does not fit."""


def wanted_modules(
    config: TrainConfig, extra_modules: Sequence[ExtraModule], world_size: int
) -> list[ExtraModule]:
    """Those that the configuration asks for; ValueError with ranks or adapters: they are not sharded, beside a whole DiT."""
    wanted = [extra for extra in extra_modules if getattr(config, extra.name)]
    if wanted and (config.lora_rank or world_size > 1):
        raise ValueError(
            f"--{wanted[0].name} trains all weights in one process: leave --lora_rank and torchrun out"
        )
    return wanted
