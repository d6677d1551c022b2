"""The contact sheet: seeded, marks in the right places and colours, and whatever cannot be read shown in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

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
        for _ in range(FRAMES):
            pixels = np.full((HEIGHT, WIDTH, 3), GREY, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    Image.new("RGB", (40, 60), (20, 200, 90)).save(folder / "green.png")
    return folder


def put(root: Path, lines: list[dict[str, Any]], name: str = "data.jsonl") -> Path:
    (root / name).write_text("\n".join(json.dumps(item) for item in lines))
    return root / name


def simple(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"clip-{number}",
        "video": "clip.mp4",
        "prompt": "grey",
        "references": ["green.png"],
    } | changes


def marked() -> dict[str, Any]:
    inside = np.zeros((80, 120), bool)
    inside[30:50, 40:80] = True
    return {
        "id": "marked",
        "source": "custom",
        "video": {"path": "clip.mp4", "crop_xyxy": [20, 10, 140, 90]},
        "prompt": "grey",
        "subjects": [
            {
                "subject_id": "1",
                "cls": "cat",
                "kind": "object",
                "target": {
                    "frame": 4,
                    "bbox_xyxy": [30, 20, 90, 60],
                    "box_space": "cropped_frame",
                    "mask_rle": {"size": [80, 120], "counts": encode(inside).counts},
                },
                "refs": [{"pair": "cross", "image": "green.png"}],
            },
            {
                "subject_id": "2",
                "kind": "object",
                "target": {"frame": 4, "bbox_xyxy": [0, 0, 16, 96], "box_space": "frame"},
                "refs": [{"pair": "cross", "image": "green.png"}],
            },
        ],
    }


def test_marks_are_where_the_row_says(root: Path) -> None:
    from refalign_ext.data.clip_set import open_clip_set

    clip = open_clip_set(put(root, [marked()]))[0]
    pixels = np.full((HEIGHT, WIDTH, 3), GREY, np.uint8)
    drawn = contact._with_targets(pixels, list(enumerate(clip.subjects)), clip.video)
    assert (pixels == GREY).all()
    # Box and mask are moved by the crop's corner (20, 10).
    red = (drawn == RED).all(-1)
    assert red[30, 50:110].all()
    assert red[69, 50:110].all()
    assert red[30:70, 50].all()
    assert red[30:70, 109].all()
    assert red[40, 60:100].all()  # the mask's outline
    assert red[59, 60:100].all()
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
    page = contact_sheet(put(root, [marked()]), width=1400)
    assert page.width == 1400
    side = (1400 - 2 * contact.MARGIN - 5 * layout.GAP) // 6 - 2
    frames = count(page, GREY)
    assert frames > 0.6 * 6 * side * side * HEIGHT / WIDTH
    assert count(page, (20, 200, 90)) > 2 * 120 * 180 * 0.9
    assert count(page, RED) > 200
    assert count(page, BLUE, 60) > 200
    assert count(page, YELLOW) > 6 * 200
    assert count(page, layout.BAD) == 0


def test_the_same_seed_gives_the_same_sheet(root: Path) -> None:
    shades = [str(number) for number in range(8)]
    for number in range(8):
        Image.new("RGB", (40, 40), (number * 30, 10, 200)).save(root / f"{shades[number]}.png")
    path = put(root, [simple(number, references=[f"{shades[number]}.png"]) for number in range(8)])
    first, again, other = (
        contact_sheet(path, samples=2, seed=seed, width=600).tobytes() for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_rows_are_chosen_without_repeats_and_by_seed() -> None:
    assert choose_rows(5, 9, 0) == [0, 1, 2, 3, 4]
    chosen = choose_rows(1000, 50, 7)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 50
    assert chosen != choose_rows(1000, 50, 8)
    assert len(choose_rows(10**9, 3, 0)) == 3


def test_what_cannot_be_read_is_shown_by_its_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    original = contact.error_text

    def noted(text: str, width: int) -> Image.Image:
        texts.append(text)
        return original(text, width)

    monkeypatch.setattr(contact, "error_text", noted)
    (root / "noise.png").write_bytes(b"no picture")
    beyond = marked()
    beyond["subjects"][1]["target"]["bbox_xyxy"] = [0, 0, 200, 96]
    lines = [
        simple(1, video="gone.mp4"),
        simple(2, references=["gone.png", "noise.png"]),
        {"id": "x"},
        beyond,
    ]
    page = contact_sheet(put(root, lines, "bad.jsonl"), width=900)
    assert len(texts) == 5
    assert texts[0] == "gone.mp4 does not exist or is no file"
    assert texts[1] == "gone.png does not exist or is no file"
    assert "noise.png" in texts[2]
    assert texts[3] == "source: is missing"
    assert "box_beyond_width" in texts[4]
    assert count(page, layout.BAD) > 100


def test_text_is_wrapped_into_the_width() -> None:
    font = layout._latin_font(18)
    text = "A long sentence of many words " * 20 + "x" * 300
    for width in (80, 300, 1000):
        lines = layout._wrapped(text, font, width, 400)
        assert all(font.getlength(item) <= width for item in lines)
        assert (
            "".join(lines).replace(" ", "") == text.replace(" ", "")[: len("".join(lines).replace(" ", ""))]
        )
    cut = layout._wrapped(text, font, 300, 3)
    assert len(cut) == 3
    assert cut[-1].endswith("\u2026")
    assert font.getlength(cut[-1]) <= 300
    assert layout._wrapped("", font, 300, 3) == [""]


def test_letters_without_a_font_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    layout._other_font.cache_clear()
    monkeypatch.setattr(layout, "_OTHER_FONTS", ("no-such-font.ttf",))
    text, _ = layout._font_for("a 狗 b", 18)
    layout._other_font.cache_clear()
    assert text == "a ? b"


@pytest.mark.parametrize(("options", "message"), [({"samples": 0}, "--samples"), ({"width": 10}, "--width")])
def test_arguments_are_checked(root: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contact_sheet(put(root, [simple(1)]), **options)


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no rows"):
        contact_sheet(tmp_path / "empty.jsonl")
