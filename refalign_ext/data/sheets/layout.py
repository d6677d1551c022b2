"""Pieces of a page: text that fits, pictures with captions, rows and columns of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

GAP = 10
INK, FAINT, ACCENT, BAD = (28, 30, 34), (110, 114, 122), (46, 98, 190), (190, 30, 30)
_PAPER, _LINE = (250, 250, 248), (214, 214, 210)

# Pillow's own font knows Latin letters only; the first of these that has a text's other letters is used.
_OTHER_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
)


def blank(width: int, height: int) -> Image.Image:
    """An empty piece of paper."""
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


def flow(tiles: Sequence[Image.Image], width: int, *, gap: int = GAP, row_gap: int = GAP) -> Image.Image:
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
    return stacked(bands, width, gap=row_gap)


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
    picture: Image.Image, text: str, colour: Colour, width: int = 0, *, size: int = 14, frame: bool = True
) -> Image.Image:
    """A picture in a hairline with one line of text under it."""
    picture = framed(picture) if frame else picture
    width = max(width, picture.width)
    return stacked([picture, text_line(text, size, colour, width)], width, gap=1)


def ruled(line: Image.Image) -> Image.Image:
    """A line of text with a hairline under it."""
    return stacked([line, Image.new("RGB", (line.width, 2), _LINE)], line.width, gap=4)


def heading(name: str, details: str, width: int) -> Image.Image:
    """The line above a sample, its name large and details small."""
    line = blank(width, 34)
    ImageDraw.Draw(line).line((0, 0, width, 0), fill=_LINE, width=2)
    half = text_line(name, 20, INK, width // 2)
    line.paste(half, (0, 6))
    shown, font = _font_for(name, 20)
    left = min(half.width, round(font.getlength(shown))) + 2 * GAP
    line.paste(text_line(details, 15, FAINT, width - left), (left, 10))
    return line


def error_text(text: str, width: int) -> Image.Image:
    """What could not be shown, in red."""
    return paragraph(text, 14, BAD, width, 10)


def text_line(text: str, size: int, colour: Colour, width: int) -> Image.Image:
    """One line of text, cut off where it does not fit."""
    return paragraph(text, size, colour, width, 1)


def paragraph(text: str, size: int, colour: Colour, width: int, lines: int) -> Image.Image:
    """Text in at most so many lines, the rest of it left out."""
    text, font = _font_for(text, size)
    shown = _wrapped(text, font, width, lines)
    height = round(size * 1.35)
    page = blank(width, height * len(shown) + 2)
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(shown):
        draw.text((0, number * height), line, fill=colour, font=font)
    return page


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Lines that fit, broken at spaces, or anywhere in a word that is longer than half a line."""
    text = " ".join(text.split())[: 400 * lines]
    shown: list[str] = []
    while text and len(shown) < lines:
        fits = _longest(text, font, width)
        if fits < len(text):
            space = text.rfind(" ", 0, fits + 1)
            if len(shown) == lines - 1:
                end = _longest(text[:fits], font, width - round(font.getlength("\u2026")))
                shown.append(text[:end].rstrip() + "\u2026")
                break
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


def has_fonts_for(text: str) -> bool:
    """Whether a font on this machine has the letters of a text."""
    return _font_for(text, 20)[0] == text


@functools.lru_cache(maxsize=16)
def _latin_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


@functools.lru_cache(maxsize=64)
def _other_font(size: int, letter: str) -> ImageFont.FreeTypeFont | None:
    """A font that has this letter: one that has not shows the same mark for it as for what is no letter at all."""
    for name in _OTHER_FONTS:
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        if bytes(font.getmask(letter)) != bytes(font.getmask("\U0010ffff")):
            return font
    return None


def _font_for(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """A font and the text, with a mark for each letter that no font here has."""
    other = next((letter for letter in text if not _is_latin(letter)), None)
    if other is None:
        return text, _latin_font(size)
    font = _other_font(size, other)
    if font is not None:
        return text, font
    return "".join(letter if _is_latin(letter) else "?" for letter in text), _latin_font(size)


def _is_latin(letter: str) -> bool:
    return ord(letter) < 0x250 or 0x2010 <= ord(letter) <= 0x2026
