from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from refalign_ext.data.sheets.result import MAX_PROMPT_LINES, PAGE_WIDTH, make_sheet


def make_video(frames: int, height: int = 48, width: int = 48) -> torch.Tensor:
    """Every frame has a red of its own."""
    reds = torch.linspace(-1, 1, frames).view(1, frames, 1, 1).expand(1, frames, height, width)
    return torch.cat([reds, -torch.ones(2, frames, height, width)])


def areas(sheet: Image.Image) -> dict[tuple[int, int, int], int]:
    """How many pixels each colour covers."""
    channels = np.asarray(sheet).astype(np.uint32)
    codes, counts = np.unique(channels @ np.array([65536, 256, 1], np.uint32), return_counts=True)
    return {
        (code >> 16, code >> 8 & 255, code & 255): count
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True)
    }


def shown_frames(sheet: Image.Image, frames: int) -> list[int]:
    """Which frames of `make_video` appear as large areas."""
    levels = (np.linspace(0, 1, frames) * 255).round().astype(int).tolist()
    covered = areas(sheet)
    return [index for index, level in enumerate(levels) if covered.get((level, 0, 0), 0) > 10_000]


@pytest.mark.parametrize(
    ("frames", "expected"),
    [(1, [0]), (5, [0, 1, 2, 3, 4]), (9, [0, 2, 4, 6, 8]), (81, [0, 16, 32, 48, 64, 80])],
)
def test_frames_are_evenly_spaced(frames: int, expected: list[int]) -> None:
    sheet = make_sheet([], "a prompt", make_video(frames), fps=8)
    assert sheet.width == PAGE_WIDTH
    assert shown_frames(sheet, frames) == expected


@pytest.mark.parametrize("count", [0, 1, 5, 8])
@pytest.mark.parametrize("size", [(208, 120), (60, 104)])
def test_every_reference_is_on_the_page(count: int, size: tuple[int, int]) -> None:
    colours = [(0, 200, 10 + index) for index in range(count)]
    references = [Image.new("RGB", size, colour) for colour in colours]
    sheet = make_sheet(
        references, "a prompt " * 20, make_video(9, size[1], size[0]), fps=16, title="t", footer="f"
    )
    covered = areas(sheet)
    assert all(covered[colour] > 15_000 for colour in colours)
    assert shown_frames(sheet, 9) == [0, 2, 4, 6, 8]


def test_prompt_is_drawn_and_cut() -> None:
    def ink(prompt: str) -> tuple[int, int]:
        sheet = make_sheet([], prompt, make_video(1), fps=8)
        return sheet.height, int((np.asarray(sheet.convert("L")) < 60).sum())

    short, long, longer = ink("word " * 5), ink("word " * 100), ink("word " * 5000)
    assert short[0] < long[0] < longer[0] <= short[0] + MAX_PROMPT_LINES * 60
    assert short[1] < long[1] < longer[1]
    assert ink("x" * 3000)[1] > long[1] / 2
    assert ink("\u4e00\u4e2a\u6751\u5e84" * 40)[1] > 100  # or what stands in for letters without a font


def test_long_footer_stays_on_the_page() -> None:
    sheet = np.asarray(make_sheet([], "p", make_video(1), fps=8, footer="seed 42   " * 60).convert("L"))
    assert (sheet[-60:, PAGE_WIDTH - 40 :] > 240).all()
