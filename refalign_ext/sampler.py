"""From noise to latents: the guided model and the loop (`denoise`, shared with `wan`) that integrates it."""

from __future__ import annotations

import logging

from torch import Tensor

from refalign_ext.backbone import ReferenceBackbone, denoise, release_cached_memory
from refalign_ext.errors import is_out_of_memory
from refalign_ext.guidance import branch_inputs, combine_branches, required_branches
from refalign_ext.parallelism import SingleProcess
from refalign_ext.tasks import Conditions

__all__ = ["GuidedModel", "denoise"]

logger = logging.getLogger(__name__)


class GuidedModel:
    """`(latents, timestep) -> velocity` with the guidance of eq. 5, for `denoise`.

    Args:
        backbone: the DiT with references attached.
        conditions: what it is conditioned on.
        image_scale, text_scale: see `dual_guidance`; equal scales are ordinary guidance.
        ranks: the ranks that evaluate the branches together.
        one_by_one: evaluates the branches one after the other, which needs less memory than a batch of them.
    """

    def __init__(
        self,
        backbone: ReferenceBackbone,
        conditions: Conditions,
        image_scale: float,
        text_scale: float,
        *,
        ranks: SingleProcess,
        one_by_one: bool,
    ) -> None:
        self.backbone, self.ranks = backbone, ranks
        self.scales = (image_scale, text_scale)
        self.branches = required_branches(image_scale, text_scale)
        self.inputs = branch_inputs(conditions.prompt, conditions.negative_prompt, conditions.references)
        self.model_inputs = conditions.model_inputs
        own = ranks.share(self.branches)
        self.batches = [[name] for name in own] if one_by_one else [own]

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Velocity [C, F, H, W] at latents [C, F, H, W] and a scalar timestep."""
        try:
            outputs = self._evaluate(latents, timestep)
        except RuntimeError as error:
            if all(len(batch) == 1 for batch in self.batches) or not is_out_of_memory(error):
                raise
            outputs = None
        if outputs is None:
            # Outside the handler, so that the failed batch's tensors are free before the next attempt.
            logger.info("the guidance branches do not fit into memory together: running them one by one")
            release_cached_memory(latents.device)
            self.batches = [[name] for batch in self.batches for name in batch]
            outputs = self._evaluate(latents, timestep)
        return combine_branches(self.ranks.exchange(self.branches, outputs), *self.scales)

    def _evaluate(self, latents: Tensor, timestep: Tensor) -> list[Tensor]:
        outputs = []
        for batch in self.batches:
            texts, references = zip(*(self.inputs[name] for name in batch), strict=True)
            model_inputs = {name: [value] * len(batch) for name, value in self.model_inputs.items()}
            times = timestep.expand(len(batch))  # [B]
            outputs += self.backbone(
                [latents] * len(batch), times, list(texts), list(references), model_inputs=model_inputs
            ).prediction
        return outputs
