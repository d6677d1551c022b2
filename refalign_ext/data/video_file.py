"""Video files opened with PyAV: probing, times of frames, and packets from any key frame on.

A file may be one of its own or held in memory. Frames are counted from 0 in the order in which they are shown.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from refalign_ext.data.media_source import Media, MediaBytes

if TYPE_CHECKING:
    import av

MAX_PIXELS = 2**26  # of one frame, 8192 x 8192: what claims more would only fill the memory
# FFmpeg's names of containers that hold their own frames. Others, such as playlists, may name files anywhere.
_CONTAINERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,ivf,nut,mxf,dv,m4v,h264,hevc,obu,yuv4mpegpipe"
)

_HDR = {16: "PQ", 18: "HLG"}  # FFmpeg's numbers of transfer functions


@dataclass(frozen=True)
class VideoInfo:
    """What a file says about its video."""

    width: int  # pixels of a frame as it is shown, after its rotation
    height: int
    frames: int  # of a file without times the number of its packets
    fps: float  # on average; 0 if nothing tells
    duration_s: float  # from the first frame to the end of the last one
    oddities: tuple[str, ...] = ()  # what training would show wrongly, a sentence each


class Packet(NamedTuple):
    """One stored frame; times in ticks of the stream, None where the file has none; size in bytes."""

    pts: int | None
    dts: int | None
    duration: int
    size: int
    is_key: bool
    is_shown: bool  # False: only there for others to build on (edit lists), or broken off


def probe(path: Media) -> VideoInfo:
    """Reads times from the packets; of the pictures only the first is decoded, as it alone tells the rotation."""
    with open_video(path) as (container, stream):
        packets = list_packets(container, stream)
        times, tick = frame_times(packets), stream.time_base
        rate = stream.average_rate or stream.guessed_rate
    with open_video(path) as (container, stream):
        frame = next(container.decode(stream), None)
        shown = [packet for packet in packets if packet.is_shown]
        if frame is None or not shown:
            raise ValueError(f"{path}: cannot be decoded (no frames in its video)")
        refuse_hdr(path, frame)
        oddities = tuple(_oddities(container, stream, frame))
        size = (frame.height, frame.width) if is_transposed(frame) else (frame.width, frame.height)
    if times is None or len(times) < 2 or tick is None:
        seconds = Fraction(len(shown)) / rate if rate else Fraction(0)
        return VideoInfo(*size, len(shown), float(rate or 0), float(seconds), oddities)
    steps = sorted(later - earlier for earlier, later in zip(times, times[1:]))
    last = next(packet.duration for packet in shown if packet.pts == times[-1]) or steps[len(steps) // 2]
    span = (times[-1] - times[0]) * tick
    fps = float((len(times) - 1) / span)
    return VideoInfo(*size, len(times), fps, float(span + last * tick), oddities)


def refuse_hdr(path: Media, frame: av.VideoFrame) -> None:
    """Raises ValueError for a picture of high dynamic range: without tone mapping its white would be grey."""
    name = _HDR.get(int(frame.color_trc or 0))
    if name is not None:
        raise ValueError(f"{path}: HDR video ({name}), which is not tone-mapped: convert it to BT.709 first")


def _oddities(
    container: av.container.InputContainer, stream: av.VideoStream, frame: av.VideoFrame
) -> Iterator[str]:
    ratio = stream.sample_aspect_ratio
    if ratio and ratio != 1:
        yield f"its pixels are not square ({ratio.numerator}:{ratio.denominator}) and are taken as if they were"
    if frame.interlaced_frame:
        yield "it is interlaced and is not deinterlaced"
    if (count := len(_videos(container))) > 1:
        yield f"it has {count} videos, of which the first is taken"


def _videos(container: av.container.InputContainer) -> list[av.VideoStream]:
    """A container's videos; a cover picture is stored as one too."""
    import av

    cover = av.stream.Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & cover]


@contextmanager
def open_video(path: Media) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its video stream; whatever FFmpeg says about them becomes a ValueError with the file's name."""
    import av

    try:
        file = io.BytesIO(path.data) if isinstance(path, MediaBytes) else str(path)
        options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
        # Titles in an unknown encoding are common in downloads and of no interest.
        with av.open(file, metadata_errors="replace", options=options) as container:
            streams = _videos(container)
            if not streams:
                raise ValueError(f"{path}: cannot be decoded (it has no video)")
            context = streams[0].codec_context
            if context is None:
                raise ValueError(f"{path}: cannot be decoded (FFmpeg here has no decoder for its video)")
            if context.width * context.height > MAX_PIXELS:
                raise ValueError(
                    f"{path}: frames of {context.width}x{context.height} pixels; {MAX_PIXELS} are the most"
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
            one.pts,
            one.dts,
            one.duration or 0,
            one.size,
            one.is_keyframe,
            not (one.is_discard or one.is_corrupt),
        )
        for one in container.demux(stream)
        if one.size
    ]


def frame_times(packets: list[Packet]) -> list[int] | None:
    """When each frame is shown, in order, or None if the file does not tell or two would be shown at once."""
    times = [packet.pts for packet in packets if packet.is_shown]
    if not times or None in times or len(set(times)) != len(times):
        return None
    return sorted(times)


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


def is_transposed(frame: av.VideoFrame) -> bool:
    """Whether a frame is stored with its rows as columns."""
    a, b, c, d = orientation(frame)
    return abs(b) + abs(c) > abs(a) + abs(d)


def orientation(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the display matrix: a pixel moves from (x, y) to (a x + c y, b x + d y), y pointing down.

    Source: ISO/IEC 14496-12, 6.2.2; FFmpeg keeps it as nine 32-bit numbers by rows.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    return a, b, c, d
