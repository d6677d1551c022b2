"""An automatic judge of sprite clips, by synthesis: it compares what it sees with what the world's renderer would draw.

Nothing in it is learned, so it shares no weights with the model, the teacher or the training data. Every subject is
looked for in its own lane (captions name the lane), cut out of every frame, aligned on its centroid and averaged; shape
and size come from the best-fitting rendered mask, colours from the palette entries nearest to its pixels, the pattern and
the angle from the best-fitting rendered two-colour map.
"""

from __future__ import annotations

import math
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
    MOTIONS,
    PALETTE,
    PATTERNS,
    SHAPES,
    SIZES,
    TRAVEL,
    Clip,
    Performance,
    Subject,
    inside_second_color,
    inside_shape,
    paint_background,
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
class Verdict:
    """One expected subject against what was seen; True, False, or None where the question does not arise."""

    found: bool
    colors: bool
    pattern: bool
    shape: bool
    motion: bool
    size: bool
    swapped: bool | None
    copied_pose: bool | None
    copied_scale: bool | None


def background_of(video: np.ndarray) -> str | None:
    """The background that explains most pixels of `video` [F, H, W, 3] uint8, or None if none explains a quarter."""
    pixels = video.astype(np.float32)
    shares = {}
    for name in BACKGROUNDS:
        gap = np.linalg.norm(pixels - paint_background(name, *video.shape[1:3]), axis=-1)
        shares[name] = float((gap < FOREGROUND_DISTANCE / 2).mean())
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] >= 0.25 else None


def foreground_of(video: np.ndarray, background: str | None) -> np.ndarray:
    """Soft subject coverage [F, H, W] in 0..1 by distance from the background, specks removed."""
    if background is None:
        return np.zeros(video.shape[:3], np.float32)
    gap = np.linalg.norm(video.astype(np.float32) - paint_background(background, *video.shape[1:3]), axis=-1)
    soft = np.clip(gap / (2 * FOREGROUND_DISTANCE), 0, 1)
    solid = torch.from_numpy((gap > FOREGROUND_DISTANCE).astype(np.float32))[:, None]
    opened = F.max_pool2d(-F.max_pool2d(-solid, 3, 1, 1), 7, 1, 3)[:, 0].numpy()
    return soft * opened


def lane_window(performance: Performance, count: int, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns in which a performance is to be looked for: its lane, or the whole frame."""
    for (layout, lanes), names in LANES.items():
        if lanes == count and performance.lane in names and _layout_of(performance) == layout:
            index = names.index(performance.lane)
            if layout == "rows":
                return slice(height * index // lanes, height * (index + 1) // lanes), slice(0, width)
            return slice(0, height), slice(width * index // lanes, width * (index + 1) // lanes)
    return slice(0, height), slice(0, width)


def _layout_of(performance: Performance) -> str:
    return "rows" if performance.motion in ("left", "right") else "columns"


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
    centers = np.stack(
        [(mask * xs).sum((1, 2)) / safe, (mask * ys).sum((1, 2)) / safe], 1
    )  # [F, 2] pixel indices
    crop = _aligned_mean(video[seen], mask[seen], centers[seen], side)
    shape, diameter = _fit_shape(crop[3], side)
    return Sighting(
        found=True,
        shape=shape,
        pattern=_fit_pattern(crop, diameter, _colors_of(crop)),
        colors=frozenset(_colors_of(crop)),
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
    grid = torch.stack(
        [x[:, None, :].expand(frames, window, window), y[:, :, None].expand(frames, window, window)], -1
    )
    crop = F.grid_sample(source, grid, mode="bilinear", align_corners=False).mean(0)
    return torch.cat([crop[:3] / crop[3:].clamp_min(1e-3), crop[3:]])


def _window_of(side: int) -> int:
    return 2 * round(SIZES["large"] * side * 0.7)


@lru_cache(maxsize=8)
def _shape_templates(side: int) -> tuple[list[tuple[str, float]], Tensor]:
    """Masks [T, S*S] of every shape at 24 angles and diameters around the two sizes."""
    window = _window_of(side)
    axis = np.arange(window) - (window - 1) / 2
    x, y = np.meshgrid(axis, axis)
    labels, masks = [], []
    for shape in SHAPES:
        for diameter in np.geomspace(SIZES["small"] * side * 0.7, SIZES["large"] * side * 1.25, 16):
            for angle in np.arange(24) * (2 * math.pi / 24):
                u, v = math.cos(angle) * x + math.sin(angle) * y, -math.sin(angle) * x + math.cos(angle) * y
                radius = diameter / 2
                masks.append(
                    np.clip(0.5 - inside_shape(shape, u / radius, v / radius) * radius, 0, 1).ravel()
                )
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
def _pattern_templates(window: int, diameter: float) -> tuple[list[tuple[str, float]], Tensor]:
    """Maps [T, S*S] of +1 (second colour) and -1 (first colour) for every pattern and angle."""
    axis = (np.arange(window) - (window - 1) / 2) / (diameter / 2)
    x, y = np.meshgrid(axis, axis)
    labels, maps = [], []
    for pattern in PATTERNS:
        for step in range(ANGLES):
            angle = 2 * math.pi * step / ANGLES
            u, v = math.cos(angle) * x + math.sin(angle) * y, -math.sin(angle) * x + math.cos(angle) * y
            second = np.clip(0.5 - inside_second_color(pattern, u, v) * diameter / 2, 0, 1)
            maps.append((2 * second - 1).ravel())
            labels.append((pattern, angle))
    return labels, torch.from_numpy(np.stack(maps)).float()


def _two_color_map(crop: Tensor, first: str, second: str) -> Tensor:
    """-1 where a pixel has the first colour, +1 where it has the second, in between for mixtures; [S*S]."""
    start = torch.tensor(PALETTE[first], dtype=torch.float32)
    way = torch.tensor(PALETTE[second], dtype=torch.float32) - start
    position = ((crop[:3].flatten(1).T - start) @ way) / way.square().sum()
    return (2 * position - 1).clamp(-1, 1)


def _fit_pattern(crop: Tensor, diameter: float, colors: list[str]) -> str | None:
    if len(colors) < 2:
        return None
    labels, maps = _pattern_templates(crop.shape[-1], round(diameter, 1))
    weight = crop[3].flatten() * (crop[3].flatten() > 0.5)
    seen = _two_color_map(crop, colors[0], colors[1])
    # Which of the two colours is the pattern's second one is open, so both signs count.
    error = torch.minimum(((maps - seen).abs() * weight).sum(1), ((maps + seen).abs() * weight).sum(1))
    return labels[int(error.argmin())][0]


def angle_of(crop: Tensor, subject: Subject, diameter: float) -> float:
    """Angle in radians at which `subject`, drawn with `diameter` (pixels), looks most like `crop` [4, S, S]."""
    window = crop.shape[-1]
    axis = (np.arange(window) - (window - 1) / 2) / (diameter / 2)
    x, y = np.meshgrid(axis, axis)
    first, second = (np.float32(PALETTE[name]) for name in (subject.first, subject.second))
    seen, seen_mask = crop[:3].permute(1, 2, 0).numpy(), crop[3].numpy()
    errors = []
    for step in range(ANGLES * 2):
        angle = math.pi * step / ANGLES
        u, v = math.cos(angle) * x + math.sin(angle) * y, -math.sin(angle) * x + math.cos(angle) * y
        mask = np.clip(0.5 - inside_shape(subject.shape, u, v) * diameter / 2, 0, 1)
        share = np.clip(0.5 - inside_second_color(subject.pattern, u, v) * diameter / 2, 0, 1)[..., None]
        color = (1 - share) * first + share * second
        both = np.minimum(mask, seen_mask)
        wrong_color = (np.abs(color - seen).mean(-1) * both).sum()
        errors.append(wrong_color + 128 * np.abs(mask - seen_mask).sum())
    return math.pi * int(np.argmin(errors)) / ANGLES


def _motion_of(centers: np.ndarray, frame: tuple[int, ...]) -> str | None:
    """The direction in which the centroid went at least half of the world's usual way, or None."""
    third = max(len(centers) // 3, 1)
    span = (len(centers) - third) / max(len(centers) - 1, 1)  # the thirds' middles lie closer than the ends
    way = (centers[-third:].mean(0) - centers[:third].mean(0)) / span / np.array([frame[1], frame[0]])
    names = {tuple(direction): name for name, direction in MOTIONS.items()}
    axis = int(np.abs(way).argmax())
    if abs(way[axis]) < TRAVEL / 2:
        return None
    direction = (int(np.sign(way[0])), 0) if axis == 0 else (0, int(np.sign(way[1])))
    return names[direction]


def judge_clip(
    video: np.ndarray, clip: Clip, references: list[tuple[float, float]] | None = None
) -> tuple[bool, list[Verdict]]:
    """Judge a clip against the truth it was asked to show.

    Args:
        video: [F, H, W, 3] uint8.
        clip: the truth.
        references: angle (radians) and scale (frame fraction) of each subject's reference image, to detect copying.

    Returns:
        whether the background is right, and one verdict for each performance in caption order.
    """
    height, width = video.shape[1:3]
    side = min(height, width)
    background = background_of(video)
    covered = foreground_of(video, background)
    sightings = [
        observe(video, covered, lane_window(performance, len(clip.performances), height, width), side)
        for performance in clip.performances
    ]
    verdicts = []
    for index, (performance, sighting) in enumerate(zip(clip.performances, sightings, strict=True)):
        subject = performance.subject
        own = sighting.colors == subject.colors
        others = {p.subject.colors for p in clip.performances} - {subject.colors}
        pose = scale = None
        if references is not None and own and sighting.shape == subject.shape:
            pose = _copied_pose(sighting, subject, references[index][0], side)
            scale = _copied_scale(sighting, performance, references[index][1])
        verdicts.append(
            Verdict(
                found=sighting.found,
                colors=own,
                pattern=own and sighting.pattern == subject.pattern,
                shape=sighting.shape == subject.shape,
                motion=sighting.motion == performance.motion,
                size=sighting.size == performance.size,
                swapped=sighting.colors in others if others else None,
                copied_pose=pose,
                copied_scale=scale,
            )
        )
    return background == clip.background, verdicts


def _copied_pose(sighting: Sighting, subject: Subject, reference_angle: float, side: int) -> bool | None:
    period = PERIODS[subject.shape, subject.pattern]
    if period < 180:
        return None
    seen = math.degrees(angle_of(sighting.crop, subject, sighting.diameter * side))
    gap = (seen - math.degrees(reference_angle)) % period
    return min(gap, period - gap) < 15


def _copied_scale(sighting: Sighting, performance: Performance, reference_scale: float) -> bool | None:
    wanted = SIZES[performance.size]
    if abs(math.log(reference_scale / wanted)) < 0.25:
        return None
    return abs(math.log(sighting.diameter / reference_scale)) < abs(math.log(sighting.diameter / wanted))


def wilson(hits: int, total: int) -> tuple[float, float, float]:
    """Share of hits with its 95% Wilson interval; three NaN for no trials."""
    if total == 0:
        return (math.nan,) * 3
    z, share = 1.96, hits / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return share, center - half, center + half


def summarize(backgrounds: list[bool], verdicts: list[list[Verdict]]) -> dict[str, dict[str, float]]:
    """Shares with intervals over clips (background) and over subjects (all else): name -> share, low, high, count."""
    answers = {"background": backgrounds}
    for name in Verdict.__dataclass_fields__:
        answers[name] = [getattr(v, name) for clip in verdicts for v in clip if getattr(v, name) is not None]
    table = {}
    for name, values in answers.items():
        share, low, high = wilson(sum(values), len(values))
        table[name] = {"share": share, "low": low, "high": high, "count": len(values)}
    return table
