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
    """An extra module in place.

    Attributes:
        module: its weights are trained, averaged and saved with the DiT's.
        around_forward: see `trainer.TrainerHooks`.
    """

    module: nn.Module
    around_forward: Callable[[Sequence[EncodedSample], Sequence[bool]], AbstractContextManager]


class ExtraModule(Protocol):
    """One kind of extra module; `name` is that of the boolean setting that asks for it and of its part of checkpoints."""

    name: str

    def attach(self, config: TrainConfig, model: nn.Module, encoders: Encoders) -> AttachedModule:
        """Put a new one, or that of the checkpoint that the run starts from, onto a DiT.

        Raises:
            ValueError: if the checkpoint's does not fit.
        """
        ...
