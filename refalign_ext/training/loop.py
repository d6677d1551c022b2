"""The run around `Trainer.train_step`: progress, logs, validation, previews, checkpoints, and a clean stop."""

from __future__ import annotations

import functools
import logging

from tqdm import tqdm

from refalign_ext.layout import SampleLayout
from refalign_ext.lora import TARGETS
from refalign_ext.planning.flops import AlignmentShape, ModelShape, peak_flops, step_flops
from refalign_ext.training.data_source import Preview
from refalign_ext.training.metrics import LossSpikeDetector, Throughput, TimestepBins
from refalign_ext.training.run_log import RunLog
from refalign_ext.training.trainer import StepReport, Trainer

logger = logging.getLogger(__name__)


def train_loop(
    trainer: Trainer, log: RunLog, *, preview: Preview | None = None, progress: bool = True
) -> None:
    """Train to `config.steps`, or to the end of the step in which a rank asks to stop; the last step is saved.

    All ranks call it together; only rank 0 shows and logs.

    Raises:
        FloatingPointError: if too many steps in a row were not finite.
        OSError: if a checkpoint or log could not be written.
    """
    config = trainer.config
    meter, spikes = _Meter(trainer), LossSpikeDetector(config.spike_factor)
    with tqdm(
        total=config.steps,
        initial=trainer.step,
        desc="training",
        unit="step",
        disable=not (progress and trainer.parallel.is_main),
        mininterval=0.5,
    ) as bar:
        while trainer.step < config.steps:
            try:
                report = trainer.train_step()
            except FloatingPointError:
                trainer.finish_saving()
                raise
            meter.count(report)
            values, step = report.values, trainer.step
            ends = step == config.steps or report.stopping
            bar.set_postfix_str(
                f"loss {values['loss/total']:.3f} RA+ {values['alignment/positive']:.3f} "
                f"RA- {values['alignment/negative']:.3f}",
                refresh=False,
            )
            bar.update()
            if spikes.is_spike(values["loss/total"]):
                _warn_of_spike(trainer, report)
            if step % config.log_every == 0 or ends:
                log.log(step, {**values, **meter.values()})
            if step % config.save_every == 0 or ends:
                trainer.save()
            if report.stopping:
                break
            if trainer.validation and config.validate_every and (step % config.validate_every == 0 or ends):
                with meter.speed.paused():
                    log.log(step, trainer.validate())
            if preview and config.preview_every and step % config.preview_every == 0:
                with meter.speed.paused():
                    if pictured := preview(step):
                        log.log(step, pictured)
    trainer.finish_saving()


def _warn_of_spike(trainer: Trainer, report: StepReport) -> None:
    names = trainer.parallel.gather_objects(report.samples)
    if trainer.parallel.is_main:
        every = list(dict.fromkeys(name for rank in names for name in rank))
        listed = ", ".join(every[:16]) + (f" and {len(every) - 16} more" if len(every) > 16 else "")
        loss = report.values["loss/total"]
        logger.warning("loss spike %.4f in step %d: samples %s", loss, trainer.step, listed)


class _Meter:
    """Speed, MFU, memory and loss by timestep between log entries."""

    def __init__(self, trainer: Trainer) -> None:
        peak, world = peak_flops(trainer.device), trainer.parallel.sizes.world
        self.trainer = trainer
        self.speed = Throughput(trainer.device, peak_flops=None if peak is None else peak * world)
        config, projectors = trainer.config, trainer.trained.projectors
        shape, alignment = ModelShape.of(trainer.trained.dit), None
        if projectors is not None:
            alignment = AlignmentShape(config.alignment.depth, projectors.teacher_dim)

        @functools.cache
        def flops(layout: SampleLayout) -> int:
            return step_flops(
                shape,
                layout.video_tokens,
                layout.reference_tokens,
                references=layout.references,
                alignment=alignment,
                lora_rank=config.lora_rank,
                lora_targets=config.lora_targets or TARGETS,
            ).model

        self._flops = flops

    def count(self, report: StepReport) -> None:
        """Count a step; the other data ranks' samples are taken to be like this rank's."""
        data = self.trainer.parallel.sizes.data
        tokens = sum(layout.tokens for layout in report.layouts)
        flops = sum(map(self._flops, report.layouts))
        self.speed.step(self.trainer.clips_per_step, tokens * data, flops * data, data_wait=report.data_wait)

    def values(self) -> dict[str, float]:
        """What to log; all ranks call it together."""
        bins = self.trainer.timestep_bins
        sums = self.trainer.parallel.sum(bins.sums)
        bins.sums.zero_()
        return {**self.speed.values(), **TimestepBins.values(sums)}
