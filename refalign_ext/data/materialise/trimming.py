"""The part of a video file that a span needs, copied out without encoding anything anew."""

from __future__ import annotations

import io
from bisect import bisect_left
from dataclasses import replace
from fractions import Fraction
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from refalign_ext.data.decoding import read_frame
from refalign_ext.data.media_source import Media, MediaBytes
from refalign_ext.data.schema import VideoSpan
from refalign_ext.data.spans import frame_range
from refalign_ext.data.video_file import Packet, frame_times, list_packets, open_video, packets_from

if TYPE_CHECKING:
    import av

_FORMATS = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "webm",
}  # file extension -> FFmpeg's muxer
_TICK = Fraction(1, 1000)  # the coarsest clock of these formats (Matroska)


def trim(media: Media, span: VideoSpan, size: int) -> tuple[MediaBytes, VideoSpan, int] | None:
    """A file with the frames of a span, from the key frame before it on; the pictures alone, without sound.

    It is read back before it is used: the first, middle and last frame of the span have to be the same, pixel for
    pixel, and all times too.

    Args:
        media: the whole file; size: its bytes.
        span: the part of it; `path` decides the format.

    Returns:
        (the file, the span in frames of the new file, how many frames came before it), or None if the whole file
        should be used: less than half would be saved, or the copy does not decode to the same frames.

    Raises:
        ValueError: if the file cannot be decoded or has no such span.
    """
    muxer = _FORMATS.get(PurePath(span.path).suffix.lower())
    with open_video(media) as (container, stream):
        packets = list_packets(container, stream)
        times, tick = frame_times(packets), stream.time_base
        if times is None or muxer is None:
            return None
        start, end = frame_range(media, [time * tick for time in times], span)
        places = {packet.pts: place for place, packet in enumerate(packets)}
        keys = [p.pts for p in packets if p.is_key and p.is_shown and p.pts <= times[start]]
        if not keys:
            return None
        first, last = places[max(keys)], max(places[time] for time in times[start:end])
        taken = packets[first : last + 1]
        # What edit lists hide would be shown in the copy.
        is_plain = all(packet.is_shown and packet.dts is not None for packet in taken)
        if not is_plain or 2 * sum(packet.size for packet in taken) > size:
            return None
        data = _remux(container, stream, packets, first, last, muxer)
    if data is None or 2 * len(data) > size:
        return None
    copy = MediaBytes(f"{media} (cut out)", data)
    skipped = bisect_left(times, packets[first].pts)
    wanted = [(time - times[skipped]) * tick for time in times[skipped:end]]
    if not _is_same(media, copy, (start, end), skipped, wanted):
        return None
    shifted = replace(span, start_frame=start - skipped, end_frame=end - skipped, start_s=None, end_s=None)
    return copy, shifted, skipped


def _remux(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    packets: list[Packet],
    first: int,
    last: int,
    muxer: str,
) -> bytes | None:
    """The packets `first` to `last` as a file of their own; None if the format does not take them."""
    import av

    places = {packet.pts: place for place, packet in enumerate(packets)}
    base = packets[first].pts
    file = io.BytesIO()
    try:
        source = packets_from(container, stream, packets, places, first)
        if source is None:
            return None
        # Nothing that differs from one time to the next, such as random identifiers.
        with av.open(file, "w", format=muxer, options={"fflags": "+bitexact"}) as output:
            target = output.add_stream_from_template(stream)
            filled = (packet for packet in source if packet.size)
            for packet, listed in zip(filled, packets[first : last + 1]):
                if packet.pts != listed.pts:
                    return None
                if packet.pts < base:
                    continue  # builds on frames before the key frame
                # After a seek FFmpeg does not know all times of decoding; when it read from the start it did.
                packet.pts, packet.dts = listed.pts - base, listed.dts - base
                packet.stream = target
                output.mux(packet)
    except (av.error.FFmpegError, ValueError, OSError):
        return None
    return file.getvalue()


def _is_same(
    media: Media, copy: MediaBytes, span: tuple[int, int], skipped: int, wanted: list[Fraction]
) -> bool:
    """Whether the copy shows the span's frames, at the same times; `wanted` from its first frame on, in seconds."""
    try:
        with open_video(copy) as (container, stream):
            times = frame_times(list_packets(container, stream))
            tick = stream.time_base
        if times is None or len(times) < len(wanted):
            return False
        shown = [(time - times[0]) * tick for time in times[: len(wanted)]]
        if any(abs(time - other) > _TICK for time, other in zip(shown, wanted)):
            return False
        start, end = span
        return all(
            np.array_equal(read_frame(media, frame=number), read_frame(copy, frame=number - skipped))
            for number in sorted({start, (start + end) // 2, end - 1})
        )
    except ValueError:
        return False
