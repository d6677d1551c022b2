"""How long a clip is: one answer from index, statistics, check, converter and decoder; and the index, kept in a file."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from refalign_ext.data import clip_index
from refalign_ext.data.check.row import check_row
from refalign_ext.data.clip_index import (
    BAD_ROW,
    BAD_VIDEO,
    USABLE,
    ClipFacts,
    clip_index_paths,
    measure,
    open_clip_index,
)
from refalign_ext.data.clip_set import ClipSet, open_clip_set
from refalign_ext.data.convert.folder import convert_folder
from refalign_ext.data.decoding import read_clip
from refalign_ext.data.hashing import hash64
from refalign_ext.data.length import Length
from refalign_ext.data.manifest_file import write_manifest
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan
from refalign_ext.data.spans import frame_range, steady_range
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


TEN = [VideoSpan("clip.mp4", start_frame=number) for number in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    render(root / "clip.mp4", FRAMES)
    Image.new("RGB", (40, 40), "red").save(root / "ref.png")
    return root


def rows_of(folder: Path, *spans: VideoSpan, name: str = "rows.jsonl") -> ClipSet:
    subjects = (Subject("1", refs=(Reference("regular", image="ref.png"),)),)
    clips = [Clip(f"{n}", "custom", span, "a box", subjects, group_id="g") for n, span in enumerate(spans)]
    write_manifest(folder / name, clips)
    return open_clip_set(folder / name)


def is_longest(frames: int, can_be: Callable[[int], bool]) -> bool:
    return (frames == 0 or can_be(frames)) and not can_be(frames + 1)


def decodes(folder: Path, span: VideoSpan, frames: int) -> bool:
    try:
        return read_clip(folder / span.path, frames, (8, 8), span=span).shape[1] == frames
    except ValueError:
        return False


def is_sound(clips: ClipSet, frames: int) -> bool:
    findings, _ = check_row(clips, 0, length=Length(frames))
    return not any(finding.level == "error" for finding in findings)


def is_converted(folder: Path, span: dict[str, float], frames: int) -> bool:
    row = {"video": "clip.mp4", "prompt": "a box", "references": ["ref.png"], **span}
    (folder / "table.jsonl").write_text(json.dumps(row))
    try:
        convert_folder(folder / "table.jsonl", folder / "converted.jsonl", length=Length(frames))
    except ValueError:
        return False
    clips = open_clip_set(folder / "converted.jsonl")
    video = clips[0].video
    told = measure(clips, 0, video, opens_files=False).frames
    return is_longest(told, lambda frames: decodes(folder, video, frames))


@pytest.mark.parametrize(("span", "frames"), SPANS, ids=[str(span) for span, _ in SPANS])
def test_all_agree_with_the_decoder_on_how_long_a_span_is(
    folder: Path, span: dict[str, Any], frames: int
) -> None:
    video = VideoSpan("clip.mp4", **span)
    clips = rows_of(folder, video)
    records = open_clip_index(clips)
    assert is_longest(frames, lambda count: decodes(folder, video, count))
    assert records["frames"].tolist() == [frames]
    assert records["state"].tolist() == [USABLE if frames else BAD_VIDEO]
    assert collect_stats(clips).numbers["frames"].sum() == frames
    assert is_longest(frames, lambda count: is_sound(clips, count))
    assert is_longest(frames, lambda count: is_converted(folder, span, count))


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
        try:
            expected = frame_range(Path("clip.mp4"), times, span)
        except ValueError:
            expected = None
        try:
            found = steady_range(span, fps, frames)
        except ValueError:
            found = None
        assert found == expected, (span, fps, frames)


@pytest.fixture
def clips(tmp_path: Path) -> ClipSet:
    """Ten rows of one file."""
    render(tmp_path / "clip.mp4", 10)
    return rows_of(tmp_path, *TEN)


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_every_clip_is_known_and_the_index_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "text.mp4").write_text("not a video")
    spans = [
        VideoSpan("none.mp4", start_frame=5, end_frame=45, fps=25.0, width=640, height=360),
        VideoSpan("clip.mp4", start_s=0.5, end_s=1.0, crop_xyxy=(0, 0, 16, 32)),
        VideoSpan("clip.mp4", start_frame=4),
        VideoSpan("text.mp4"),
    ]
    path = rows_of(folder, *spans).path
    with path.open("a") as file:
        file.write("{}\n")
    clips = open_clip_set(path)
    found = open_clip_index(clips)
    assert found["state"].tolist() == [USABLE] * 3 + [BAD_VIDEO, BAD_ROW]
    assert found[["width", "height", "frames", "fps"]].tolist()[:3] == [
        (640, 360, 40, 25.0),
        (16, 32, 4, 8.0),
        (64, 48, 16, 8.0),
    ]
    assert found["group"][0] == hash64("g") and found["id"][1] == hash64("1") and found["is_free"][0]
    assert sum(message.startswith("skipping ") for message in caplog.messages) == 2
    index = pickle.loads(pickle.dumps(partial(clip_index._index_rows, clips, clip_index._measured_records())))
    assert index(range(5))[0].tobytes() == found.tobytes()
    monkeypatch.setattr(clip_index, "measure", refuse)
    again = open_clip_index(clips)
    assert isinstance(again, np.memmap) and again.tobytes() == found.tobytes()
    monkeypatch.undo()
    assert len(open_clip_index(rows_of(folder, spans[0]))) == 1  # another manifest, another index


def test_a_download_that_has_ended_since_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    whole = (folder / "clip.mp4").read_bytes()
    (folder / "half.mp4").write_bytes(whole[: len(whole) // 2])
    clips = rows_of(
        folder, *(VideoSpan(name) for name in ("clip.mp4", "half.mp4", "missing.mp4", "never.mp4"))
    )
    assert open_clip_index(clips)["state"].tolist() == [USABLE, *[BAD_VIDEO] * 3]
    (folder / "half.mp4").write_bytes(whole)
    (folder / "missing.mp4").write_bytes(whole)
    assert open_clip_index(clips, tries_bad_again=False)["state"].tolist() == [USABLE, *[BAD_VIDEO] * 3]
    for _ in range(2):
        found = open_clip_index(clips)
        assert found["state"].tolist() == [USABLE] * 3 + [BAD_VIDEO]
        assert len(set(found["frames"][:3].tolist())) == 1
    assert sum("2 clips can be used that could not before" in text for text in caplog.messages) == 1
    opened: list[int] = []
    original = clip_index.measure
    monkeypatch.setattr(clip_index, "measure", lambda *given: opened.append(given[1]) or original(*given))
    assert isinstance(open_clip_index(clips), np.memmap) and opened == []  # what is missing is not opened


def test_an_interrupted_index_goes_on(clips: ClipSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_index, "_CHUNK", 3)
    original, measured = clip_index.measure, []

    def failing(clip_set: ClipSet, row: int, span: VideoSpan) -> ClipFacts:
        if row == 7 and row not in measured:
            measured.append(row)
            raise KeyboardInterrupt
        measured.append(row)
        return original(clip_set, row, span)

    monkeypatch.setattr(clip_index, "measure", failing)
    with pytest.raises(KeyboardInterrupt):
        open_clip_index(clips)
    (path,) = clip_index_paths(clips)
    part = path.with_name(path.name + ".part")
    assert not path.exists()
    part.write_bytes(part.read_bytes() + b"half a record")
    measured.clear()
    measured.append(7)
    found = open_clip_index(clips)
    assert measured[1:] == [6, 7, 8, 9]
    assert (found["state"] == USABLE).all() and len(set(found["id"].tolist())) == 10
    assert not part.exists()


def test_files_that_have_not_changed_are_not_opened_for_another_manifest(
    clips: ClipSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, folder = open_clip_index(clips), clips.path.parent
    render(folder / "new.mp4", 8)
    opened: list[int] = []
    original = clip_index.measure
    monkeypatch.setattr(clip_index, "measure", lambda *given: opened.append(given[1]) or original(*given))
    more = rows_of(folder, VideoSpan("new.mp4"), *TEN)
    assert open_clip_index(more)["frames"].tolist() == [8, *found["frames"].tolist()]
    assert opened == [0]
    render(folder / "clip.mp4", 12)
    clips = rows_of(folder, VideoSpan("clip.mp4"))
    assert open_clip_index(clips)["frames"].tolist() == [12]


@pytest.mark.parametrize("has_fallback", [False, True])
def test_a_set_that_cannot_be_written_beside(
    clips: ClipSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    has_fallback: bool,
) -> None:
    original, fallback = clip_index._continued, tmp_path / "run" / "indexes" if has_fallback else None
    monkeypatch.setattr(
        clip_index,
        "_continued",
        lambda path, mark: refuse() if path.parent == tmp_path else original(path, mark),
    )
    found = open_clip_index(clips, fallback_dir=fallback)
    assert (found["state"] == USABLE).all() and isinstance(found, np.memmap) == has_fallback
    assert ("cannot be kept" in caplog.text) == (not has_fallback)
    if fallback:
        assert list(fallback.iterdir()) == clip_index_paths(clips, fallback)[1:]
        monkeypatch.setattr(clip_index, "measure", refuse)
        assert open_clip_index(clips, fallback_dir=fallback).tobytes() == found.tobytes()


def test_an_index_needs_no_locks_but_does_not_share_a_file(
    clips: ClipSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(clip_index.fcntl, "flock", refuse)
    assert isinstance(open_clip_index(clips), np.memmap)
    (path,) = clip_index_paths(clips)
    path.unlink()
    monkeypatch.undo()
    with clip_index._continued(path.with_name(path.name + ".part"), bytes(40)):
        assert not isinstance(open_clip_index(clips), np.memmap)
    assert "cannot be kept" in caplog.text


def test_damaged_indexes_are_made_anew(clips: ClipSet) -> None:
    good, (path,) = open_clip_index(clips).tobytes(), clip_index_paths(clips)
    for damage in (b"", b"RACLIP1\n", path.read_bytes()[:-5], b"x" * 500):
        path.write_bytes(damage)
        assert open_clip_index(clips).tobytes() == good
