"""Caches: what is read is what was computed, anything stale or foreign is refused with the reason, killed work goes on."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from refalign_ext.backbone import WAN_CONFIGS
from refalign_ext.config import TrainConfig, tiny, with_overrides
from refalign_ext.data.cache.build import CacheSummary, build_cache, fill_cache
from refalign_ext.data.cache.files import (
    CacheError,
    CacheHeader,
    ChunkRecord,
    chunk_path,
    write_chunk,
    write_header,
)
from refalign_ext.data.cache.names import cache_fingerprint, reference_name, text_name, video_name
from refalign_ext.data.cache.reader import CachedText, LatentCache
from refalign_ext.data.cache.rows import LoadedRow, RowLoader
from refalign_ext.data.clip_set import open_clip_set
from refalign_ext.data.loading.source import ClipSource
from refalign_ext.data.pieces import Share
from refalign_ext.data.pixels import from_uint8, load_reference, video_uint8
from refalign_ext.data.sampling.sample_spec import Bucket, ReferenceSpec, Sampling
from refalign_ext.encoders import Encoders
from refalign_ext.tasks import TASKS
from tests.helpers.clips import render

BUCKET = Bucket(48, 48, 9)
SAMPLING = Sampling((BUCKET,), clip_variants=1, seed=3)
FILES = {"VAE": "a" * 64, "text encoder": "b" * 64, "tokenizer": "c" * 64, "teacher": "d" * 64}
PLAIN = ReferenceSpec(0, 0, None)
WHOLE = Share(0, 1)


def fingerprint(
    sampling: Sampling = SAMPLING,
    dtype: str | None = "float32",
    teacher: str | None = "dinov3-tiny",
    **files: str,
) -> dict[str, Any]:
    """What a cache of these tests is made from; keywords replace digests of files."""
    files = FILES | {name.replace("_", " "): digest for name, digest in files.items()}
    return cache_fingerprint(
        sampling, files, teacher=teacher, token_stride=(8, 8), text_length=64, dtype=dtype
    )


class Rows:
    """Rows without files: a loader and a clip set in one. Row n shows random pixels of seed n and its own prompt."""

    def __init__(self, count: int, changed: tuple[int, ...] = (), broken: tuple[int, ...] = ()) -> None:
        self.count, self.changed, self.broken, self.loaded = count, changed, broken, []
        self.clip_set = self

    def __len__(self) -> int:
        return self.count

    def place(self, row: int) -> str:
        return f"data.jsonl, row {row + 1}"

    def identify(self, row: int) -> tuple[str, str]:
        return f"dog-{row}", f"{row + 1000 * (row in self.changed):016x}"

    def __call__(self, row: int) -> LoadedRow:
        self.loaded.append(row)
        clip_id, digest = self.identify(row)
        levels, video = row_levels(row), video_name(clip_id, BUCKET, 0)
        pixels, failures = {reference_name(clip_id, BUCKET, PLAIN): levels[:, 0]}, {}
        if row in self.broken:
            failures[video] = f"{clip_id}.mp4: cannot be decoded"
        else:
            pixels[video] = levels
        return LoadedRow(clip_id, digest, (f"dog {row % 4}",), pixels, failures)


def row_levels(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (3, 2, 4, 4), np.uint8)


def stand_ins(stop_after: int = 10**9) -> SimpleNamespace:
    """Encoders that only scale; the VAE is interrupted after so many calls."""
    calls = iter(range(stop_after))

    def encode(videos: list[torch.Tensor]) -> list[torch.Tensor]:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return [video * 3 for video in videos]

    return SimpleNamespace(
        task=SimpleNamespace(t5_dtype=torch.bfloat16, sample_neg_prompt=""),
        vae=SimpleNamespace(encode=encode),
        features=lambda images: images.flatten(2) * 5,
        encode_text=lambda prompts: [torch.full((len(text) + 1, 2), float(len(text))) for text in prompts],
    )


def fill(folder: Path, rows: Rows, stop_after: int = 10**9, **options: Any) -> CacheSummary:
    made_from = options.pop("made_from", fingerprint())
    header = CacheHeader(made_from, len(rows), options.pop("chunk_rows", 4))
    encoders = options.pop("encoders", stand_ins(stop_after))
    return fill_cache(rows, folder, header, encoders, **{"share": WHOLE, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_is_read_is_what_was_computed_and_all_else_none(tmp_path: Path) -> None:
    summary = fill(tmp_path, Rows(10))
    assert (summary.rows, summary.made, summary.kept, summary.failures) == (10, 3, 0, 0)
    cache = LatentCache(tmp_path, fingerprint(dtype=None))
    for row in (0, 3, 4, 9):
        pixels = from_uint8(torch.from_numpy(row_levels(row)))
        assert torch.equal(cache.video(f"dog-{row}", BUCKET, 0), pixels * 3)
        # The number of frames does not matter to references.
        latents, features = cache.reference(f"dog-{row}", Bucket(48, 48, 5), PLAIN)
        assert torch.equal(latents, pixels[:, :1] * 3)
        assert torch.equal(features, pixels[:, 0].flatten(1) * 5)
        text = cache.text(f"dog {row % 4}")
        assert text.dtype == torch.float32 and text.shape == (6, 2) and (text == 5).all()
    assert cache.text("").shape == (1, 2)
    assert cache.video("dog-0", BUCKET, 1) is None
    assert cache.video("dog-0", Bucket(48, 48, 13), 0) is None
    assert cache.video("cat", BUCKET, 0) is None
    assert cache.reference("dog-0", BUCKET, ReferenceSpec(0, 0, 2)) is None
    assert cache.text("cat") is None


RECORDED = {
    "cache.json": "2a9fe029f83216f5",
    "chunk-000000.safetensors": "2fd8d030265c9846",
    "chunk-000001.safetensors": "f911f14cda4f2131",
}


def test_files_are_the_same_as_ever(tmp_path: Path) -> None:
    """Digests of what the first version wrote: caches on disk stay readable."""
    fill(tmp_path, Rows(3, broken=(1,)), chunk_rows=2)
    digests = {name: hashlib.sha256(data).hexdigest()[:16] for name, data in contents(tmp_path).items()}
    assert digests == RECORDED


@pytest.mark.parametrize(
    ("expected", "reason"),
    [
        (fingerprint(VAE="e" * 64), "another VAE: aaaaaaaaaaaa != eeeeeeeeeeee"),
        (fingerprint(text_encoder="e" * 64), "another text encoder"),
        (fingerprint(teacher="dinov3-l"), "teacher dinov3-tiny, this run asks for dinov3-l"),
        (fingerprint(replace(SAMPLING, clip_variants=2)), "clip_variants 1, this run asks for 2"),
        (fingerprint(replace(SAMPLING, reference_variants=2)), "reference_variants 0"),
        (fingerprint(replace(SAMPLING, fps=16.0)), "fps None"),
        (fingerprint(replace(SAMPLING, seed=4)), "seed 3"),
        (fingerprint(replace(SAMPLING, augment=False)), "augment True"),
        (fingerprint(replace(SAMPLING, buckets=(Bucket(64, 48, 9),))), r"buckets .*48.*64"),
        (fingerprint() | {"format": 0}, "format is 1, this version reads 0"),
    ],
)
def test_a_foreign_cache_is_refused_with_the_reason(
    tmp_path: Path, expected: dict[str, Any], reason: str
) -> None:
    fill(tmp_path, Rows(1))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} does not fit: .*{reason}.*`data cache`"):
        LatentCache(tmp_path, expected)
    with pytest.raises(ValueError, match=f"--out {tmp_path} holds another cache: "):
        fill(tmp_path, Rows(1), made_from=expected)
    with pytest.raises(ValueError, match="chunk_rows 4, this run asks for 5"):
        fill(tmp_path, Rows(1), chunk_rows=5)
    assert contents(tmp_path) == before


def test_what_a_run_does_not_need_does_not_matter(tmp_path: Path) -> None:
    fill(tmp_path / "with", Rows(2))
    fill(tmp_path / "without", Rows(2), made_from=fingerprint(teacher=None))
    LatentCache(
        tmp_path / "with", fingerprint(replace(SAMPLING, cross_pairs=1.0, max_references=2), dtype=None)
    )
    LatentCache(tmp_path / "with", fingerprint(teacher=None, dtype=None))
    with pytest.raises(ValueError, match="made without the teacher"):
        LatentCache(tmp_path / "without", fingerprint(dtype=None))
    with pytest.raises(ValueError, match="holds another cache"):
        fill(tmp_path / "with", Rows(2), made_from=fingerprint(teacher=None))


def test_killed_and_shared_work_gives_equal_files(tmp_path: Path) -> None:
    fill(tmp_path / "whole", Rows(10))
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        fill(folder, Rows(10), stop_after=13)  # two encodings per row: within the second chunk
    assert sorted(contents(folder)) == ["cache.json", "chunk-000000.safetensors"]
    with pytest.raises(ValueError, match="chunk 1 of 3 is missing: run `data cache` again"):
        LatentCache(folder)
    (folder / ".chunk-000001.safetensors.0123.part").write_bytes(b"half")
    rows = Rows(10)
    summary = fill(folder, rows)
    assert (summary.made, summary.kept) == (2, 1) and rows.loaded == list(range(4, 10))
    summaries = [fill(tmp_path / "shared", Rows(10), share=Share(index, 2)) for index in (1, 0)]
    assert [summary.rows for summary in summaries] == [4, 6]
    assert contents(folder) == contents(tmp_path / "shared") == contents(tmp_path / "whole")
    assert fill(folder, Rows(10), encoders=None).kept == 3  # a complete share loads no models


def test_changed_and_new_rows_renew_only_their_chunks(tmp_path: Path) -> None:
    fill(tmp_path, Rows(9))
    rows = Rows(13, changed=(5,))
    assert fill(tmp_path, rows).kept == 1 and rows.loaded == list(range(4, 13))
    assert len(LatentCache(tmp_path)) == 13


def test_what_failed_says_why_and_can_be_tried_again(tmp_path: Path) -> None:
    summary = fill(tmp_path, Rows(6, broken=(5,)))
    assert summary.failures == 1 and summary.examples == ["dog-5.mp4: cannot be decoded"]
    cache = LatentCache(tmp_path)
    assert cache.failures == 1
    with pytest.raises(ValueError, match="dog-5.mp4: cannot be decoded") as caught:
        cache.video("dog-5", BUCKET, 0)
    assert not isinstance(caught.value, CacheError)
    assert cache.reference("dog-5", BUCKET, PLAIN) is not None
    assert fill(tmp_path, Rows(6)).made == 0
    assert fill(tmp_path, Rows(6), retry_failed=True).made == 1
    assert LatentCache(tmp_path).video("dog-5", BUCKET, 0) is not None


def test_tensors_are_rounded_on_request_and_never_without_end(tmp_path: Path) -> None:
    encoders = stand_ins()
    encoders.features = lambda images: images / 0
    fill(tmp_path, Rows(1), made_from=fingerprint(dtype="bfloat16"), encoders=encoders)
    cache = LatentCache(tmp_path, fingerprint(dtype=None))
    exact, found = from_uint8(torch.from_numpy(row_levels(0))) * 3, cache.video("dog-0", BUCKET, 0)
    assert found.dtype == torch.float32 and torch.equal(found, exact.bfloat16().float())
    with pytest.raises(ValueError, match=r"row 1 \(dog-0\): .* not finite"):
        cache.reference("dog-0", BUCKET, PLAIN)


def test_a_truncated_chunk_is_named_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, Rows(6))
    before, path = contents(tmp_path), chunk_path(tmp_path, 1)
    for size in (0, 5, 300, path.stat().st_size - 1):
        path.write_bytes(before[path.name][:size])
        with pytest.raises(ValueError, match=f"{path} is damaged.* run `data cache` again"):
            LatentCache(tmp_path)
    assert fill(tmp_path, Rows(6)).made == 1
    assert path.name in caplog.text
    assert contents(tmp_path) == before


def test_damage_that_comes_late_is_no_matter_of_a_clip(tmp_path: Path) -> None:
    fill(tmp_path, Rows(6))
    cache, path = LatentCache(tmp_path), chunk_path(tmp_path, 1)
    assert cache.video("dog-5", BUCKET, 0) is not None
    cache = pickle.loads(pickle.dumps(cache))  # as a loader process gets it, with no file open
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    with pytest.raises(CacheError, match=f"{path} is damaged"):
        cache.video("dog-4", BUCKET, 0)
    path.unlink()
    with pytest.raises(CacheError, match=f"{path} is missing"):
        cache.reference("dog-4", BUCKET, PLAIN)
    path.write_bytes(whole)
    assert cache.video("dog-4", BUCKET, 0) is not None


def test_foreign_and_invalid_chunks_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "a", Rows(6))
    fill(tmp_path / "b", Rows(6), made_from=fingerprint(VAE="e" * 64))
    path, text = chunk_path(tmp_path / "a", 1), {"text-" + "0" * 32: torch.zeros(1)}
    for foreign, reason in (
        (chunk_path(tmp_path / "b", 1), "made with another VAE"),
        (chunk_path(tmp_path / "a", 0), "4 rows instead of 2"),
    ):
        path.write_bytes(foreign.read_bytes())
        with pytest.raises(ValueError, match=f"{path} does not belong to this cache: {reason}"):
            LatentCache(tmp_path / "a")
    for tensors, record in (
        (text, ChunkRecord(fingerprint(), [["x", "not hex"]])),
        (text, ChunkRecord({}, [])),
        (text, ChunkRecord([], [[]])),
        ({"weights": torch.zeros(1)}, ChunkRecord(fingerprint(), [])),
    ):
        write_chunk(tmp_path / "a", 1, tensors, record)
        with pytest.raises(ValueError, match=f"{path} is damaged"):
            LatentCache(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 1}', '{"fingerprint":{},"rows":1,"chunk_rows":1}'])
def test_a_damaged_header_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path / 'cache.json'} is damaged"):
        LatentCache(tmp_path)


def test_ids_must_be_distinct(tmp_path: Path) -> None:
    class Twice(Rows):
        def identify(self, row: int) -> tuple[str, str]:
            return "dog-0", "0" * 16

    with pytest.raises(ValueError, match="row 2: id 'dog-0' is used twice"):
        fill(tmp_path / "near", Twice(4))
    fill(tmp_path / "far", Twice(2), chunk_rows=1)
    with pytest.raises(ValueError, match="two rows have the same id"):
        LatentCache(tmp_path / "far")


def test_many_rows_take_little_memory_and_few_open_files(tmp_path: Path) -> None:
    rows, size = 20_000, 1_000
    write_header(tmp_path, CacheHeader(fingerprint(), rows, size))
    for number in range(rows // size):
        ids = [f"clip-{row}" for row in range(number * size, (number + 1) * size)]
        tensors = {text_name(clip_id): torch.zeros(1) for clip_id in ids[:20]}
        write_chunk(tmp_path, number, tensors, ChunkRecord(fingerprint(), [[i, f"{7:016x}"] for i in ids]))
    cache = LatentCache(tmp_path)
    for row in range(0, rows, size):
        assert cache.text(f"clip-{row + 19}") is not None and cache.text(f"clip-{row + 20}") is None
    assert len(cache._open) == 16
    assert len(pickle.dumps(cache)) < 26 * rows  # whatever it holds is in what is pickled


def test_text_for_the_trainer(tmp_path: Path) -> None:
    fill(tmp_path, Rows(5))
    loaded: list[int] = []

    def load_encoder() -> Any:
        loaded.append(1)
        return lambda prompts: [torch.ones(1, 2) for _ in prompts]

    text = CachedText([LatentCache(tmp_path)], "cpu", load_encoder)
    assert [tuple(item.shape) for item in text(["dog 1", "", "dog 1"])] == [(6, 2), (1, 2), (6, 2)]
    assert not loaded
    assert torch.equal(text(["a cat", "a bird"])[1], torch.ones(1, 2)) and len(loaded) == 1


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of three clips: with a regular and a cross reference, with a second prompt, and one that is damaged."""
    folder, rows = tmp_path_factory.mktemp("clips"), []
    for number in range(3):
        render(folder / f"{number}.mp4", 14)
        Image.new("RGB", (30 + number, 20), (200, 30 * number, 60)).save(folder / f"{number}.png")
        refs = [{"pair": "cross", "image": f"{number}.png"}, {"pair": "regular", "image": "0.png"}]
        row = {"id": f"clip-{number}", "source": "custom", "video": {"path": f"{number}.mp4"}}
        row |= {"prompt": "a red square", "prompt_alt": ["it moves"] * (number == 1)}
        rows.append(row | {"subjects": [{"subject_id": "1", "kind": "object", "refs": refs}]})
    (folder / "2.mp4").write_bytes((folder / "2.mp4").read_bytes()[:200])
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


EMBEDDED = TASKS["r2v-tiny"].bundled
CPU = torch.device("cpu")
REAL = Sampling((BUCKET,), clip_variants=2, reference_variants=1, prompt_alternatives=True, seed=5)


def tiny_config(**changes: Any) -> TrainConfig:
    return with_overrides(tiny(), changes)


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    """The embedded model's."""
    return Encoders(tiny_config(), CPU, dit=False)


@pytest.fixture(scope="module")
def built(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of these clips for the embedded model."""
    out = tmp_path_factory.mktemp("cache")
    summary = build_cache(tiny_config(), clips, out, sampling=REAL, device=CPU, share=WHOLE, chunk_rows=2)
    assert (summary.rows, summary.made, summary.failures) == (3, 2, 2)  # both variants of the damaged clip
    assert all("2.mp4" in example for example in summary.examples)
    return out


def test_cached_tensors_equal_encoding_directly(clips: Path, built: Path, encoders: Encoders) -> None:
    clip_set, vae = open_clip_set(clips), encoders.vae
    cache = LatentCache(built, cache_fingerprint(REAL, **encoders.fingerprint()))
    cache.check_rows(clip_set)
    for row in range(2):
        clip = clip_set[row]
        for variant in range(2):
            video = from_uint8(video_uint8(clip_set, row, clip, BUCKET, variant, REAL))
            assert (cache.video(clip.id, BUCKET, variant) - vae.encode([video])[0]).abs().max() < 1e-6
        for spec in (ReferenceSpec(0, 0, None), ReferenceSpec(0, 1, 0)):
            image = load_reference(clip_set, row, clip, spec, BUCKET, REAL)
            latents, features = cache.reference(clip.id, BUCKET, spec)
            assert (latents - vae.encode([image[:, None]])[0]).abs().max() < 1e-6
            assert (features - encoders.teacher(image[None], (6, 6))[0]).abs().max() < 1e-6
        assert cache.reference(clip.id, BUCKET, ReferenceSpec(0, 1, None)) is None
    for prompt in ("a red square", "it moves", "", encoders.task.sample_neg_prompt):
        assert torch.equal(cache.text(prompt), encoders.encode_text([prompt])[0])
    with pytest.raises(ValueError, match="2.mp4"):
        cache.video("clip-2", BUCKET, 0)
    assert cache.reference("clip-2", BUCKET, PLAIN) is not None


@pytest.mark.parametrize("reference_variants", [0, 1])
def test_training_sees_the_same_with_and_without_a_cache(
    clips: Path, built: Path, encoders: Encoders, reference_variants: int
) -> None:
    sampling = replace(REAL, reference_variants=reference_variants)
    encoded: list[int] = []

    def encode(videos: list[torch.Tensor]) -> list[torch.Tensor]:
        encoded.append(len(videos))
        return encoders.vae.encode(videos)

    samples = []
    for caches in ([None], [LatentCache(built)]):
        encoded.clear()
        source = ClipSource(
            [open_clip_set(clips)],
            sampling,
            encode=encode,
            features=encoders.features,
            caches=caches,
            max_bad_share=1.0,
        )
        samples.append([source.samples(step, range(step, step + 1))[0] for step in range(8)])
    # Augmentations whose number is not limited are not in the cache: they are encoded when they are needed.
    assert not encoded if reference_variants else 0 < len(encoded) < 8
    for direct, cached in zip(*samples, strict=True):
        assert (direct.name, direct.prompt) == (cached.name, cached.prompt)
        for name in ("latents", "references", "features"):
            assert (getattr(direct, name) - getattr(cached, name)).abs().max() < 1e-5


def test_the_fingerprint_knows_the_files(tmp_path: Path, built: Path) -> None:
    def open_for(**changes: Any) -> LatentCache:
        encoders = Encoders(tiny_config(**changes), CPU, dit=False)
        return LatentCache(built, cache_fingerprint(REAL, **encoders.fingerprint()))

    open_for(**{"alignment.weight": 0.0})
    name = WAN_CONFIGS["r2v-tiny"].vae_checkpoint
    for path in EMBEDDED.iterdir():
        if path.name != name:
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / name).write_bytes((EMBEDDED / name).read_bytes() + b"\0")
    with pytest.raises(ValueError, match="made with another VAE: "):
        open_for(ckpt_dir=str(tmp_path))


def test_changed_rows_and_files_are_noticed(clips: Path, built: Path, tmp_path: Path) -> None:
    cache, image = LatentCache(built), clips.parent / "1.png"
    before = image.read_bytes()
    try:
        for change in (lambda: image.write_bytes(before + b"\0"), image.unlink):
            change()
            with pytest.raises(ValueError, match=r"data.jsonl, row 2 \(clip-1\) changed since"):
                cache.check_rows(open_clip_set(clips))
    finally:
        image.write_bytes(before)
    for word, problem in (("it moves", r"\(clip-1\) changed since"), ("clip-1", r"\(other\) is not in the")):
        path = clips.with_name("changed.jsonl")
        path.write_text(clips.read_text().replace(word, "other"))
        with pytest.raises(ValueError, match=f"changed.jsonl, row 2 {problem}.*again"):
            cache.check_rows(open_clip_set(path))


def test_clips_get_the_bucket_that_training_shows_them_in(clips: Path) -> None:
    sampling = replace(REAL, buckets=(Bucket(48, 48, 5), BUCKET, Bucket(64, 48, 13), Bucket(48, 64, 13)))
    row = pickle.loads(pickle.dumps(RowLoader(open_clip_set(clips), sampling)))(0)
    assert [pixels.shape for pixels in row.pixels.values()] == [(3, 13, 48, 64)] * 2 + [(3, 48, 64)] * 2
    with pytest.raises(ValueError, match="clip_variants is 0.*--sampling.clip_variants 1"):
        RowLoader(open_clip_set(clips), replace(REAL, clip_variants=0))
    sampling = replace(REAL, buckets=(Bucket(48, 48, 17), Bucket(64, 48, 21)))
    row = RowLoader(open_clip_set(clips), sampling)(0)
    assert row.clip_id == "clip-0" and not row.pixels
    (reason,) = row.failures.values()
    assert "row 1: its 14 frames are too few for every bucket" in reason
