"""The source of training samples: split, mixed, encoded, and stopped when too much of it is bad."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refalign_ext.data.batch import EncodedSample
from refalign_ext.data.cache.files import CacheError
from refalign_ext.data.clip_set import ClipSet, open_clip_set
from refalign_ext.data.hashing import hash64
from refalign_ext.data.loading import bad_clips
from refalign_ext.data.loading.source import ClipSource
from refalign_ext.data.manifest_file import write_manifest
from refalign_ext.data.materialise.run import materialise
from refalign_ext.data.pixels import from_uint8, load_reference, video_uint8
from refalign_ext.data.sampling.sample_spec import Bucket, ReferenceSpec, Sampling
from refalign_ext.data.sampling.split import Split
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan
from tests.helpers.clips import render

BUCKET, SIZE = Bucket(32, 32, 5), (48, 32)


def row(name: str, video: str = "long.mp4", *refs: Reference, **changes: object) -> Clip:
    refs = refs or (Reference("regular", image="a.png"), Reference("cross", image="b.png"))
    return Clip(name, "custom", VideoSpan(video), f"about {name}", (Subject("1", refs=refs),), **changes)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("media")
    render(root / "long.mp4", 12, size=SIZE)
    render(root / "tall.mp4", 7, size=(32, 64))
    render(root / "short.mp4", 4, size=SIZE)
    (root / "text.mp4").write_text("not a video")
    (root / "text.png").write_text("not a picture")
    Image.new("RGB", (20, 30), "red").save(root / "a.png")
    Image.new("RGB", (30, 20), "blue").save(root / "b.png")
    return root


@pytest.fixture
def folder(media: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(media, tmp_path / "data"))


def clip_set(folder: Path, *rows: Clip, name: str = "data.jsonl") -> ClipSet:
    write_manifest(folder / name, rows)
    return open_clip_set(folder / name)


def encode(videos: list[torch.Tensor]) -> list[torch.Tensor]:
    return [video.mean(dim=(2, 3), keepdim=True) for video in videos]


def features(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(2)[:, :, ::400].clone()


def make(*sets: ClipSet, **changes: object) -> ClipSource:
    sampling = changes.pop("sampling", Sampling((BUCKET,), seed=3))
    return ClipSource(sets, sampling, **{"encode": encode, "features": features, **changes})


def at(source: ClipSource, *positions: int) -> list[EncodedSample]:
    """Samples, asked for one at a time."""
    return [source.samples(0, range(position, position + 1))[0] for position in positions]


def same(one: EncodedSample, other: EncodedSample) -> bool:
    tensors = ("latents", "references", "features")
    is_same = all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
    return is_same and (one.name, one.prompt) == (other.name, other.prompt)


def test_samples_are_encoded_pixels_of_the_choice(folder: Path) -> None:
    clips = clip_set(folder, row("a", "long.mp4", Reference("cross", image="b.png")))
    sampling = Sampling((BUCKET,), clip_variants=1)
    (sample,) = make(clips, sampling=sampling).samples(0, range(1))
    video = from_uint8(video_uint8(clips, 0, clips[0], BUCKET, 0, sampling))
    picture = load_reference(clips, 0, clips[0], ReferenceSpec(0, 0, None), BUCKET, sampling)
    assert (sample.name, sample.prompt) == ("a", "about a")
    assert torch.equal(sample.latents, encode([video])[0])
    assert torch.equal(sample.references, encode([picture[:, None]])[0])
    assert torch.equal(sample.features, features(picture[None]))
    assert make(clips, features=None).samples(0, range(1))[0].features is None


def test_every_clip_comes_once_per_epoch_and_positions_decide(folder: Path) -> None:
    clips = clip_set(folder, *(row(name) for name in "abcd"))
    source = make(clips, batch_size=2)
    samples = [sample for start in range(0, 12, 2) for sample in source.samples(0, range(start, start + 2))]
    names = [sample.name for sample in samples]
    assert [sorted(names[start : start + 4]) for start in (0, 4, 8)] == [list("abcd")] * 3
    assert names[:4] != names[4:8] or names[4:8] != names[8:]
    # Resumed, out of turn, one at a time, or on the second of two ranks: the same.
    assert all(map(same, make(clips, batch_size=2).samples(5, range(6, 8)), samples[6:8]))
    assert all(map(same, source.samples(5, range(2, 4)), samples[2:4]))
    order = (0, 1, 2, 7, 3)
    assert all(map(same, at(make(clips), *order), [samples[position] for position in order]))
    second = make(clips, batch_size=2, data_rank=1, data_size=2)
    for start in (2, 6, 10):
        assert all(map(same, second.samples(0, range(start, start + 2)), samples[start : start + 2]))
    other = make(clips, sampling=Sampling((BUCKET,), seed=4))
    assert [sample.name for sample in at(other, *range(12))] != names


def test_batches_are_fetched_ahead_and_not_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = clip_set(folder, *(row(name) for name in "abcdefg"))
    started = []
    original = ClipSource._start
    monkeypatch.setattr(ClipSource, "_start", lambda self, of: started.append(of.start) or original(self, of))
    plain = at(make(clips), *range(10))
    started.clear()
    source = make(clips, workers=2, start_method="fork")
    assert all(map(same, at(source, *range(5)), plain[:5]))
    assert started == [0]
    assert all(map(same, at(source, 8, 9), plain[8:]))
    assert started == [0, 8]
    source.close()
    assert same(at(source, 3)[0], plain[3])
    source.close()


def test_a_continued_run_of_another_batch_size_keeps_batches_of_one_bucket(folder: Path) -> None:
    buckets = (Bucket(32, 32, 5), Bucket(16, 32, 5))
    clips = clip_set(folder, *(row(f"{n}", "tall.mp4" if n % 2 else "long.mp4") for n in range(10)))
    source = make(clips, sampling=Sampling(buckets), batch_size=4, encode=lambda videos: videos)
    for start in range(6, 40, 4):
        assert len({sample.latents.shape for sample in source.samples(0, range(start, start + 4))}) == 1


def test_buckets_follow_the_clips(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    buckets = (Bucket(32, 32, 9), Bucket(32, 32, 5), Bucket(16, 32, 5))
    clips = clip_set(folder, row("long"), row("tall", "tall.mp4"), row("short", "short.mp4"))
    with caplog.at_level(logging.INFO):
        source = make(clips, sampling=Sampling(buckets), encode=lambda videos: videos)
        shapes = {sample.name: tuple(sample.latents.shape) for sample in at(source, *range(8))}
    assert shapes == {"long": (3, 9, 32, 32), "tall": (3, 5, 32, 16)}
    assert "2 of 3 clips (1 are too short for every bucket)" in caplog.text


def test_several_sets_are_mixed(folder: Path) -> None:
    first = clip_set(folder, row("a"), row("b"))
    second = clip_set(folder, row("c"), name="more.jsonl")
    names = Counter(sample.name for sample in at(make(first, second), *range(30)))
    assert names["c"] == pytest.approx(10, abs=5)
    stages = make(first, second, mix=(0.6, 0.4), schedule="stages", total=20)
    names = [sample.name for sample in at(stages, *range(24))]
    assert set(names[:12]) == {"a", "b"} and set(names[12:]) == {"c"}
    for mix in ((1.0,), (0.6, 0.0)):
        with pytest.raises(ValueError, match="data_mix"):
            make(first, second, mix=mix)


def test_a_packed_folder_gives_the_samples_of_its_manifest(folder: Path) -> None:
    clips = clip_set(folder, *(row(f"{n}") for n in range(9)))
    materialise(folder / "data.jsonl", folder / "packed", pack=True, shard_size=2)
    packed = open_clip_set(folder / "packed")
    shards = {packed[row].id: shard for shard, rows in enumerate(packed.shard_ranges()) for row in rows}
    assert len(set(shards.values())) > 2
    fixed = Sampling((BUCKET,), clip_variants=1, reference_variants=1, cross_pairs=0.0)

    def samples(clips: ClipSet) -> list[EncodedSample]:
        return at(make(clips, sampling=fixed, mixed_shards=1), *range(18))

    from_shards, from_files = samples(packed), {sample.name: sample for sample in samples(clips)}
    assert all(same(sample, from_files[sample.name]) for sample in from_shards)
    for epoch in (from_shards[:9], from_shards[9:]):
        assert {sample.name for sample in epoch} == from_files.keys()
        visited = [shards[sample.name] for sample in epoch]
        changes = sum(one != other for one, other in zip(visited, visited[1:]))
        assert changes == len(set(visited)) - 1  # one shard after the other
    assert [sample.name for sample in from_shards[:9]] != sorted(from_files)


def test_bad_clips_are_left_out_or_replaced_counted_and_named_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clips = clip_set(
        folder,
        row("good"),
        row("better"),
        row("text", "text.mp4"),
        row("absent", "absent.mp4"),
        row("picture", "long.mp4", Reference("cross", image="text.png")),
    )
    with caplog.at_level(logging.WARNING):
        source = make(clips)
        samples, again = at(source, *range(20)), at(source, *range(20))
    assert all(map(same, samples, again))
    assert {sample.name for sample in samples} == {"good", "better"}
    assert source.bad_clips == 1
    skipped = [message for message in caplog.messages if message.startswith("skipping clip")]
    assert len(skipped) == 3
    for name, reason in (("text", "cannot be decoded"), ("absent", "absent.mp4"), ("picture", "text.png")):
        assert sum(f"clip {name}" in message and reason in message for message in skipped) == 1
    assert "2 of 5 clips cannot be used" in caplog.text
    assert "data.jsonl, row 3; " in caplog.text and "data.jsonl, row 4" in caplog.text


def test_nothing_usable_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.jsonl: no clip can be used: .* 1 cannot .* 1 are too short"):
        make(clip_set(folder, row("a", "text.mp4"), row("b", "short.mp4"))).prepare()
    bad = Reference("cross", image="text.png")
    source = make(clip_set(folder, row("a", "long.mp4", bad), row("b", "long.mp4", bad)))
    with pytest.raises(ValueError, match=r"data\.jsonl: none of 2 clips tried for position 0 .*text\.png"):
        source.samples(0, range(1))
    (folder / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl has no clips"):
        make(open_clip_set(folder / "empty.jsonl")).prepare()


def test_too_many_bad_clips_stop_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_clips, "LEAST_TRIED", 6)
    bad = Reference("cross", image="text.png")
    clips = clip_set(folder, *(row(f"{n}", "long.mp4", *([bad] if n < 3 else [])) for n in range(12)))
    with pytest.raises(ValueError, match=r"of the \d+ clips tried .* max_bad_share 0.1: [012]: .*text.png"):
        at(make(clips), *range(40))
    patient = make(clips, max_bad_share=0.6)
    at(patient, *range(40))
    assert patient.bad_clips == 3
    videos = ["text.mp4"] * 4 + ["long.mp4"] * 8
    broken = clip_set(folder, *(row(f"{n}", video) for n, video in enumerate(videos)), name="b.jsonl")
    with pytest.raises(ValueError, match="max_bad_share 0.1 .*of 12 clips 4 cannot be used.*`data check`"):
        make(broken).prepare()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_breaks_stops_training_at_once(folder: Path, workers: int) -> None:
    class Damaged:
        def video(self, clip_id: str, bucket: Bucket, cut: int) -> None:
            raise CacheError("chunk-000003.safetensors is damaged: delete it")

    settings = {"workers": workers, "max_bad_share": 1.0, "start_method": "fork"}
    source = make(clip_set(folder, row("a"), row("b")), caches=[Damaged()], **settings)
    with pytest.raises(ValueError, match="^chunk-000003.safetensors is damaged: delete it$"):
        source.samples(0, range(1))
    assert source.bad_clips == 0
    source.close()


def holds(split: Split, group: str) -> bool:
    return bool(split.contains(np.array([hash64(group)], np.uint64))[0])


def test_training_and_validation_share_no_group(folder: Path) -> None:
    groups, rows = [f"g{n % 12}" for n in range(24)], []
    for number, group in enumerate(groups):
        cross = [Reference("cross", image="b.png", source_group=f"g{n}") for n in range(3)]
        by_id = Reference("cross", image="b.png", source_id=f"{(number + 1) % 24}")
        refs = (Reference("regular", image="a.png"), *cross, by_id)
        rows.append(row(f"{number}", "long.mp4", *refs, group_id=group))
    clips, seen = clip_set(folder, *rows), []
    for part in ("train", "validation"):
        split, owners = Split(0.4, 1, part), set()
        source = make(clips, split=split, sampling=Sampling((BUCKET,), cross_pairs=0.8))
        source.prepare()
        seen.append({rows[number].group for number in np.concatenate(source._sets[0].rows)})
        loader = source._start(range(1))
        for (sample,) in islice(loader, 60):
            assert not sample.failures
            clip = rows[sample.spec.row]
            for spec in sample.spec.references:
                shown = clip.subjects[0].refs[spec.reference]
                by_id = rows[int(shown.source_id)].group if shown.source_id else None
                owners.add(by_id or shown.source_group or clip.group)
        assert len(owners) > 1 and all(holds(split, group) for group in owners | seen[-1])
    train, validation = seen
    assert train and validation and not train & validation and train | validation == set(groups)


def test_clips_whose_references_are_all_on_the_other_side_are_left_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split = Split(0.5, 0, "train")
    here = [f"g{n}" for n in range(40) if holds(split, f"g{n}")]
    there = [f"g{n}" for n in range(40) if not holds(split, f"g{n}")]

    def cross(name: str, **source: str) -> Clip:
        return row(name, "long.mp4", Reference("cross", image="b.png", **source), group_id=here[0])

    lost, kept = cross("lost", source_group=there[0]), cross("kept", source_group=here[1])
    lost_by_id, other = cross("lost too", source_id="other"), row("other", group_id=there[0])
    with caplog.at_level(logging.INFO):
        source = make(clip_set(folder, lost, kept, other, lost_by_id), split=split)
        assert {sample.name for sample in at(source, *range(8))} == {"kept"}
    assert "1 belong to the other side of the split, 2 have all their references on" in caplog.text
    validation = make(clip_set(folder, lost, kept), split=Split(0.0, 0, "validation"))
    with pytest.raises(ValueError, match="no clip can be used for validation"):
        validation.prepare()


def test_clips_that_were_away_are_looked_at_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_clips, "LEAST_TRIED", 2)
    clips = clip_set(folder, *(row(f"{n}") for n in range(4)))
    (folder / "long.mp4").rename(folder / "away.mp4")
    for share, message in ((0.1, "more than max_bad_share"), (1.0, "no clip can be used")):
        with pytest.raises(ValueError, match=message):
            make(clips, max_bad_share=share).prepare()
    (folder / "away.mp4").rename(folder / "long.mp4")
    assert at(make(clips), 0)[0].name in "0123"
