"""What a training run says about itself: logs, loss by timestep, spikes, skipped steps, speed and memory.

Nothing here knows other ranks: values come averaged, sums are handed out to be added up.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import secrets
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refalign_ext.atomic_io import atomic_open

logger = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_id.txt"
SKIPPED_FOLDER = "skipped"
SAMPLES_FOLDER = "samples"
_GIF_SIDE = 320  # TensorBoard keeps whole pictures in its log: the moving ones are made small
_WANDB_SECONDS = 60
_NETWORK_PACKAGES = {"wandb", "requests", "urllib3", "httpx"}


class RunLog:
    """The log of one run: TensorBoard and `metrics.jsonl` always, Weights & Biases on request.

    A context manager. A resumed run first forgets what was logged beyond the step that it goes on from, in TensorBoard
    and in `metrics.jsonl`; a W&B run cannot forget, so steps done twice appear twice there, over the same `step` axis.

    Args:
        out: the run's folder; made when missing.
        first_step: optimizer steps done before this start (0, or the checkpoint's step).
        wandb_project: project for Weights & Biases, or None. The run's id is kept in `out/wandb_id.txt`, so that a
            resumed run goes on in the same place; remove the file for a new one.
        settings: the resolved configuration, shown by W&B.
        is_main: whether this rank writes; on the others every method does nothing.

    Raises:
        ValueError: if W&B is asked for and not installed, on every rank.
    """

    def __init__(
        self,
        out: Path,
        *,
        first_step: int,
        wandb_project: str | None,
        settings: dict[str, Any],
        is_main: bool,
    ) -> None:
        if wandb_project is not None and importlib.util.find_spec("wandb") is None:
            raise ValueError("Weights & Biases is not installed: pip install wandb or leave --wandb out")
        self.out, self.first_step, self.is_main = Path(out), first_step, is_main
        self._settings, self._project = settings, wandb_project
        self._writer: Any = None
        self._wandb: _WandbRun | None = None

    def __enter__(self) -> RunLog:
        """Open the logs.

        Raises:
            ValueError: if W&B wants a login.
            OSError: if the folder cannot be written.
        """
        if not self.is_main:
            return self
        from torch.utils.tensorboard import SummaryWriter

        self.out.mkdir(parents=True, exist_ok=True)
        forget_metrics_after(self.out / METRICS_FILE, self.first_step)
        if self._project is not None:
            self._wandb = _WandbRun(self.out, self._project, self._settings)
        # purge_step hides what an interrupted run logged beyond its last checkpoint
        self._writer = SummaryWriter(str(self.out / TENSORBOARD_FOLDER), purge_step=self.first_step + 1)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._wandb is not None:
            self._wandb.finish(failed=kind is not None)
            self._wandb = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers at a step.

        Raises:
            OSError: if the disk is full or the folder is gone.
        """
        if self._writer is None:
            return
        with _named_disk_errors(self.out / TENSORBOARD_FOLDER):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        path = self.out / METRICS_FILE
        with _named_disk_errors(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **_plain(dict(values))}, allow_nan=False) + "\n")
        if self._wandb is not None:
            self._wandb.log(step, lambda _: dict(values))

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Log a picture [H, W, 3] uint8."""
        if self._writer is None:
            return
        self._writer.add_image(name, picture, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log(step, lambda wandb: {name: wandb.Image(picture)})

    def video(self, step: int, name: str, frames: np.ndarray, fps: float) -> None:
        """Log frames [T, H, W, 3] uint8: an mp4 in `out/samples`, shown small by TensorBoard and as it is by W&B.

        Raises:
            ValueError: if the mp4 cannot be written.
        """
        if self._writer is None:
            return
        from refalign_ext.media import save_video

        video = torch.from_numpy(frames).permute(3, 0, 1, 2).float().div(127.5).sub(1)  # [3, T, H, W]
        path = self.out / SAMPLES_FOLDER / f"step-{step:08d}-{name.replace('/', '-')}.mp4"
        save_video(video, path, fps)
        self._writer.file_writer.add_summary(_gif_summary(name, frames, fps), step)
        if self._wandb is not None:
            self._wandb.log(step, lambda wandb: {name: wandb.Video(str(path), format="mp4")})


class _WandbRun:
    """A W&B run that may fail without the training noticing more than one warning."""

    def __init__(self, out: Path, project: str, settings: dict[str, Any]) -> None:
        import wandb

        self._module, self._run = wandb, None
        # The other ranks wait for the start, and a finished job holds its machines: neither may take the network's time.
        os.environ.setdefault("WANDB_INIT_TIMEOUT", str(_WANDB_SECONDS))
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(_WANDB_SECONDS))
        id_file = out / WANDB_ID_FILE
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else ""
        if not run_id:
            run_id = secrets.token_hex(4)
            _write_aside(id_file, run_id + "\n")
        name = out.absolute().name
        options = {"project": project, "id": run_id, "name": name, "dir": str(out), "config": settings}
        self._try(lambda: self._open(options), "did not start")

    def _open(self, options: dict[str, Any]) -> None:
        usage_error = self._module.errors.UsageError
        try:
            self._run = self._module.init(**options, resume="allow")
        except usage_error as error:
            raise ValueError(
                f"Weights & Biases does not start ({' '.join(str(error).split())[:200]}): run `wandb login`, set "
                "WANDB_MODE=offline or leave --wandb out"
            ) from error
        except Exception as error:
            if not _is_network_failure(error):
                raise
            logger.warning(
                "W&B cannot be reached (%s): logging to %s/wandb, upload it later with `wandb sync`",
                _one_line(error),
                options["dir"],
            )
            self._module.teardown()  # the attempt above still holds the run's id
            self._run = self._module.init(**options, mode="offline")
        # Values carry their step: W&B's own counter never goes back, and a resumed run must.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Callable[[Any], dict[str, Any]]) -> None:
        """Log what `values` makes of the wandb module."""
        if self._run is not None:
            self._try(lambda: self._run.log({"step": step, **values(self._module)}), "stopped")

    def finish(self, *, failed: bool) -> None:
        """Upload what is left, for a minute at most."""
        run = self._run
        if run is not None:
            self._try(lambda: run.finish(exit_code=int(failed)), "did not finish")
        self._run = None

    def _try(self, action: Callable[[], None], what: str) -> None:
        try:
            action()
        except Exception as error:
            if not _is_network_failure(error):
                raise
            self._run = None
            logger.warning(
                "W&B %s (%s): the training goes on, TensorBoard and %s have everything",
                what,
                _one_line(error),
                METRICS_FILE,
            )


def _is_network_failure(error: Exception) -> bool:
    """What W&B and the libraries below it raise of their own, which has no common base class."""
    packages = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError | EOFError | RuntimeError) or bool(packages & _NETWORK_PACKAGES)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _gif_summary(name: str, frames: np.ndarray, fps: float) -> Any:
    """TensorBoard's own record of a moving picture, [T, H, W, 3] uint8."""
    import io

    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    pictures = [Image.fromarray(frame) for frame in frames]
    for picture in pictures:
        picture.thumbnail((_GIF_SIDE, _GIF_SIDE))
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0
    )
    width, height = pictures[0].size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
    return Summary(value=[Summary.Value(tag=name, image=image)])


def forget_metrics_after(path: Path, step: int) -> None:
    """Drop lines beyond `step`, and lines cut short, from a `metrics.jsonl`; does nothing where there is none."""
    if not path.is_file():
        return

    def is_kept(line: str) -> bool:
        try:
            return line.endswith("\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):  # two runs wrote at once, or a crash cut a line short
            return False

    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    _write_aside(path, "".join(line for line in lines if is_kept(line)))


class TimestepBins:
    """Flow loss by timestep: sums of errors in equal bins of [0, 1000], gathered between two log entries.

    Args:
        bins: number of equal bins.
        device: where the sums are kept; that of the losses avoids waiting for the device.
    """

    def __init__(self, bins: int = 10, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(bins, 2, device=device)

    def add(self, timesteps: Tensor, errors: Tensor) -> None:
        """Count samples: timesteps [B] in [0, 1000] and their losses [B]."""
        bins = len(self._sums)
        index = (timesteps.detach().float() * (bins / 1000)).long().clamp(0, bins - 1)  # [B]
        errors = errors.detach().float()
        rows = torch.stack([errors, torch.ones_like(errors)], dim=1)  # [B, 2]
        self._sums.index_add_(0, index.to(self._sums.device), rows.to(self._sums.device))

    def sums(self) -> Tensor:
        """A copy of [bins, 2]: sum of the losses and number of samples; to be added up over ranks."""
        return self._sums.clone()

    def reset(self) -> None:
        """Start the next interval."""
        self._sums.zero_()

    @staticmethod
    def values(sums: Tensor) -> dict[str, float]:
        """Mean loss per bin as `loss_by_timestep/0-100`, ...; empty bins are left out."""
        width = 1000 / len(sums)
        return {
            f"loss_by_timestep/{round(index * width)}-{round((index + 1) * width)}": total / count
            for index, (total, count) in enumerate(sums.tolist())
            if count
        }


class LossSpikeDetector:
    """Tells losses that stand out from those before.

    Spikes stay out of the statistics, so one does not hide the next; but so many in a row that they are a new level
    become the statistics.

    Args:
        factor: standard deviations above the mean that make a spike; 0 turns the watch off.
        window: number of recent losses that mean and deviation are taken over.
        least: losses to see before the first verdict.
        new_level: spikes in a row that are a new level.
    """

    def __init__(self, factor: float, window: int = 200, *, least: int = 50, new_level: int = 10) -> None:
        self.factor, self.least, self.new_level = factor, min(least, window), new_level
        self._values: deque[float] = deque(maxlen=window)
        self._spikes: list[float] = []

    def is_spike(self, loss: float) -> bool:
        """Whether this loss stands out; counts it. A loss that is not finite is neither (`NonFiniteGuard` sees to those)."""
        if not self.factor or not math.isfinite(loss):
            return False
        if len(self._values) >= self.least:
            mean = statistics.fmean(self._values)
            # Of equal losses the deviation is 0, and rounding would be a spike.
            deviation = max(statistics.pstdev(self._values, mean), 1e-6 * abs(mean))
            if loss > mean + self.factor * deviation:
                self._spikes.append(loss)
                if len(self._spikes) >= self.new_level:
                    self._values.clear()
                    self._values.extend(self._spikes)
                    self._spikes.clear()
                return True
        self._spikes.clear()
        self._values.append(loss)
        return False


class NonFiniteGuard:
    """Stops a run whose steps are skipped, for losses or gradients that are not finite, too often in a row.

    Args:
        limit: skipped steps in a row that end the run; 0 counts as 1.
        out: the run's folder, for the message.
    """

    def __init__(self, limit: int, out: Path) -> None:
        self.limit, self.folder, self.count = max(1, limit), Path(out) / SKIPPED_FOLDER, 0

    def skipped(self) -> None:
        """Count a skipped step.

        Raises:
            FloatingPointError: if it is one too many.
        """
        self.count += 1
        if self.count >= self.limit:
            raise FloatingPointError(
                f"{self.count} step{'s' if self.count > 1 else ''} in a row gave a loss or gradient that is not "
                f"finite: see the samples in {self.folder}, lower --learning_rate or leave them out; the last "
                "checkpoint is untouched"
            )

    def reset(self) -> None:
        """Note that a step went through."""
        self.count = 0


def write_skipped(out: Path, step: int, report: Mapping[str, Any]) -> Path:
    """Write what is known about a skipped step to `out/skipped/step-00000012.json`; returns the file.

    Args:
        out: the run's folder.
        step: the step that was skipped, as in the logs.
        report: anything that JSON can tell, and tensors; numbers that are not finite become the strings `nan`, `inf`
            and `-inf`, so that every reader takes the file.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(out) / SKIPPED_FOLDER / f"step-{step:08d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_aside(path, json.dumps({"step": step, **_plain(dict(report))}, indent=2, allow_nan=False) + "\n")
    return path


class Throughput:
    """Speed between two log entries, and peak memory.

    Counts are whatever the caller gives; for the speed of a whole run these are sums over ranks.

    Args:
        device: whose memory to watch.
        peak_flops: floating-point operations a second that all devices together could do; None leaves MFU out.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from refalign_ext.backbone import PeakMemory

        self._memory, self._peak_flops, self._clock = PeakMemory(device), peak_flops, clock
        self._start()

    def _start(self) -> None:
        self._began, self._waited, self._paused = self._clock(), 0.0, 0.0
        self._steps, self._clips, self._tokens = 0, 0, 0
        self._flops: float | None = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside the block is waiting for data."""
        began = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block (a validation, a preview) does not count."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    def step(self, clips: int, tokens: int, flops: float | None = None) -> None:
        """Count one optimizer step over `clips` samples of `tokens` tokens in all.

        Args:
            clips: samples in the step.
            tokens: tokens of these samples, references included, padding not.
            flops: what the model has to compute for them, forward and backward, without recomputation; None if unknown.
        """
        self._steps += 1
        self._clips += clips
        self._tokens += tokens
        self._flops = None if flops is None or self._flops is None else self._flops + flops

    def values(self) -> dict[str, float]:
        """Speeds since the last call, and the peak memory so far; starts the next interval.

        `speed/data_wait` is a share of the time; `speed/mfu` a share of `peak_flops`; `memory/peak_gib` what was
        allocated on a CUDA device, elsewhere the resident set of the process.
        """
        seconds = max(self._clock() - self._began - self._paused, 1e-9)
        values: dict[str, float] = {}
        if self._steps:
            values |= {
                "speed/seconds_per_step": seconds / self._steps,
                "speed/clips_per_second": self._clips / seconds,
                "speed/tokens_per_second": self._tokens / seconds,
                "speed/data_wait": min(1.0, self._waited / seconds),
            }
            if self._peak_flops and self._flops:
                values["speed/mfu"] = self._flops / seconds / self._peak_flops
        if (peak := self._memory.bytes()) is not None:
            values["memory/peak_gib"] = peak / 2**30
        self._start()
        return values


def _plain(value: Any) -> Any:
    """`value` as JSON can tell it: tensors and arrays as lists, numbers that are not finite as strings."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int) else str(value)


def _write_aside(path: Path, text: str) -> None:
    """Write a file that is whole or not there."""
    with _named_disk_errors(path), atomic_open(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def _named_disk_errors(path: Path) -> Iterator[None]:
    """A full disk names no file of its own accord."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{path} cannot be written ({reason}): free some space or check the folder") from error
