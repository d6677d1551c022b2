"""The judge must be right on real clips before it may judge generated ones, and wrong answers must be found wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from refalign_ext.sprites.judge import METRIC_NAMES, judge_clip, tabulate, wilson
from refalign_ext.sprites.world import (
    BACKGROUNDS,
    Performance,
    SpriteClip,
    SpriteSubject,
    all_subjects,
    render_clip,
    sample_clip,
    sample_reference,
)


def judged(count: int, clips: int, pair: str, size: tuple[int, int] = (48, 48)):
    rng = np.random.default_rng(count)
    answers = {name: [] for name in METRIC_NAMES}
    for _ in range(clips):
        clip = sample_clip(rng, all_subjects(), count)
        video, _ = render_clip(clip, 9, *size)
        references = [sample_reference(rng, p, *size, pair)[1:] for p in clip.performances]
        for name, found in judge_clip(video, clip, references).items():
            answers[name].append(found)
    return tabulate(answers)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_right_on_real_clips(count):
    table = judged(count, 60, "cross")
    for name in ("background", "found", "colors", "pattern", "shape", "motion", "size"):
        assert table[name]["share"] >= 0.99, name
    if count > 1:
        assert table["swapped"]["share"] == 0.0
    assert table["copied_pose"]["share"] < 0.35  # chance is 8 to 17%
    assert table["copied_scale"]["share"] == 0.0


def test_copied_pose_is_seen_in_regular_pairs():
    assert judged(1, 30, "regular")["copied_pose"]["share"] >= 0.95


def test_other_sizes():
    table = judged(1, 10, "cross", size=(64, 96))
    for name in ("background", "found", "colors", "motion", "size"):
        assert table[name]["share"] == 1.0, name


def alone(**changes) -> tuple[SpriteClip, SpriteClip]:
    """A clip and one that differs from it in one respect."""
    subject = SpriteSubject("square", "core", "red", "green")
    truth = Performance(subject, "large", "left", "", 0.3, (0.5, 0.5))
    other = replace(truth, **{k: v for k, v in changes.items() if k != "background"})
    background = changes.get("background", "a grey wall")
    return SpriteClip("a grey wall", (truth,), ""), SpriteClip(background, (other,), "")


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"background": "a sandy beach"}, "background"),
        ({"motion": "up"}, "motion"),
        ({"motion": "right"}, "motion"),
        ({"size": "small"}, "size"),
        ({"subject": SpriteSubject("circle", "core", "red", "green")}, "shape"),
        ({"subject": SpriteSubject("square", "band", "red", "green")}, "pattern"),
        ({"subject": SpriteSubject("square", "core", "red", "blue")}, "colors"),
    ],
)
def test_one_wrong_thing_is_found_wrong_and_nothing_else(change, wrong):
    asked, shown = alone(**change)
    answers = judge_clip(render_clip(shown, 9, 48, 48)[0], asked)
    for name in ("background", "found", "motion", "size", "shape", "colors"):
        assert answers[name] == [name != wrong], name
    assert answers[wrong] == [False]


def test_swapped_colors_are_called_swapped():
    rng = np.random.default_rng(0)
    seen = 0
    while seen < 10:
        clip = sample_clip(rng, all_subjects(), 2)
        first, second = clip.performances
        if first.subject.colors == second.subject.colors:
            continue
        seen += 1
        swapped = SpriteClip(
            clip.background,
            (replace(first, subject=second.subject), replace(second, subject=first.subject)),
            clip.caption,
        )
        answers = judge_clip(render_clip(swapped, 9, 48, 48)[0], clip)
        assert answers["swapped"] == [True, True] and answers["colors"] == [False, False]


def test_empty_and_noise_clips_score_nothing():
    clip, _ = alone()
    for name in BACKGROUNDS:
        empty = render_clip(SpriteClip(name, (), ""), 9, 48, 48)[0]
        answers = judge_clip(empty, clip)
        assert answers["background"] == [name == "a grey wall"]
        assert answers["found"] == answers["colors"] == answers["motion"] == [False]
    noise = np.random.default_rng(0).integers(0, 256, (9, 48, 48, 3), dtype=np.uint8)
    answers = judge_clip(noise, clip)
    assert not (answers["colors"][0] and answers["motion"][0])


def test_intervals():
    share, low, high = wilson(95, 100)
    assert share == 0.95 and low == pytest.approx(0.888, abs=2e-3) and high == pytest.approx(0.978, abs=2e-3)
    table = tabulate({"background": [[True], [False]], "colors": [[True, True]], "swapped": [[None]]})
    assert table["background"]["share"] == 0.5 and table["colors"]["count"] == 2 and table["swapped"] is None
