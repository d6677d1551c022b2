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

import av
import numpy as np
import pytest
import torch
from PIL import Image

from refalign_ext.data.clip_set import ClipSet, open_clip_set
from refalign_ext.data.loading.dataset import ClipDataset, LoadedSample
from refalign_ext.data.loading.loader import ClipLoader
from refalign_ext.data.manifest_file import write_manifest
from refalign_ext.data.pixels import from_uint8, video_uint8
from refalign_ext.data.sampling.order import Order, SetOrder
from refalign_ext.data.sampling.sample_spec import Bucket, Sampling
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan

BUCKETS = (Bucket(32, 32, 5), Bucket(48, 32, 5))
CLIPS = 11


def render(path: Path, frames: int, level: int, size: tuple[int, int] = (48, 32)) -> Path:
    """A grey clip, frame n brighter by n than `level`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=8, options={"g": "6", "crf": "8", "preset": "ultrafast"}
        )
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), min(level + number, 255), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ClipSet:
    """Clips of two shapes with a regular and a cross reference each; the files of row 4 are broken."""
    root, rows = tmp_path_factory.mktemp("clips"), []
    for row in range(CLIPS):
        render(root / f"{row}.mp4", 12 + row, 20 * row)
        Image.new("RGB", (20 + row, 30), (10 * row, 60, 200)).save(root / f"{row}.png")
        refs = (
            Reference("regular", image=f"{row}.png"),
            Reference("cross", image=f"{(row + 1) % CLIPS}.png"),
        )
        rows.append(
            Clip(
                f"clip {row}",
                "custom",
                VideoSpan(f"{row}.mp4"),
                f"prompt {row}",
                (Subject("1", refs=refs), Subject("2", refs=refs[:1])),
                prompt_alt=("another",),
            )
        )
    (root / "4.mp4").write_text("not a video")
    write_manifest(root / "data.jsonl", rows)
    return open_clip_set(root / "data.jsonl")


@pytest.fixture
def sampling() -> Sampling:
    return Sampling(BUCKETS, prompt_alternatives=True, reference_dropout=0.3, seed=5)


def make_order(batch_size: int = 2, rows: int = CLIPS) -> Order:
    buckets = np.arange(rows) % 3 // 2
    return Order([SetOrder(buckets, BUCKETS, [range(rows)], batch_size, mixed_shards=1, seed=5, name="0")])


def content(sample: LoadedSample) -> tuple:
    """Everything that a sample is."""
    pictures = tuple(one.pixels.numpy().tobytes() for one in sample.references)
    return (
        sample.entry,
        sample.spec,
        sample.clip,
        sample.pixels.numpy().tobytes(),
        pictures,
        sample.failures,
    )


def by_position(loader: Iterator[list[LoadedSample]], batches: int) -> dict[int, tuple]:
    found = {}
    for _ in range(batches):
        for sample in next(loader):
            found[sample.entry.position] = content(sample)
    return found


@pytest.fixture
def expected(clips: ClipSet, sampling: Sampling) -> dict[int, tuple]:
    """Loaded one by one, in reverse."""
    dataset, order = ClipDataset([clips], sampling), make_order()
    return {position: content(dataset[order.at(position)]) for position in reversed(range(40))}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_neither_ranks_nor_workers_change_a_sample(
    clips: ClipSet, sampling: Sampling, expected: dict[int, tuple], ranks: int, workers: int
) -> None:
    dataset, found = ClipDataset([clips], sampling), {}
    for rank in range(ranks):
        loader = ClipLoader(
            dataset,
            make_order(),
            batch_size=2,
            data_rank=rank,
            data_size=ranks,
            workers=workers,
            start_method="fork",
        )
        mine = by_position(loader, 20 // ranks)
        assert [position // 2 % ranks for position in mine] == [rank] * len(mine)
        found |= mine
        loader.close()
    assert found == expected
    assert {
        len({sample[0].bucket for sample in list(found.values())[at : at + 2]}) for at in range(0, 40, 2)
    } == {1}


@pytest.mark.parametrize(("first_workers", "then_workers"), [(0, 0), (0, 2), (2, 0), (2, 2)])
def test_loading_goes_on_exactly_where_it_stopped(
    clips: ClipSet, sampling: Sampling, expected: dict[int, tuple], first_workers: int, then_workers: int
) -> None:
    dataset = ClipDataset([clips], sampling)
    # After 3 batches, in the middle of an epoch with others already fetched; after 6, across its end (11 rows).
    for stop in (3, 6) if (first_workers, then_workers) == (2, 2) else (3,):
        options = {"batch_size": 2, "start_method": "fork"}
        one = ClipLoader(dataset, make_order(), workers=first_workers, **options)
        before = by_position(one, stop)
        assert one.position == 2 * stop
        one.close()
        after: dict[int, tuple] = {}
        for rank in range(2):  # and on another number of ranks
            other = ClipLoader(
                dataset,
                make_order(),
                data_rank=rank,
                data_size=2,
                start=2 * stop,
                workers=then_workers,
                **options,
            )
            after |= by_position(other, 4)
            other.close()
        last = 2 * stop + 16
        assert sorted(after) == list(range(2 * stop, last))
        assert before | after == {position: expected[position] for position in range(last)}


def test_a_dataset_is_picklable_and_spawned_workers_give_the_same(
    clips: ClipSet, sampling: Sampling, expected: dict[int, tuple]
) -> None:
    dataset = pickle.loads(pickle.dumps(ClipDataset([clips], sampling)))
    loader = ClipLoader(dataset, make_order(), batch_size=2, workers=1)
    found = by_position(loader, 4)
    loader.close()
    assert found == {position: expected[position] for position in range(8)}


def test_a_bad_clip_is_replaced_by_its_position(
    clips: ClipSet, sampling: Sampling, expected: dict[int, tuple]
) -> None:
    replaced = {position: item for position, item in expected.items() if item[0].row == 4}
    assert len(replaced) >= 3
    for entry, spec, clip, _, _, failures in replaced.values():
        assert spec.row != 4 and spec.row in entry.fallback_rows and clip == f"clip {spec.row}"
        assert spec.bucket == entry.bucket
        assert [(failure.set_index, failure.row, failure.clip) for failure in failures] == [(0, 4, "clip 4")]
        assert "4.mp4" in failures[0].reason and "cannot be decoded" in failures[0].reason
    assert len({item[1].row for item in replaced.values()}) > 1  # not always the same stand-in
    for entry, spec, *_, failures in expected.values():
        if entry.row != 4:
            assert spec.row == entry.row and not failures


def test_a_cut_follows_from_its_clip_and_its_number(clips: ClipSet, sampling: Sampling) -> None:
    def load(row: int, variant: int, seed: int = 5) -> torch.Tensor:
        settings = Sampling(BUCKETS, seed=seed)
        return from_uint8(video_uint8(clips, row, clips[row], BUCKETS[0], variant, settings))

    starts = [load(9, variant)[0, 0, 0, 0].item() for variant in range(30)]
    assert len(set(starts)) > 8
    assert torch.equal(load(9, 7), load(9, 7))
    assert any(not torch.equal(load(9, variant), load(9, variant, seed=6)) for variant in range(5))
    steps = from_uint8(torch.tensor([0, 1], dtype=torch.uint8)).diff().item()
    brightness = load(9, 7).mean((0, 2, 3)).diff()
    assert brightness.mean().item() == pytest.approx(steps, rel=0.3)  # frame by frame


def test_fps_and_stride_choose_frames(clips: ClipSet) -> None:
    step = 2 / 255
    for settings, frames in ((Sampling(BUCKETS, stride=3), 3), (Sampling(BUCKETS, fps=4.0), 2)):
        video = from_uint8(video_uint8(clips, 9, clips[9], BUCKETS[0], 1, settings))
        assert video.mean((0, 2, 3)).diff().mean().item() == pytest.approx(frames * step, rel=0.25)


class Cache:
    """Has the video and the references of some rows."""

    def __init__(self, names: set[str], has_features: bool) -> None:
        self.names, self.has_features = names, has_features

    def video(self, clip_id: str, bucket: Bucket, variant: int) -> torch.Tensor | None:
        return torch.full((1,), variant % 7.0) if clip_id in self.names else None

    def reference(
        self, clip_id: str, bucket: Bucket, spec: object
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        if clip_id not in self.names:
            return None
        return torch.zeros(1), torch.ones(2) if self.has_features else None


def test_what_is_cached_is_not_decoded(clips: ClipSet, sampling: Sampling) -> None:
    order = make_order()
    for has_features in (True, False):
        cache = Cache({"clip 4", "clip 5"}, has_features)
        dataset = ClipDataset([clips], sampling, caches=[cache])
        for position in range(30):
            sample = dataset[order.at(position)]
            is_cached = sample.clip in cache.names
            assert not sample.failures  # row 4 needs no file
            assert (sample.pixels is None) == is_cached == (sample.latents is not None)
            for one in sample.references:
                # Features that are missing are computed from pixels.
                assert (one.pixels is None) == (is_cached and has_features)
                assert (one.latents is not None) == is_cached
    without = ClipDataset([clips], sampling, caches=[Cache({"clip 4"}, False)], needs_features=False)
    entry = next(order.at(position) for position in range(40) if order.at(position).row == 4)
    assert all(one.pixels is None and one.features is None for one in without[entry].references)


def test_a_worker_that_dies_is_a_clear_error(clips: ClipSet, sampling: Sampling) -> None:
    loader = ClipLoader(Deadly([clips], sampling), make_order(), batch_size=2, workers=1, start_method="fork")
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(OSError, match="a loader process was killed .*--data_workers"):
        by_position(loader, 1)
    loader.close()
    assert signal.getsignal(signal.SIGCHLD) is before  # nothing is raised between batches


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_leave_it_to_their_parent_when_to_stop(
    clips: ClipSet, sampling: Sampling, expected: dict[int, tuple], method: str
) -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    loader = ClipLoader(
        ClipDataset([clips], sampling), make_order(), batch_size=2, workers=2, start_method=method
    )
    found = by_position(loader, 1)
    workers = loader._loaded._workers
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked
    for name in ("-TERM", "-INT", "-TERM"):  # from elsewhere, as a terminal or torchrun sends them to all
        subprocess.run(["kill", name, *(str(worker.pid) for worker in workers)], check=True)
    found |= by_position(loader, 5)
    assert found == {position: expected[position] for position in range(12)}
    workers[0].terminate()
    workers[0].join(5)
    assert workers[0].exitcode == 0
    loader.close()
    assert not any(worker.is_alive() for worker in workers)


def test_workers_end_with_their_parent(clips: ClipSet, sampling: Sampling) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def train() -> None:
        loader = ClipLoader(
            ClipDataset([clips], sampling), make_order(), batch_size=2, workers=2, start_method="fork"
        )
        next(loader)
        there.send([worker.pid for worker in loader._loaded._workers])
        time.sleep(60)

    parent = context.Process(target=train)
    parent.start()
    assert here.poll(60)
    workers = here.recv()
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Deadly(ClipDataset):
    """Kills its own process."""

    def __getitem__(self, entry: object) -> LoadedSample:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError
