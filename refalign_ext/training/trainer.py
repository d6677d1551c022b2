"""Training with reference alignment. `Trainer.train_step` is the whole method on one screen.

The trainer sees modules, a source of samples and a configuration; what shards or wraps the modules does so before they
get here. All randomness of a sample depends on the seed and its global position, so a batch of two equals two
accumulated batches of one or two ranks with one each, a resumed run equals one that was never interrupted, and there is
no state of a random generator to save.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refalign_ext.backbone import ReferenceBackbone
from refalign_ext.checkpoint.checkpointer import Checkpointer, read_meta
from refalign_ext.checkpoint.state import build_state, restore_state
from refalign_ext.config import TrainConfig
from refalign_ext.data.batch import EncodedSample, Source, stack_features
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import TrainedModules, reshard_all
from refalign_ext.encoders import EncodeText
from refalign_ext.layout import SampleLayout
from refalign_ext.losses import (
    alignment_by_block,
    average_errors,
    flow_matching_errors,
    flow_matching_target,
)
from refalign_ext.timesteps import TIMESTEP_RECIPES, add_noise
from refalign_ext.training.ema import EMA
from refalign_ext.training.metrics import NonFiniteGuard, TimestepBins
from refalign_ext.training.optimizers import build_optimizers, learning_rate_scale, set_learning_rates
from refalign_ext.training.randomness import SampleRandomness, sample_randomness

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerHooks:
    """What others hang into training, given at construction.

    Attributes:
        stop_requested: asked after every step; True on any rank ends the run after that step.
        around_forward: (samples, which of them keep their references) -> a context entered around a pass of the model,
            as extra modules need.
    """

    stop_requested: Callable[[], bool] = lambda: False
    around_forward: Callable[[Sequence[EncodedSample], Sequence[bool]], AbstractContextManager] = (
        lambda samples, keep_references: nullcontext()
    )


@dataclass(frozen=True)
class BatchLosses:
    """Losses of one batch on one rank."""

    total: Tensor  # eq. 11, with the gradient; averaged over all ranks it is the loss of all their samples
    flow: Tensor  # flow matching, weighted, averaged over the samples
    # [K], alignment of each block, averaged over the samples: of this rank's reference tokens, times the ranks that share
    # them.
    positive: Tensor
    negative: Tensor
    errors: Tensor  # [B], unweighted flow-matching error of each sample


@dataclass(frozen=True)
class MicroBatch:
    """What is kept of one forward and backward pass: a step of many must not hold on to their latents."""

    samples: list[str]  # their names
    layouts: list[SampleLayout]
    randomness: list[SampleRandomness]  # without the noise
    losses: BatchLosses  # without the gradient
    data_wait: float  # seconds


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    values: dict[str, float]  # averages over all ranks, by the name that logs give them
    skipped: bool  # something was not finite, and the weights are as they were
    stopping: bool  # a rank asked to stop
    samples: list[str]  # names of this rank's samples
    layouts: list[SampleLayout]  # where their tokens lie
    data_wait: float = field(default=0.0, compare=False)  # seconds that this rank waited for samples


class Trainer:
    """Trains a backbone and its projectors, alone or as one of many ranks.

    Args:
        trained: the backbone's DiT, projectors (None: training without alignment) and extra modules, parallelized.
    """

    def __init__(
        self,
        config: TrainConfig,
        backbone: ReferenceBackbone,
        trained: TrainedModules,
        source: Source,
        encode_text: EncodeText,
        parallel: Parallel,
        validation: Source | None = None,
        hooks: TrainerHooks | None = None,
    ) -> None:
        self.config, self.backbone, self.trained = config, backbone, trained
        self.source, self.encode_text, self.validation = source, encode_text, validation
        self.parallel, self.device = parallel, parallel.device
        self.hooks = hooks or TrainerHooks()
        self.recipe = TIMESTEP_RECIPES[config.timesteps]
        self.accumulation = config.accumulation(parallel.sizes.data)
        self.optimizers = build_optimizers(trained, config)
        self.ema = EMA(trained, config.ema_decay)
        self.step, self.samples_seen = 0, 0
        self.timestep_bins = TimestepBins(device=self.device)
        self._guard = NonFiniteGuard(config.max_skipped_steps, Path(config.out))
        self._checkpointer = Checkpointer(
            Path(config.out) / "checkpoints", parallel, config.keep_last, 60 * config.timeout_minutes
        )

    @property
    def clips_per_step(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.config.batch_size * self.parallel.sizes.data * self.accumulation

    def train_step(self) -> StepReport:
        """One optimizer step over all ranks; one that is not finite leaves the weights as they were.

        FloatingPointError after `max_skipped_steps` such steps in a row.
        """
        set_learning_rates(self.optimizers, learning_rate_scale(self.step, self.config))
        batches = [self._forward_backward(micro) for micro in range(self.accumulation)]
        norm = self._clip_gradients()
        values, stopping = self._average_over_ranks([batch.losses for batch in batches])
        values["gradient_norm"] = norm
        values["learning_rate"] = self.optimizers[0].param_groups[0]["lr"]
        self.step += 1
        self.samples_seen += self.clips_per_step
        skipped = not (math.isfinite(values["loss/total"]) and math.isfinite(norm))
        if skipped:
            self._record_skipped(batches, values)
        else:
            self._guard.reset()
            for optimizer in self.optimizers:
                optimizer.step()
            self.ema.update(self.step)
            for batch in batches:
                timesteps = torch.stack([chosen.timestep for chosen in batch.randomness])
                self.timestep_bins.add(timesteps, batch.losses.errors)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return StepReport(
            values,
            skipped,
            stopping,
            samples=[name for batch in batches for name in batch.samples],
            layouts=[layout for batch in batches for layout in batch.layouts],
            data_wait=sum(batch.data_wait for batch in batches),
        )

    def _forward_backward(self, micro: int) -> MicroBatch:
        """Adds the gradient of one of a step's micro-batches."""
        # Data ranks take turns; ranks that share a sample get the same positions.
        size, data = self.config.batch_size, self.parallel.sizes.data
        start = self.samples_seen + (micro * data + self.parallel.data_rank) * size
        indices = range(start, start + size)
        began = time.monotonic()
        samples = self.source.samples(self.step, indices)
        data_wait = time.monotonic() - began
        pairs = zip(samples, indices, strict=True)
        randomness = [sample_randomness(sample, index, self.config) for sample, index in pairs]
        losses = self.losses(samples, randomness)
        (losses.total / self.accumulation).backward()
        return MicroBatch(
            [sample.name for sample in samples],
            [self._layout(sample) for sample in samples],
            [replace(chosen, noise=None) for chosen in randomness],
            replace(losses, total=losses.total.detach()),
            data_wait,
        )

    def losses(self, samples: list[EncodedSample], randomness: list[SampleRandomness]) -> BatchLosses:
        """Eq. 11 for one batch: flow matching plus gated, weighted reference alignment."""
        alignment, projectors = self.config.alignment, self.trained.projectors
        timestep = torch.stack([chosen.timestep for chosen in randomness])  # [B]
        keep_references = [chosen.keep_references for chosen in randomness]
        latents = [sample.latents.to(self.device) for sample in samples]
        noise = [chosen.noise.to(self.device) for chosen in randomness]
        pairs = list(zip(samples, randomness, strict=True))
        references = [sample.references.to(self.device) * chosen.keep_references for sample, chosen in pairs]
        texts = self.encode_text([sample.prompt if chosen.keep_text else "" for sample, chosen in pairs])
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        with autocast, self.hooks.around_forward(samples, keep_references):
            output = self.backbone(
                add_noise(latents, noise, timestep),
                timestep.to(self.device),
                texts,
                references,
                tap_depth=alignment.depth if projectors is not None else 0,
                tap=alignment.tap,
            )
            students = [] if projectors is None else projectors(output.reference_tokens)
        errors = flow_matching_errors(output.prediction, flow_matching_target(latents, noise))  # [B]
        flow = average_errors(errors, self.recipe.flow_weight(timestep))
        if projectors is None:
            none = flow.new_zeros(0)
            return BatchLosses(flow, flow.detach(), none, none, errors.detach())
        features, mask = stack_features(samples, self.device)  # [B, M, N, D], [B, M]
        positive, negative = alignment_by_block(
            students,
            features,
            mask=mask & torch.tensor(keep_references, device=self.device)[:, None],
            margin=alignment.margin,
            sample_weight=self.recipe.alignment_gate(timestep),
            spans=output.reference_spans,
        )
        # Ranks that share a sample hold parts of its references: their average, times how many they are, is the sum.
        share = self.parallel.sizes.sequence
        total = flow + alignment.weight * share * (positive + alignment.negative_weight * negative).mean()
        return BatchLosses(
            total, flow.detach(), share * positive.detach(), share * negative.detach(), errors.detach()
        )

    def _layout(self, sample: EncodedSample) -> SampleLayout:
        _, height, width = self.backbone.model.patch_size
        frames, rows, columns = sample.latents.shape[1:]
        return SampleLayout(frames, sample.references.shape[1], rows // height, columns // width)

    def _clip_gradients(self) -> float:
        parameters = [
            p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]
        ]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip_norm or float("inf"))
        return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()

    def _average_over_ranks(self, batches: list[BatchLosses]) -> tuple[dict[str, float], bool]:
        """Logged values and whether any rank wants to stop, in one exchange."""
        parts = [
            torch.cat([losses.total[None], losses.flow[None], losses.positive, losses.negative])
            for losses in batches
        ]
        stop = torch.tensor([float(self.hooks.stop_requested())], device=self.device)
        # [2 + 2 K + 1]
        mean = self.parallel.mean(torch.cat([torch.stack(parts).mean(0).float(), stop])).tolist()
        depth = len(batches[0].positive)
        values = {"loss/total": mean[0], "loss/flow": mean[1]}
        for name, terms in (("positive", mean[2 : 2 + depth]), ("negative", mean[2 + depth : -1])):
            values[f"alignment/{name}"] = sum(terms) / max(depth, 1)
            values |= {f"alignment_by_block/{name}_{block}": term for block, term in enumerate(terms)}
        return values, mean[-1] > 0

    def _record_skipped(self, batches: list[MicroBatch], values: dict[str, float]) -> None:
        mine = [
            {
                "sample": name,
                "timestep": chosen.timestep.item(),
                "keep_text": chosen.keep_text,
                "keep_references": chosen.keep_references,
                "flow_error": error.item(),
                "batch_total": batch.losses.total.item(),
                "batch_positive": batch.losses.positive.tolist(),
                "batch_negative": batch.losses.negative.tolist(),
            }
            for batch in batches
            for name, chosen, error in zip(batch.samples, batch.randomness, batch.losses.errors, strict=True)
        ]
        report = {"values": values, "samples_by_rank": self.parallel.gather_objects(mine)}
        self._guard.skipped(self.step, report, writes=self.parallel.is_main)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses of the validation clips, the same clips with the same noise and timesteps at every step."""
        assert self.validation is not None
        names = ("loss", "flow", "positive", "negative") if self.trained.projectors else ("loss", "flow")
        data, count = self.parallel.sizes.data, self.config.validation_clips
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        # One clip at a time, so that any number of ranks sees the same ones. All ranks pass through the model equally
        # often; what lies beyond the last clip does not count.
        for first in range(0, count, data):
            place = first + self.parallel.data_rank
            samples = self.validation.samples(place, range(place, place + 1))
            randomness = sample_randomness(samples[0], place, self.config, purpose="validation/")
            losses = self.losses(samples, [randomness])
            if place < count:
                terms = [losses.total, losses.flow, losses.positive.mean(), losses.negative.mean()]
                sums += torch.stack(terms[: len(names)]).double()
        reshard_all(self.trained)
        mean = (self.parallel.sum(sums) / self.parallel.sizes.sequence / count).tolist()
        return {f"validation/{name}": value for name, value in zip(names, mean, strict=True)}

    def save(self) -> None:
        """Begin to write a checkpoint, whole when `finish_saving` returns; OSError if the one before failed."""
        only_adapters = self.config.lora_rank > 0
        self._checkpointer.save(
            self.step,
            build_state(self.trained, self.optimizers, self.ema.average, trainable_only=only_adapters),
            {"samples_seen": self.samples_seen, "settings": self.config.to_dict()},
            dit_settings(self.trained.dit),
        )

    def finish_saving(self) -> Path | None:
        """Wait for the last checkpoint; returns its folder (None: none since the last call) or raises its OSError."""
        return self._checkpointer.finish()

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of any number of ranks; ValueError if it does not fit. Says which settings differ."""
        meta = read_meta(path)
        if self.parallel.is_main:
            now, then = _flat(json.loads(json.dumps(self.config.to_dict()))), _flat(meta["settings"])
            for name in sorted(now.keys() & then.keys()):
                if now[name] != then[name]:
                    text = "resuming with %s = %s (the checkpoint has %s)"
                    logger.warning(text, name, now[name], then[name])
        restore_state(path, self.trained, self.optimizers, self.ema.average)
        self.step, self.samples_seen = meta["step"], meta["samples_seen"]


def dit_settings(model: nn.Module) -> dict[str, Any]:
    """The constructor arguments of a DiT, as its checkpoints store them."""
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    return {"_class_name": "WanModel", **config}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by the names of the command line."""
    flat = {name: value for name, value in settings.items() if not isinstance(value, dict)}
    for group in settings.keys() - flat.keys():
        flat |= {f"{group}.{name}": value for name, value in settings[group].items()}
    return flat
