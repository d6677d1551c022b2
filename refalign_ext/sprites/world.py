"""The sprite world: procedural clips whose truth is known, for training and judging reference-to-video on a CPU.

A subject is a shape with a two-tone pattern in two palette colours. A clip shows one to three subjects moving over a
background; its caption names shape, size, motion, lane and background but never pattern or colours, so identity can
only come from the reference images. References show the subject on white: in another pose and scale (cross pairs) or
in the pose of the clip (regular pairs), so that copying a pose is measurable.

All coordinates are fractions of the frame, so the same specification renders at any size.
"""

from __future__ import annotations

import colorsys
import hashlib
import math
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

WORLD_VERSION = 4  # part of the name of caches: raise it when other pixels come of the same seeds
SHAPES = ("circle", "square", "triangle", "cross")
PATTERNS = ("halves", "core", "band")
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "blue": (45, 80, 230),
    "yellow": (245, 215, 45),
    "magenta": (205, 60, 205),
    "cyan": (60, 210, 225),
}
COLORS = tuple(PALETTE)
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "a grey wall": ((118, 118, 122), (118, 118, 122)),
    "a night sky": ((14, 16, 44), (34, 34, 78)),
    "a sandy beach": ((226, 202, 164), (206, 180, 140)),
    "a dark forest": ((18, 46, 32), (42, 78, 50)),
}
SIZES = {"small": 16 / 48, "large": 23 / 48}  # diameter of the bounding circle / shorter side of the frame
MOTIONS: dict[str, tuple[float, float]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TRAVEL = 16 / 48  # distance covered in a clip / frame side along the motion: two pixels a frame
# Mid-clip centre along the motion, by its sign: a way begins and ends 4 pixels beside a multiple of 8, as lanes of two do,
# so that a subject looks the same to the DiT's tokens wherever it is. Caption and references decide everything in a clip:
# with free places and turns, 350,000 clips taught a small model blobs of the right colours.
ALONG = {1: 20 / 48, -1: 28 / 48}
# Clips show their subjects upright; references show them turned by 20 to 45 degrees, so that a copied pose can be told.
REFERENCE_TILT = (math.radians(20), math.radians(45))
LANES = {
    ("rows", 2): ("at the top", "at the bottom"),
    ("rows", 3): ("at the top", "in the middle", "at the bottom"),
    ("columns", 2): ("on the left", "on the right"),
    ("columns", 3): ("on the left", "in the middle", "on the right"),
}
REGULAR_SCALE = 0.7  # of a reference cut out of its clip
# Three colour pairs that training never shows, each colour once, so that every colour stays equally frequent.
HELD_OUT_PALETTES = (
    frozenset({"red", "cyan"}),
    frozenset({"green", "magenta"}),
    frozenset({"blue", "yellow"}),
)


Color = tuple[int, int, int]


@dataclass(frozen=True)
class SpriteSubject:
    """What makes a subject itself: `shape`, `pattern` and the pattern's two colours (`first`, `second`).

    `tints` replaces the palette's red, green and blue values; the names are then those of the nearest palette colours.
    """

    shape: str
    pattern: str
    first: str
    second: str
    tints: tuple[Color, Color] | None = None

    @property
    def rgb(self) -> tuple[Color, Color]:
        """The two colours as they are drawn, 0..255."""
        return self.tints or (PALETTE[self.first], PALETTE[self.second])

    @property
    def colors(self) -> frozenset[str]:
        return frozenset((self.first, self.second))


@dataclass(frozen=True)
class Performance:
    """One subject's part in a clip: `angle` in radians, `center` (x, y) at mid-clip and `size` as frame fractions."""

    subject: SpriteSubject
    size: str
    motion: str
    lane: str
    angle: float
    center: tuple[float, float]


@dataclass(frozen=True)
class SpriteClip:
    """A clip's full truth."""

    background: str
    performances: tuple[Performance, ...]
    caption: str


def all_subjects() -> list[SpriteSubject]:
    return [
        SpriteSubject(shape, pattern, first, second)
        for shape in SHAPES
        for pattern in PATTERNS
        for first, second in permutations(COLORS, 2)
    ]


def subject_split(subject: SpriteSubject) -> str:
    """`"palette"` for the three palettes never trained on, `"held_out"` for a fixed fifth of the rest, else `"train"`."""
    if subject.colors in HELD_OUT_PALETTES:
        return "palette"
    name = f"{subject.shape}/{subject.pattern}/{subject.first}/{subject.second}"
    return "held_out" if hashlib.sha256(name.encode()).digest()[0] % 5 == 0 else "train"


def subjects_of(split: str) -> list[SpriteSubject]:
    """Subjects of `"train"`, `"held_out"` or `"palette"`."""
    chosen = [subject for subject in all_subjects() if subject_split(subject) == split]
    if not chosen:
        raise ValueError(f"unknown split {split!r}: choose train, held_out or palette")
    return chosen


def nearest_color(rgb: Color) -> str:
    return min(PALETTE, key=lambda name: sum((a - b) ** 2 for a, b in zip(PALETTE[name], rgb, strict=True)))


def tinted(rng: np.random.Generator, subject: SpriteSubject) -> SpriteSubject:
    """`subject` in two free colours that are nearest to its own names.

    With six fixed colours a model learns to tell a dozen pairs apart and cannot show any other pair; free colours can
    only be copied from the reference. Held-out subjects and palettes stay unseen, since the names decide.
    """
    tints = []
    for name in (subject.first, subject.second):
        while True:
            hue, saturation, value = rng.uniform(), rng.uniform(0.6, 1.0), rng.uniform(0.65, 1.0)
            rgb = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
            if nearest_color(rgb) == name:
                tints.append(rgb)
                break
    return replace(subject, tints=tuple(tints))


def caption_of(background: str, performances: tuple[Performance, ...]) -> str:
    """The caption: shape, size, lane, motion and background; never pattern or colour."""
    parts = []
    for performance in performances:
        way = performance.motion if performance.motion in ("up", "down") else f"to the {performance.motion}"
        parts.append(f"a {performance.size} {performance.subject.shape} {performance.lane} moves {way}")
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"{text[0].upper()}{text[1:]} in front of {background}."


def layout_of(performance: Performance) -> str:
    """Whether a performance's lane is one of `rows` or of `columns`."""
    return "rows" if performance.motion in ("left", "right") else "columns"


def sample_clip(
    rng: np.random.Generator,
    subjects: list[SpriteSubject],
    count: int,
    free_colors: bool = False,
    tilted: bool = False,
) -> SpriteClip:
    """Draw a clip of `count` (1 to 3) different subjects, each in a lane of its own, named from the first lane on.

    Half of the pairs share a shape or a palette on purpose: otherwise there is nothing that could be confused.
    Subjects are `tinted` for `free_colors`; `tilted` ones are turned as references are, others stand upright.
    """
    if count not in (1, 2, 3):
        raise ValueError(f"{count} subjects asked for: the sprite world shows 1, 2 or 3")
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    cast = _draw_cast(rng, subjects, count)
    if free_colors:
        cast = [tinted(rng, subject) for subject in cast]
    layout = ("rows", "columns")[rng.integers(2)]
    lanes = LANES[layout, max(count, 2)]
    places = [int(rng.integers(2))] if count == 1 else range(count)
    performances = []
    for place, subject in zip(places, cast, strict=True):
        size = "small" if count == 3 else ("small", "large")[rng.integers(2)]
        motion = (("left", "right") if layout == "rows" else ("up", "down"))[rng.integers(2)]
        along, across = ALONG[sum(MOTIONS[motion])], (place + 0.5) / len(lanes)
        center = (along, across) if layout == "rows" else (across, along)
        angle = draw_tilt(rng) if tilted else 0.0
        performances.append(Performance(subject, size, motion, lanes[place], angle, center))
    return SpriteClip(background, tuple(performances), caption_of(background, tuple(performances)))


def _draw_cast(rng: np.random.Generator, subjects: list[SpriteSubject], count: int) -> list[SpriteSubject]:
    cast = [subjects[rng.integers(len(subjects))]]
    while len(cast) < count:
        wish = rng.integers(4)
        alike = [
            other
            for other in subjects
            if other not in cast
            and (wish != 0 or other.shape == cast[0].shape)
            and (wish != 1 or other.colors == cast[0].colors)
            and (wish < 2 or not other.colors & cast[0].colors)
        ]
        others = alike or [other for other in subjects if other not in cast]
        cast.append(others[rng.integers(len(others))])
    return cast


def inside_shape(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (about; negative inside) to `shape` in a unit bounding circle, for coordinates of any shape."""
    if shape == "circle":
        return np.hypot(x, y) - 0.9
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.7
    if shape == "triangle":
        side = math.sqrt(3) / 2
        return np.maximum(np.maximum(side * x + 0.5 * y, -side * x + 0.5 * y), -y) - 0.5
    assert shape == "cross", shape
    bar = np.maximum(np.abs(x) - 0.93, np.abs(y) - 0.36)
    return np.minimum(bar, np.maximum(np.abs(y) - 0.93, np.abs(x) - 0.36))


def inside_second_color(pattern: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) to the part of `pattern` that carries the second colour."""
    if pattern == "halves":
        return x - 0.2  # uneven, so that swapping the two colours makes another subject and not a turned one
    if pattern == "core":
        return np.hypot(x, y) - 0.5
    assert pattern == "band", pattern
    return np.abs(y) - 0.3


def rotated(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in a frame turned by `angle` (radians)."""
    return math.cos(angle) * x + math.sin(angle) * y, -math.sin(angle) * x + math.cos(angle) * y


def coverage_at(distance: np.ndarray, radius: float) -> np.ndarray:
    """Coverage 0..1 of pixels at signed distances in radii (of `radius` pixels): edges are one pixel soft."""
    return np.clip(0.5 - distance * radius, 0, 1)


def paint(
    canvas: np.ndarray, subject: SpriteSubject, center: tuple[float, float], diameter: float, angle: float
) -> np.ndarray:
    """Paint `subject` on `canvas` ([H, W, 3] float, in place) and return its coverage [H, W] in 0..1.

    `center` (x, y) and `diameter` are in pixels, `angle` in radians.
    """
    height, width, _ = canvas.shape
    radius = diameter / 2
    x = (np.arange(width, dtype=np.float32) + 0.5 - center[0]) / radius
    y = (np.arange(height, dtype=np.float32) + 0.5 - center[1]) / radius
    u, v = rotated(*np.meshgrid(x, y), angle)
    coverage = coverage_at(inside_shape(subject.shape, u, v), radius)
    second = coverage_at(inside_second_color(subject.pattern, u, v), radius)[..., None]
    first_rgb, second_rgb = subject.rgb
    color = (1 - second) * np.float32(first_rgb) + second * np.float32(second_rgb)
    canvas += coverage[..., None] * (color - canvas)
    return coverage


def paint_background(name: str, height: int, width: int) -> np.ndarray:
    """A vertical gradient [height, width, 3] float 0..255."""
    top, bottom = (np.float32(color) for color in BACKGROUNDS[name])
    ramp = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    return np.broadcast_to(top + ramp * (bottom - top), (height, width, 3)).copy()


def render_clip(clip: SpriteClip, frames: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Video [frames, height, width, 3] uint8, and coverage [frames, height, width] float 0..1 of all subjects."""
    video = np.empty((frames, height, width, 3), np.uint8)
    covered = np.zeros((frames, height, width), np.float32)
    background = paint_background(clip.background, height, width)
    for frame in range(frames):
        canvas = background.copy()
        moment = frame / max(frames - 1, 1) - 0.5
        for performance in clip.performances:
            way = MOTIONS[performance.motion]
            center = (
                width * (performance.center[0] + TRAVEL * moment * way[0]),
                height * (performance.center[1] + TRAVEL * moment * way[1]),
            )
            diameter = SIZES[performance.size] * min(height, width)
            coverage = paint(canvas, performance.subject, center, diameter, performance.angle)
            np.maximum(covered[frame], coverage, out=covered[frame])
        video[frame] = np.rint(canvas)
    return video, covered


def render_reference(
    subject: SpriteSubject,
    height: int,
    width: int,
    angle: float,
    scale: float,
    offset: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """A reference image [height, width, 3] uint8: the subject on white; `scale` and `offset` as frame fractions."""
    canvas = np.full((height, width, 3), 255, np.float32)
    side = min(height, width)
    center = (width / 2 + offset[0] * side, height / 2 + offset[1] * side)
    paint(canvas, subject, center, scale * side, angle)
    return np.rint(canvas).astype(np.uint8)


def draw_tilt(rng: np.random.Generator) -> float:
    return float(rng.choice((-1, 1)) * rng.uniform(*REFERENCE_TILT))


def render_cross_reference(
    rng: np.random.Generator, subject: SpriteSubject, height: int, width: int
) -> tuple[np.ndarray, float, float]:
    """A reference in a pose and scale of its own: image [height, width, 3] uint8, angle in radians, scale."""
    angle, scale = draw_tilt(rng), float(rng.uniform(0.45, 0.85))
    offset = tuple(float(value) for value in rng.uniform(-0.05, 0.05, 2))
    return render_reference(subject, height, width, angle, scale, offset), angle, scale


def sample_reference(
    rng: np.random.Generator, performance: Performance, height: int, width: int, pair: str = "cross"
) -> tuple[np.ndarray, float, float]:
    """A reference for a performance: image [height, width, 3] uint8, angle in radians, scale as a frame fraction.

    `pair` is `"cross"` (another angle and scale) or `"regular"` (the clip's own angle, cut out and enlarged).
    """
    if pair == "cross":
        return render_cross_reference(rng, performance.subject, height, width)
    if pair != "regular":
        raise ValueError(f"unknown pair kind {pair!r}: choose cross or regular")
    image = render_reference(performance.subject, height, width, performance.angle, REGULAR_SCALE)
    return image, performance.angle, REGULAR_SCALE
