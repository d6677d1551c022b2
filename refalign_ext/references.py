"""Reference images: from any picture file to what the VAE sees (upright, on white, at the video's size)."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageOps

from refalign_ext.request import MATTE_MODES, Role, parse_role

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 64_000_000
WHITE = (255, 255, 255)

# Only plain picture formats: Pillow would otherwise hand an EPS file to a PostScript interpreter.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "PPM", "ICO", "TGA", "JPEG2000", "AVIF")
_BROKEN_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


class PictureBytes(Protocol):
    """A picture file held in memory, such as one from an archive: its name, for errors, and its bytes."""

    @property
    def name(self) -> str: ...

    @property
    def data(self) -> bytes: ...


def load_image(path: str | os.PathLike[str] | PictureBytes) -> Image.Image:
    """Reads a picture file as an upright 8-bit RGB image.

    EXIF orientation is applied, transparency lies on white, grey, CMYK, palette and 16-bit pictures become RGB, of
    an animation the first frame counts. At most `MAX_PIXELS` pixels are decoded; the size is read before that.

    Raises:
        ValueError: naming the file, when it is missing, unreadable, empty, not a picture, broken or too large.
    """
    is_path = isinstance(path, (str, os.PathLike))
    name = f"reference image {path if is_path else path.name}"
    try:
        with open(path, "rb") if is_path else io.BytesIO(path.data) as file:
            return _decode(file, name)
    except OSError as error:
        raise ValueError(
            f"{name} cannot be read ({error.strerror}): check the path and permissions"
        ) from None


def _decode(file: BinaryIO, name: str) -> Image.Image:
    limit = f"{MAX_PIXELS // 1_000_000} megapixels, the limit for references: shrink it first"
    if not file.read(1):
        raise ValueError(f"{name} is empty (0 bytes): save or download it again")
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.init()
            image = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has more than {limit}") from None
    except _BROKEN_IMAGE_ERRORS:
        raise ValueError(
            f"{name} is not a picture that can be read: use PNG, JPEG, WebP, BMP, GIF or TIFF"
        ) from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{name} ({image.width}x{image.height}) has more than {limit}")
    try:
        return to_rgb(image)
    except _BROKEN_IMAGE_ERRORS as error:
        raise ValueError(f"{name} is damaged ({error}): save or download it again") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Gives an upright 8-bit RGB copy of a picture in any of Pillow's modes, transparency laid on white."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        upright = _to_eight_bits(upright)
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        white = Image.new("RGBA", layer.size, (*WHITE, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return upright.convert("RGB")


def letterbox(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scales a picture, up or down, to fit into `size` (width, height) and centres it on white.

    One side fits exactly, the other is rounded down, and the filter is Lanczos: pixels are those of the official
    release's `short_resize_and_crop_pil`.
    """
    width, height = size
    if image.width * height > image.height * width:
        fitted = (width, max(1, width * image.height // image.width))
    else:
        fitted = (max(1, height * image.width // image.height), height)
    canvas = Image.new("RGB", size, WHITE)
    resized = image if fitted == image.size else image.resize(fitted, Image.Resampling.LANCZOS)
    canvas.paste(resized, ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    return canvas


def prepare_reference(
    path_or_image: str | os.PathLike[str] | Image.Image,
    size: tuple[int, int],
    *,
    role: Role | str = Role.SUBJECT,
    matte: str = "off",
) -> Image.Image:
    """Makes the picture that the VAE encodes: upright RGB, letterboxed on white at the video's size.

    Args:
        path_or_image: a picture file or a Pillow image.
        size: the video's (width, height) in pixels.
        role: "subject", "face" or "background".
        matte: "auto" replaces what lies behind a subject or face by white (needs the package `rembg`); "off"
            keeps the picture. A background reference is never cut out.

    Raises:
        ValueError: for an unknown role or matte, a picture that `load_image` refuses, or `matte="auto"` without the
            package.
    """
    role = parse_role(role)
    if matte not in MATTE_MODES:
        raise ValueError(f"unknown matte {matte!r}: choose one of {', '.join(MATTE_MODES)}")
    image = to_rgb(path_or_image) if isinstance(path_or_image, Image.Image) else load_image(path_or_image)
    if matte == "auto" and role is not Role.BACKGROUND:
        image = remove_background(image)
    return letterbox(image, size)


def reference_to_tensor(image: Image.Image) -> torch.Tensor:
    """Turns an RGB image into a float32 tensor [3, H, W] in [-1, 1]."""
    import torch

    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # [H, W, 3]
    return pixels.permute(2, 0, 1).to(torch.float32).div(127.5).sub(1.0)


def remove_background(image: Image.Image) -> Image.Image:
    """Replaces what lies behind the subject by white, with rembg's default network; ValueError if it cannot be had."""
    try:
        import rembg
    except ImportError:
        raise ValueError(
            '--matte auto needs the package rembg: run pip install "rembg[cpu]", or use --matte off'
        ) from None
    try:
        cut_out = rembg.remove(image)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"background removal failed ({error}): use --matte off or cut the subject out yourself"
        ) from error
    return to_rgb(cut_out)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Maps 16-bit, 32-bit integer and float grey pictures to 8 bits; Pillow's own conversion only clips them."""
    values = np.asarray(image).astype(np.float64)
    largest = float(values.max(initial=0.0))
    if image.mode == "F" and largest <= 1.0:
        full_scale = 1.0
    elif largest <= 255.0 and not image.mode.startswith("I;16"):
        full_scale = 255.0
    else:
        full_scale = max(65535.0, largest)
    levels = np.clip(np.nan_to_num(values) / full_scale, 0.0, 1.0) * 255.0
    return Image.fromarray(levels.round().astype(np.uint8))
