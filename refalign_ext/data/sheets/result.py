"""The picture next to each result: references, prompt and frames on one page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from refalign_ext.data.sheets.layout import (
    ACCENT,
    FAINT,
    INK,
    blank,
    captioned,
    flow,
    framed,
    padded,
    paragraph,
    scaled,
    stacked,
)

if TYPE_CHECKING:
    import torch

PAGE_WIDTH = 1400
MAX_PROMPT_LINES = 8
_MARGIN, _GAP = 48, 20
_WIDTH = PAGE_WIDTH - 2 * _MARGIN
_REFERENCE_SIDE = 216
_REFERENCES_PER_ROW = 4
_LABEL_HEIGHT = 34
_FRAME_HEIGHT = 360
_MAX_FRAMES = 6


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
        title: shown at the top, such as the task; footer: at the bottom, such as seed and settings.
    """
    bands = [_conditions(references, prompt), _frames(video, fps)]
    if title:
        bands.insert(0, padded(paragraph(title, 34, INK, _WIDTH, 1), 56))
    if footer:
        bands.append(padded(paragraph(footer, 17, FAINT, _WIDTH, 1), 24))
    return stacked(bands, PAGE_WIDTH, margin=_MARGIN, gap=_GAP)


def _conditions(references: Sequence[Image.Image], prompt: str) -> Image.Image:
    """References in rows, with the prompt to their right."""
    left = min(len(references), _REFERENCES_PER_ROW) * (_REFERENCE_SIDE + _GAP)
    text = paragraph(prompt, 30, INK, _WIDTH - left - _GAP, MAX_PROMPT_LINES)
    texts = _labelled("prompt", padded(text, text.height + _GAP))
    if not references:
        return texts
    tiles = [framed(scaled(image, _REFERENCE_SIDE, _REFERENCE_SIDE)) for image in references]
    label = "reference" if len(tiles) == 1 else f"{len(tiles)} references"
    pictures = _labelled(label, flow(tiles, left, gap=_GAP - 2))
    rows = -(-len(references) // _REFERENCES_PER_ROW)
    band = blank(_WIDTH, max(_LABEL_HEIGHT + rows * (_REFERENCE_SIDE + _GAP), texts.height))
    band.paste(pictures, (0, 0))
    band.paste(texts, (left + _GAP, 0))
    return band


def _frames(video: torch.Tensor, fps: float) -> Image.Image:
    """Evenly spaced frames with their times; wide videos in rows of three, others in one row."""
    _, count, height, width = video.shape
    # Whole steps between the frames where that is possible: five frames always are, of 4n + 1.
    shown = _MAX_FRAMES if (count - 1) % (_MAX_FRAMES - 1) == 0 else _MAX_FRAMES - 1
    indices = sorted({round(index) for index in np.linspace(0, count - 1, min(count, shown)).tolist()})
    chosen = video.detach()[:, indices].float().cpu().clamp(-1, 1)
    levels = chosen.add(1).mul(127.5).round().byte().permute(1, 2, 3, 0).numpy()  # [frames, H, W, 3]
    columns = min(len(indices), 3 if width > 1.2 * height else _MAX_FRAMES)
    cell = (_WIDTH - (columns - 1) * _GAP) // columns
    tiles = []
    for index, pixels in zip(indices, levels, strict=True):
        time = f"{index / fps:.2f} s" if count > 1 else ""
        tiles.append(captioned(scaled(Image.fromarray(pixels), cell, _FRAME_HEIGHT), (time, FAINT), size=17))
    label = "image" if count == 1 else f"video, {count} frames, {count / fps:.2f} s"
    band = flow(tiles, _WIDTH + 2, gap=_GAP - 2)
    return _labelled(label, padded(band, band.height + 8))


def _labelled(label: str, band: Image.Image) -> Image.Image:
    title = padded(paragraph(label, 20, ACCENT, band.width, 1), _LABEL_HEIGHT)
    return stacked([title, band], band.width, gap=0)
