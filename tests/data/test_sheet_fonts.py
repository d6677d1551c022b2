"""Which font a page takes for its text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager, get_data_path

from refalign_ext.data.sheets import layout

FONTS = Path(get_data_path()) / "fonts" / "ttf"  # what matplotlib brings along
GREEK, CHINESE = "ένα κόκκινο τρίγωνο", "红色三角形"


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What was found out about fonts is of this test's machine."""
    cached = (layout._font, layout._installed_fonts, layout._letters_of, layout._tell_of_missing)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(FONTS / name) for name in names])


def font_of(text: str) -> str:
    return layout._font(14, frozenset(map(ord, text.replace(" ", "")))).getname()[0]


def test_latin_text_looks_for_no_font(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: pytest.fail("looked"))
    assert font_of("A red “ball” – naïve…") == font_of("ball")


def test_the_font_that_has_the_letters_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, "cmr10.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans.ttf")
    assert layout._font(14, frozenset(map(ord, "έν"))).getname() == ("DejaVu Sans", "Book")
    ink = np.asarray(layout.paragraph(GREEK, 14, layout.INK, 300, 1))
    assert (ink < 100).any() and not caplog.records


def test_letters_that_no_font_has_are_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, "DejaVuSans.ttf")
    for size in (14, 14, 20):
        layout.paragraph(f"a ball, {CHINESE}", size, layout.INK, 300, 1)
    (line,) = caplog.messages
    assert all(letter in line for letter in CHINESE) and "install" in line
    layout.paragraph("🐶", 14, layout.INK, 300, 1)
    assert "🐶" in caplog.messages[1]


def test_no_font_at_all_and_a_damaged_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "bad.ttf").write_bytes(b"no font")
    install(monkeypatch)
    assert font_of(CHINESE) == font_of("ball")
    layout._font.cache_clear()
    layout._installed_fonts.cache_clear()
    monkeypatch.setattr(
        font_manager, "findSystemFonts", lambda: [str(tmp_path / "bad.ttf"), str(FONTS / "DejaVuSans.ttf")]
    )
    assert font_of(GREEK) == "DejaVu Sans"
