"""Augmentation of references that come from the clip itself, so that a model cannot copy them pixel by pixel.

The paper lists rotation, scale, flip, affine with shear, blur and colour jitter, without strengths: those below are
ours. White stays white, as it is what lies behind a subject that was cut out, and nothing of the picture is lost.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageFilter

from refalign_ext.references import WHITE

FLIP = 0.5  # probability of a mirror image
ROTATION = 15.0  # degrees, either way
SHEAR = 10.0  # degrees, either way, along both axes
SCALE = (0.7, 1.0)  # of the largest size that fits; the rest is margin, in which the picture lies anywhere
BLUR = 0.3  # probability of a blur
BLUR_RADIUS = (0.002, 0.01)  # standard deviation as a share of the long side
BRIGHTNESS = 1.25  # largest exponent of the levels; the least is its inverse
CONTRAST = (0.8, 1.2)  # factor of the distance to white
SATURATION = (0.7, 1.3)  # factor of the distance to grey
HUE = 10.0  # degrees around the grey axis, either way

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # Rec. ITU-R BT.601


def augment(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A varied picture on white of an RGB one, seldom of the same size; all draws are made in a fixed order."""
    image = _jitter_colors(image, generator)
    image = _warp(image, generator)
    has_blur, share = generator.random() < BLUR, generator.uniform(*BLUR_RADIUS)
    return image.filter(ImageFilter.GaussianBlur(share * max(image.size))) if has_blur else image


def _warp(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Mirrors, shears, rotates and moves in one step, on a canvas that holds all of the picture."""
    mirror = -1.0 if generator.random() < FLIP else 1.0
    angle = math.radians(generator.uniform(-ROTATION, ROTATION))
    shear = np.tan(np.radians(generator.uniform(-SHEAR, SHEAR, 2)))
    scale, place = generator.uniform(*SCALE), generator.random(2)
    cosine, sine = math.cos(angle), math.sin(angle)
    forward = np.array([[cosine, -sine], [sine, cosine]])
    forward = forward @ np.array([[1.0, shear[0]], [shear[1], 1.0]]) @ np.diag([mirror, 1.0])
    half = np.array(image.size) / 2
    reach = np.abs(forward) @ half  # half of the warped picture's bounding box
    # A pixel of white all around: otherwise the picture's edge would be smeared over the margin.
    canvas = np.ceil(2 * reach / scale).astype(int) + 2
    centre = 1 + reach + place * (canvas - 2 - 2 * reach)
    backward = np.linalg.inv(forward)
    offset = half - backward @ centre
    matrix = (*backward[0], offset[0], *backward[1], offset[1])
    options = {"resample": Image.Resampling.BICUBIC, "fillcolor": WHITE}
    return image.transform(tuple(canvas.tolist()), Image.Transform.AFFINE, [*map(float, matrix)], **options)


def _jitter_colors(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    exponent = BRIGHTNESS ** generator.uniform(-1, 1)
    contrast, saturation = generator.uniform(*CONTRAST), generator.uniform(*SATURATION)
    turn = _grey_axis_rotation(math.radians(generator.uniform(-HUE, HUE)))
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255  # [H, W, 3]
    pixels = 1 - contrast * (1 - pixels**exponent)
    grey = (pixels @ _LUMA)[..., None]
    pixels = grey + saturation * ((pixels @ turn.T) - grey)
    return Image.fromarray(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))


def _grey_axis_rotation(angle: float) -> np.ndarray:
    """[3, 3]: turns colours around the grey axis (Rodrigues' formula), which leaves greys as they are."""
    axis = 1 / math.sqrt(3)
    cross = axis * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    turn = math.cos(angle) * np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) / 3
    return turn.astype(np.float32)
