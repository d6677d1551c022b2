"""Pieces of a page: text that fits, pictures with captions, rows and columns of them."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

GAP = 10
INK, FAINT, ACCENT, BAD = (28, 30, 34), (110, 114, 122), (46, 98, 190), (190, 30, 30)
_PAPER, _LINE = (250, 250, 248), (214, 214, 210)

# Styles of a family that are not for running text.
_STYLES = re.compile(
    "bold|italic|oblique|mono|condensed|light|black|medium|thin|serif|math|display", re.IGNORECASE
)
logger = logging.getLogger(__name__)


def blank(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), _PAPER)


def padded(part: Image.Image, height: int) -> Image.Image:
    """A part with empty paper under it, or cut off, so that it has this height."""
    page = blank(part.width, height)
    page.paste(part, (0, 0))
    return page


def stacked(parts: Sequence[Image.Image], width: int, *, margin: int = 0, gap: int = GAP) -> Image.Image:
    """Parts one below the other."""
    page = blank(width, sum(part.height for part in parts) + gap * (len(parts) - 1) + 2 * margin)
    top = margin
    for part in parts:
        page.paste(part, (margin, top))
        top += part.height + gap
    return page


def flow(tiles: Sequence[Image.Image], width: int, *, gap: int = GAP) -> Image.Image:
    """Tiles from left to right, their lower edges in line, in as many rows as they need."""
    rows: list[list[Image.Image]] = [[]]
    for tile in tiles:
        if rows[-1] and sum(item.width + gap for item in rows[-1]) + tile.width > width:
            rows.append([])
        rows[-1].append(tile)
    bands = []
    for row in rows:
        band = blank(width, max((tile.height for tile in row), default=1))
        left = 0
        for tile in row:
            band.paste(tile, (left, band.height - tile.height))
            left += tile.width + gap
        bands.append(band)
    return stacked(bands, width, gap=gap)


def scaled(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Fitted into a box; small pictures by whole factors, so that their pixels can be seen."""
    factor = min(width / picture.width, height / picture.height)
    if factor >= 2:
        size = (picture.width * int(factor), picture.height * int(factor))
        return picture.resize(size, Image.Resampling.NEAREST)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def framed(picture: Image.Image) -> Image.Image:
    """A picture in a hairline, so that white ones have an edge."""
    tile = Image.new("RGB", (picture.width + 2, picture.height + 2), _LINE)
    tile.paste(picture, (1, 1))
    return tile


def captioned(
    picture: Image.Image, *lines: tuple[str, Colour], width: int = 0, size: int = 14
) -> Image.Image:
    """A picture in a hairline with lines of text under it, at least `width` pixels wide."""
    width = max(width, picture.width + 2)
    texts = [paragraph(text, size, colour, width, 1) for text, colour in lines]
    return stacked([framed(picture), *texts], width, gap=1)


def error_text(text: str, width: int) -> Image.Image:
    """What could not be shown, in red."""
    return paragraph(text, 14, BAD, width, 10)


def paragraph(text: str, size: int, colour: Colour, width: int, lines: int) -> Image.Image:
    """Text in at most so many lines, the rest of it left out."""
    font = _font(size, frozenset(ord(letter) for letter in text if not letter.isspace()))
    shown = wrapped(text, font, width, lines)
    height = round(size * 1.35)
    page = blank(width, height * len(shown) + 2)
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(shown):
        draw.text((0, number * height), line, fill=colour, font=font)
    return page


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Lines that fit, broken at spaces, or anywhere in a word that is longer than half a line."""
    text = " ".join(text.split())[: 400 * lines]
    shown: list[str] = []
    while text and len(shown) < lines:
        fits = _longest(text, font, width)
        if fits < len(text) and len(shown) == lines - 1:
            end = _longest(text[:fits], font, width - round(font.getlength("\u2026")))
            return [*shown, text[:end].rstrip() + "\u2026"]
        space = text.rfind(" ", 0, fits + 1) if fits < len(text) else -1
        fits = space if space > fits // 2 else fits
        shown.append(text[:fits].rstrip())
        text = text[fits:].lstrip()
    return shown or [""]


def _longest(text: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    """How many characters, at least one, are at most `width` pixels long."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


@functools.lru_cache(maxsize=256)
def _font(size: int, letters: frozenset[int]) -> ImageFont.FreeTypeFont:
    """Pillow's own font where it has these letters, else the installed one that has the most of them."""
    if all(letter < 0x250 or 0x2010 <= letter <= 0x2026 for letter in letters):
        return ImageFont.load_default(size)
    best = max(_installed_fonts(), key=lambda path: len(letters & _letters_of(path)), default=None)
    if best is not None and not letters & _letters_of(best):
        best = None
    missing = letters if best is None else letters - _letters_of(best)
    if missing:
        _tell_of_missing("".join(map(chr, sorted(missing)[:8])))
    return ImageFont.load_default(size) if best is None else ImageFont.truetype(best, size)


@functools.cache
def _installed_fonts() -> list[str]:
    """Files of fonts, those for running text first."""
    from matplotlib import font_manager

    return sorted(
        font_manager.findSystemFonts(), key=lambda path: (bool(_STYLES.search(Path(path).stem)), path)
    )


@functools.cache
def _letters_of(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # a damaged font, or one of a kind that cannot be read
        return frozenset()


@functools.cache
def _tell_of_missing(letters: str) -> None:
    logger.warning(
        "no font on this machine has %s: boxes are drawn instead; install one, such as Noto Sans CJK or Noto Emoji",
        letters,
    )
