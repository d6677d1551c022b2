"""Exponential moving average of the weights, which is what training generates and publishes with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from refalign_ext.checkpoint.reading import merge_adapter
from refalign_ext.checkpoint.weights import Weight, read_weights
from refalign_ext.distributed.parallelize import TrainedModules, gather_full_tensors, local_part, reshard_all
from refalign_ext.lora import adapter_scale, split_state_dict


class EMA:
    """The moving average of the DiT and of the extra modules beside it (projectors only serve training), sharded alike.

    Attributes:
        average: the DiT's tensors by its own names, extra modules' as `<module>.<name>`. None without a decay: then the
            weights to generate with are the trained ones.
    """

    def __init__(self, trained: TrainedModules, decay: float) -> None:
        self.trained, self.decay = trained, decay
        self.average: dict[str, Tensor] | None = None
        if decay:
            self.average = {key: value.detach().clone() for key, value in self._trained_weights().items()}

    def _trained_weights(self) -> dict[str, Tensor]:
        weights = dict(self.trained.dit.state_dict())
        for name, module in self.trained.extra.items():
            weights |= module.state_dict(prefix=f"{name}.")
        return weights

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 1)."""
        if self.average is None:
            return
        # A short memory at first: otherwise the random start would linger for a thousand steps.
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = self._trained_weights()
        mine = [local_part(value) for value in self.average.values()]
        torch._foreach_lerp_(mine, [local_part(weights[key]) for key in self.average], 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The DiT's weights to generate with, sharded as the model is."""
        if self.average is None:
            return dict(self.trained.dit.state_dict())
        prefixes = tuple(f"{name}." for name in self.trained.extra)
        return {key: value for key, value in self.average.items() if not key.startswith(prefixes)}

    def full_state_dict(self) -> dict[str, Tensor]:
        """The same gathered whole, under upstream's names with adapters merged; all ranks call it together."""
        state = gather_full_tensors(self.state_dict())
        base, adapter = split_state_dict({name: Weight.of(tensor) for name, tensor in state.items()})
        return (
            read_weights(merge_adapter(base, adapter, *adapter_scale(self.trained.dit))) if adapter else state
        )

    def extra_state_dict(self, name: str) -> dict[str, Tensor]:
        """The weights of an extra module to generate with, by its own names."""
        weights = self._trained_weights() if self.average is None else self.average
        prefix = f"{name}."
        return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The trained modules with the average's weights, for as long as the block lasts."""
        weights = self._trained_weights()
        average = self.average or {}
        before = {key: local_part(weights[key]).clone() for key in average}
        try:
            for key, value in average.items():
                local_part(weights[key]).copy_(local_part(value))
            yield
        finally:
            reshard_all(self.trained)
            for key, value in before.items():
                local_part(weights[key]).copy_(value)
