"""Clips from files train alike on any number of ranks and loader processes, resumed anywhere, and cached by many."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from refalign_ext.config import tiny, with_overrides
from refalign_ext.data.batch import EncodedSample
from refalign_ext.data.cache.build import fill_cache
from refalign_ext.data.cache.files import CacheHeader
from refalign_ext.data.cache.names import cache_fingerprint
from refalign_ext.data.cache.reader import LatentCache
from refalign_ext.data.cache.rows import RowLoader
from refalign_ext.data.clip_set import open_clip_set
from refalign_ext.data.loading.source import ClipSource
from refalign_ext.data.manifest_file import write_manifest
from refalign_ext.data.pieces import Share
from refalign_ext.data.sampling.sample_spec import Bucket, Sampling
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.sizes import ParallelSizes
from refalign_ext.training import clip_data as training_data
from tests.helpers.clips import RATE, render
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_training import CPU, TEACHER_DIM, build, change

pytestmark = pytest.mark.timeout(300)

ALONE = ParallelSizes()
CLIPS, STEPS, GLOBAL_BATCH = 11, 4, 4
SAMPLING = Sampling(
    (Bucket(32, 32, 5), Bucket(32, 48, 5)),
    clip_variants=2,
    reference_variants=2,
    reference_dropout=0.3,
    seed=7,
)
ENCODERS = {"files": {}, "teacher": "test", "token_stride": (16, 16), "text_length": 8}
FINGERPRINT = cache_fingerprint(SAMPLING, **ENCODERS)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of two shapes; one is damaged, which only shows when it is decoded."""
    root, rows = tmp_path_factory.mktemp("clips"), []
    for number in range(CLIPS):
        size = (48, 64) if number % 3 == 2 else (64, 48)
        render(root / f"{number}.mp4", 8 + number, size=size)
        Image.new("RGB", (20 + number, 30), (20 * number, 60, 200)).save(root / f"{number}.png")
        own, other = Reference("regular", image=f"{number}.png"), Reference("cross", image="0.png")
        told = {"end_frame": 8 + number, "fps": float(RATE), "width": size[0], "height": size[1]}
        span = VideoSpan(f"{number}.mp4", start_frame=0, **told)
        subjects = (Subject("1", refs=(own, other)), Subject("2", refs=(own,)))
        rows.append(Clip(f"clip {number}", "custom", span, f"prompt {number}", subjects))
    (root / "4.mp4").write_bytes((root / "4.mp4").read_bytes()[:300])
    write_manifest(root / "data.jsonl", rows)
    return root / "data.jsonl"


def encode(videos: list[Tensor]) -> list[Tensor]:
    """Each [3, T, H, W] -> [4, 1 or 2, H / 8, W / 8]."""
    latents = []
    for video in videos:
        frames = torch.stack([video[:, 0], *([video[:, 1:].mean(1)] if video.shape[1] > 1 else [])])
        pooled = functional.avg_pool2d(frames, 8).transpose(0, 1)
        latents.append(torch.cat([pooled, pooled.mean(0, keepdim=True)]))
    return latents


def features(images: Tensor) -> Tensor:
    """[M, 3, H, W] -> [M, H / 16 * W / 16, TEACHER_DIM]."""
    tokens = functional.avg_pool2d(images, 16).flatten(2).transpose(1, 2)
    return tokens @ torch.arange(3.0 * TEACHER_DIM).reshape(3, TEACHER_DIM).sin()


class Recorded(ClipSource):
    """Keeps what every position gave."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.seen: dict[int, tuple[str, str]] = {}

    def samples(self, step: int, indices: range) -> list[EncodedSample]:
        found = super().samples(step, indices)
        for index, sample in zip(indices, found, strict=True):
            content = hashlib.sha256(sample.prompt.encode())
            for tensor in (sample.latents, sample.references, sample.features):
                content.update(tensor.contiguous().numpy().tobytes())
            self.seen[index] = (sample.name, content.hexdigest())
        return found


@dataclass(frozen=True)
class Run:
    losses: list[float]
    seen: dict[int, tuple[str, str]]
    bad: int


def train(
    rank: int,
    sizes: ParallelSizes,
    data: Path,
    out: Path,
    start: int = 0,
    end: int = STEPS,
    workers: int = 0,
    cache: Path | None = None,
) -> Run:
    """Steps `start` to `end` of the tiny model, going on from and saving checkpoints in `out`."""
    parallel = Parallel.create(sizes, CPU)
    source = Recorded(
        [open_clip_set(data)],
        SAMPLING,
        encode=encode,
        features=features,
        data_rank=parallel.data_rank,
        data_size=sizes.data,
        caches=[] if cache is None else [LatentCache(cache, FINGERPRINT)],
        workers=workers,
        max_bad_share=1.0,
        start_method="fork",
    )
    config = change(batch_size=1, global_batch_size=GLOBAL_BATCH, steps=STEPS, out=str(out))
    trainer = build(config, source, parallel, heads=4)
    for group in trainer.optimizers[0].param_groups:
        group["eps"] = 1e-5  # Adam would blow up the rounding noise of gradients that are zero
    if start:
        trainer.load(out / "checkpoints" / f"step-{start:08d}")
    losses = [trainer.train_step().values["loss/total"] for _ in range(start, end)]
    trainer.save()
    trainer.finish_saving()
    bad = source.bad_clips
    source.close()
    return Run(losses, source.seen, bad)


def train_on(sizes: ParallelSizes, *given: Any) -> Run:
    """What all ranks saw together; ranks that share samples saw the same."""
    runs = run_ranks(train, sizes.world, sizes, *given)
    seen: dict[int, tuple[str, str]] = {}
    for run in runs:
        assert run.losses == runs[0].losses
        assert all(seen.get(index, sample) == sample for index, sample in run.seen.items())
        assert len(run.seen) * sizes.data == len(runs[0].losses) * GLOBAL_BATCH
        seen |= run.seen
    return Run(runs[0].losses, seen, max(run.bad for run in runs))


@pytest.fixture(scope="module")
def expected(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One rank, one process, never interrupted."""
    run = train_on(ALONE, clips, tmp_path_factory.mktemp("alone"))
    assert sorted(run.seen) == list(range(STEPS * GLOBAL_BATCH)) and len(set(run.seen.values())) > CLIPS
    assert run.bad == 1 and "clip 4" not in {name for name, _ in run.seen.values()}
    return run


@pytest.mark.parametrize(
    ("sizes", "workers"),
    [(ParallelSizes(2), 2), (ParallelSizes(1, 1, 2), 0)],
    ids=["2 data, 2 workers", "2 sequence"],
)
def test_ranks_and_workers_do_not_change_what_is_trained(
    clips: Path, expected: Run, tmp_path: Path, sizes: ParallelSizes, workers: int
) -> None:
    found = train_on(sizes, clips, tmp_path, 0, STEPS, workers)
    assert found.seen == expected.seen
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


def test_an_interrupted_run_goes_on_with_the_next_samples_on_other_ranks_and_workers(
    clips: Path, expected: Run, tmp_path: Path
) -> None:
    # 12 samples are in the middle of the second pass over the clips.
    stop = 3
    first = train_on(ParallelSizes(2), clips, tmp_path, 0, stop, 1)
    second = train_on(ALONE, clips, tmp_path, stop, STEPS, 2)
    assert sorted(first.seen) == list(range(stop * GLOBAL_BATCH))
    assert first.seen | second.seen == expected.seen
    assert first.losses + second.losses == pytest.approx(expected.losses, rel=1e-5)


def fill(rank: int, data: Path, folder: Path, ranks: int) -> tuple[int, int]:
    """What one of the processes that torchrun starts caches: chunks and failures."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    loader = RowLoader(open_clip_set(data), SAMPLING)
    made_from = {**FINGERPRINT, "settings": {**FINGERPRINT["settings"], "dtype": "float32"}}
    encoders = SimpleNamespace(
        task=SimpleNamespace(t5_dtype=torch.float32, sample_neg_prompt=""),
        vae=SimpleNamespace(encode=encode),
        features=features,
        encode_text=lambda prompts: [torch.full((len(text) + 1, 2), float(len(text))) for text in prompts],
    )
    header = CacheHeader(made_from, CLIPS, 2)
    summary = fill_cache(loader, folder, header, encoders, share=Share.from_environment())
    return summary.made, summary.failures


@pytest.fixture(scope="module")
def cache(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by two processes at once."""
    folder = tmp_path_factory.mktemp("cache") / "two"
    assert run_ranks(fill, 2, clips, folder, 2) == [(3, 2), (3, 0)]  # both cuts of clip 4, in the third chunk
    return folder


def test_a_cache_of_many_processes_is_that_of_one(clips: Path, cache: Path, tmp_path: Path) -> None:
    assert run_ranks(fill, 1, clips, tmp_path, 1) == [(6, 2)]
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (tmp_path, cache))
    assert one == two


def test_cached_samples_are_the_same_on_any_number_of_ranks(
    clips: Path, cache: Path, expected: Run, tmp_path: Path
) -> None:
    found = train_on(ParallelSizes(2), clips, tmp_path, 0, STEPS, 1, cache)
    assert found.seen == expected.seen
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


def open_on_rank_0(rank: int, data: Path, cache: Path) -> tuple[int, str]:
    """Rows of the caches that this rank gets, and what it is told about one that is not there."""
    encoders = SimpleNamespace(fingerprint=lambda: ENCODERS)
    if rank:
        training_data.LatentCache = lambda *given: pytest.fail("opened on every rank")
    parallel = Parallel.create(ParallelSizes(2), CPU)
    config = with_overrides(tiny(), {"data": str(data), "cache": str(cache)})
    (found,) = training_data.open_caches(config, SAMPLING, encoders, parallel)
    assert found.video("clip 1", SAMPLING.buckets[0], 1) is not None
    elsewhere = with_overrides(config, {"cache": f"{cache}-none"})
    with pytest.raises(ValueError) as caught:
        training_data.open_caches(elsewhere, SAMPLING, encoders, parallel)
    return len(found), str(caught.value)


def test_one_rank_opens_and_checks_a_cache_for_all(clips: Path, cache: Path) -> None:
    rows, told = zip(*run_ranks(open_on_rank_0, 2, clips, cache), strict=True)
    assert rows == (CLIPS, CLIPS)
    assert told[0] == told[1] and "make the cache with `data cache`" in told[0]
