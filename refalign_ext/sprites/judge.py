"""An automatic judge of sprite clips, by synthesis: it compares what it sees with what the world's renderer would draw.

Nothing in it is learned, so it shares no weights with the model, the teacher or the training data. Every subject is
looked for in its own lane (captions name the lane), cut out of every frame, aligned on its centroid and averaged; shape
and size come from the best-fitting rendered mask, colours from the palette entries nearest to its pixels, the pattern and
the angle from the best-fitting rendered two-colour map. `METRICS` are the questions that are answered from that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refalign_ext.sprites.world import (
    BACKGROUNDS,
    COLORS,
    LANES,
    PALETTE,
    PATTERNS,
    SHAPES,
    SIZES,
    TRAVEL,
    Performance,
    SpriteClip,
    SpriteSubject,
    coverage_at,
    inside_second_color,
    inside_shape,
    layout_of,
    paint_background,
    rotated,
)

FOREGROUND_DISTANCE = 55.0  # RGB distance from the background at which a pixel counts as subject
COLOR_DISTANCE = 105.0  # RGB distance beyond which a pixel belongs to no palette colour
SMALLEST_SHARE = 0.12  # share of a subject's pixels that its rarer colour must reach
ANGLES = 36
# Turning by this many degrees leaves a subject unchanged (0: by any angle).
PERIODS = {
    ("circle", "halves"): 360,
    ("circle", "core"): 0,
    ("circle", "band"): 180,
    ("square", "halves"): 360,
    ("square", "core"): 90,
    ("square", "band"): 180,
    ("triangle", "halves"): 360,
    ("triangle", "core"): 120,
    ("triangle", "band"): 360,
    ("cross", "halves"): 360,
    ("cross", "core"): 90,
    ("cross", "band"): 180,
}

Answers = dict[str, list[list[bool | None]]]
"""Metric -> for each clip its answers, one for the clip (`background`) or one for each subject; None: not asked."""


@dataclass(frozen=True)
class Sighting:
    """What the judge saw in one lane. Labels are None where nothing fits; `diameter` is a frame fraction."""

    found: bool
    shape: str | None = None
    pattern: str | None = None
    colors: frozenset[str] = frozenset()
    motion: str | None = None
    size: str | None = None
    diameter: float = 0.0
    crop: Tensor | None = None  # [4, S, S]: aligned mean colour 0..255 and coverage


@dataclass(frozen=True)
class Comparison:
    """One subject as it was asked for and as it was seen.

    Attributes:
        others: colours of the clip's other subjects.
        reference: angle (radians) and scale (frame fraction) of its reference image; None if there is none.
        side: the frame's shorter side in pixels.
    """

    asked: Performance
    seen: Sighting
    others: set[frozenset[str]]
    reference: tuple[float, float] | None
    side: int

    @property
    def has_colors(self) -> bool:
        """Whether both colours are right."""
        return self.seen.colors == self.asked.subject.colors

    @property
    def has_shape(self) -> bool:
        """Whether the shape is right."""
        return self.seen.shape == self.asked.subject.shape


def _has_pattern(one: Comparison) -> bool:
    return one.has_colors and one.seen.pattern == one.asked.subject.pattern


def _is_swapped(one: Comparison) -> bool | None:
    return one.seen.colors in one.others if one.others else None


def _copied_pose(one: Comparison) -> bool | None:
    subject = one.asked.subject
    period = PERIODS[subject.shape, subject.pattern]
    if one.reference is None or not (one.has_colors and one.has_shape) or period < 180:
        return None
    seen = math.degrees(angle_of(one.seen.crop, subject, one.seen.diameter * one.side))
    gap = (seen - math.degrees(one.reference[0])) % period
    return min(gap, period - gap) < 15


def _copied_scale(one: Comparison) -> bool | None:
    wanted, seen = SIZES[one.asked.size], one.seen.diameter
    if one.reference is None or not (one.has_colors and one.has_shape):
        return None
    scale = one.reference[1]
    if abs(math.log(scale / wanted)) < 0.25:
        return None
    return abs(math.log(seen / scale)) < abs(math.log(seen / wanted))


# What is asked of every subject. A row here is a metric of tables, reports, previews and studies.
METRICS: dict[str, Callable[[Comparison], bool | None]] = {
    "found": lambda one: one.seen.found,
    "colors": lambda one: one.has_colors,
    "pattern": _has_pattern,
    "shape": lambda one: one.has_shape,
    "motion": lambda one: one.seen.motion == one.asked.motion,
    "size": lambda one: one.seen.size == one.asked.size,
    "swapped": _is_swapped,
    "copied_pose": _copied_pose,
    "copied_scale": _copied_scale,
}
METRIC_NAMES = ("background", *METRICS)


def judge_clip(
    video: np.ndarray, clip: SpriteClip, references: Sequence[tuple[float, float]] | None = None
) -> dict[str, list[bool | None]]:
    """Judge a clip against the truth it was asked to show.

    Args:
        video: [F, H, W, 3] uint8.
        clip: the truth.
        references: angle (radians) and scale (frame fraction) of each subject's reference image, to detect copying.

    Returns:
        metric -> whether the background is right (one answer), and one answer for each performance in caption order.
    """
    height, width = video.shape[1:3]
    background = background_of(video)
    covered = foreground_of(video, background)
    comparisons = []
    for index, asked in enumerate(clip.performances):
        seen = observe(
            video,
            covered,
            lane_window(asked, len(clip.performances), height, width),
            min(height, width),
        )
        others = {other.subject.colors for other in clip.performances} - {asked.subject.colors}
        reference = None if references is None else references[index]
        comparisons.append(Comparison(asked, seen, others, reference, min(height, width)))
    answers: dict[str, list[bool | None]] = {"background": [background == clip.background]}
    for name, metric in METRICS.items():
        found = map(metric, comparisons)
        answers[name] = [None if answer is None else bool(answer) for answer in found]
    return answers


def tabulate(answers: Answers) -> dict[str, dict[str, float] | None]:
    """Metric -> share, low, high (95% Wilson interval) and count of all its answers; None without any."""
    table: dict[str, dict[str, float] | None] = {}
    for name, clips in answers.items():
        known = [answer for clip in clips for answer in clip if answer is not None]
        table[name] = None
        if known:
            share, low, high = wilson(sum(known), len(known))
            table[name] = {"share": share, "low": low, "high": high, "count": len(known)}
    return table


def wilson(hits: int, total: int) -> tuple[float, float, float]:
    """Share of hits with its 95% Wilson interval."""
    z, share = 1.96, hits / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return share, center - half, center + half


def percent(row: Mapping[str, float] | None) -> str:
    """`95.0 [92-97]` for a row of a table, `-` for none."""
    if row is None:
        return "-"
    low = max(row["low"], 0.0)  # by rounding it can be less
    return f"{100 * row['share']:.1f} [{100 * low:.0f}-{100 * row['high']:.0f}]"


def background_of(video: np.ndarray) -> str | None:
    """The background that explains most pixels of `video` [F, H, W, 3] uint8, or None if none explains a quarter."""
    shares = {
        name: float((_distance_from(video, name) < FOREGROUND_DISTANCE / 2).mean()) for name in BACKGROUNDS
    }
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] >= 0.25 else None


def foreground_of(video: np.ndarray, background: str | None) -> np.ndarray:
    """Soft subject coverage [F, H, W] in 0..1 by distance from the background, specks removed."""
    if background is None:
        return np.zeros(video.shape[:3], np.float32)
    gap = _distance_from(video, background)
    soft = np.clip(gap / (2 * FOREGROUND_DISTANCE), 0, 1)
    solid = torch.from_numpy((gap > FOREGROUND_DISTANCE).astype(np.float32))[:, None]
    opened = F.max_pool2d(-F.max_pool2d(-solid, 3, 1, 1), 7, 1, 3)[:, 0].numpy()
    return soft * opened


def _distance_from(video: np.ndarray, background: str) -> np.ndarray:
    return np.linalg.norm(video.astype(np.float32) - paint_background(background, *video.shape[1:3]), axis=-1)


def lane_window(performance: Performance, count: int, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns in which a performance is to be looked for: its lane, or the whole frame."""
    layout = layout_of(performance)
    lanes = LANES.get((layout, count), ())
    if performance.lane not in lanes:
        return slice(0, height), slice(0, width)
    index = lanes.index(performance.lane)
    if layout == "rows":
        return slice(height * index // count, height * (index + 1) // count), slice(0, width)
    return slice(0, height), slice(width * index // count, width * (index + 1) // count)


def observe(video: np.ndarray, covered: np.ndarray, window: tuple[slice, slice], side: int) -> Sighting:
    """Look at one lane of `video` [F, H, W, 3] with subject coverage [F, H, W]; `side` is the frame's shorter side."""
    mask = np.zeros_like(covered)
    mask[:, window[0], window[1]] = covered[:, window[0], window[1]]
    weight = mask.sum((1, 2))
    smallest = 0.2 * math.pi * (SIZES["small"] * side / 2) ** 2
    seen = weight > smallest
    if seen.mean() < 0.7:
        return Sighting(found=False)
    ys, xs = np.mgrid[: mask.shape[1], : mask.shape[2]]
    safe = np.maximum(weight, 1e-6)
    centers = np.stack([(mask * xs).sum((1, 2)) / safe, (mask * ys).sum((1, 2)) / safe], 1)  # [F, 2] pixels
    crop = _aligned_mean(video[seen], mask[seen], centers[seen], side)
    shape, diameter = _fit_shape(crop[3], side)
    colors = _colors_of(crop)
    return Sighting(
        found=True,
        shape=shape,
        pattern=_fit_pattern(crop, diameter, colors),
        colors=frozenset(colors),
        motion=_motion_of(centers[seen], mask.shape[1:]),
        size=min(SIZES, key=lambda name: abs(math.log(SIZES[name] * side / diameter))),
        diameter=diameter / side,
        crop=crop,
    )


def _aligned_mean(video: np.ndarray, mask: np.ndarray, centers: np.ndarray, side: int) -> Tensor:
    """Every frame shifted so that its centroid is central, averaged: [4, S, S] of colour 0..255 and coverage 0..1."""
    window = _window_of(side)
    frames, height, width = mask.shape
    stacked = np.concatenate([video.astype(np.float32) * mask[..., None], mask[..., None]], -1)
    source = torch.from_numpy(stacked).permute(0, 3, 1, 2).float()  # [F, 4, H, W]
    offsets = torch.arange(window, dtype=torch.float32) - (window - 1) / 2
    center = torch.from_numpy(centers).float()
    x = ((center[:, 0, None] + offsets) * 2 + 1) / width - 1  # [F, S]
    y = ((center[:, 1, None] + offsets) * 2 + 1) / height - 1
    shape = (frames, window, window)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], -1)
    crop = F.grid_sample(source, grid, mode="bilinear", align_corners=False).mean(0)
    return torch.cat([crop[:3] / crop[3:].clamp_min(1e-3), crop[3:]])


def _window_of(side: int) -> int:
    return 2 * round(SIZES["large"] * side * 0.7)


def _pixel_grid(window: int, unit: float = 1.0) -> list[np.ndarray]:
    """x and y [S, S] of a crop's pixels around its centre."""
    return np.meshgrid(*[(np.arange(window) - (window - 1) / 2) / unit] * 2)


@lru_cache(maxsize=8)
def _shape_templates(side: int) -> tuple[list[tuple[str, float]], Tensor]:
    """Masks [T, S*S] of every shape at 24 angles and diameters around the two sizes."""
    x, y = _pixel_grid(_window_of(side))
    labels, masks = [], []
    for shape in SHAPES:
        for diameter in np.geomspace(SIZES["small"] * side * 0.7, SIZES["large"] * side * 1.25, 16):
            for angle in np.arange(24) * (2 * math.pi / 24):
                u, v = rotated(x, y, angle)
                radius = diameter / 2
                masks.append(coverage_at(inside_shape(shape, u / radius, v / radius), radius).ravel())
                labels.append((shape, float(diameter)))
    return labels, torch.from_numpy(np.stack(masks)).float()


def _fit_shape(coverage: Tensor, side: int) -> tuple[str, float]:
    labels, templates = _shape_templates(side)
    seen = coverage.flatten()
    overlap = torch.minimum(templates, seen).sum(1) / torch.maximum(templates, seen).sum(1)
    return labels[int(overlap.argmax())]


def _colors_of(crop: Tensor) -> list[str]:
    """The two palette colours that most of the subject's pixels are nearest to; fewer where they are too rare."""
    inside = crop[3] > 0.6
    if not bool(inside.any()):
        return []
    pixels = crop[:3, inside].T  # [P, 3]
    distance = torch.cdist(pixels, torch.tensor([PALETTE[name] for name in COLORS], dtype=torch.float32))
    nearest = distance.argmin(1)[distance.min(1).values < COLOR_DISTANCE]
    shares = torch.bincount(nearest, minlength=len(COLORS)).float() / len(pixels)
    order = shares.argsort(descending=True)[:2]
    return [COLORS[index] for index in order.tolist() if shares[index] >= SMALLEST_SHARE]


@lru_cache(maxsize=64)
def _pattern_templates(window: int, diameter: float) -> tuple[list[str], Tensor]:
    """Maps [T, S*S] of +1 (second colour) and -1 (first colour) for every pattern and angle, and their patterns."""
    x, y = _pixel_grid(window, diameter / 2)
    labels, maps = [], []
    for pattern in PATTERNS:
        for step in range(ANGLES):
            u, v = rotated(x, y, 2 * math.pi * step / ANGLES)
            maps.append((2 * coverage_at(inside_second_color(pattern, u, v), diameter / 2) - 1).ravel())
            labels.append(pattern)
    return labels, torch.from_numpy(np.stack(maps)).float()


def _fit_pattern(crop: Tensor, diameter: float, colors: list[str]) -> str | None:
    if len(colors) < 2:
        return None
    labels, maps = _pattern_templates(crop.shape[-1], round(diameter, 1))
    weight = crop[3].flatten() * (crop[3].flatten() > 0.5)
    # -1 where a pixel has the first colour, +1 where it has the second, in between for mixtures.
    start = torch.tensor(PALETTE[colors[0]], dtype=torch.float32)
    way = torch.tensor(PALETTE[colors[1]], dtype=torch.float32) - start
    position = ((crop[:3].flatten(1).T - start) @ way) / way.square().sum()
    seen = (2 * position - 1).clamp(-1, 1)
    # Which of the two colours is the pattern's second one is open, so both signs count.
    error = torch.minimum(((maps - seen).abs() * weight).sum(1), ((maps + seen).abs() * weight).sum(1))
    return labels[int(error.argmin())]


def angle_of(crop: Tensor, subject: SpriteSubject, diameter: float) -> float:
    """Angle in radians at which `subject`, drawn with `diameter` (pixels), looks most like `crop` [4, S, S]."""
    x, y = _pixel_grid(crop.shape[-1], diameter / 2)
    first, second = (np.float32(PALETTE[name]) for name in (subject.first, subject.second))
    seen, seen_mask = crop[:3].permute(1, 2, 0).numpy(), crop[3].numpy()
    errors = []
    for step in range(ANGLES * 2):
        u, v = rotated(x, y, math.pi * step / ANGLES)
        mask = coverage_at(inside_shape(subject.shape, u, v), diameter / 2)
        share = coverage_at(inside_second_color(subject.pattern, u, v), diameter / 2)[..., None]
        color = (1 - share) * first + share * second
        wrong_color = (np.abs(color - seen).mean(-1) * np.minimum(mask, seen_mask)).sum()
        errors.append(wrong_color + 128 * np.abs(mask - seen_mask).sum())
    return math.pi * int(np.argmin(errors)) / ANGLES


def _motion_of(centers: np.ndarray, frame: tuple[int, ...]) -> str | None:
    """The direction in which the centroid went at least half of the world's usual way, or None."""
    third = max(len(centers) // 3, 1)
    span = (len(centers) - third) / max(len(centers) - 1, 1)  # the thirds' middles lie closer than the ends
    way = (centers[-third:].mean(0) - centers[:third].mean(0)) / span / np.array([frame[1], frame[0]])
    axis = int(np.abs(way).argmax())
    if abs(way[axis]) < TRAVEL / 2:
        return None
    return (("left", "right"), ("up", "down"))[axis][int(way[axis] > 0)]
