"""Choices and order: functions of seed and position, fair, complete, and never from the other side of a split."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from functools import partial

import numpy as np
import pytest

from refalign_ext.data.hashing import hash64, keyed_generator
from refalign_ext.data.sampling.buckets import assign, make_buckets
from refalign_ext.data.sampling.order import Interleaver, Order, SetOrder
from refalign_ext.data.sampling.sample_spec import (
    Bucket,
    SampleSpec,
    Sampling,
    draw_sample_spec,
    possible_prompts,
    possible_references,
)
from refalign_ext.data.sampling.split import AllowedReferences, Split
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan

BUCKET = Bucket(64, 48, 9)


def reference(pair: str, **changes: object) -> Reference:
    return Reference(pair=pair, image="a.png", **changes)


def clip(*subjects: tuple[Reference, ...], **changes: object) -> Clip:
    people = tuple(Subject(str(number), refs=refs) for number, refs in enumerate(subjects))
    return Clip("a", "custom", VideoSpan("a.mp4"), "p", people, **changes)


def drawn(item: Clip, count: int, **settings: object) -> list[SampleSpec]:
    sampling = Sampling((BUCKET,), **settings)
    return [draw_sample_spec(item, 3, BUCKET, sampling, position) for position in range(count)]


REGULAR, CROSS, GENERATED = reference("regular"), reference("cross"), reference("generated")


def test_generators_depend_on_every_key_and_on_nothing_else() -> None:
    keys = [(1, 2, 3), (1, 23), (12, 3), (1, "2", 3), (1, "2/3"), (3, 2, 1)]
    firsts = {keyed_generator(*key).random() for key in keys}
    assert len(firsts) == len(keys)
    assert keyed_generator(1, 2, 3).random() == keyed_generator(1, 2, 3).random()
    # The numbers themselves are part of what a seed promises, on any machine.
    assert keyed_generator(0, "a", 5).integers(1000, size=3).tolist() == [580, 290, 371]


def test_a_position_decides_everything() -> None:
    item = clip((REGULAR, CROSS), (REGULAR,), (CROSS, GENERATED), prompt_alt=("q", "r"))
    settings = {"prompt_alternatives": True, "reference_dropout": 0.5}
    first, again = drawn(item, 200, **settings), drawn(item, 200, **settings)
    assert first == again
    assert len({choice.clip_variant for choice in first}) == 200
    assert Counter(choice.prompt for choice in first).keys() == {"p", "q", "r"}
    assert drawn(item, 200, **settings, seed=1) != first
    assert {choice.row for choice in first} == {3}


def test_cross_pairs_are_a_share_of_samples_and_the_other_kind_stands_in() -> None:
    both, only_regular, only_cross = (REGULAR, CROSS, GENERATED), (REGULAR,), (CROSS,)
    item = clip(both, both, only_regular, only_cross)

    def pairs(count: int, share: float) -> list[dict[int, str]]:
        """The kind of each subject's reference, by sample."""
        specs = drawn(item, count, cross_pairs=share)
        return [
            {c.subject: item.subjects[c.subject].refs[c.reference].pair for c in s.references} for s in specs
        ]

    found = pairs(1000, 0.3)
    for kinds in found:
        assert kinds[2] == "regular" and kinds[3] == "cross"
        assert (kinds[0] == "regular") == (kinds[1] == "regular")  # drawn for the sample, not for a subject
    assert 250 < sum(kinds[0] != "regular" for kinds in found) < 350
    assert {kinds[0] for kinds in pairs(100, 0.0)} == {"regular"}
    assert {kinds[0] for kinds in pairs(100, 1.0)} == {"cross", "generated"}


def test_references_are_shuffled_dropped_and_limited() -> None:
    item = clip(*[(REGULAR,)] * 5, ())

    def counts(count: int, **settings: object) -> Counter[int]:
        return Counter(len(spec.references) for spec in drawn(item, count, **settings))

    whole = drawn(item, 300)
    assert all(sorted(one.subject for one in spec.references) == [0, 1, 2, 3, 4] for spec in whole)
    firsts = Counter(spec.references[0].subject for spec in whole)
    assert len(firsts) == 5 and min(firsts.values()) > 30
    dropped = counts(600, reference_dropout=0.5)
    assert set(dropped) == {1, 2, 3, 4, 5}
    assert sum(n * count for n, count in dropped.items()) / 600 == pytest.approx(3, abs=0.2)
    assert set(counts(50, reference_dropout=1.0)) == {1} and set(counts(50, max_references=2)) == {2}
    with pytest.raises(ValueError, match="max_references is 9"):
        counts(1, max_references=9)
    with pytest.raises(ValueError, match="clip a has no references"):
        drawn(clip(()), 1)


def test_only_regular_pairs_are_augmented() -> None:
    item = clip((REGULAR,), (CROSS,), (GENERATED,))
    for augment in (True, False):
        for spec in drawn(item, 30, augment=augment):
            augmented = {one.subject for one in spec.references if one.augmentation is not None}
            assert augmented == ({0} if augment else set())


def test_what_can_be_drawn_is_listed_whole() -> None:
    item = clip((REGULAR, CROSS), (REGULAR, REGULAR), prompt_alt=("q",))
    sampling = Sampling(
        (BUCKET,), clip_variants=3, reference_variants=2, prompt_alternatives=True, reference_dropout=0.3
    )
    choices = [draw_sample_spec(item, 0, BUCKET, sampling, position) for position in range(500)]
    assert {choice.clip_variant for choice in choices} == {0, 1, 2}
    assert {choice.prompt for choice in choices} == set(possible_prompts(item, sampling))
    listed = possible_references(item, sampling)
    assert {c for choice in choices for c in choice.references} == set(listed)
    assert len(listed) == len(set(listed)) == 3 * 2 + 1
    endless = Sampling((BUCKET,))
    assert [c.augmentation for c in possible_references(item, endless)] == [None]


def test_buckets_have_the_area_of_the_task_and_divide() -> None:
    buckets = make_buckets((832, 480), (81, 49), (4, 16, 16), (1.0, 9 / 16, 832 / 480))
    assert buckets[0] == Bucket(832, 480, 81) and buckets[1] == Bucket(832, 480, 49)
    assert len(buckets) == 6
    for bucket in buckets:
        assert bucket.width % 16 == bucket.height % 16 == 0
        assert abs(bucket.width * bucket.height / (832 * 480) - 1) < 0.06
    assert make_buckets((48, 48), (9,), (4, 8, 8)) == (Bucket(48, 48, 9),)
    for frames, ratio, message in ((80, 1.0, "bucket_frames"), (81, 0.0, "bucket_ratios")):
        with pytest.raises(ValueError, match=message):
            make_buckets((832, 480), (frames,), (4, 16, 16), (ratio,))


def test_clips_go_to_the_longest_bucket_they_fill_of_the_nearest_shape() -> None:
    wide, tall, short = Bucket(64, 32, 17), Bucket(32, 64, 17), Bucket(64, 32, 9)
    sampling = Sampling((wide, tall, short), stride=2)
    widths, heights = np.array([1920, 1080, 1080, 1920, 640]), np.array([1080, 1920, 1920, 1080, 640])
    frames = np.array([33, 33, 17, 16, 1000])
    found = assign(widths, heights, frames, np.full(5, 30.0), sampling)
    assert found.tolist() == [0, 1, 2, -1, 0]


def set_order(
    counts: list[int],
    batch_size: int,
    shards: list[range] | None = None,
    seed: int = 0,
    mixed_shards: int = 2,
) -> SetOrder:
    shapes = [Bucket(8, 8, number + 1) for number in range(len(counts))]
    buckets = np.concatenate([np.full(count, number) for number, count in enumerate(counts)])
    buckets = np.random.default_rng(5).permutation(buckets)
    shards = [range(len(buckets))] if shards is None else shards
    return SetOrder(buckets, shapes, shards, batch_size, mixed_shards=mixed_shards, seed=seed, name="0")


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_epochs_of_one_bucket_are_different_permutations_whatever_the_batch(batch_size: int) -> None:
    order = Order([set_order([10], batch_size)])
    rows = [order.at(position).row for position in range(60)]
    epochs = [tuple(rows[start : start + 10]) for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 6
    assert rows == [Order([set_order([10], 1)]).at(position).row for position in range(60)]
    assert rows != [Order([set_order([10], batch_size, seed=1)]).at(position).row for position in range(60)]


def test_batches_share_a_bucket_and_every_bucket_walks_through_its_rows() -> None:
    order = Order([set_order([50, 13, 3], 4)])
    entries = [order.at(position) for position in range(66 * 12)]
    for start in range(0, len(entries), 4):
        assert len({entry.bucket for entry in entries[start : start + 4]}) == 1
    for frames, count in ((1, 50), (2, 13), (3, 3)):
        rows = [entry.row for entry in entries if entry.bucket.frames == frames]
        assert len(rows) == pytest.approx(12 * count, abs=4)
        for start in range(0, len(rows) - count + 1, count):
            assert len(set(rows[start : start + count])) == count
    # Entries are found alike from anywhere: nothing depends on what was asked for before.
    fresh = Order([set_order([50, 13, 3], 4)])
    assert [fresh.at(position) for position in range(700, 600, -7)] == [
        entries[p] for p in range(700, 600, -7)
    ]


def test_fallback_rows_are_others_of_the_bucket() -> None:
    order = Order([set_order([100, 6], 2)])
    entries = [order.at(position) for position in range(300)]
    rows = {frames: {entry.row for entry in entries if entry.bucket.frames == frames} for frames in (1, 2)}
    for entry in entries:
        others = set(entry.fallback_rows)
        assert entry.row not in others and len(others) == len(entry.fallback_rows)
        assert len(others) == 5 if entry.bucket.frames == 2 else len(others) >= 7
        assert others <= rows[entry.bucket.frames]


def test_shards_are_read_nearly_in_sequence() -> None:
    shards = [range(start, start + 20) for start in range(0, 400, 20)]
    order = Order([set_order([300, 100], 2, shards, mixed_shards=3)])
    entries = [order.at(position) for position in range(400)]
    rows = [entry.row for entry in entries]
    assert sorted(rows) == list(range(400))
    # Of 20: a few groups of 3, as buckets do not keep exactly the same pace.
    assert max(len({row // 20 for row in rows[start : start + 30]}) for start in range(370)) <= 9
    first = [entry.row for entry in entries if entry.bucket.frames == 1]
    visited = list(dict.fromkeys(row // 20 for row in first))
    assert first != sorted(first) and visited != sorted(visited)


def test_interleaving_is_exact_and_needs_no_walk() -> None:
    interleaver = Interleaver([Fraction(128 * 6, 10), Fraction(128 * 4, 10)], 0, "sets")
    seen = Counter()
    for batch in range(2000):
        stream, ordinal = interleaver.at(batch)
        assert ordinal == seen[stream]
        seen[stream] += 1
    assert seen[0] == pytest.approx(1200, abs=30)
    far = Interleaver([Fraction(128 * 6, 10), Fraction(128 * 4, 10)], 0, "sets")
    stream, ordinal = far.at(10**12)
    assert ordinal == pytest.approx((0.6, 0.4)[stream] * 10**12, abs=128)
    thin = Interleaver([Fraction(1, 1000)], 0, "thin")
    assert [thin.at(batch) for batch in range(3)] == [(0, 0), (0, 1), (0, 2)]


def test_sets_are_mixed_by_share_or_follow_each_other() -> None:
    sets = [set_order([7], 4), set_order([5], 4)]
    mixed = Order(sets, (0.6, 0.4))
    entries = [mixed.at(position) for position in range(1200)]
    parts = [entry.set_index for entry in entries]
    assert all(len(set(parts[start : start + 4])) == 1 for start in range(0, 1200, 4))
    assert sum(parts) / 1200 == pytest.approx(0.4, abs=0.05)
    assert len({tuple(parts[start : start + 40]) for start in range(0, 1200, 40)}) > 5
    first = [entry.row for entry in entries if entry.set_index == 0]
    assert all(sorted(first[start : start + 7]) == list(range(7)) for start in range(0, 600, 7))
    stages = Order(sets, (0.6, 0.4), "stages", total=400)
    parts = [stages.at(position).set_index for position in range(500)]
    assert parts == [0] * 240 + [1] * 260
    second = [stages.at(position).row for position in range(240, 250)]
    assert sorted(second[:5]) == sorted(second[5:]) == list(range(5))


def holds(split: Split, group: str) -> bool:
    return bool(split.contains(np.array([hash64(group)], np.uint64))[0])


def test_groups_are_split_whole_by_chance_alone() -> None:
    groups = np.array([hash64(f"group {n}") for n in range(20000)], np.uint64)
    train, validation = (
        Split(0.05, 3, "train").contains(groups),
        Split(0.05, 3, "validation").contains(groups),
    )
    assert (train ^ validation).all()
    assert validation.mean() == pytest.approx(0.05, abs=0.006)
    other = Split(0.05, 4, "validation").contains(groups)
    assert (other & validation).mean() < 0.01
    assert Split(0.0, 3, "train").contains(groups).all() and Split(0.3, 3, "all").contains(groups).all()
    assert not Split(0.0, 3, "validation").contains(groups).any()


def test_references_from_the_other_side_are_never_used() -> None:
    split = Split(0.5, 0, "train")
    names = [f"g{n}" for n in range(100)]
    here = next(name for name in names if holds(split, name))
    there = next(name for name in names if not holds(split, name))
    ids, groups = (np.array([*map(hash64, names)], np.uint64) for names in (("b", "c"), (there, here)))
    rule = AllowedReferences(split, ids, groups)
    of_groups = [reference("cross", source_group=group) for group in (there, here)]
    # Of the last the group is not known: it is one of its own.
    of_ids = [reference("cross", source_id=name) for name in ("b", "c", "a", there)]
    item = clip((*of_groups, *of_ids, REGULAR), group_id=here)
    verdicts = [rule.allows(item, one) for one in item.subjects[0].refs]
    assert verdicts == [False, True, False, True, True, False, True]
    sampling, allowed = Sampling((BUCKET,)), partial(rule.allows, item)
    specs = [draw_sample_spec(item, 0, BUCKET, sampling, p, allowed=allowed) for p in range(300)]
    used = {spec.references[0].reference for spec in specs}
    assert used == {1, 3, 4, 6}
    only = clip((reference("cross", source_group=there),), group_id=here)
    with pytest.raises(ValueError, match="no references on its side of the split"):
        draw_sample_spec(only, 0, BUCKET, sampling, 0, allowed=lambda one: rule.allows(only, one))
