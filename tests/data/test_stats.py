"""Statistics of a data set: equal to what is counted by hand, in memory that does not grow, however many work on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from refalign_ext.data.length import Length
from refalign_ext.data.manifest_file import write_manifest
from refalign_ext.data.schema import parse
from refalign_ext.data.statistics import tally
from refalign_ext.data.statistics.plot import plot_stats
from refalign_ext.data.statistics.stats import collect_stats, count_words, nearest_aspect
from refalign_ext.data.statistics.table import stats_table
from refalign_ext.data.statistics.tally import Distribution, Tally


def line(number: int, **changes: Any) -> dict[str, Any]:
    """A row of 100 frames at 25 fps, 1920x1080, with one person and one reference of it."""
    return {
        "id": f"clip-{number}",
        "source": "custom",
        "video": {
            "path": "a.mp4",
            "start_frame": 10,
            "end_frame": 110,
            "fps": 25,
            "width": 1920,
            "height": 1080,
        },
        "prompt": "a man walks",
        "subjects": [
            {"subject_id": "1", "cls": "Man", "kind": "human", "refs": [{"pair": "cross", "image": "a.png"}]}
        ],
    } | changes


def manifest(folder: Path, lines: list[dict[str, Any]]) -> Path:
    write_manifest(folder / "data.jsonl", (parse(entry, "test") for entry in lines))
    return folder / "data.jsonl"


MIXED = [
    line(1),
    line(2, group_id="film", prompt="a man", prompt_alt=["he"], scores={"aesthetic": 5, "motion": 0.5}),
    line(
        3,
        group_id="film",
        source="opens2v",
        scores={"aesthetic": 4},
        video={
            "path": "b.mp4",
            "start_s": 1,
            "end_s": 11,
            "fps": 30,
            "width": 1080,
            "height": 1920,
            "crop_xyxy": [40, 100, 1040, 1100],
        },
        subjects=[
            {
                "subject_id": "1",
                "cls": "man ",
                "kind": "human",
                "refs": [
                    {"pair": "regular", "image": "a.png", "scores": {"gme": 0.6, "area_ratio": 0.25}},
                    {"pair": "cross", "image": "a.png", "scores": {"gme": 0.8}},
                ],
            },
            {
                "subject_id": "2",
                "phrase": "a dog",
                "kind": "object",
                "refs": [{"pair": "cross", "image": "a.png"}],
            },
        ],
    ),
]


def test_counts_are_those_counted_by_hand(tmp_path: Path) -> None:
    path = manifest(tmp_path, MIXED)
    stats = collect_stats(path, lengths=[Length(100), Length(81, stride=3), Length(81, fps=16)])
    assert (stats.rows, stats.clips, stats.unmeasured, stats.problems) == (3, 3, 0, [])
    assert stats.hours == pytest.approx((4 + 4 + 10) / 3600)
    assert stats.seconds.quantile(0.5) == 4
    assert (stats.frames.smallest, stats.frames.largest, stats.frames.mean) == (100, 300, 500 / 3)
    assert dict(stats.sizes.counts) == {"1920x1080": 2, "1000x1000": 1}
    assert dict(stats.aspects.counts) == {"16:9": 2, "1:1": 1}
    assert dict(stats.sources.counts) == {"custom": 2, "opens2v": 1}
    assert dict(stats.subjects.counts) == {"1": 2, "2": 1}
    assert dict(stats.references.counts) == {"1": 2, "3": 1}
    assert dict(stats.pairs.counts) == {"cross": 4, "regular": 1}
    assert dict(stats.kinds.counts) == {"human": 3, "object": 1}
    assert dict(stats.classes.counts) == {"man": 3, "a dog": 1}
    assert (stats.prompt_words.smallest, stats.prompt_words.sum) == (2, 8)
    assert stats.prompts.largest == 2
    assert (stats.groups, stats.largest_group) == (2, 2)
    assert {name: (scores.count, scores.mean) for name, scores in stats.scores.items()} == {
        "clip.aesthetic": (2, 4.5),
        "clip.motion": (1, 0.5),
        "reference.gme": (2, pytest.approx(0.7)),
        "reference.area_ratio": (1, 0.25),
    }
    assert stats.long_enough == {"100 frames": 3, "81 frames at stride 3": 1, "81 frames at 16 fps": 1}


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


def test_length_names_the_flag_that_is_wrong() -> None:
    for arguments, flag in (
        (dict(frames=0), "--frames"),
        (dict(stride=0), "--stride"),
        (dict(fps=0.0), "--fps"),
    ):
        with pytest.raises(ValueError, match=flag):
            Length(**({"frames": 1} | arguments))


def test_files_are_opened_only_where_rows_do_not_say_enough(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height = 64, 48
        for shade in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade * 20, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    lines = [
        {"id": "file", "video": "clip.mp4", "prompt": "x", "references": ["a.png"]},
        {"id": "span", **{key: line(0)[key] for key in ("source", "prompt", "subjects")}}
        | {"video": {"path": "clip.mp4", "start_s": 0.5, "end_s": 1.25, "crop_xyxy": [0, 0, 48, 48]}},
        {"id": "lost", "video": "lost.mp4", "prompt": "x", "references": ["a.png"]},
        line(4),  # says all, so that its file is not missed
    ]
    path = manifest(tmp_path, lines)
    stats = collect_stats(path)
    assert (stats.clips, stats.unmeasured) == (4, 1)
    assert sorted(stats.frames.values.elements()) == [6, 12, 100]
    assert dict(stats.sizes.counts) == {"64x48": 1, "48x48": 1, "1920x1080": 1}
    assert stats.seconds.sum == pytest.approx(4 + 1.5 + 0.75)
    assert collect_stats(path, measure=False).unmeasured == 3


def test_bad_rows_are_named_and_the_rest_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(
        json.dumps(line(1)) + "\n{\n" + json.dumps(line(3, source="x")) + "\n" + json.dumps(line(4))
    )
    stats = collect_stats(path)
    assert (stats.rows, stats.clips) == (4, 2)
    assert "row 2: not valid JSON" in stats.problems[0]
    assert "row 3: source" in stats.problems[1]
    assert "2 rows that cannot be read" in stats_table(stats)


def test_processes_change_nothing(tmp_path: Path) -> None:
    lines = [line(n, group_id=f"g{n % 7}", prompt="w " * (1 + n % 5)) for n in range(1100)]
    path = manifest(tmp_path, lines)
    whole = collect_stats(path)
    assert collect_stats(path, workers=1).to_json() == whole.to_json()
    assert whole.clips == 1100 and whole.groups == 7
    assert whole.largest_group == 158


def test_quantiles_are_numpys_until_there_are_too_many_values_and_close_after() -> None:
    numbers = np.random.default_rng(0).lognormal(2, 1, 30_000)
    few, many = Distribution(), Distribution()
    for number in numbers[:1000].tolist():
        few.add(number)
    halves = [Distribution(), Distribution()]
    for index, number in enumerate(numbers.tolist()):
        many.add(number)
        halves[index % 2].add(number)
    halves[0].merge(halves[1])
    for share in (0, 0.05, 0.5, 0.9, 1):
        assert few.quantile(share) == pytest.approx(np.quantile(numbers[:1000], share), rel=1e-12)
        for rounded in (many, halves[0]):
            assert rounded.quantile(share) == pytest.approx(np.quantile(numbers, share), rel=6e-3)
    assert len(many.values) <= tally.MAX_VALUES
    assert many.count == 30_000
    assert many.mean == pytest.approx(numbers.mean())
    assert (many.smallest, many.largest) == (numbers.min(), numbers.max())


def test_names_beyond_the_cap_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "MAX_NAMES", 3)
    names = Tally()
    for name in ("b", "a", "b", "c", "d", "e", "a", "b"):
        names.add(name)
    assert names.most(2) == [("b", 3), ("a", 2)]
    assert names.to_dict(2) == {"b": 3, "a": 2, "others": 3}
    other = Tally()
    other.add("f", 4)
    names.merge(other)
    assert (names.others, names.total) == (6, 12)


def test_words_and_aspects() -> None:
    assert count_words("A dog runs.") == 3
    assert count_words("一只狗 runs") == 4
    assert [
        nearest_aspect(*size) for size in ((1920, 1080), (832, 480), (480, 832), (640, 480), (100, 101))
    ] == [
        "16:9",
        "16:9",
        "9:16",
        "4:3",
        "1:1",
    ]


def test_table_and_json_say_the_same(tmp_path: Path) -> None:
    stats = collect_stats(manifest(tmp_path, MIXED))
    text, plain = stats_table(stats), json.loads(stats.to_json())
    assert plain["clips"] == 3
    assert plain["classes"] == {"man": 3, "a dog": 1}
    assert plain["frames"]["quantiles"]["0.5"] == 100
    for part in ("3 clips", "man", "81 frames at stride 3", "words of prompt", "reference.gme"):
        assert part in text
    assert max(map(len, text.splitlines())) < 160


def test_plot_is_drawn_also_of_nothing(tmp_path: Path) -> None:
    from PIL import Image

    for lines in (MIXED, []):
        plot_stats(collect_stats(manifest(tmp_path, lines)), tmp_path / "stats.png")
        with Image.open(tmp_path / "stats.png") as picture:
            assert picture.format == "PNG"
            assert picture.width > 1000
