"""Which frames of a file are meant: a span of it in frames or seconds, and those that a clip takes from it.

`frame_range` is what decoding goes by, with the time of every frame; `steady_range` gives the same answer from a file's
frame rate and number of frames alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from fractions import Fraction

from refalign_ext.data.media_source import Media
from refalign_ext.data.schema import VideoSpan

_ROUNDED = Fraction(1, 1000)  # seconds by which written times are rounded
_END_TOLERANCE = 1  # frames that a data set's end of a span may lie beyond the end of the file


def frame_range(path: Media, times: list[Fraction], span: VideoSpan) -> tuple[int, int]:
    """First frame and end (exclusive) of a span.

    Seconds count from the first frame. An end that lies at most one frame beyond the end of the file is rounding and
    means the end of the file.

    Args:
        path: for errors; times: when each frame of the file is shown, in seconds, ascending.
    """
    if not _is_in_seconds(span):
        return _range_of_frames(path, len(times), span)
    step = _usual_step(times)

    def frame_at(second: Fraction) -> int:
        return bisect_left(times, times[0] + second - _ROUNDED)

    return _range_of_seconds(path, len(times), step, times[-1] - times[0] + step, frame_at, span)


def steady_range(span: VideoSpan, fps: float, frames: int | None) -> tuple[int, int]:
    """First frame and end (exclusive) of a span, as `frame_range` finds them in a file of a steady rate.

    Args:
        fps: frames per second of the file; only a span in seconds needs it.
        frames: of the file; None: unknown, and the span, which has to tell its end, lies in it.
    """
    if not _is_in_seconds(span):
        return _range_of_frames(span.path, frames, span)
    if not fps > 0:
        raise ValueError(f"{span.path}: it tells no frame rate: give the span in frames, not in seconds")
    rate = Fraction(fps)
    step = Fraction(0) if frames == 1 else 1 / rate  # nothing tells for how long a single frame stands
    length = None if frames is None else (frames - 1) / rate + step
    return _range_of_seconds(span.path, frames, step, length, lambda second: steady_frame(second, rate), span)


def steady_frame(second: Fraction | float, fps: Fraction | float) -> int:
    """Number of the first frame that is shown from a second on, at a steady rate."""
    return max(0, math.ceil((Fraction(second) - _ROUNDED) * Fraction(fps)))


def _is_in_seconds(span: VideoSpan) -> bool:
    return span.start_s is not None or span.end_s is not None


def _range_of_frames(path: Media | str, frames: int | None, span: VideoSpan) -> tuple[int, int]:
    start, end = span.start_frame or 0, frames if span.end_frame is None else span.end_frame
    frames = end if frames is None else frames
    usable = frames if frames < end <= frames + _END_TOLERANCE else end
    if not 0 <= start < usable <= frames:
        raise ValueError(f"{path}: frames {start} to {end} are asked for, the file has {frames}")
    return start, usable


def _range_of_seconds(
    path: Media | str,
    frames: int | None,
    step: Fraction,
    length: Fraction | None,
    frame_at: Callable[[Fraction], int],
    span: VideoSpan,
) -> tuple[int, int]:
    """`frame_at`: the first frame shown from a second on; `length`: of the file in seconds, None if unknown."""
    start_s = Fraction(span.start_s or 0)
    end_s = length if span.end_s is None else Fraction(span.end_s)
    start = frame_at(start_s)
    end = frames if span.end_s is None else frame_at(end_s)
    if frames is not None:
        end = min(end, frames)
    is_beyond = length is not None and end_s > length + _END_TOLERANCE * step + _ROUNDED
    if start >= end or is_beyond:
        has = "" if length is None else f", the file has {frames} over {float(length):.2f} s"
        raise ValueError(f"{path}: frames from {float(start_s):g} s to {float(end_s):g} s are asked for{has}")
    return start, end


def _usual_step(times: list[Fraction]) -> Fraction:
    """Seconds from one frame to the next, as most are; 0 if there is only one."""
    steps = sorted(later - earlier for earlier, later in zip(times, times[1:]))
    return steps[len(steps) // 2] if steps else Fraction(0)


def choose_frames(
    path: Media,
    times: list[Fraction],
    span: VideoSpan,
    frame_num: int,
    start_share: float,
    fps: float | None,
    stride: int,
) -> list[int]:
    """Numbers of the frames to take, in order; at a high `fps` one may come repeatedly.

    Arguments are those of `frame_range` and `decoding.read_clip`.
    """
    start, end = frame_range(path, times, span)
    inside = "" if (start, end) == (0, len(times)) else f" from {start} to {end}"
    if fps is None:
        left_over = end - start - ((frame_num - 1) * stride + 1)
        if left_over < 0:
            possible = "" if stride == 1 else f" are {-(-(end - start) // stride)} at stride {stride}"
            raise ValueError(f"{path}: {end - start} frames{inside}{possible}, {frame_num} are needed")
        first = start + int(start_share * left_over)
        return list(range(first, first + frame_num * stride, stride))
    times, interval = times[start:end], 1 / Fraction(fps)
    # The last frame stands for half a step after its time, as every other one does.
    reach = times[-1] + _usual_step(times) / 2
    starts = bisect_right(times, reach - (frame_num - 1) * interval)
    if not starts:
        possible = int((reach - times[0]) / interval) + 1
        raise ValueError(
            f"{path}: {end - start} frames{inside} over {float(reach - times[0]):.2f} s are {possible} at {fps:g} fps, "
            f"{frame_num} are needed"
        )
    begin = times[int(start_share * (starts - 1))]
    return [start + _nearest(times, begin + index * interval) for index in range(frame_num)]


def _nearest(times: list[Fraction], instant: Fraction) -> int:
    """Index of the time nearest to `instant`; the earlier of two that are equally near."""
    after = min(bisect_left(times, instant), len(times) - 1)
    return after - 1 if after and instant - times[after - 1] <= times[after] - instant else after
