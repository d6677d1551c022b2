"""How long a clip is: one answer from the row, the index, the statistics, the check, the converter and the decoder."""

from __future__ import annotations

import csv
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from refalign_ext.data.checking.row import RowSettings, check_row
from refalign_ext.data.clip_index import BAD_VIDEO, USABLE, measure, open_clip_index
from refalign_ext.data.clip_set import ClipSet, open_clip_set
from refalign_ext.data.convert.folder import convert_folder
from refalign_ext.data.decoding import read_clip
from refalign_ext.data.length import Length
from refalign_ext.data.manifest_file import write_manifest
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan
from refalign_ext.data.spans import Part, frame_range, span_arguments, steady_range
from refalign_ext.data.statistics.stats import collect_stats
from tests.helpers.clips import render

FRAMES = 20
# Spans of 20 frames at 8 fps, and how many frames they have; 0: the file has no such span.
SPANS = [
    ({}, 20),
    ({"start_s": 0.02, "end_s": 1.0}, 7),  # frame 0 is over before the span begins
    ({"start_s": 0.0005, "end_s": 1.0005}, 8),  # rounded by less than a millisecond
    ({"start_s": 0.125, "end_s": 0.25}, 1),
    ({"start_s": 2.0}, 4),
    ({"end_s": 2.6}, 20),  # less than a frame beyond the end
    ({"end_s": 2.7}, 0),
    ({"start_frame": 5}, 15),
    ({"start_frame": 5, "end_frame": 21}, 15),
    ({"end_frame": 22}, 0),
    ({"start_frame": 20}, 0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    render(root / "clip.mp4", FRAMES)
    Image.new("RGB", (40, 40), "red").save(root / "ref.png")
    return root


def clip_set(folder: Path, span: VideoSpan) -> ClipSet:
    subjects = (Subject("1", refs=(Reference("cross", image="ref.png"),)),)
    write_manifest(folder / "data.jsonl", [Clip("a", "custom", span, "a box", subjects)])
    return open_clip_set(folder / "data.jsonl")


def longest(is_possible: Any) -> int:
    return max((frames for frames in range(1, FRAMES + 5) if is_possible(frames)), default=0)


def decoded(folder: Path, span: VideoSpan) -> int:
    def decodes(frames: int) -> bool:
        try:
            return read_clip(folder / span.path, frames, (8, 8), **span_arguments(span)).shape[1] == frames
        except ValueError:
            return False

    return longest(decodes)


def checked(clips: ClipSet) -> int:
    def is_sound(frames: int) -> bool:
        findings, _ = check_row(clips, 0, RowSettings(length=Length(frames)))
        return not any(finding.level == "error" for finding in findings)

    return longest(is_sound)


def converted(folder: Path, span: dict[str, float]) -> int:
    row = {"video": "clip.mp4", "prompt": "a box", "ref1": "ref.png", **span}
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)

    def is_kept(frames: int) -> bool:
        try:
            convert_folder(folder / "table.csv", folder / "converted.jsonl", length=Length(frames))
        except ValueError:
            return False
        clips = open_clip_set(folder / "converted.jsonl")
        video = clips[0].video
        assert measure(clips, 0, video, opens_files=False).frames == decoded(folder, video)
        return True

    return longest(is_kept)


@pytest.mark.parametrize(("span", "frames"), SPANS, ids=[str(span) for span, _ in SPANS])
def test_all_agree_with_the_decoder_on_how_long_a_span_is(
    folder: Path, span: dict[str, Any], frames: int
) -> None:
    video = VideoSpan("clip.mp4", **span)
    clips = clip_set(folder, video)
    records = open_clip_index(clips)
    assert decoded(folder, video) == frames
    assert records["frames"].tolist() == [frames]
    assert records["state"].tolist() == [USABLE if frames else BAD_VIDEO]
    assert sum(collect_stats(clips).frames.values.elements()) == frames
    assert checked(clips) == frames
    assert converted(folder, span) == frames


@pytest.mark.parametrize("seed", range(4))
def test_a_steady_rate_tells_what_the_times_of_all_frames_tell(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        fps = rng.choice([8.0, 23.976, 24.0, 25.0, 29.97, 30000 / 1001, 60.0, rng.uniform(1, 120)])
        frames = rng.randint(1, 40)
        times = [3 + number / Fraction(fps) for number in range(frames)]
        instants = [None, rng.uniform(0, 1.1) * frames / fps, rng.randint(0, frames) / fps]
        instants += [round(instant, 3) for instant in instants[1:]]
        span = VideoSpan("clip.mp4", start_s=rng.choice(instants), end_s=rng.choice(instants))
        part = Part(**span_arguments(span))
        try:
            expected = frame_range(Path("clip.mp4"), times, part)
        except ValueError:
            expected = None
        try:
            found = steady_range(span, fps, frames)
        except ValueError:
            found = None
        assert found == expected, (span, fps, frames)
