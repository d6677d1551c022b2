"""The sprite world: what captions may say, which subjects are held out, that rendering matches its truth."""

from __future__ import annotations

import numpy as np
import pytest

from refalign_ext.sprites.world import (
    COLORS,
    HELD_OUT_PALETTES,
    LANES,
    MOTIONS,
    PALETTE,
    PATTERNS,
    REFERENCE_TILT,
    SHAPES,
    TRAVEL,
    all_subjects,
    nearest_color,
    render_clip,
    render_reference,
    sample_clip,
    sample_reference,
    subject_split,
    subjects_of,
    tinted,
)


def test_splits_cover_all_subjects_and_hide_whole_palettes():
    splits = {name: set(subjects_of(name)) for name in ("train", "held_out", "palette")}
    assert set.union(*splits.values()) == set(all_subjects())
    # A stored model was trained on these: another rule would silently test on its training subjects.
    assert {name: len(group) for name, group in splits.items()} == {
        "train": 231,
        "held_out": 57,
        "palette": 72,
    }
    assert not any(subject.colors in HELD_OUT_PALETTES for subject in splits["train"] | splits["held_out"])
    # every single factor is seen in training
    assert {s.shape for s in splits["train"]} == set(SHAPES)
    assert {s.pattern for s in splits["train"]} == set(PATTERNS)
    assert {s.first for s in splits["train"]} == {s.second for s in splits["train"]} == set(COLORS)
    with pytest.raises(ValueError, match="held_out"):
        subjects_of("test")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_captions_never_tell_pattern_or_color(count):
    rng = np.random.default_rng(count)
    for _ in range(50):
        clip = sample_clip(rng, all_subjects(), count)
        words = clip.caption.lower().replace(",", "").replace(".", "").split()
        assert not set(words) & (set(COLORS) | set(PATTERNS))
        for performance in clip.performances:
            assert performance.subject.shape in words and performance.size in words
        assert clip.background in clip.caption
        assert len({p.subject for p in clip.performances}) == count
        assert count == 1 or tuple(p.lane for p in clip.performances) in LANES.values()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_subjects_stay_inside_the_frame_and_apart(count):
    rng = np.random.default_rng(count)
    for _ in range(30):
        clip = sample_clip(rng, all_subjects(), count)
        video, covered = render_clip(clip, 9, 48, 48)
        assert video.shape == (9, 48, 48, 3) and video.dtype == np.uint8
        border = np.concatenate([covered[:, 0], covered[:, -1], covered[:, :, 0], covered[:, :, -1]], 1)
        assert border.max() < 0.75  # the soft edge may touch, the body may not
        # the area is the sum of the subjects' own areas: nobody hides anybody
        alone = 0.0
        for performance in clip.performances:
            single = type(clip)(clip.background, (performance,), clip.caption)
            alone += render_clip(single, 9, 48, 48)[1].sum()
        assert covered.sum() == pytest.approx(alone, rel=0.02)


def test_seeded_and_size_independent():
    first = sample_clip(np.random.default_rng(3), all_subjects(), 2)
    assert first == sample_clip(np.random.default_rng(3), all_subjects(), 2)
    small, large = render_clip(first, 5, 48, 48)[1], render_clip(first, 5, 96, 192)[1]
    assert small[0].sum() / 48**2 == pytest.approx(
        large[0].sum() / 96**2, rel=0.08
    )  # scaled by the shorter side
    with pytest.raises(ValueError, match="1, 2 or 3"):
        sample_clip(np.random.default_rng(0), all_subjects(), 4)


def test_references_show_the_subject_on_white():
    rng = np.random.default_rng(0)
    for subject in all_subjects()[::17]:
        image = render_reference(subject, 48, 48, float(rng.uniform(0, 6)), 0.7)
        assert (image[0] == 255).all() and (image[-1] == 255).all()
        inside = image[image.min(-1) < 250].astype(float)
        palette = np.array([PALETTE[name] for name in COLORS])
        nearest = np.linalg.norm(inside[:, None] - palette, axis=-1).argmin(1)
        shares = np.bincount(nearest, minlength=len(COLORS)) / len(nearest)
        assert {COLORS[i] for i in shares.argsort()[-2:]} == subject.colors


def test_pairs_differ_in_pose():
    clip = sample_clip(np.random.default_rng(1), all_subjects(), 1)
    performance = clip.performances[0]
    _, angle, _ = sample_reference(np.random.default_rng(2), performance, 48, 48, "regular")
    assert angle == performance.angle
    _, angle, _ = sample_reference(np.random.default_rng(2), performance, 48, 48, "cross")
    assert performance.angle == 0 and REFERENCE_TILT[0] <= abs(angle) <= REFERENCE_TILT[1]
    tilted = sample_clip(np.random.default_rng(1), all_subjects(), 1, tilted=True)
    assert REFERENCE_TILT[0] <= abs(tilted.performances[0].angle) <= REFERENCE_TILT[1]
    with pytest.raises(ValueError, match="cross or regular"):
        sample_reference(np.random.default_rng(2), performance, 48, 48, "other")


@pytest.mark.parametrize("count", [1, 2])
def test_ways_begin_and_end_on_the_grid_of_tokens(count):
    rng = np.random.default_rng(count)
    for _ in range(30):
        for performance in sample_clip(rng, all_subjects(), count).performances:
            way = np.array(MOTIONS[performance.motion]) * TRAVEL
            for moment in (-0.5, 0.5):
                place = 48 * (np.array(performance.center) + moment * way)
                assert np.allclose(place % 8, 4)


def test_free_colors_are_new_and_keep_their_names():
    rng = np.random.default_rng(0)
    seen = set()
    for subject in subjects_of("train")[::11]:
        free = tinted(rng, subject)
        assert [nearest_color(rgb) for rgb in free.rgb] == [subject.first, subject.second]
        assert free.rgb != subject.rgb and subject_split(free) == "train"
        seen.add(free.rgb)
    assert len(seen) == len(subjects_of("train")[::11])
    clip = sample_clip(rng, subjects_of("train"), 2, free_colors=True)
    assert all(performance.subject.tints for performance in clip.performances)
    inside = render_reference(clip.performances[0].subject, 48, 48, 0.0, 0.8).reshape(-1, 3)
    for rgb in clip.performances[0].subject.rgb:
        assert (inside == np.array(rgb)).all(1).sum() > 20
