"""Training with reference alignment. `Trainer.train_step` is the whole method on one screen.

The trainer sees modules, a source of samples and a configuration; what shards or wraps the modules does so before they
get here. All randomness of a sample depends on the seed and its global position, so a batch of two equals two
accumulated batches of one, and a resumed run equals one that was never interrupted.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from refalign_ext.backbone import ReferenceBackbone
from refalign_ext.checkpoint import read_checkpoint, save_checkpoint
from refalign_ext.config import TrainConfig
from refalign_ext.data.batch import EncodedSample, Source, stack_features
from refalign_ext.losses import flow_matching_loss, flow_matching_target, reference_alignment_over_blocks
from refalign_ext.optimizers import build_optimizers, learning_rate_scale, set_learning_rates
from refalign_ext.projectors import ReferenceProjectors
from refalign_ext.timesteps import add_noise, timestep_recipe

logger = logging.getLogger(__name__)

EncodeText = Callable[[Sequence[str]], list[Tensor]]


@dataclass(frozen=True)
class Draw:
    """What chance decides about one sample: its timestep, noise and dropped conditions."""

    timestep: Tensor  # []
    noise: Tensor  # [C, F, h, w]
    keep_text: bool
    keep_references: bool


@dataclass(frozen=True)
class StepLosses:
    """Losses of one batch; `total` carries the gradient, all are averages over the samples."""

    total: Tensor
    flow: Tensor
    positive: Tensor
    negative: Tensor


def draw(sample: EncodedSample, index: int, config: TrainConfig) -> Draw:
    """Everything random about the sample at global position `index`, from the seed and the position alone."""
    digest = hashlib.sha256(f"{config.seed}/{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    timestep = timestep_recipe(config.timesteps).sample(1, generator)[0]
    noise = torch.randn(sample.latents.shape, generator=generator)
    lot = torch.rand((), generator=generator).item()
    drops_text = lot < config.drop_text
    drops_references = config.drop_text <= lot < config.drop_text + config.drop_references
    edge = config.drop_text + config.drop_references
    drops_both = edge <= lot < edge + config.drop_both
    return Draw(timestep, noise, not (drops_text or drops_both), not (drops_references or drops_both))


class Trainer:
    """Trains a backbone and its projectors.

    Args:
        config: every setting.
        backbone: the DiT with references attached, on the training device.
        projectors: one per aligned block, or None for training without alignment.
        source: where samples come from.
        encode_text: prompts to text features.
        device: where losses are computed.
    """

    def __init__(
        self,
        config: TrainConfig,
        backbone: ReferenceBackbone,
        projectors: ReferenceProjectors | None,
        source: Source,
        encode_text: EncodeText,
        device: torch.device,
    ) -> None:
        self.config, self.backbone, self.projectors = config, backbone, projectors
        self.source, self.encode_text, self.device = source, encode_text, device
        self.recipe = timestep_recipe(config.timesteps)
        self.optimizers = build_optimizers(backbone.model, projectors, config)
        self.average = copy.deepcopy(backbone.model.state_dict()) if config.ema_decay else None
        self.step = 0

    def losses(self, samples: list[EncodedSample], draws: list[Draw]) -> StepLosses:
        """Eq. 11 for one batch: flow matching plus gated, weighted reference alignment."""
        config, alignment = self.config, self.config.alignment
        timestep = torch.stack([chance.timestep for chance in draws])  # [B]
        latents = [sample.latents.to(self.device) for sample in samples]
        noise = [chance.noise.to(self.device) for chance in draws]
        references = [
            sample.references.to(self.device) * chance.keep_references
            for sample, chance in zip(samples, draws, strict=True)
        ]
        prompts = [
            sample.prompt if chance.keep_text else "" for sample, chance in zip(samples, draws, strict=True)
        ]
        aligned = self.projectors is not None and any(sample.references.shape[1] for sample in samples)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            output = self.backbone(
                add_noise(latents, noise, timestep),
                timestep.to(self.device),
                self.encode_text(prompts),
                references,
                tap_depth=alignment.depth if aligned else 0,
                tap=alignment.tap,
            )
            students = self.projectors(output.reference_tokens) if aligned else []
        weight = self.recipe.flow_weight(timestep).to(self.device)
        targets = flow_matching_target(latents, noise)
        flow = flow_matching_loss(output.prediction, targets, sample_weight=weight)
        if not aligned:
            zero = flow.new_zeros(())
            return StepLosses(flow, flow.detach(), zero, zero)
        teacher, mask = stack_features(samples, self.device)  # [B, M, N, D], [B, M]
        kept = torch.tensor([chance.keep_references for chance in draws], device=self.device)
        alignment_loss = reference_alignment_over_blocks(
            students,
            teacher,
            mask=mask & kept[:, None],
            margin=alignment.margin,
            negative_weight=alignment.negative_weight,
            sample_weight=self.recipe.alignment_gate(timestep),
        )
        total = flow + alignment.weight * alignment_loss.total
        return StepLosses(
            total, flow.detach(), alignment_loss.positive.detach(), alignment_loss.negative.detach()
        )

    def train_step(self) -> dict[str, float]:
        """One optimizer step over `accumulation` batches; returns what to log.

        Raises:
            FloatingPointError: if a loss or the gradient is not finite; the weights are left as they were.
        """
        config = self.config
        set_learning_rates(self.optimizers, learning_rate_scale(self.step, config))
        first = self.step * config.accumulation * config.batch_size
        sums: dict[str, float] = {}
        seen: list[str] = []
        for micro in range(config.accumulation):
            start = first + micro * config.batch_size
            indices = range(start, start + config.batch_size)
            samples = self.source.samples(self.step, indices)
            draws = [draw(sample, index, config) for sample, index in zip(samples, indices, strict=True)]
            losses = self.losses(samples, draws)
            (losses.total / config.accumulation).backward()
            for name in ("total", "flow", "positive", "negative"):
                sums[name] = sums.get(name, 0.0) + getattr(losses, name).item() / config.accumulation
            seen += [sample.name for sample in samples]
            self._require_finite("loss", sums["total"], seen[-len(samples) :])
        parameters = [
            p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]
        ]
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or float("inf"))
        self._require_finite("gradient", norm.item(), seen)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self._update_average()
        self.step += 1
        return {
            "loss/total": sums["total"],
            "loss/flow": sums["flow"],
            "alignment/positive": sums["positive"],
            "alignment/negative": sums["negative"],
            "gradient_norm": norm.item(),
            "learning_rate": self.optimizers[0].param_groups[0]["lr"],
        }

    def _require_finite(self, what: str, value: float, names: list[str]) -> None:
        if not math.isfinite(value):
            listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise FloatingPointError(
                f"the {what} of step {self.step + 1} is {value} (samples {listed}): lower --learning_rate or look at "
                "these samples; the last checkpoint is untouched"
            )

    @torch.no_grad()
    def _update_average(self) -> None:
        # A short memory at first: otherwise the random start would linger for a thousand steps.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        weights = self.backbone.model.state_dict()
        torch._foreach_lerp_(list(self.average.values()), [weights[key] for key in self.average], 1 - decay)

    def averaged_state(self) -> dict[str, Tensor]:
        """The weights to generate with: the moving average if there is one."""
        return dict(self.average if self.average is not None else self.backbone.model.state_dict())

    def save(self) -> Path:
        """Write a checkpoint of the present step."""
        return save_checkpoint(
            Path(self.config.out) / "checkpoints",
            self.step,
            dit=self.backbone.model.state_dict(),
            dit_config=_plain_config(self.backbone.model),
            average=self.average,
            projectors=None if self.projectors is None else self.projectors.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            settings=self.config.to_dict(),
            keep_last=self.config.keep_last,
        )

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; says which settings differ from the run that wrote it.

        Raises:
            ValueError: if it does not fit this model or its optimizers.
        """
        state = read_checkpoint(path)
        then, now = _flatten(state["settings"]), _flatten(self.config.to_dict())
        for name in sorted(name for name in now if name in then and str(then[name]) != str(now[name])):
            logger.warning("resuming with %s = %s (the checkpoint has %s)", name, now[name], then[name])
        try:
            self.backbone.model.load_state_dict(state["dit"])
            if self.projectors is not None:
                self.projectors.load_state_dict(state["projectors"] or {})
            if len(state["optimizers"]) != len(self.optimizers):
                raise ValueError(
                    f"it has {len(state['optimizers'])} optimizers, this run {len(self.optimizers)}"
                )
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                # Rates, betas and weight decay are this run's, as the warnings above say.
                options = [
                    {key: value for key, value in group.items() if key != "params"}
                    for group in optimizer.param_groups
                ]
                optimizer.load_state_dict(saved)
                for group, values in zip(optimizer.param_groups, options, strict=True):
                    group.update(values)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"checkpoint {path} does not fit this run ({reason[:200]}): use the settings it was trained with, "
                "--resume off or another --out"
            ) from error
        if self.average is not None:
            self.average = {k: v.to(self.device) for k, v in (state["average"] or state["dit"]).items()}
        self.step = state["step"]

    def run(
        self,
        *,
        log: Callable[[int, dict[str, float]], None],
        preview: Callable[[int], dict[str, float]] | None = None,
        should_stop: Callable[[], bool] | None = None,
        progress: bool = True,
    ) -> None:
        """Train to `config.steps` with a progress bar, logs, previews and checkpoints.

        Args:
            log: takes the step and its values.
            preview: makes a picture at a step and returns values to log.
            should_stop: asked after every step; True saves a checkpoint and ends the run.
        """
        from tqdm import tqdm

        config = self.config
        clips = config.batch_size * config.accumulation
        began, logged_at = time.monotonic(), self.step
        with tqdm(
            total=config.steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not progress,
            mininterval=0.5,
        ) as bar:
            while self.step < config.steps:
                values = self.train_step()
                seconds = max(time.monotonic() - began, 1e-9)
                values["clips_per_second"] = (self.step - logged_at) * clips / seconds
                bar.set_postfix_str(
                    f"loss {values['loss/total']:.3f} RA+ {values['alignment/positive']:.3f} "
                    f"RA- {values['alignment/negative']:.3f} {values['clips_per_second']:.1f} clips/s",
                    refresh=False,
                )
                bar.update()
                if self.step % config.log_every == 0 or self.step == config.steps:
                    log(self.step, values)
                    began, logged_at = time.monotonic(), self.step
                stopping = should_stop is not None and should_stop()
                if self.step % config.save_every == 0 or self.step == config.steps or stopping:
                    self.save()
                if stopping:
                    break
                if preview is not None and config.preview_every and self.step % config.preview_every == 0:
                    log(self.step, preview(self.step))
                    began, logged_at = time.monotonic(), self.step


def _plain_config(model: nn.Module) -> dict:
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    return {"_class_name": type(model).__name__, **config}


def _flatten(settings: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
