"""Statistics of a data set: equal to what is counted by hand, however many processes work on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from refalign_ext.data.length import Length
from refalign_ext.data.manifest_file import write_manifest
from refalign_ext.data.schema import parse
from refalign_ext.data.statistics.plot import plot_stats
from refalign_ext.data.statistics.stats import collect_stats, count_words, nearest_aspect
from refalign_ext.data.statistics.table import stats_table
from tests.helpers.clips import render


def line(number: int, **changes: Any) -> dict[str, Any]:
    """A row of 100 frames at 25 fps, 1920x1080, with one person and one reference of it."""
    size = {"width": 1920, "height": 1080}
    reference = {"pair": "cross", "image": "a.png"}
    return {
        "id": f"clip-{number}",
        "source": "custom",
        "video": {"path": "a.mp4", "start_frame": 10, "end_frame": 110, "fps": 25} | size,
        "prompt": "a man walks",
        "subjects": [{"subject_id": "1", "cls": "Man", "kind": "human", "refs": [reference]}],
    } | changes


def manifest(folder: Path, lines: list[dict[str, Any]]) -> Path:
    write_manifest(folder / "data.jsonl", (parse(entry, "test") for entry in lines))
    return folder / "data.jsonl"


FILM = {"path": "b.mp4", "start_s": 1, "end_s": 11, "fps": 30, "width": 1080, "height": 1920}
MAN = [
    {"pair": "regular", "image": "a.png", "scores": {"gme": 0.6, "area_ratio": 0.25}},
    {"pair": "cross", "image": "a.png", "scores": {"gme": 0.8}},
]
DOG = [{"pair": "cross", "image": "a.png"}]
MIXED = [
    line(1),
    line(2, group_id="film", prompt="a man", prompt_alt=["he"], scores={"aesthetic": 5, "motion": 0.5}),
    line(
        3,
        group_id="film",
        source="opens2v",
        scores={"aesthetic": 4},
        video=FILM | {"crop_xyxy": [40, 100, 1040, 1100]},
        subjects=[
            {"subject_id": "1", "cls": "man ", "kind": "human", "refs": MAN},
            {"subject_id": "2", "phrase": "a dog", "kind": "object", "refs": DOG},
        ],
    ),
]


def test_counts_are_those_counted_by_hand(tmp_path: Path) -> None:
    path = manifest(tmp_path, MIXED)
    stats = collect_stats(path, lengths=[Length(100), Length(81, stride=3), Length(81, fps=16)])
    assert (stats.rows, stats.clips, stats.unmeasured, stats.problems) == (3, 3, 0, [])
    assert stats.hours == pytest.approx((4 + 4 + 10) / 3600)
    assert {name: values.tolist() for name, values in stats.numbers.items()} == {
        "seconds": [4, 4, 10],
        "frames": [100, 100, 300],
        "fps": [25, 25, 30],
        "prompt_words": [3, 2, 3],
        "prompts": [1, 2, 1],
        "clip.aesthetic": [5, 4],
        "clip.motion": [0.5],
        "reference.gme": [0.6, 0.8],
        "reference.area_ratio": [0.25],
    }
    assert stats.names == {
        "sizes": {"1920x1080": 2, "1000x1000": 1},
        "aspects": {"16:9": 2, "1:1": 1},
        "sources": {"custom": 2, "opens2v": 1},
        "subjects": {"1": 2, "2": 1},
        "references": {"1": 2, "3": 1},
        "pairs": {"cross": 4, "regular": 1},
        "kinds": {"human": 3, "object": 1},
        "classes": {"man": 3, "a dog": 1},
    }
    assert (stats.groups, stats.largest_group) == (2, 2)
    assert stats.long_enough == {"100 frames": 3, "81 frames at stride 3": 1, "81 frames at 16 fps": 1}
    text, plain = stats_table(stats), json.loads(stats.to_json())
    assert plain["classes"] == {"man": 3, "a dog": 1}
    assert plain["frames"] == {
        "count": 3,
        "mean": 166.666667,
        "quantiles": {"0": 100, "0.05": 100, "0.25": 100, "0.5": 100, "0.75": 200, "0.95": 280, "1": 300},
    }
    assert plain["scores"]["clip.motion"]["mean"] == 0.5
    for part in ("3 clips", "man", "81 frames at stride 3", "prompt_words", "reference.gme"):
        assert part in text


@pytest.mark.parametrize(
    ("length", "frames", "fps", "possible"),
    [
        (Length(81), 81, 24, 81),
        (Length(81, stride=3), 241, 24, 81),
        (Length(81, stride=3), 240, 24, 80),
        (Length(81, fps=16), 81, 16, 81),
        (Length(81, fps=16), 121, 24, 81),  # frame 120 stands at 5 s
        (Length(81, fps=16), 120, 24, 80),  # the last one stands until 4.98 s
        (Length(81, fps=48), 10, 24, 20),
        (Length(81, fps=16), 0, 24, 0),
    ],
)
def test_possible_frames(length: Length, frames: int, fps: float, possible: int) -> None:
    assert length.possible(frames, fps) == possible


@pytest.mark.parametrize(("name", "value"), [("frames", 0), ("stride", 0), ("fps", 0.0)])
def test_length_names_the_flag_that_is_wrong(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"--{name}"):
        Length(**({"frames": 1} | {name: value}))


def test_files_are_opened_only_where_rows_do_not_say_enough(tmp_path: Path) -> None:
    render(tmp_path / "clip.mp4", 12)
    part = {"path": "clip.mp4", "start_s": 0.5, "end_s": 1.25, "crop_xyxy": [0, 0, 48, 48]}
    lines = [
        {"id": "file", "video": "clip.mp4", "prompt": "x", "references": ["a.png"]},
        line(2, video=part),
        {"id": "lost", "video": "lost.mp4", "prompt": "x", "references": ["a.png"]},
        line(4),  # says all, so that its file is not missed
    ]
    path = manifest(tmp_path, lines)
    stats = collect_stats(path)
    assert (stats.clips, stats.unmeasured) == (4, 1)
    assert stats.numbers["frames"].tolist() == [12, 6, 100]
    assert stats.numbers["seconds"].tolist() == [1.5, 0.75, 4]
    assert stats.names["sizes"] == {"64x48": 1, "48x48": 1, "1920x1080": 1}
    assert collect_stats(path, measure=False).unmeasured == 3


def test_bad_rows_are_named_and_the_rest_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\n".join([json.dumps(line(1)), "{", json.dumps(line(3, source="x")), json.dumps(line(4))])
    )
    stats = collect_stats(path)
    assert (stats.rows, stats.clips) == (4, 2)
    assert "row 2: not valid JSON" in stats.problems[0]
    assert "row 3: source" in stats.problems[1]
    assert "2 rows" in stats_table(stats) and stats.problems[0] in stats_table(stats)


def test_processes_change_nothing(tmp_path: Path) -> None:
    lines = [line(n, group_id=f"g{n % 7}", prompt="w " * (1 + n % 5)) for n in range(1100)]
    path = manifest(tmp_path, lines)
    whole = collect_stats(path)
    assert collect_stats(path, workers=1).to_json() == whole.to_json()
    assert (whole.clips, whole.groups, whole.largest_group) == (1100, 7, 158)


def test_words_and_aspects() -> None:
    assert count_words("A dog runs.") == 3
    assert count_words("一只狗 runs") == 4
    sizes = {"16:9": (832, 480), "9:16": (480, 832), "4:3": (640, 480), "1:1": (100, 101)}
    assert {name: nearest_aspect(*size) for name, size in sizes.items()} == {name: name for name in sizes}


@pytest.mark.parametrize("lines", [MIXED, []], ids=["mixed", "empty"])
def test_plot_is_drawn_also_of_nothing(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    plot_stats(collect_stats(manifest(tmp_path, lines)), tmp_path / "stats.png")
    with Image.open(tmp_path / "stats.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    if not lines:
        assert "0 clips" in stats_table(collect_stats(tmp_path / "data.jsonl"))
