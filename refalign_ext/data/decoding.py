"""Frames of clips, decoded with PyAV: any of them without those before its key frame, upright, in true colours, at a set rate.

Frames are counted from 0 in the order in which they are shown, seconds from the first one. Pixels are taken as square;
nothing is tone-mapped. A file may be one of its own or held in memory.
"""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refalign_ext.data.media_source import Media, MediaBytes
from refalign_ext.data.spans import Part, choose_frames, frame_range

if TYPE_CHECKING:
    import av

MAX_PIXELS = 2**26  # of one frame, 8192 x 8192: what claims more would only fill the memory
_WORTH_SEEKING = (
    8  # frames to leave out: below this, decoding on costs less than starting anew at a key frame
)
_LIMITED_RANGE = 1  # FFmpeg's number for black at 16 and white at 235
# FFmpeg's names of containers that hold their own frames. Others, such as playlists, may name files anywhere.
_CONTAINERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,ivf,nut,mxf,dv,m4v,h264,hevc,obu,yuv4mpegpipe"
)


@dataclass(frozen=True)
class VideoInfo:
    """What a file says about its video.

    Attributes:
        width, height: pixels of a frame as it is shown, after its rotation.
        frames: how many there are; of a file without times the number of its packets.
        fps: frames per second on average.
        duration_s: seconds from the first frame to the end of the last one.
        rotation: degrees clockwise by which stored frames are turned to be shown: 0, 90, 180 or 270.
        is_variable_rate: whether some frame is shown for 10% longer or shorter than most are.
        pixel_format: FFmpeg's name of how pixels are stored, such as yuv420p10le.
    """

    width: int
    height: int
    frames: int
    fps: float
    duration_s: float
    rotation: int
    is_variable_rate: bool
    pixel_format: str


@dataclass(frozen=True)
class Packet:
    """One stored frame; times in ticks of the stream, None where the file has none; size in bytes."""

    pts: int | None
    dts: int | None
    duration: int
    size: int
    is_key: bool
    is_shown: bool  # False: only there for others to build on (edit lists), or broken off


def probe(path: Media) -> VideoInfo:
    """Reads times from the packets; of the pictures only the first is decoded, as it alone tells the rotation.

    Raises:
        ValueError: if the file has no video that can be decoded.
    """
    with open_video(path) as (container, stream):
        packets = list_packets(container, stream)
        shown = [packet for packet in packets if packet.is_shown]
        times, tick = frame_times(packets), stream.time_base
        rate = stream.average_rate or stream.guessed_rate
        pixel_format = stream.codec_context.pix_fmt or ""
    with open_video(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None or not shown:
            raise ValueError(f"{path}: cannot be decoded (no frames in its video)")
        rotation, width, height = _degrees(frame), frame.width, frame.height
        if _is_transposed(frame):
            width, height = height, width
        pixel_format = pixel_format or frame.format.name
    if times is None or len(times) < 2 or tick is None:
        seconds = Fraction(len(shown)) / rate if rate else Fraction(0)
        fps = float(rate or 0)
        return VideoInfo(width, height, len(shown), fps, float(seconds), rotation, False, pixel_format)
    steps = sorted(later - earlier for earlier, later in zip(times, times[1:]))
    usual = steps[len(steps) // 2]
    # Containers round times to whole ticks (Matroska's are milliseconds), which alone makes steps differ by one.
    is_variable = any(abs(step - usual) > max(1, usual / 10) for step in steps)
    last = next(packet.duration for packet in packets if packet.is_shown and packet.pts == times[-1])
    return VideoInfo(
        width,
        height,
        len(times),
        float((len(times) - 1) / ((times[-1] - times[0]) * tick)),
        float((times[-1] - times[0] + (last or usual)) * tick),
        rotation,
        is_variable,
        pixel_format,
    )


def read_clip(
    path: Media,
    frame_num: int,
    size: tuple[int, int],
    start_share: float = 0.0,
    *,
    fps: float | None = None,
    stride: int | None = None,
    start_frame: int | None = None,
    end_frame: int | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    end_tolerance: int = 0,
    crop_xyxy: Sequence[int] | None = None,
) -> Tensor:
    """`frame_num` frames, upright, scaled and centre-cropped to `size` (width, height): [3, T, H, W] in [-1, 1].

    Only these frames, and those back to the key frame before them, are decoded.

    Args:
        start_share: where to start, 0 to 1, as a share of the frames that can be spared.
        fps: frames per second to take, each the one shown nearest to its time; None takes frames of the file.
        stride: take every stride-th frame of the file, instead of `fps`; None is 1.
        start_frame, end_frame: take frames from this range alone, `end_frame` excluded; None is no limit.
        start_s, end_s: the range in seconds instead: of frames shown from `start_s` on and before `end_s`.
        end_tolerance: frames by which the end may lie beyond that of the file, and is then taken as the file's.
        crop_xyxy: left, top, right and bottom of the part to use, in whole pixels of a frame as it is shown.

    Raises:
        ValueError: if the file cannot be decoded, or is too short or too small for what is asked.
    """
    _check_request(path, frame_num, size, start_share, fps, stride)
    part = Part(start_frame, end_frame, start_s, end_s, end_tolerance)

    def choose(times: list[Fraction]) -> list[int]:
        return choose_frames(path, times, part, frame_num, start_share, fps, stride or 1)

    return torch.stack(_read(path, choose, _Finish(path, size, crop_xyxy)), 1)  # [3, T, H, W]


def read_frame(
    path: Media,
    *,
    frame: int | None = None,
    frame_share: float | None = None,
    start_frame: int | None = None,
    end_frame: int | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    end_tolerance: int = 0,
) -> np.ndarray:
    """One whole frame, upright, at its own size: [H, W, 3] uint8, RGB.

    Args:
        frame: its number in the file, or frame_share: its place in [0, 1) among the frames of the range.
        start_frame, end_frame, start_s, end_s, end_tolerance: the range, as for `read_clip`.

    Raises:
        ValueError: if the file cannot be decoded, or the frame is not in the range or the range not in the file.
    """
    if (frame is None) == (frame_share is None):
        raise ValueError(f"{path}: give either frame or frame_share")
    if frame_share is not None and not 0 <= frame_share < 1:
        raise ValueError(f"{path}: frame_share is {frame_share}, it is at least 0 and below 1")
    part = Part(start_frame, end_frame, start_s, end_s, end_tolerance)

    def choose(times: list[Fraction]) -> list[int]:
        start, end = frame_range(path, times, part)
        number = frame if frame is not None else start + int((end - start) * frame_share)
        if not start <= number < end:
            inside = "" if (start, end) == (0, len(times)) else f" that are used ({start} to {end})"
            raise ValueError(f"{path}: frame {number} is not one of the {end - start} frames{inside}")
        return [number]

    return _read(path, choose, _Finish(path, None, None))[0].numpy()


def _read(path: Media, choose: Callable[[list[Fraction]], list[int]], finish: _Finish) -> list[Tensor]:
    """The frames whose numbers `choose` picks, given all times in seconds."""
    shown = None
    with open_video(path) as (container, stream):
        packets = list_packets(container, stream)
        times = frame_times(packets)  # without times there is only counting
        if times is not None:
            chosen = choose([time * stream.time_base for time in times])
            shown = _decode_from(container, stream, packets, [times[index] for index in chosen], finish)
    return _decode_counting(path, choose, finish) if shown is None else shown


def _check_request(
    path: Media,
    frame_num: int,
    size: tuple[int, int],
    start_share: float,
    fps: float | None,
    stride: int | None,
) -> None:
    if frame_num < 1 or min(size) < 1:
        raise ValueError(f"{path}: {frame_num} frames of {size[0]} x {size[1]} pixels are no clip")
    if not 0 <= start_share <= 1:
        raise ValueError(f"{path}: start_share is {start_share}, it lies between 0 and 1")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"{path}: fps is {fps}, it has to be above 0")
    if stride is not None and stride < 1:
        raise ValueError(f"{path}: stride is {stride}, it is at least 1")
    if fps is not None and stride is not None:
        raise ValueError(f"{path}: frames are taken either at fps or with a stride, not both")


@contextmanager
def open_video(path: Media) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its video stream; whatever FFmpeg says about them becomes a ValueError with the file's name."""
    import av

    try:
        file = io.BytesIO(path.data) if isinstance(path, MediaBytes) else str(path)
        options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
        # Titles in an unknown encoding are common in downloads and of no interest.
        with av.open(file, metadata_errors="replace", options=options) as container:
            # A cover picture is stored as a video stream too.
            cover = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                raise ValueError(f"{path}: cannot be decoded (it has no video)")
            context = streams[0].codec_context
            if context is None:
                raise ValueError(f"{path}: cannot be decoded (FFmpeg here has no decoder for its video)")
            if context.width * context.height > MAX_PIXELS:
                raise ValueError(
                    f"{path}: frames of {context.width} x {context.height} pixels; {MAX_PIXELS} are the most"
                )
            # Loaders run one process per core: threads inside each would only fight over these.
            context.thread_count = 1
            yield container, streams[0]
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"{path}: cannot be decoded ({error.strerror or error})") from error


def list_packets(container: av.container.InputContainer, stream: av.VideoStream) -> list[Packet]:
    """All packets in the order of the file; nothing is decoded."""
    return [
        Packet(
            packet.pts,
            packet.dts,
            packet.duration or 0,
            packet.size,
            packet.is_keyframe,
            not (packet.is_discard or packet.is_corrupt),
        )
        for packet in container.demux(stream)
        if packet.size
    ]


def frame_times(packets: list[Packet]) -> list[int] | None:
    """When each frame is shown, in order, or None if the file does not tell or two would be shown at once."""
    times = [packet.pts for packet in packets if packet.is_shown]
    if not times or None in times or len(set(times)) != len(times):
        return None
    return sorted(times)


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
            runs.append((key, [time]))
        else:
            runs[-1][1].append(time)
    frames: dict[int, Tensor] = {}
    for key, wanted in runs:
        try:
            source = packets_from(container, stream, packets, places, key)
        except av.error.FFmpegError:  # a stream without an index
            return None
        found = None if source is None else _decode_run(source, wanted, finish)
        if found is None:
            return None
        frames |= found
    return [frames[time] for time in times]


def packets_from(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    packets: list[Packet],
    places: dict[int | None, int],
    key: int,
) -> Iterator[av.Packet] | None:
    """The file's packets from the key frame at `key` on; None if no seek gets there."""
    wanted = packets[key]
    # Some formats seek by the time of showing, some by that of decoding, and some land a little too late.
    targets = [wanted.pts, wanted.dts, packets[max(key - 1, 0)].dts, packets[0].dts]
    for target in dict.fromkeys(target for target in targets if target is not None):
        container.seek(target, stream=stream, backward=True)
        source = container.demux(stream)
        for packet in source:
            if places.get(packet.pts, key + 1) > key:
                break
            if packet.pts == wanted.pts:
                return chain([packet], source)
    return None


def _decode_run(source: Iterator[av.Packet], times: list[int], finish: _Finish) -> dict[int, Tensor] | None:
    """The frames at `times` (ascending), or None if one of them does not come out."""
    frames: dict[int, Tensor] = {}
    for packet in source:
        for frame in packet.decode():
            time = times[len(frames)]
            if frame.pts is None or frame.pts > time:
                return None
            if frame.pts == time:
                frames[time] = finish(frame)
            if len(frames) == len(times):
                return frames
    return None


def _decode_counting(
    path: Media, choose: Callable[[list[Fraction]], list[int]], finish: _Finish
) -> list[Tensor]:
    """The same for files with missing or untrue times: count all frames first, then decode up to the last one."""
    with open_video(path) as (container, stream):
        tick, rate = stream.time_base, stream.average_rate or stream.guessed_rate or Fraction(1)
        shown = [frame.pts for frame in container.decode(stream)]
    if not shown:
        raise ValueError(f"{path}: cannot be decoded (no frames in its video)")
    if None not in shown and all(earlier < later for earlier, later in zip(shown, shown[1:])):
        times = [time * tick for time in shown]
    else:
        times = [index / Fraction(rate) for index in range(len(shown))]
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
        pixels = _upright(frame, _rgb(frame, self.reformatter))
        if self.crop is not None:
            left, top, right, bottom = self._checked_crop(pixels.shape[1], pixels.shape[0])
            pixels = pixels[top:bottom, left:right]
        pixels = np.ascontiguousarray(pixels)
        return torch.from_numpy(pixels) if self.size is None else _fitted(pixels, self.size)

    def _checked_crop(self, width: int, height: int) -> tuple[int, int, int, int]:
        crop = self.crop
        if len(crop) != 4 or any(not math.isfinite(edge) or edge != int(edge) for edge in crop):
            raise ValueError(f"{self.path}: crop {list(crop)} is not four whole numbers of pixels")
        left, top, right, bottom = (int(edge) for edge in crop)
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"{self.path}: crop {list(crop)} (left, top, right, bottom) does not lie in the frame of "
                f"{width} x {height} pixels"
            )
        return left, top, right, bottom


def _rgb(frame: av.VideoFrame, reformatter: av.video.reformatter.VideoReformatter) -> np.ndarray:
    """[H, W, 3] uint8 from 0 (black) to 255 (white). Matrix and range are the frame's; unknown: BT.601, limited."""
    # swscale turns white of deep formats into 253 on the way to rgb24, but not on the slower one to planes.
    is_deep = any(component.bits > 8 for component in frame.format.components)
    pixels = reformatter.reformat(frame, format="gbrp" if is_deep else "rgb24", threads=1).to_ndarray()
    if frame.format.name.startswith("gray") and frame.color_range == _LIMITED_RANGE:
        # swscale takes every grey as full range, whatever the file says.
        pixels = np.rint((pixels.astype(np.float32) - 16) * (255 / 219)).clip(0, 255).astype(np.uint8)
    return pixels


def _orientation(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the display matrix: a pixel moves from (x, y) to (a x + c y, b x + d y), y pointing down.

    Source: ISO/IEC 14496-12, 6.2.2; FFmpeg keeps it as nine 32-bit numbers by rows.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    return a, b, c, d


def _is_transposed(frame: av.VideoFrame) -> bool:
    a, b, c, d = _orientation(frame)
    return abs(b) + abs(c) > abs(a) + abs(d)


def _degrees(frame: av.VideoFrame) -> int:
    """Clockwise rotation to the nearest quarter turn."""
    a, b, _, _ = _orientation(frame)
    return round(math.degrees(math.atan2(b, a)) / 90) % 4 * 90


def _upright(frame: av.VideoFrame, pixels: np.ndarray) -> np.ndarray:
    """[H, W, 3] stored -> as it is shown: quarter turns and mirrorings, angles between them rounded."""
    a, b, c, d = _orientation(frame)
    if _is_transposed(frame):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    if a < 0:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if d < 0 else pixels


def _fitted(frame: np.ndarray, size: tuple[int, int]) -> Tensor:
    """[H, W, 3] uint8 -> [3, height, width] in [-1, 1], the aspect ratio kept, what protrudes cut off."""
    width, height = size
    image = torch.from_numpy(frame).permute(2, 0, 1)[
        None
    ]  # [1, 3, H, W]; bytes scale four times faster than floats
    scale = max(height / image.shape[2], width / image.shape[3])
    scaled = (max(height, round(image.shape[2] * scale)), max(width, round(image.shape[3] * scale)))
    if image.shape[2:] != scaled:
        image = F.interpolate(image, size=scaled, mode="bilinear", antialias=True, align_corners=False)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return image[0, :, top : top + height, left : left + width].float().div_(127.5).sub_(1)
