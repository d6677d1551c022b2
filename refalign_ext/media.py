"""Writing videos and images, whole or not at all."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from refalign_ext.atomic_io import atomic_path

if TYPE_CHECKING:
    import torch

_BT709 = 1  # ITU-R BT.709 in the H.264 tables for matrix, primaries and transfer


def video_to_frames(video: torch.Tensor, *, magnify: int = 1) -> np.ndarray:
    """Turns a video [3, F, H, W] in [-1, 1] into uint8 frames [F, H * magnify, W * magnify, 3].

    Values outside the range are clamped. Enlarging repeats pixels, so that small videos stay sharp.

    Raises:
        ValueError: when the shape is wrong, or a value is not a number.
    """
    import torch

    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise ValueError(f"a video has shape [3, frames, height, width], got {list(video.shape)}")
    values = video.detach().to(device="cpu", dtype=torch.float32)
    if not torch.isfinite(values).all():
        raise ValueError("the video holds values that are not numbers: sample again with --dtype fp32")
    levels = values.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    frames = levels.permute(1, 2, 3, 0)  # [F, H, W, 3]
    if magnify > 1:
        frames = frames.repeat_interleave(magnify, dim=1).repeat_interleave(magnify, dim=2)
    return frames.contiguous().numpy()


def save_video(video: torch.Tensor, path: str | os.PathLike[str], fps: float) -> Path:
    """Writes an H.264 mp4 file whole or not at all, see `encode_video`; its folder is created. Returns its path."""
    target = Path(path)
    if target.suffix.lower() != ".mp4":
        raise ValueError(f"cannot write {target}: a video file ends in .mp4")
    with atomic_path(target) as unfinished:
        encode_video(video, unfinished, fps)
    return target


def encode_video(video: torch.Tensor, path: Path, fps: float, *, magnify: int = 1) -> None:
    """Writes an H.264 mp4 (yuv420p, BT.709, index at the front) that browsers and phones play.

    Odd sizes, which yuv420p cannot hold, get their last column or row repeated.

    Args:
        video: [3, F, H, W] in [-1, 1].
        path: the file to write, of any name.
        fps: frames per second, above 0.
        magnify: enlarges every frame this many times by repeating pixels.

    Raises:
        ValueError: when the video or the frame rate is unusable.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    if not fps > 0:
        raise ValueError(f"the frame rate is {fps}: give a number above 0")
    frames = video_to_frames(video, magnify=magnify)
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16", "preset": "medium"}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def image_format(path: Path) -> str:
    """Pillow's name of the format that a picture's suffix stands for."""
    from PIL import Image

    Image.init()
    return Image.EXTENSION[path.suffix.lower()]
