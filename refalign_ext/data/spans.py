"""Which frames of a file are meant: a part of it in frames or seconds, and those that a clip takes from it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from fractions import Fraction

from refalign_ext.data.media_source import Media

_ROUNDED = Fraction(1, 1000)  # seconds by which written times are rounded


@dataclass(frozen=True)
class Part:
    """The frames of a file that may be used, in frames or in seconds, as `video.read_clip` describes it."""

    start_frame: int | None
    end_frame: int | None
    start_s: float | None
    end_s: float | None
    end_tolerance: int


def frame_range(path: Media, times: list[Fraction], part: Part) -> tuple[int, int]:
    """First frame and end (exclusive) of a part.

    Args:
        path: for errors; times: when each frame of the file is shown, in seconds, ascending.

    Raises:
        ValueError: if the file does not have these frames.
    """
    if part.start_s is not None or part.end_s is not None:
        if part.start_frame is not None or part.end_frame is not None:
            raise ValueError(f"{path}: the range is given in frames or in seconds, not both")
        return _range_of_seconds(path, times, part)
    start, end = part.start_frame or 0, len(times) if part.end_frame is None else part.end_frame
    usable = len(times) if len(times) < end <= len(times) + part.end_tolerance else end
    if not 0 <= start < usable <= len(times):
        raise ValueError(f"{path}: frames {start} to {end} are asked for, the file has {len(times)}")
    return start, usable


def _range_of_seconds(path: Media, times: list[Fraction], part: Part) -> tuple[int, int]:
    step = _usual_step(times)
    length = times[-1] - times[0] + step
    start_s = Fraction(part.start_s or 0)
    end_s = length if part.end_s is None else Fraction(part.end_s)
    start, end = (bisect_left(times, times[0] + second - _ROUNDED) for second in (start_s, end_s))
    if part.end_s is None:
        end = len(times)
    if start < 0 or start >= end or end_s > length + part.end_tolerance * step + _ROUNDED:
        raise ValueError(
            f"{path}: frames from {float(start_s):g} s to {float(end_s):g} s are asked for, the file has "
            f"{len(times)} over {float(length):.2f} s"
        )
    return start, end


def _usual_step(times: list[Fraction]) -> Fraction:
    """Seconds from one frame to the next, as most are; 0 if there is only one."""
    steps = sorted(later - earlier for earlier, later in zip(times, times[1:]))
    return steps[len(steps) // 2] if steps else Fraction(0)


def choose_frames(
    path: Media,
    times: list[Fraction],
    part: Part,
    frame_num: int,
    start_share: float,
    fps: float | None,
    stride: int,
) -> list[int]:
    """Numbers of the frames to take, in order; at a high `fps` one may come repeatedly.

    Arguments are those of `frame_range` and `video.read_clip`.

    Raises:
        ValueError: if the part is not in the file or is too short.
    """
    start, end = frame_range(path, times, part)
    inside = "" if (start, end) == (0, len(times)) else f" from {start} to {end}"
    if fps is None:
        spared = end - start - ((frame_num - 1) * stride + 1)
        if spared < 0:
            possible = "" if stride == 1 else f" are {-(-(end - start) // stride)} at stride {stride}"
            raise ValueError(f"{path}: {end - start} frames{inside}{possible}, {frame_num} are needed")
        first = start + int(start_share * spared)
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
