"""The picture next to each result: references, prompt and frames on one page."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

PAGE_WIDTH = 1400
MARGIN = 48
GAP = 20
BAND_WIDTH = PAGE_WIDTH - 2 * MARGIN
LABEL_HEIGHT = 34
REFERENCE_SIDE = 216
REFERENCES_PER_ROW = 4
PROMPT_LINE_HEIGHT = 42
FRAME_HEIGHT = 360
TIME_HEIGHT = 36
MAX_FRAMES = 6
MAX_PROMPT_LINES = 8

_PAPER = (250, 250, 248)
_INK = (28, 30, 34)
_FAINT = (122, 126, 134)
_LINE = (222, 222, 218)
_ACCENT = (46, 98, 190)

# Pillow's own font knows Latin letters only; these are looked for when a prompt needs more.
_WIDE_FONTS = (
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


def make_sheet(
    references: Sequence[Image.Image],
    prompt: str,
    video: torch.Tensor,
    *,
    fps: float,
    title: str = "",
    footer: str = "",
) -> Image.Image:
    """Draws references, prompt and evenly spaced frames of a video.

    Args:
        references: prepared references; may be empty.
        prompt: wrapped, and cut after `MAX_PROMPT_LINES` lines.
        video: [3, F, H, W] in [-1, 1]; first and last frame are always shown.
        fps: frames per second, for the times under the frames.
        title: shown at the top, such as the task.
        footer: shown at the bottom, such as seed and settings.

    Small pictures are enlarged by repeating pixels, large ones are shrunk smoothly.
    """
    bands = [
        _title_band(title) if title else None,
        _condition_band(references, prompt),
        _video_band(video, fps),
        _footer_band(footer) if footer else None,
    ]
    bands = [band for band in bands if band is not None]
    height = 2 * MARGIN + sum(band.height for band in bands) + GAP * (len(bands) - 1)
    page = Image.new("RGB", (PAGE_WIDTH, height), _PAPER)
    top = MARGIN
    for band in bands:
        page.paste(band, (MARGIN, top))
        top += band.height + GAP
    return page


def _band(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    band = Image.new("RGB", (BAND_WIDTH + 2, height), _PAPER)
    return band, ImageDraw.Draw(band)


def _title_band(title: str) -> Image.Image:
    band, draw = _band(56)
    draw.text((0, 0), title, fill=_INK, font=_font(34, title))
    draw.line((0, 52, BAND_WIDTH, 52), fill=_LINE, width=2)
    return band


def _footer_band(footer: str) -> Image.Image:
    band, draw = _band(24)
    font = _font(17, footer)
    while len(footer) > 1 and draw.textlength(footer, font=font) > BAND_WIDTH:
        footer = footer[:-2].rstrip() + "\u2026"
    draw.text((0, 0), footer, fill=_FAINT, font=font)
    return band


def _condition_band(references: Sequence[Image.Image], prompt: str) -> Image.Image:
    """References in rows with the prompt to their right, where it has room for a few words a line."""
    tiles = [_fit(image, REFERENCE_SIDE, REFERENCE_SIDE) for image in references]
    columns = min(len(tiles), REFERENCES_PER_ROW)
    rows = -(-len(tiles) // REFERENCES_PER_ROW)
    if _needs_wide_font(prompt) and _wide_font(30) is None:
        prompt = "(written in letters that no font on this machine knows; the settings file has it)"
    prompt_left = columns * (REFERENCE_SIDE + GAP) + GAP if columns else 0
    font = _font(30, prompt)
    lines = _wrap(prompt, font, BAND_WIDTH - prompt_left)
    tiles_height = LABEL_HEIGHT + rows * (REFERENCE_SIDE + GAP) if tiles else 0
    band, draw = _band(max(tiles_height, LABEL_HEIGHT + len(lines) * PROMPT_LINE_HEIGHT + GAP))

    if tiles:
        label = "reference" if len(tiles) == 1 else f"{len(tiles)} references"
        draw.text((0, 0), label, fill=_ACCENT, font=_font(20))
    for index, tile in enumerate(tiles):
        row, column = divmod(index, REFERENCES_PER_ROW)
        position = (column * (REFERENCE_SIDE + GAP), LABEL_HEIGHT + row * (REFERENCE_SIDE + GAP))
        _paste(band, draw, tile, *position)
    draw.text((prompt_left, 0), "prompt", fill=_ACCENT, font=_font(20))
    for index, line in enumerate(lines):
        draw.text((prompt_left, LABEL_HEIGHT + index * PROMPT_LINE_HEIGHT), line, fill=_INK, font=font)
    return band


def _video_band(video: torch.Tensor, fps: float) -> Image.Image:
    """Evenly spaced frames with their times; wide videos in rows of three, others in one row."""
    frames, indices = _pick_frames(video)
    columns = min(len(frames), 3 if frames[0].width > 1.2 * frames[0].height else MAX_FRAMES)
    rows = -(-len(frames) // columns)
    cell_width = (BAND_WIDTH - (columns - 1) * GAP) // columns
    tiles = [_fit(frame, cell_width, FRAME_HEIGHT) for frame in frames]
    cell_height = max(tile.height for tile in tiles) + TIME_HEIGHT
    band, draw = _band(LABEL_HEIGHT + rows * cell_height)

    count = video.shape[1]
    label = "image" if count == 1 else f"video, {count} frames, {count / fps:.2f} s"
    draw.text((0, 0), label, fill=_ACCENT, font=_font(20))
    for position, (tile, index) in enumerate(zip(tiles, indices, strict=True)):
        row, column = divmod(position, columns)
        left, top = column * (cell_width + GAP), LABEL_HEIGHT + row * cell_height
        _paste(band, draw, tile, left, top)
        if count > 1:
            draw.text((left, top + tile.height + 5), f"{index / fps:.2f} s", fill=_FAINT, font=_font(17))
    return band


def _pick_frames(video: torch.Tensor) -> tuple[list[Image.Image], list[int]]:
    count = video.shape[1]
    # Whole steps between the frames where that is possible: five frames always are, of 4n + 1.
    shown = MAX_FRAMES if (count - 1) % (MAX_FRAMES - 1) == 0 else MAX_FRAMES - 1
    indices = sorted({round(index) for index in np.linspace(0, count - 1, min(count, shown)).tolist()})
    levels = video.detach()[:, indices].float().cpu().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in levels.unbind(1)], indices


def _fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scales to fit a box: by a whole factor without smoothing when that enlarges, else smoothly."""
    factor = min(width / image.width, height / image.height)
    if factor >= 2:
        return image.resize((image.width * int(factor), image.height * int(factor)), Image.Resampling.NEAREST)
    fitted = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(fitted, Image.Resampling.LANCZOS)


def _paste(band: Image.Image, draw: ImageDraw.ImageDraw, tile: Image.Image, left: int, top: int) -> None:
    """Puts a tile down with a hairline around it, so that white references stay visible."""
    draw.rectangle((left, top, left + tile.width + 1, top + tile.height + 1), outline=_LINE)
    band.paste(tile, (left + 1, top + 1))


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks a text into lines that fit: at spaces, and inside words (or Chinese text) that are too long alone."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        candidate = f"{line} {word}" if line else word
        if font.getlength(candidate) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        line = ""
        for letter in word:
            if line and font.getlength(line + letter) > width:
                lines.append(line)
                line = ""
            line += letter
    lines.append(line)
    if len(lines) > MAX_PROMPT_LINES:
        lines = lines[:MAX_PROMPT_LINES]
        last = lines[-1]
        while last and font.getlength(last + " \u2026") > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + " \u2026"
    return lines


def _needs_wide_font(text: str) -> bool:
    """Whether a text has letters beyond Latin and ordinary punctuation."""
    return any(ord(letter) > 0x24F and not 0x2010 <= ord(letter) <= 0x2026 for letter in text)


@functools.lru_cache(maxsize=32)
def _wide_font(size: int) -> ImageFont.FreeTypeFont | None:
    for name in _WIDE_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return None


@functools.lru_cache(maxsize=32)
def _latin_font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _font(size: int, text: str = "") -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """A font for a text; letters that no installed font knows come out as boxes."""
    wide = _wide_font(size) if _needs_wide_font(text) else None
    return wide or _latin_font(size)
