"""Loading: the same bytes whatever loads them, exact resumption, and bad clips replaced without upsetting anything."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from refalign_ext.data.clip_set import ClipSet, open_clip_set
from refalign_ext.data.decoding import read_clip
from refalign_ext.data.loading.dataset import ClipDataset, LoadedSample
from refalign_ext.data.loading.loader import ClipLoader
from refalign_ext.data.manifest_file import write_manifest
from refalign_ext.data.pixels import from_uint8, video_uint8
from refalign_ext.data.sampling.order import Order, SetOrder
from refalign_ext.data.sampling.sample_spec import Bucket, Sampling
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan
from tests.helpers.clips import render

BUCKETS = (Bucket(32, 32, 5), Bucket(48, 32, 5))
CLIPS = 11
SAMPLING = Sampling(BUCKETS, prompt_alternatives=True, reference_dropout=0.3, seed=5)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ClipSet:
    """Clips of two shapes with a regular and a cross reference each; the files of row 4 are broken."""
    root, rows = tmp_path_factory.mktemp("clips"), []
    for row in range(CLIPS):
        render(root / f"{row}.mp4", 12 + row, size=(48, 32))
        Image.new("RGB", (20 + row, 30), (10 * row, 60, 200)).save(root / f"{row}.png")
        own, other = (Reference("regular", image=f"{row}.png"), Reference("cross", image="0.png"))
        subjects = (Subject("1", refs=(own, other)), Subject("2", refs=(own,)))
        span = VideoSpan(f"{row}.mp4")
        rows.append(Clip(f"clip {row}", "custom", span, f"prompt {row}", subjects, prompt_alt=("another",)))
    (root / "4.mp4").write_text("not a video")
    write_manifest(root / "data.jsonl", rows)
    return open_clip_set(root / "data.jsonl")


@pytest.fixture(scope="module")
def dataset(clips: ClipSet) -> ClipDataset:
    return ClipDataset([clips], SAMPLING)


def make_order() -> Order:
    buckets = np.arange(CLIPS) % 3 // 2
    return Order([SetOrder(buckets, BUCKETS, [range(CLIPS)], 2, mixed_shards=1, seed=5, name="0")])


def load(dataset: ClipDataset, **options: Any) -> ClipLoader:
    return ClipLoader(dataset, make_order(), batch_size=2, **{"start_method": "fork", **options})


def content(sample: LoadedSample) -> tuple:
    """Everything that a sample is."""
    tensors = (sample.pixels, *(one.pixels for one in sample.references))
    pixels = tuple(tensor.numpy().tobytes() for tensor in tensors)
    return sample.entry, sample.spec, sample.clip, sample.failures, pixels


def by_position(loader: Iterator[list[LoadedSample]], batches: int) -> dict[int, tuple]:
    samples = [sample for _ in range(batches) for sample in next(loader)]
    return {sample.entry.position: content(sample) for sample in samples}


@pytest.fixture(scope="module")
def expected(dataset: ClipDataset) -> dict[int, tuple]:
    """Loaded one by one, in reverse."""
    order = make_order()
    return {position: content(dataset[order.at(position)]) for position in reversed(range(40))}


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 1), (4, 0)])
def test_neither_ranks_nor_workers_change_a_sample(
    dataset: ClipDataset, expected: dict[int, tuple], ranks: int, workers: int
) -> None:
    found = {}
    for rank in range(ranks):
        loader = load(dataset, data_rank=rank, data_size=ranks, workers=workers)
        mine = by_position(loader, 20 // ranks)
        assert [position // 2 % ranks for position in mine] == [rank] * len(mine)
        found |= mine
        loader.close()
    assert found == expected
    for start in range(0, 40, 2):
        assert found[start][0].bucket == found[start + 1][0].bucket


@pytest.mark.parametrize(
    ("stop", "first_workers", "then_workers"), [(3, 0, 2), (3, 2, 0), (3, 2, 2), (6, 2, 2)]
)
def test_loading_goes_on_exactly_where_it_stopped(
    dataset: ClipDataset, expected: dict[int, tuple], stop: int, first_workers: int, then_workers: int
) -> None:
    # After 3 batches, in the middle of an epoch with others already fetched; after 6, across its end (11 rows).
    one = load(dataset, workers=first_workers)
    found = by_position(one, stop)
    assert one.position == 2 * stop
    one.close()
    for rank in range(2):  # and on another number of ranks
        other = load(dataset, data_rank=rank, data_size=2, start=2 * stop, workers=then_workers)
        found |= by_position(other, 4)
        other.close()
    assert found == {position: expected[position] for position in range(2 * stop + 16)}


def test_spawned_workers_give_the_same(dataset: ClipDataset, expected: dict[int, tuple]) -> None:
    loader = load(pickle.loads(pickle.dumps(dataset)), workers=1, start_method="spawn")
    found = by_position(loader, 4)
    loader.close()
    assert found == {position: expected[position] for position in range(8)}


def test_a_bad_clip_is_replaced_by_its_position(expected: dict[int, tuple]) -> None:
    replaced = {position: item for position, item in expected.items() if item[0].row == 4}
    assert len(replaced) >= 3
    for entry, spec, clip, failures, _ in replaced.values():
        assert spec.row != 4 and spec.row in entry.fallback_rows and clip == f"clip {spec.row}"
        assert spec.bucket == entry.bucket
        assert [(failure.row, failure.clip) for failure in failures] == [(4, "clip 4")]
        assert "4.mp4" in failures[0].reason and "cannot be decoded" in failures[0].reason
    assert len({item[1].row for item in replaced.values()}) > 1  # not always the same stand-in
    for entry, spec, _, failures, _ in expected.values():
        if entry.row != 4:
            assert spec.row == entry.row and not failures


def test_a_variant_follows_from_its_clip_and_its_number(clips: ClipSet) -> None:
    def variant(row: int, number: int, **settings: Any) -> torch.Tensor:
        sampling = Sampling(BUCKETS, **{"seed": 5, **settings})
        return from_uint8(video_uint8(clips, row, clips[row], BUCKETS[0], number, sampling))

    assert len({variant(9, number).numpy().tobytes() for number in range(30)}) > 8
    assert torch.equal(variant(9, 7), variant(9, 7))
    assert any(not torch.equal(variant(9, number), variant(9, number, seed=6)) for number in range(5))
    path = clips.media(9, "9.mp4")
    for settings in ({"stride": 3}, {"fps": 4.0}, {}):
        possible = [read_clip(path, 5, (32, 32), place / 40, **settings) for place in range(40)]
        found = variant(9, 1, **settings)
        assert any((found - one).abs().max() < 1 / 127 for one in possible)


class Cache:
    """Has the video and the references of some rows."""

    def __init__(self, names: set[str], has_features: bool) -> None:
        self.names, self.has_features = names, has_features

    def video(self, clip_id: str, bucket: Bucket, variant: int) -> torch.Tensor | None:
        return torch.full((1,), variant % 7.0) if clip_id in self.names else None

    def reference(self, clip_id: str, bucket: Bucket, spec: object) -> tuple | None:
        features = torch.ones(2) if self.has_features else None
        return (torch.zeros(1), features) if clip_id in self.names else None


def test_what_is_cached_is_not_decoded(clips: ClipSet) -> None:
    order = make_order()
    for has_features in (True, False):
        cache = Cache({"clip 4", "clip 5"}, has_features)
        dataset = ClipDataset([clips], SAMPLING, caches=[cache])
        for position in range(30):
            sample = dataset[order.at(position)]
            is_cached = sample.clip in cache.names
            assert not sample.failures  # row 4 needs no file
            assert (sample.pixels is None) == is_cached == (sample.latents is not None)
            for one in sample.references:
                # Features that are missing are computed from pixels.
                assert (one.pixels is None) == (is_cached and has_features)
                assert (one.latents is not None) == is_cached
    without = ClipDataset([clips], SAMPLING, caches=[Cache({"clip 4"}, False)], needs_features=False)
    entry = next(order.at(position) for position in range(40) if order.at(position).row == 4)
    assert all(one.pixels is None and one.features is None for one in without[entry].references)


class Deadly(ClipDataset):
    """Kills its own process."""

    def __getitem__(self, entry: object) -> LoadedSample:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_worker_that_dies_is_a_clear_error(clips: ClipSet, monkeypatch: pytest.MonkeyPatch) -> None:
    # How long torch waits for a batch before it looks after its workers: 5 s.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    loader = load(Deadly([clips], SAMPLING), workers=1)
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(OSError, match="a loader process was killed .*--data_workers"):
        next(loader)
    loader.close()
    assert signal.getsignal(signal.SIGCHLD) is before  # nothing is raised between batches


def test_workers_leave_it_to_their_parent_when_to_stop(
    dataset: ClipDataset, expected: dict[int, tuple]
) -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    loader = load(dataset, workers=2)
    found = by_position(loader, 1)
    workers = loader._loaded._workers
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked
    for name in ("-TERM", "-INT", "-TERM"):  # from elsewhere, as a terminal or torchrun sends them to all
        subprocess.run(["kill", name, *(str(worker.pid) for worker in workers)], check=True)
    found |= by_position(loader, 5)
    assert found == {position: expected[position] for position in range(12)}
    workers[0].terminate()
    workers[0].join(60)
    assert workers[0].exitcode == 0
    loader.close()
    assert not any(worker.is_alive() for worker in workers)


def test_workers_end_with_their_parent(dataset: ClipDataset) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def train() -> None:
        loader = load(dataset, workers=2)
        next(loader)
        there.send([worker.pid for worker in loader._loaded._workers])
        signal.pause()

    parent = context.Process(target=train)
    parent.start()
    assert here.poll(60)
    workers = here.recv()
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 60
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
