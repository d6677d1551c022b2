"""Frames of clips: any of them without those before its key frame, upright, in true colours, at a set rate.

Frames are counted from 0 in the order in which they are shown, seconds from the first one. Pixels are taken as square;
nothing is tone-mapped, and what would need it is refused.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refalign_ext.data.boxes import lies_in_frame
from refalign_ext.data.media_source import Media
from refalign_ext.data.schema import VideoSpan
from refalign_ext.data.spans import choose_frames, frame_range
from refalign_ext.data.video_file import (
    Packet,
    frame_times,
    is_transposed,
    list_packets,
    open_video,
    orientation,
    packets_from,
    refuse_hdr,
)

if TYPE_CHECKING:
    import av

# Frames to leave out: below this, decoding on costs less than starting anew at a key frame.
_WORTH_SEEKING = 8
WHOLE_FILE = VideoSpan("")
_LIMITED_RANGE = 1  # FFmpeg's number for black at 16 and white at 235


def read_clip(
    path: Media,
    frame_num: int,
    size: tuple[int, int],
    start_share: float = 0.0,
    *,
    fps: float | None = None,
    stride: int | None = None,
    span: VideoSpan = WHOLE_FILE,
) -> Tensor:
    """`frame_num` frames, upright, scaled and centre-cropped to `size` (width, height): [3, T, H, W] in [-1, 1].

    Only these frames, and those back to the key frame before them, are decoded.

    Args:
        start_share: where to start, 0 to 1, as a share of the frames that are not needed.
        fps: frames per second to take, each the one shown nearest to its time; None takes frames of the file.
        stride: take every stride-th frame of the file, instead of `fps`; None is 1.
        span: the frames that may be taken, and the crop to use of each.
    """
    assert frame_num > 0 and min(size) > 0 and 0 <= start_share <= 1
    assert fps is None or (fps > 0 and stride is None)

    def choose(times: list[Fraction]) -> list[int]:
        return choose_frames(path, times, span, frame_num, start_share, fps, stride or 1)

    return torch.stack(_read(path, choose, _Finish(path, size, span.crop_xyxy)), 1)  # [3, T, H, W]


def read_frame(
    path: Media,
    *,
    frame: int | None = None,
    frame_share: float | None = None,
    span: VideoSpan = WHOLE_FILE,
) -> np.ndarray:
    """One whole frame, upright, at its own size: [H, W, 3] uint8, RGB.

    Args:
        frame: its number in the file, or frame_share: its place in [0, 1) among the frames of the span.
        span: the frames that may be taken; its crop is not applied.
    """
    assert (frame is None) != (frame_share is None)

    def choose(times: list[Fraction]) -> list[int]:
        start, end = frame_range(path, times, span)
        number = frame if frame is not None else start + int((end - start) * frame_share)
        if not start <= number < end:
            inside = "" if (start, end) == (0, len(times)) else f" that are used ({start} to {end})"
            raise ValueError(f"{path}: frame {number} is not one of the {end - start} frames{inside}")
        return [number]

    return _read(path, choose, _Finish(path, None, None))[0].numpy()


def _read(path: Media, choose: Callable[[list[Fraction]], list[int]], finish: _Finish) -> list[Tensor]:
    """The frames whose numbers `choose` picks, given all times in seconds."""
    with open_video(path) as (container, stream):
        packets = list_packets(container, stream)
        times = frame_times(packets)
        if times is not None:
            chosen = choose([time * stream.time_base for time in times])
            shown = _decode_from(container, stream, packets, [times[index] for index in chosen], finish)
            if shown is not None:
                return shown
    return _decode_counting(path, choose, finish)


def _decode_from(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    packets: list[Packet],
    times: list[int],
    finish: _Finish,
) -> list[Tensor] | None:
    """The frames shown at `times` (ascending ticks), or None if the file does not decode to exactly these."""
    import av

    places = {packet.pts: place for place, packet in enumerate(packets)}
    keys = sorted(
        (packet.pts, place)
        for place, packet in enumerate(packets)
        if packet.is_key and packet.pts is not None
    )
    runs: list[tuple[int, list[int]]] = []  # (place of the key frame to start from, times)
    for time in sorted(set(times)):
        number = bisect_right(keys, (time, len(packets))) - 1
        if number < 0:
            return None
        key = keys[number][1]
        if not runs or key - places[runs[-1][1][-1]] > _WORTH_SEEKING:
            runs.append((key, []))
        runs[-1][1].append(time)
    frames: dict[int, Tensor] = {}
    try:
        for key, wanted in runs:
            source = packets_from(container, stream, packets, places, key)
            if source is not None:
                frames |= _decode_run(source, wanted, finish)
    except av.error.FFmpegError:  # a stream without an index, or a damaged packet
        return None
    return [frames[time] for time in times] if frames.keys() >= set(times) else None


def _decode_run(source: Iterator[av.Packet], times: list[int], finish: _Finish) -> dict[int, Tensor]:
    """The frames at `times` (ascending), up to one that does not come out."""
    frames: dict[int, Tensor] = {}
    for frame in chain.from_iterable(packet.decode() for packet in source):
        time = times[len(frames)]
        if frame.pts is None or frame.pts > time:
            break
        if frame.pts == time:
            frames[time] = finish(frame)
        if len(frames) == len(times):
            break
    return frames


def _decode_counting(
    path: Media, choose: Callable[[list[Fraction]], list[int]], finish: _Finish
) -> list[Tensor]:
    """The same for files with missing or untrue times: count all frames first, then decode up to the last one."""
    with open_video(path) as (container, stream):
        tick, rate = stream.time_base, stream.average_rate or stream.guessed_rate or Fraction(1)
        shown = [frame.pts for frame in container.decode(stream)]
    if not shown:
        raise ValueError(f"{path}: cannot be decoded (no frames in its video)")
    is_timed = None not in shown and sorted(set(shown)) == shown
    times = [time * tick for time in shown] if is_timed else [n / Fraction(rate) for n in range(len(shown))]
    chosen = choose(times)
    wanted, frames = set(chosen), {}
    with open_video(path) as (container, stream):
        for index, frame in enumerate(islice(container.decode(stream), chosen[-1] + 1)):
            if index in wanted:
                frames[index] = finish(frame)
    return [frames[index] for index in chosen]


class _Finish:
    """Turns decoded frames into tensors: colours, rotation, crop, size; without a size into [H, W, 3] uint8."""

    def __init__(self, path: Media, size: tuple[int, int] | None, crop_xyxy: Sequence[int] | None) -> None:
        from av.video.reformatter import VideoReformatter

        self.path, self.size, self.crop = path, size, crop_xyxy
        self.reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> Tensor:
        if frame.is_corrupt:
            raise ValueError(f"{self.path}: the frame at {frame.time} s is damaged")
        refuse_hdr(self.path, frame)
        pixels = _upright(frame, _rgb(frame, self.reformatter))
        if self.crop is not None:
            (left, top, right, bottom), (height, width) = self.crop, pixels.shape[:2]
            if not lies_in_frame(self.crop, (width, height)):
                raise ValueError(
                    f"{self.path}: crop {list(self.crop)} does not lie in the frame of {width}x{height} pixels"
                )
            pixels = pixels[top:bottom, left:right]
        pixels = np.ascontiguousarray(pixels)
        return torch.from_numpy(pixels) if self.size is None else resize_and_crop(pixels, self.size)


def _rgb(frame: av.VideoFrame, reformatter: av.video.reformatter.VideoReformatter) -> np.ndarray:
    """[H, W, 3] uint8 from 0 (black) to 255 (white). Matrix and range are the frame's; unknown: BT.601, limited."""
    # swscale turns white of deep formats into 253 on the way to rgb24, but not on the slower one to planes.
    is_deep = any(component.bits > 8 for component in frame.format.components)
    pixels = reformatter.reformat(frame, format="gbrp" if is_deep else "rgb24", threads=1).to_ndarray()
    if frame.format.name.startswith("gray") and frame.color_range == _LIMITED_RANGE:
        # swscale takes every grey as full range, whatever the file says.
        pixels = np.rint((pixels.astype(np.float32) - 16) * (255 / 219)).clip(0, 255).astype(np.uint8)
    return pixels


def _upright(frame: av.VideoFrame, pixels: np.ndarray) -> np.ndarray:
    """[H, W, 3] stored -> as it is shown: quarter turns and mirrorings, angles between them rounded."""
    a, b, c, d = orientation(frame)
    if is_transposed(frame):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    if a < 0:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if d < 0 else pixels


def resize_and_crop(frame: np.ndarray, size: tuple[int, int]) -> Tensor:
    """[H, W, 3] uint8 -> [3, height, width] in [-1, 1], the aspect ratio kept, what protrudes cut off."""
    width, height = size
    # Bytes scale four times faster than floats.
    image = torch.from_numpy(frame).permute(2, 0, 1)[None]  # [1, 3, H, W]
    scale = max(height / image.shape[2], width / image.shape[3])
    scaled = (max(height, round(image.shape[2] * scale)), max(width, round(image.shape[3] * scale)))
    if image.shape[2:] != scaled:
        image = F.interpolate(image, size=scaled, mode="bilinear", antialias=True, align_corners=False)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return image[0, :, top : top + height, left : left + width].float().div_(127.5).sub_(1)
