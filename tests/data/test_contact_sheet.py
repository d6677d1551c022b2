"""The contact sheet: seeded, marks in the right places and colours, and whatever cannot be read shown in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from refalign_ext.data.clip_set import open_clip_set
from refalign_ext.data.masks import encode
from refalign_ext.data.sheets import contact, layout
from refalign_ext.data.sheets.contact import choose_rows, contact_sheet

WIDTH, HEIGHT, FRAMES = 160, 96, 12
GREY = (90, 90, 90)
RED, BLUE, YELLOW = (230, 60, 50), (30, 120, 230), (250, 220, 60)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "4"})
        stream.width, stream.height = WIDTH, HEIGHT
        pixels = np.full((HEIGHT, WIDTH, 3), GREY, np.uint8)
        for _ in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    Image.new("RGB", (40, 60), (20, 200, 90)).save(folder / "green.png")
    return folder


def put(root: Path, lines: list[dict[str, Any]], name: str = "data.jsonl") -> Path:
    (root / name).write_text("\n".join(json.dumps(item) for item in lines))
    return root / name


def simple(number: int, **changes: Any) -> dict[str, Any]:
    row = {"id": f"clip-{number}", "video": "clip.mp4", "prompt": "grey", "references": ["green.png"]}
    return row | changes


def with_targets() -> dict[str, Any]:
    inside = np.zeros((80, 120), bool)
    inside[30:50, 40:80] = True
    mask = {"size": [80, 120], "counts": encode(inside).counts}
    cat = {"frame": 4, "bbox_xyxy": [30, 20, 90, 60], "box_space": "cropped_frame", "mask_rle": mask}
    other = {"frame": 4, "bbox_xyxy": [0, 0, 16, 96], "box_space": "frame"}
    shared = {"kind": "object", "refs": [{"pair": "cross", "image": "green.png"}]}
    return {
        "id": "marked",
        "source": "custom",
        "video": {"path": "clip.mp4", "crop_xyxy": [20, 10, 140, 90]},
        "prompt": "grey",
        "subjects": [
            {"subject_id": "1", "cls": "cat", "target": cat} | shared,
            {"subject_id": "2", "target": other} | shared,
        ],
    }


def test_marks_are_where_the_row_says(root: Path) -> None:
    clip = open_clip_set(put(root, [with_targets()]))[0]
    pixels = np.full((HEIGHT, WIDTH, 3), GREY, np.uint8)
    drawn = np.asarray(contact.marked(pixels, list(enumerate(clip.subjects)), clip.video))
    assert (pixels == GREY).all()
    # Box and mask are moved by the crop's corner (20, 10).
    red = (drawn == RED).all(-1)
    assert red[30, 50:110].all() and red[69, 50:110].all()
    assert red[30:70, 50].all() and red[30:70, 109].all()
    assert red[40, 60:100].all() and red[59, 60:100].all()  # the mask's outline
    tint = np.array(GREY) * 0.65 + np.array(RED) * 0.35
    assert np.abs(drawn[45:55, 70:90] - tint).max() <= 1
    assert (drawn[35, 60:100] == GREY).all()
    assert (drawn[0:96, 0] == BLUE).all()
    assert (drawn[10, 30:130] == YELLOW).all()
    assert (drawn[95, 30:] == GREY).all()


def count(page: Image.Image, colour: tuple[int, int, int], tolerance: int = 6) -> int:
    """Pixels of a colour."""
    return int((np.abs(np.asarray(page).astype(int) - colour).max(-1) <= tolerance).sum())


def test_sheet_shows_frames_targets_and_references(root: Path) -> None:
    page = contact_sheet(put(root, [with_targets()]), width=1400)
    assert page.width == 1400
    side = (1400 - 2 * contact.MARGIN - 5 * layout.GAP) // 6 - 2
    frames = count(page, GREY)
    assert frames > 0.6 * 6 * side * side * HEIGHT / WIDTH
    assert count(page, (20, 200, 90)) > 2 * 120 * 180 * 0.9
    assert count(page, RED) > 200
    assert count(page, BLUE, 60) > 200
    assert count(page, YELLOW) > 6 * 200
    assert count(page, layout.BAD) == 0


def test_rows_are_chosen_without_repeats_and_by_seed() -> None:
    assert choose_rows(5, 9, 0) == [0, 1, 2, 3, 4]
    chosen = choose_rows(1000, 50, 7)
    assert chosen == sorted(set(chosen)) == choose_rows(1000, 50, 7) != choose_rows(1000, 50, 8)
    assert len(chosen) == 50 and len(choose_rows(10**9, 3, 0)) == 3


def test_what_cannot_be_read_is_shown_by_its_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    monkeypatch.setattr(
        contact, "error_text", lambda text, width: texts.append(text) or layout.error_text(text, width)
    )
    (root / "noise.png").write_bytes(b"no picture")
    beyond = with_targets()
    beyond["subjects"][1]["target"]["bbox_xyxy"] = [0, 0, 200, 96]
    bad = [simple(1, video="gone.mp4"), simple(2, references=["gone.png", "noise.png"]), {"id": "x"}, beyond]
    page = contact_sheet(put(root, bad, "bad.jsonl"), width=900)
    expected = [
        "gone.mp4 does not exist",
        "gone.png does not exist",
        "noise.png",
        "source",
        "box_beyond_width",
    ]
    assert len(texts) == len(expected)
    assert all(part in text and "row" not in text for part, text in zip(expected, texts))
    assert count(page, layout.BAD) > 100


def test_text_is_wrapped_into_the_width() -> None:
    font = layout._font(18, frozenset())
    text = "A long sentence of many words " * 20 + "x" * 300
    for width in (80, 300, 1000):
        lines = layout.wrapped(text, font, width, 400)
        assert all(font.getlength(item) <= width for item in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = layout.wrapped(text, font, 300, 3)
    assert len(cut) == 3
    assert cut[-1].endswith("\u2026")
    assert font.getlength(cut[-1]) <= 300
    assert layout.wrapped("", font, 300, 3) == [""]


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no rows"):
        contact_sheet(tmp_path / "empty.jsonl")
