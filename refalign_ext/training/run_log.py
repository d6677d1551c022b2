"""The log of a training run: TensorBoard, `metrics.jsonl`, sample videos and, on request, Weights & Biases."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from refalign_ext.atomic_io import write_text
from refalign_ext.data.pixels import to_uint8
from refalign_ext.media import save_video
from refalign_ext.training.metrics import json_values
from refalign_ext.training.wandb_log import WandbRun

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
SAMPLES_FOLDER = "samples"
_GIF_SIDE = 320  # TensorBoard keeps whole pictures in its log: the moving ones are made small


class RunLog:
    """The log of one run: TensorBoard and `metrics.jsonl` always, Weights & Biases on request. A context manager.

    A resumed run first forgets what was logged beyond the step that it goes on from; a W&B run cannot forget, so steps
    done twice appear twice there, over the same `step` axis.

    Args:
        first_step: optimizer steps done before this start.
        wandb_project: its run's id is kept in `out/wandb_id.txt`, so that a resumed run goes on in the same place.
        is_main: whether this rank writes; on the others every method does nothing.

    Raises:
        ValueError: on every rank if W&B is not installed; when opened, if it wants a login.
        OSError: when opened or written to, if the disk is full or the folder is gone.
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
        self.out, self.first_step, self.is_main = out, first_step, is_main
        self._settings, self._project = settings, wandb_project
        self._writer: Any = None
        self._wandb: WandbRun | None = None

    def __enter__(self) -> RunLog:
        if not self.is_main:
            return self
        from torch.utils.tensorboard import SummaryWriter

        self.out.mkdir(parents=True, exist_ok=True)
        forget_metrics_after(self.out / METRICS_FILE, self.first_step)
        if self._project is not None:
            self._wandb = WandbRun(self.out, self._project, self._settings)
        # purge_step hides what an interrupted run logged beyond its last checkpoint
        self._writer = SummaryWriter(str(self.out / TENSORBOARD_FOLDER), purge_step=self.first_step + 1)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish(failed=kind is not None)
        self._writer = self._wandb = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers at a step."""
        if self._writer is None:
            return
        with _named_disk_errors(self.out / TENSORBOARD_FOLDER):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        path = self.out / METRICS_FILE
        with _named_disk_errors(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **json_values(values)}, allow_nan=False) + "\n")
        if self._wandb is not None:
            self._wandb.log(step, lambda _: dict(values))

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Log a picture [H, W, 3] uint8."""
        if self._writer is None:
            return
        self._writer.add_image(name, picture, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log(step, lambda wandb: {name: wandb.Image(picture)})

    def video(self, step: int, name: str, video: Tensor, fps: float) -> None:
        """Log a video [3, T, H, W] in [-1, 1]: an mp4 in `out/samples`, shown small by TensorBoard and as it is by W&B."""
        if self._writer is None:
            return
        path = self.out / SAMPLES_FOLDER / f"step-{step:08d}-{name.replace('/', '-')}.mp4"
        save_video(video, path, fps)
        frames = to_uint8(video).permute(1, 2, 3, 0).numpy()  # [T, H, W, 3]
        self._writer.file_writer.add_summary(_gif_summary(name, frames, fps), step)
        if self._wandb is not None:
            self._wandb.log(step, lambda wandb: {name: wandb.Video(str(path), format="mp4")})


def _gif_summary(name: str, frames: np.ndarray, fps: float) -> Any:
    """TensorBoard's own record of a moving picture, [T, H, W, 3] uint8."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    pictures = [Image.fromarray(frame) for frame in frames]
    for picture in pictures:
        picture.thumbnail((_GIF_SIDE, _GIF_SIDE))
    buffer, duration = io.BytesIO(), round(1000 / fps)
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    width, height = pictures[0].size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
    return Summary(value=[Summary.Value(tag=name, image=image)])


def forget_metrics_after(path: Path, step: int) -> None:
    """Drop lines beyond `step`, and lines that a crash cut short, from a `metrics.jsonl`, if there is one."""
    if not path.is_file():
        return
    kept = ""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept += line
        except (ValueError, KeyError, TypeError):  # two runs wrote at once
            pass
    with _named_disk_errors(path):
        write_text(path, kept)


@contextmanager
def _named_disk_errors(path: Path) -> Iterator[None]:
    """A full disk names no file of its own accord."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{path} cannot be written ({reason}): free some space or check the folder") from error
