"""Training with reference alignment. `Trainer.train_step` is the whole method on one screen.

The trainer sees modules, a source of samples and a configuration; what shards or wraps the modules does so before they
get here. All randomness of a sample depends on the seed and its global position, so a batch of two equals two
accumulated batches of one or two ranks with one each, a resumed run equals one that was never interrupted, and there is
no state of a random generator to save.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refalign_ext.backbone import ReferenceBackbone
from refalign_ext.checkpoint.checkpointer import Checkpointer, read_meta
from refalign_ext.checkpoint.state import TEACHER_INPUT, build_state, restore_state
from refalign_ext.config import TrainConfig
from refalign_ext.data.batch import EncodedSample, Source, stack_features
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import TrainedModules, gather_full_tensors, local_part, reshard_all
from refalign_ext.layout import SampleLayout
from refalign_ext.lora import adapter_scale, merge_tensors, split_state_dict
from refalign_ext.losses import (
    alignment_by_block,
    average_errors,
    flow_matching_errors,
    flow_matching_target,
)
from refalign_ext.projectors import TeacherInput
from refalign_ext.timesteps import add_noise, timestep_recipe
from refalign_ext.training.logging import NonFiniteGuard, TimestepBins, write_skipped
from refalign_ext.training.optimizers import build_optimizers, learning_rate_scale, set_learning_rates

logger = logging.getLogger(__name__)

EncodeText = Callable[[Sequence[str]], list[Tensor]]


@dataclass(frozen=True)
class SampleRandomness:
    """What chosen decides about one sample: its timestep, noise and dropped conditions."""

    timestep: Tensor  # []
    noise: Tensor | None  # [C, F, h, w]
    keep_text: bool
    keep_references: bool


@dataclass(frozen=True)
class BatchLosses:
    """Losses of one batch on one rank.

    Attributes:
        total: eq. 11, with the gradient. Averaged over all ranks it is the loss of all their samples.
        flow: flow matching, weighted, averaged over the samples.
        positive, negative: [K], alignment terms of each block, averaged over the samples; of this rank's reference tokens
            times the number of ranks that share them.
        errors: [B], unweighted flow-matching error of each sample.
    """

    total: Tensor
    flow: Tensor
    positive: Tensor
    negative: Tensor
    errors: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """What is kept of one forward and backward pass: a step of many micro_batches must not hold on to their latents."""

    samples: list[str]
    layouts: list[SampleLayout]
    randomness: list[SampleRandomness]  # without the noise
    losses: BatchLosses  # without the gradient


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    Attributes:
        values: averages over all ranks, by the name that logs give them.
        skipped: True if something was not finite and the weights are as they were.
        stopping: True if a rank asked to stop.
        samples: what this rank's samples are called.
        layouts: where their tokens lie.
    """

    values: dict[str, float]
    skipped: bool
    stopping: bool
    samples: list[str]
    layouts: list[SampleLayout]


def sample_randomness(
    sample: EncodedSample, index: int, config: TrainConfig, *, purpose: str = ""
) -> SampleRandomness:
    """Everything random about the sample at global position `index`, from the seed and the position alone.

    Args:
        purpose: sets randomness apart that share positions, such as those of validation.
    """
    digest = hashlib.sha256(f"{config.seed}/{purpose}{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    timestep = timestep_recipe(config.timesteps).sample(1, generator)[0]
    noise = torch.randn(sample.latents.shape, generator=generator)
    u = torch.rand((), generator=generator).item()
    drops_text = u < config.drop_text
    drops_references = config.drop_text <= u < config.drop_text + config.drop_references
    edge = config.drop_text + config.drop_references
    drops_both = edge <= u < edge + config.drop_both
    return SampleRandomness(
        timestep, noise, not (drops_text or drops_both), not (drops_references or drops_both)
    )


class Trainer:
    """Trains a backbone and its projectors, alone or as one of many ranks.

    Args:
        config: every setting.
        backbone: the DiT with references attached, on the training device.
        trained: the DiT, the projectors (None: training without alignment), parallelized, and the teacher input (None:
            no features go into the DiT).
        source: where samples come from.
        encode_text: prompts to text features.
        parallel: this rank's place.
        validation: clips that training does not see.
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
    ) -> None:
        self.config, self.backbone, self.trained = config, backbone, trained
        self.source, self.encode_text, self.validation = source, encode_text, validation
        self.parallel, self.device = parallel, parallel.device
        self.recipe = timestep_recipe(config.timesteps)
        self.accumulation = config.accumulation(parallel.sizes.data)
        beside = [part for part in (trained.projectors, trained.teacher_input) if part is not None]
        self.optimizers = build_optimizers(trained.dit, nn.ModuleList(beside) if beside else None, config)
        self.average = None
        if config.ema_decay:
            self.average = {key: value.detach().clone() for key, value in self._generating_weights().items()}
        self.step, self.samples_seen = 0, 0
        self.timestep_bins = TimestepBins(device=self.device)
        self.stop_requested: Callable[[], bool] = lambda: False
        self.waiting: Callable[[], AbstractContextManager] = nullcontext  # entered while samples are awaited
        self._guard = NonFiniteGuard(config.max_skipped_steps, Path(config.out))
        self._checkpointer: Checkpointer | None = None

    @property
    def clips_per_step(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.config.batch_size * self.parallel.sizes.data * self.accumulation

    def losses(self, samples: list[EncodedSample], randomness: list[SampleRandomness]) -> BatchLosses:
        """Eq. 11 for one batch: flow matching plus gated, weighted reference alignment."""
        alignment, projectors = self.config.alignment, self.trained.projectors
        teacher_input = self.trained.teacher_input
        timestep = torch.stack([chosen.timestep for chosen in randomness])  # [B]
        latents = [sample.latents.to(self.device) for sample in samples]
        noise = [chosen.noise.to(self.device) for chosen in randomness]
        references = [
            sample.references.to(self.device) * chosen.keep_references
            for sample, chosen in zip(samples, randomness, strict=True)
        ]
        prompts = [
            sample.prompt if chosen.keep_text else ""
            for sample, chosen in zip(samples, randomness, strict=True)
        ]
        texts = self.encode_text(prompts)
        if projectors is not None or teacher_input is not None:
            features, mask = stack_features(samples, self.device)  # [B, M, N, D], [B, M]
            mask = mask & torch.tensor(
                [[chosen.keep_references] for chosen in randomness], device=self.device
            )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            output = self.backbone(
                add_noise(latents, noise, timestep),
                timestep.to(self.device),
                texts,
                references,
                tap_depth=alignment.depth if projectors is not None else 0,
                tap=alignment.tap,
                reference_input=None
                if teacher_input is None
                else teacher_input(features * mask[..., None, None]),
            )
            students = [] if projectors is None else projectors(output.reference_tokens)
        errors = flow_matching_errors(output.prediction, flow_matching_target(latents, noise))  # [B]
        flow = average_errors(errors, self.recipe.flow_weight(timestep))
        if projectors is None:
            none = flow.new_zeros(0)
            return BatchLosses(flow, flow.detach(), none, none, errors.detach())
        positive, negative = alignment_by_block(
            students,
            features,
            mask=mask,
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

    def train_step(self) -> StepReport:
        """One optimizer step over all ranks.

        A step whose loss or gradient is not finite leaves the weights as they were; what it saw is written down.

        Raises:
            FloatingPointError: after `max_skipped_steps` such steps in a row.
        """
        set_learning_rates(self.optimizers, learning_rate_scale(self.step, self.config))
        micro_batches: list[MicroBatch] = []
        for micro in range(self.accumulation):
            indices = self._indices(micro)
            with self.waiting():
                samples = self.source.samples(self.step, indices)
            randomness = [
                sample_randomness(sample, index, self.config)
                for sample, index in zip(samples, indices, strict=True)
            ]
            losses = self.losses(samples, randomness)
            (losses.total / self.accumulation).backward()
            micro_batches.append(
                MicroBatch(
                    [sample.name for sample in samples],
                    [self._layout(sample) for sample in samples],
                    [replace(chosen, noise=None) for chosen in randomness],
                    replace(losses, total=losses.total.detach()),
                )
            )
        norm = self._clip_gradients()
        values, stopping = self._average_over_ranks([done.losses for done in micro_batches])
        values["gradient_norm"] = norm
        values["learning_rate"] = self.optimizers[0].param_groups[0]["lr"]
        self.step += 1
        self.samples_seen += self.clips_per_step
        skipped = not (math.isfinite(values["loss/total"]) and math.isfinite(norm))
        if skipped:
            self._skip(micro_batches, values)
        else:
            self._guard.reset()
            for optimizer in self.optimizers:
                optimizer.step()
            if self.average is not None:
                self._update_average()
            for done in micro_batches:
                timesteps = torch.stack([chosen.timestep for chosen in done.randomness])
                self.timestep_bins.add(timesteps, done.losses.errors)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        names = [name for done in micro_batches for name in done.samples]
        layouts = [layout for done in micro_batches for layout in done.layouts]
        return StepReport(values, skipped, stopping, names, layouts)

    def _indices(self, micro: int) -> range:
        """Global positions of this rank's samples: data ranks take turns, ranks that share a sample get the same."""
        size, data = self.config.batch_size, self.parallel.sizes.data
        start = self.samples_seen + (micro * data + self.parallel.data_rank) * size
        return range(start, start + size)

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
        stop = torch.tensor([float(self.stop_requested())], device=self.device)
        # [2 + 2 K + 1]
        mean = self.parallel.mean(torch.cat([torch.stack(parts).mean(0).float(), stop])).tolist()
        depth = len(batches[0].positive)
        values = {"loss/total": mean[0], "loss/flow": mean[1]}
        for name, terms in (("positive", mean[2 : 2 + depth]), ("negative", mean[2 + depth : -1])):
            values[f"alignment/{name}"] = sum(terms) / max(depth, 1)
            values |= {f"alignment_by_block/{name}_{block}": term for block, term in enumerate(terms)}
        return values, mean[-1] > 0

    def _skip(self, micro_batches: list[MicroBatch], values: dict[str, float]) -> None:
        mine = [
            {
                "sample": name,
                "timestep": chosen.timestep.item(),
                "keep_text": chosen.keep_text,
                "keep_references": chosen.keep_references,
                "flow_error": done.losses.errors[place].item(),
                "batch_total": done.losses.total.item(),
                "batch_positive": done.losses.positive.tolist(),
                "batch_negative": done.losses.negative.tolist(),
            }
            for done in micro_batches
            for place, (name, chosen) in enumerate(zip(done.samples, done.randomness, strict=True))
        ]
        by_rank = self.parallel.gather_objects(mine)
        folder = Path(self.config.out)
        if self.parallel.is_main:
            path = write_skipped(folder, self.step, {"values": values, "samples_by_rank": by_rank})
            logger.warning(
                "step %d skipped, it is not finite: %s tells its samples and losses", self.step, path
            )
        self._guard.skipped()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses of the validation clips, the same clips with the same noise and timesteps at every step."""
        assert self.validation is not None
        names = (
            ("loss", "flow") if self.trained.projectors is None else ("loss", "flow", "positive", "negative")
        )
        data, count = self.parallel.sizes.data, self.config.validation_clips
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        # One clip at a time, so that any number of ranks sees the same ones. All ranks pass through the model equally
        # often; what lies beyond the last clip does not count.
        for first in range(0, count, data):
            place = first + self.parallel.data_rank
            samples = self.validation.samples(place, range(place, place + 1))
            losses = self.losses(
                samples, [sample_randomness(samples[0], place, self.config, purpose="validation/")]
            )
            if place < count:
                terms = [losses.total, losses.flow, losses.positive.mean(), losses.negative.mean()]
                sums += torch.stack(terms[: len(names)]).double()
        reshard_all(self.trained)
        mean = (self.parallel.sum(sums) / self.parallel.sizes.sequence / count).tolist()
        return {f"validation/{name}": value for name, value in zip(names, mean, strict=True)}

    @torch.no_grad()
    def _update_average(self) -> None:
        # A short memory at first: otherwise the random start would linger for a thousand steps.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        weights = self._generating_weights()
        mine = [local_part(value) for value in self.average.values()]
        torch._foreach_lerp_(mine, [local_part(weights[key]) for key in self.average], 1 - decay)

    def _generating_weights(self) -> dict[str, Tensor]:
        """All that generation computes with, as it is now: the DiT by its own names, and `teacher_input.*`."""
        teacher_input = self.trained.teacher_input
        beside = {} if teacher_input is None else teacher_input.state_dict(prefix=TEACHER_INPUT)
        return {**self.trained.dit.state_dict(), **beside}

    def ema_state_dict(self) -> dict[str, Tensor]:
        """The DiT's weights to generate with: the moving average if there is one. Sharded as the model is."""
        weights = self._generating_weights() if self.average is None else self.average
        return {name: value for name, value in weights.items() if not name.startswith(TEACHER_INPUT)}

    def generation_input(self) -> TeacherInput | None:
        """The teacher input to generate with: a copy, with the moving average if there is one."""
        module = copy.deepcopy(self.trained.teacher_input)
        if module is not None and self.average is not None:
            module.load_state_dict({name: self.average[TEACHER_INPUT + name] for name in module.state_dict()})
        return module

    def generation_weights(self) -> dict[str, Tensor]:
        """The same, whole and under upstream's names, with adapters merged; all ranks call it together."""
        state = gather_full_tensors(self.ema_state_dict())
        if not self.config.lora_rank:
            return state
        rank, alpha = adapter_scale(self.trained.dit)
        return merge_tensors(*split_state_dict(state), rank=rank, alpha=alpha)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with the moving average's weights, for as long as the block lasts."""
        weights = self._generating_weights()
        before = {key: local_part(value).clone() for key, value in weights.items()} if self.average else {}
        try:
            for key in before:
                local_part(weights[key]).copy_(local_part(self.average[key]))
            yield
        finally:
            reshard_all(self.trained)
            for key, value in before.items():
                local_part(weights[key]).copy_(value)

    def save(self) -> None:
        """Begin to write a checkpoint of the present step; it is whole when `finish_saving` returns.

        Raises:
            OSError: if the one before could not be written.
        """
        if self._checkpointer is None:
            folder = Path(self.config.out) / "checkpoints"
            timeout = 60 * self.config.timeout_minutes
            self._checkpointer = Checkpointer(folder, self.parallel, self.config.keep_last, timeout)
        only_adapters = self.config.lora_rank > 0
        self._checkpointer.save(
            self.step,
            build_state(self.trained, self.optimizers, self.average, trainable_only=only_adapters),
            {"samples_seen": self.samples_seen, "settings": self.config.to_dict()},
            _plain_config(self.trained.dit),
        )

    def finish_saving(self) -> Path | None:
        """Wait for the last checkpoint and return its folder (None: none since the last call).

        Raises:
            OSError: if it could not be written.
        """
        return None if self._checkpointer is None else self._checkpointer.finish()

    def load(self, path: Path) -> None:
        """Continue from a checkpoint, whatever number of ranks wrote it; says which settings differ.

        Raises:
            ValueError: if it does not fit this model or its optimizers.
        """
        meta = read_meta(path)
        then, now = _flatten(meta["settings"]), _flatten(self.config.to_dict())
        if self.parallel.is_main:
            for name in sorted(name for name in now if name in then and str(then[name]) != str(now[name])):
                logger.warning("resuming with %s = %s (the checkpoint has %s)", name, now[name], then[name])
        restore_state(path, self.trained, self.optimizers, self.average)
        self.step, self.samples_seen = meta["step"], meta["samples_seen"]


def _plain_config(model: nn.Module) -> dict[str, Any]:
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    return {"_class_name": "WanModel", **config}


def _flatten(settings: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
