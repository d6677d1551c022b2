"""Writing videos and images. Everything is written under a temporary name and renamed, and every failure raises."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_BT709 = 1  # ITU-R BT.709 in the H.264 tables for matrix, primaries and transfer


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Makes sure that a file can be written at `path` without writing anything.

    Raises:
        ValueError: when `path` is a folder, or its folder (or the nearest one that exists) takes no new file.
    """
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"cannot write {target}: it is a folder; give a file name")
    folder = target.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {target}: {folder} is not a folder; choose another place")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"cannot write {target}: folder {folder} takes no files ({reason}); choose another"
        ) from None
    return target


@contextmanager
def atomic_open(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside `path`; a clean exit renames it to `path`, an error removes it.

    The folder is created when it is missing. The temporary name keeps the suffix, which chooses the format.

    Raises:
        ValueError: when nothing can be written there.
    """
    target = check_writable(path)
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.stem[:64]}.{os.getpid()}.partial{target.suffix}")
    try:
        yield aside
        os.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def video_to_frames(video: torch.Tensor, *, magnify: int = 1) -> np.ndarray:
    """Turns a video [3, F, H, W] in [-1, 1] into uint8 frames [F, H * magnify, W * magnify, 3].

    Values outside the range are clamped. Enlarging repeats pixels, so that small videos stay sharp.

    Raises:
        ValueError: when the shape or `magnify` is wrong, or a value is not a number.
    """
    import torch

    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise ValueError(f"a video has shape [3, frames, height, width], got {list(video.shape)}")
    if magnify < 1:
        raise ValueError(f"magnify is {magnify}: give a whole number of 1 or more")
    values = video.detach().to(device="cpu", dtype=torch.float32)
    if not torch.isfinite(values).all():
        raise ValueError("the video holds values that are not numbers: sample again with --dtype fp32")
    levels = values.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    frames = levels.permute(1, 2, 3, 0)  # [F, H, W, 3]
    if magnify > 1:
        frames = frames.repeat_interleave(magnify, dim=1).repeat_interleave(magnify, dim=2)
    return frames.contiguous().numpy()


def save_video(
    video: torch.Tensor,
    path: str | os.PathLike[str],
    fps: float,
    *,
    magnify: int = 1,
    quality: int = 16,
) -> Path:
    """Writes an H.264 mp4 (yuv420p, BT.709, index at the front) that browsers and phones play.

    Args:
        video: [3, F, H, W] in [-1, 1].
        path: the file to write, ending in .mp4; its folder is created.
        fps: frames per second, above 0.
        magnify: enlarges every frame this many times by repeating pixels.
        quality: x264's constant rate factor, 0 (lossless) to 51; lower is better.

    Odd sizes, which yuv420p cannot hold, get their last column or row repeated.

    Returns:
        The path written.

    Raises:
        ValueError: when the video, the frame rate or the path is unusable.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    target = Path(path)
    if target.suffix.lower() != ".mp4":
        raise ValueError(f"cannot write {target}: a video file ends in .mp4")
    if not fps > 0:
        raise ValueError(f"the frame rate is {fps}: give a number above 0")
    frames = video_to_frames(video, magnify=magnify)
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")

    with atomic_open(target) as aside:
        with av.open(str(aside), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height = frames.shape[2], frames.shape[1]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": str(quality), "preset": "medium"}
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = ColorRange.MPEG
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
    return target


def save_image(image: torch.Tensor, path: str | os.PathLike[str], *, magnify: int = 1) -> Path:
    """Writes one picture in the format its suffix names.

    Args:
        image: [3, H, W], or a video of one frame [3, 1, H, W], in [-1, 1].
        path: the file to write (.png, .jpg, .webp, .bmp or .tif); its folder is created.
        magnify: enlarges the picture this many times by repeating pixels.

    Raises:
        ValueError: when the picture or the path is unusable.
    """
    from PIL import Image

    target = Path(path)
    if target.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"cannot write {target}: an image file ends in one of {', '.join(IMAGE_SUFFIXES)}")
    video = image if image.ndim == 4 else image.unsqueeze(1)  # [3, 1, H, W]
    if video.ndim != 4 or video.shape[1] != 1:
        raise ValueError(f"an image has shape [3, height, width], got {list(image.shape)}")
    picture = Image.fromarray(video_to_frames(video, magnify=magnify)[0])
    with atomic_open(target) as aside:
        picture.save(aside)
    return target
