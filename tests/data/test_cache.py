"""Caches: what is read is what was computed, anything stale or foreign is refused with the reason, killed work goes on."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from refalign_ext.backbone import WAN_CONFIGS, WanVAE
from refalign_ext.config import TrainConfig, tiny, with_overrides
from refalign_ext.data.cache import build as caching
from refalign_ext.data.cache.build import build_cache, fill_cache
from refalign_ext.data.cache.files import (
    CacheError,
    CacheHeader,
    ChunkRecord,
    chunk_path,
    default_folder,
    write_chunk,
    write_header,
)
from refalign_ext.data.cache.names import (
    cache_fingerprint,
    reference_name,
    row_digest,
    text_name,
    video_name,
)
from refalign_ext.data.cache.reader import CachedText, LatentCache
from refalign_ext.data.cache.rows import LoadedItem, LoadedRow, RowLoader, check_rows
from refalign_ext.data.clip_set import open_clip_set
from refalign_ext.data.loading.source import ClipSource, LoaderSettings
from refalign_ext.data.pieces import Share
from refalign_ext.data.pixels import from_uint8, load_reference, video_uint8
from refalign_ext.data.sampling.sample_spec import Bucket, ReferenceSpec, Sampling
from refalign_ext.data.schema import parse
from refalign_ext.encoders import Encoders, on_grid, text_encoder
from refalign_ext.tasks import TASKS
from refalign_ext.teachers import load_teacher

BUCKET = Bucket(48, 48, 9)
SAMPLING = Sampling((BUCKET,), clip_variants=1, seed=3)
FILES = {"VAE": "a" * 64, "text encoder": "b" * 64, "tokenizer": "c" * 64, "teacher": "d" * 64}
PLAIN = ReferenceSpec(0, 0, None)


def fingerprint(sampling: Sampling = SAMPLING, dtype: str | None = "float32", **files: str) -> dict[str, Any]:
    """What a cache of these tests is made from; keywords replace digests of files."""
    return cache_fingerprint(
        sampling,
        FILES | {name.replace("_", " "): digest for name, digest in files.items()},
        teacher="dinov3-tiny",
        token_stride=(8, 8),
        text_length=64,
        dtype=dtype,
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
        levels = np.random.default_rng(row).integers(0, 256, (3, 2, 4, 4), np.uint8)
        video = LoadedItem(video_name(clip_id, BUCKET, 0), levels)
        if row in self.broken:
            video = replace(video, levels=None, reason=f"{clip_id}.mp4: cannot be decoded")
        reference = LoadedItem(reference_name(clip_id, BUCKET, PLAIN), levels[:, 0])
        return LoadedRow(clip_id, digest, (f"dog {row % 4}",), [video, reference])


def stand_ins(stop_after: int = 10**9) -> SimpleNamespace:
    """Encoders that only scale; the VAE is interrupted after so many calls."""
    calls = iter(range(stop_after))

    def encode(videos: list[torch.Tensor]) -> list[torch.Tensor]:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return [video * 3 for video in videos]

    return SimpleNamespace(
        task=SimpleNamespace(t5_dtype=torch.bfloat16),
        vae=SimpleNamespace(encode=encode),
        features=lambda images: images.flatten(2) * 5,
        encode_text=lambda prompts: [torch.full((len(text) + 1, 2), float(len(text))) for text in prompts],
    )


def fill(folder: Path, rows: Rows, stop_after: int = 10**9, **options: Any) -> caching.CacheSummary:
    made_from = options.pop("made_from", fingerprint())
    header = CacheHeader(made_from, len(rows), options.pop("chunk_rows", 4))
    options.setdefault("share", Share(0, 1))
    return fill_cache(rows, folder, header, stand_ins(stop_after), **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_is_read_is_what_was_computed(tmp_path: Path) -> None:
    summary = fill(tmp_path, Rows(10))
    assert (summary.rows, summary.made, summary.kept, summary.failures) == (10, 3, 0, 0)
    cache = LatentCache(tmp_path, fingerprint(dtype=None))
    for row in (0, 3, 4, 9):
        levels = np.random.default_rng(row).integers(0, 256, (3, 2, 4, 4), np.uint8)
        pixels = from_uint8(torch.from_numpy(levels))
        assert torch.equal(cache.video(f"dog-{row}", BUCKET, 0), pixels * 3)
        latents, features = cache.reference(
            f"dog-{row}", Bucket(48, 48, 5), PLAIN
        )  # frames do not matter here
        assert torch.equal(latents, pixels[:, :1] * 3)
        assert torch.equal(features, pixels[:, 0].flatten(1) * 5)
        text = cache.text(f"dog {row % 4}")
        assert text.dtype == torch.float32 and text.shape == (6, 2) and (text == 5).all()
    assert cache.text("").shape == (1, 2)


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


def test_what_a_cache_does_not_have_is_none(tmp_path: Path) -> None:
    fill(tmp_path, Rows(3))
    cache = LatentCache(tmp_path)
    assert cache.video("dog-0", BUCKET, 1) is None
    assert cache.video("dog-0", Bucket(48, 48, 13), 0) is None
    assert cache.video("cat", BUCKET, 0) is None
    assert cache.reference("dog-0", BUCKET, ReferenceSpec(0, 0, 2)) is None
    assert cache.text("cat") is None


def test_half_precision_rounds_and_halves(tmp_path: Path) -> None:
    fill(tmp_path / "a", Rows(4))
    fill(tmp_path / "b", Rows(4), made_from=fingerprint(dtype="bfloat16"))
    exact, rounded = (LatentCache(tmp_path / name, fingerprint(dtype=None)) for name in "ab")
    expected = exact.video("dog-1", BUCKET, 0)
    found = rounded.video("dog-1", BUCKET, 0)
    assert found.dtype == torch.float32 and torch.equal(found, expected.bfloat16().float())
    assert not torch.equal(found, expected)


@pytest.mark.parametrize(
    ("expected", "reason"),
    [
        (fingerprint(VAE="e" * 64), "made with another VAE: aaaaaaaaaaaa != eeeeeeeeeeee"),
        (fingerprint(text_encoder="e" * 64), "made with another text encoder: bbbbbbbbbbbb != eeee"),
        (fingerprint(tokenizer="e" * 64), "made with another tokenizer"),
        (fingerprint(teacher="e" * 64), "made with another teacher: dddddddddddd != eeee"),
        (fingerprint(replace(SAMPLING, clip_variants=2)), "clip_variants 1, this run asks for 2"),
        (fingerprint(replace(SAMPLING, reference_variants=2)), "reference_variants 0, this run asks for 2"),
        (fingerprint(replace(SAMPLING, fps=16.0)), "fps None, this run asks for 16.0"),
        (fingerprint(replace(SAMPLING, stride=3)), "stride 1, this run asks for 3"),
        (fingerprint(replace(SAMPLING, seed=4)), "seed 3, this run asks for 4"),
        (fingerprint(replace(SAMPLING, augment=False)), "augment True, this run asks for False"),
        (fingerprint(replace(SAMPLING, prompt_alternatives=True)), "prompt_alternatives False, this run"),
        (
            fingerprint(replace(SAMPLING, buckets=(Bucket(64, 48, 9),))),
            "buckets 48x48x9, this run asks for 64x48x9",
        ),
        (fingerprint() | {"format": 0}, r"made by another version \(format 1, this one reads 0\)"),
    ],
)
def test_a_foreign_cache_is_refused_with_the_reason(
    tmp_path: Path, expected: dict[str, Any], reason: str
) -> None:
    fill(tmp_path, Rows(2))
    with pytest.raises(ValueError, match=f"{tmp_path} does not fit: {reason}.*`data cache`"):
        LatentCache(tmp_path, expected)
    before = contents(tmp_path)
    if "version" not in reason:
        with pytest.raises(ValueError, match=f"--out {tmp_path} holds another cache: "):
            fill(tmp_path, Rows(2), made_from=expected)
    assert contents(tmp_path) == before


def test_settings_that_only_choose_do_not_matter(tmp_path: Path) -> None:
    fill(tmp_path, Rows(2))
    LatentCache(tmp_path, fingerprint(replace(SAMPLING, cross_pairs=1.0, max_references=2)))


def test_a_run_without_a_teacher_reads_a_cache_with_one_but_not_the_reverse(tmp_path: Path) -> None:
    def made_from(teacher: str | None, dtype: str | None) -> dict[str, Any]:
        return cache_fingerprint(
            SAMPLING, FILES, teacher=teacher, token_stride=(8, 8), text_length=64, dtype=dtype
        )

    fill(tmp_path / "with", Rows(2), made_from=made_from("dinov3-tiny", "float32"))
    fill(tmp_path / "without", Rows(2), made_from=made_from(None, "float32"))
    LatentCache(tmp_path / "with", made_from(None, None))
    with pytest.raises(ValueError, match="made without the teacher; teacher None, this run asks for dinov3"):
        LatentCache(tmp_path / "without", made_from("dinov3-tiny", None))
    with pytest.raises(ValueError, match="holds another cache"):
        fill(tmp_path / "with", Rows(2), made_from=made_from(None, "float32"))


def test_a_killed_run_goes_on_and_gives_equal_files(tmp_path: Path) -> None:
    fill(tmp_path / "whole", Rows(10))
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        fill(folder, Rows(10), stop_after=13)  # two encodings per row: within the second chunk
    assert sorted(contents(folder)) == ["cache.json", "chunk-000000.safetensors"]
    with pytest.raises(ValueError, match="chunks 1, 2 of 3 are missing: run `data cache` again"):
        LatentCache(folder)
    (folder / ".chunk-000001.safetensors.0123.part").write_bytes(b"half")
    rows = Rows(10)
    summary = fill(folder, rows)
    assert (summary.made, summary.kept) == (2, 1) and rows.loaded == list(range(4, 10))
    assert contents(folder) == contents(tmp_path / "whole")


def test_shares_give_equal_files(tmp_path: Path) -> None:
    fill(tmp_path / "whole", Rows(10))
    summaries = [fill(tmp_path / "shared", Rows(10), share=Share(index, 2)) for index in (1, 0)]
    assert [summary.rows for summary in summaries] == [4, 6]
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")


def test_a_complete_share_loads_no_models(tmp_path: Path) -> None:
    fill(tmp_path, Rows(6))
    header = CacheHeader(fingerprint(), 6, 4)
    summary = fill_cache(Rows(6), tmp_path, header, None, share=Share(0, 1))
    assert (summary.made, summary.kept, summary.rows) == (0, 2, 6)


def test_changed_and_new_rows_renew_only_their_chunks(tmp_path: Path) -> None:
    fill(tmp_path, Rows(9))
    rows = Rows(13, changed=(5,))
    summary = fill(tmp_path, rows)
    assert summary.kept == 1 and rows.loaded == list(range(4, 13))
    cache = LatentCache(tmp_path)
    assert len(cache) == 13 and cache.video("dog-12", BUCKET, 0) is not None


def test_another_chunk_size_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, Rows(9))
    with pytest.raises(ValueError, match="chunk_rows 4, this run asks for 5"):
        fill(tmp_path, Rows(9), chunk_rows=5)


def test_what_failed_says_why_and_can_be_tried_again(tmp_path: Path) -> None:
    summary = fill(tmp_path, Rows(6, broken=(5,)))
    assert summary.failures == 1 and summary.examples == ["dog-5.mp4: cannot be decoded"]
    cache = LatentCache(tmp_path)
    assert cache.failures == 1
    with pytest.raises(ValueError, match="dog-5.mp4: cannot be decoded"):
        cache.video("dog-5", BUCKET, 0)
    assert cache.reference("dog-5", BUCKET, PLAIN) is not None
    assert fill(tmp_path, Rows(6)).made == 0
    assert fill(tmp_path, Rows(6), retry_failed=True).made == 1
    assert LatentCache(tmp_path).video("dog-5", BUCKET, 0) is not None


def test_tensors_that_are_not_finite_are_failures(tmp_path: Path) -> None:
    broken = stand_ins()
    broken.vae.encode = lambda videos: [video / 0 for video in videos]
    fill_cache(Rows(1), tmp_path, CacheHeader(fingerprint(), 1, 4), broken, share=Share(0, 1))
    with pytest.raises(ValueError, match=r"row 1 \(dog-0\): what the encoders give is not finite"):
        LatentCache(tmp_path).video("dog-0", BUCKET, 0)


def test_a_truncated_chunk_is_named_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, Rows(6))
    before, path = contents(tmp_path), chunk_path(tmp_path, 1)
    for size in (0, 5, 300, path.stat().st_size - 1):
        path.write_bytes(before[path.name][:size])
        with pytest.raises(ValueError, match=f"{path} is damaged or cut off .* run `data cache` again"):
            LatentCache(tmp_path)
    assert fill(tmp_path, Rows(6)).made == 1
    assert path.name in caplog.text
    assert contents(tmp_path) == before


def test_damage_that_comes_late_is_no_matter_of_a_clip(tmp_path: Path) -> None:
    fill(tmp_path, Rows(6, broken=(5,)))
    cache, path = LatentCache(tmp_path), chunk_path(tmp_path, 1)
    with pytest.raises(ValueError, match="cannot be decoded") as caught:
        cache.video("dog-5", BUCKET, 0)
    assert not isinstance(caught.value, CacheError)
    cache = pickle.loads(pickle.dumps(cache))  # as a loader process gets it, with no file open
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CacheError, match=f"{path} is damaged or cut off"):
        cache.video("dog-4", BUCKET, 0)
    path.unlink()
    with pytest.raises(CacheError, match=f"{path} is missing"):
        cache.reference("dog-4", BUCKET, PLAIN)


def test_foreign_and_invalid_files_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "a", Rows(6))
    fill(tmp_path / "b", Rows(6), made_from=fingerprint(VAE="e" * 64))
    path = chunk_path(tmp_path / "a", 1)
    path.write_bytes(chunk_path(tmp_path / "b", 1).read_bytes())
    with pytest.raises(ValueError, match=f"{path} does not belong to this cache: made with another VAE"):
        LatentCache(tmp_path / "a")
    path.write_bytes(chunk_path(tmp_path / "a", 0).read_bytes())
    with pytest.raises(ValueError, match=f"{path} does not belong to this cache: 4 rows instead of 2"):
        LatentCache(tmp_path / "a")
    for record in (
        ChunkRecord(fingerprint(), [["x", "not hex"]]),
        ChunkRecord({}, []),
        ChunkRecord([], [[]]),
    ):
        write_chunk(tmp_path / "a", 1, {"text-" + "0" * 32: torch.zeros(1)}, record)
        with pytest.raises(ValueError, match=f"{path} is damaged"):
            LatentCache(tmp_path / "a")
    write_chunk(tmp_path / "a", 1, {"weights": torch.zeros(1)}, ChunkRecord(fingerprint(), []))
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        LatentCache(tmp_path / "a")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"rows": 1}', "\0", '{"fingerprint":{},"rows":1,"chunk_rows":1}']
)
def test_a_damaged_header_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path / 'cache.json'} is damaged"):
        LatentCache(tmp_path)


def test_a_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make the cache with `data cache`"):
        LatentCache(tmp_path / "none")


def test_ids_must_be_distinct(tmp_path: Path) -> None:
    class Twice(Rows):
        def identify(self, row: int) -> tuple[str, str]:
            return "dog-0", "0" * 16

    with pytest.raises(ValueError, match="row 2: id 'dog-0' is used twice"):
        fill(tmp_path / "near", Twice(4))
    fill(tmp_path / "far", Twice(2), chunk_rows=1)
    with pytest.raises(ValueError, match="two rows have the same id"):
        LatentCache(tmp_path / "far")


def test_rows_are_checked_by_content(tmp_path: Path) -> None:
    fill(tmp_path, Rows(2))
    cache = LatentCache(tmp_path)
    clip = parse({"id": "dog-1", "video": "a.mp4", "prompt": "dog", "references": ["a.png"]}, "")
    cache.check_row("data.jsonl, row 2", clip, f"{1:016x}")
    with pytest.raises(ValueError, match=r"data.jsonl, row 2 \(dog-1\) changed since .* again"):
        cache.check_row("data.jsonl, row 2", clip, f"{2:016x}")
    with pytest.raises(ValueError, match=r"data.jsonl, row 2 \(cat\) is not in the cache"):
        cache.check_row("data.jsonl, row 2", replace(clip, id="cat"), f"{1:016x}")
    digests = {
        row_digest(clip, [1, 2]),
        row_digest(clip, [1, 3]),
        row_digest(replace(clip, prompt="cat"), [1, 2]),
    }
    assert len(digests) == 3


def test_a_cache_can_be_pickled(tmp_path: Path) -> None:
    fill(tmp_path, Rows(5))
    cache = LatentCache(tmp_path)
    expected = cache.video("dog-4", BUCKET, 0)
    assert torch.equal(pickle.loads(pickle.dumps(cache)).video("dog-4", BUCKET, 0), expected)


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    fill(tmp_path, Rows(40), chunk_rows=1)
    cache = LatentCache(tmp_path)
    for row in range(40):
        assert cache.video(f"dog-{row}", BUCKET, 0) is not None
    assert len(cache._files) == 16


def test_memory_of_many_rows_is_small(tmp_path: Path) -> None:
    rows, size = 100_000, 5_000
    write_header(tmp_path, CacheHeader(fingerprint(), rows, size))
    for number in range(rows // size):
        ids = [f"clip-{row}" for row in range(number * size, (number + 1) * size)]
        tensors = {text_name(clip_id): torch.zeros(1) for clip_id in ids[:100]}
        write_chunk(tmp_path, number, tensors, ChunkRecord(fingerprint(), [[i, f"{7:016x}"] for i in ids]))
    cache = LatentCache(tmp_path)
    # Whatever it holds is in what is pickled.
    assert len(pickle.dumps(cache)) < 25 * rows
    assert cache.text("clip-95099") is not None and cache.text("clip-95100") is None


def test_text_for_the_trainer(tmp_path: Path) -> None:
    fill(tmp_path, Rows(5))
    cache = LatentCache(tmp_path)
    known = CachedText([cache], "cpu")(["dog 1", "", "dog 1"])
    assert [tuple(item.shape) for item in known] == [(6, 2), (1, 2), (6, 2)]
    with pytest.raises(ValueError, match="does not have the prompt 'a cat': run `data cache` again"):
        CachedText([cache], "cpu")(["dog 1", "a cat"])
    loaded: list[int] = []

    def fallback() -> Any:
        loaded.append(1)
        return lambda prompts: [torch.ones(1, 2) for _ in prompts]

    text = CachedText([cache], "cpu", fallback)
    assert torch.equal(text([""])[0], known[1]) and not loaded
    assert torch.equal(text(["a cat", "a bird"])[1], torch.ones(1, 2)) and len(loaded) == 1


def test_cuts_must_be_finite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clip_variants is 0.*--sampling.clip_variants 1"):
        RowLoader(SimpleNamespace(), replace(SAMPLING, clip_variants=0))


def render(path: Path, frames: int, shade: int) -> None:
    """A clip of a square that moves across a grey picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "10", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(frames):
            pixels = np.full((48, 64, 3), shade, np.uint8)
            pixels[8:24, 2 * index : 2 * index + 16] = (220, 40, 5 * index)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of three clips: with a regular and a cross reference, with a second prompt, and one that is damaged."""
    folder = tmp_path_factory.mktemp("clips")
    for number, shade in enumerate((90, 160, 30)):
        render(folder / f"{number}.mp4", 14, shade)
        Image.new("RGB", (30 + number, 20), (200, 30 * number, 60)).save(folder / f"{number}.png")
    broken = folder / "2.mp4"
    broken.write_bytes(broken.read_bytes()[:200])
    rows = []
    for number in range(3):
        refs = [{"pair": "cross", "image": f"{number}.png"}, {"pair": "regular", "image": "0.png"}]
        row = {"id": f"clip-{number}", "source": "custom", "video": {"path": f"{number}.mp4"}}
        row |= {"prompt": "a red square", "subjects": [{"subject_id": "1", "refs": refs}]}
        row["subjects"][0]["kind"] = "object"
        rows.append(row | ({"prompt_alt": ["it moves"]} if number == 1 else {}))
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_config(**changes: Any) -> TrainConfig:
    return with_overrides(tiny(), changes)


EMBEDDED = TASKS["r2v-tiny"].bundled
CPU = torch.device("cpu")


def made_from(config: TrainConfig, sampling: Sampling) -> dict[str, Any]:
    return cache_fingerprint(sampling, **Encoders(config, CPU, dit=False).fingerprint())


REAL = Sampling((BUCKET,), clip_variants=2, reference_variants=1, prompt_alternatives=True, seed=5)


@pytest.fixture(scope="module")
def built(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of these clips for the embedded model."""
    out = tmp_path_factory.mktemp("cache")
    summary = build_cache(
        tiny_config(), clips, out, sampling=REAL, device=CPU, share=Share(0, 1), chunk_rows=2
    )
    assert (summary.rows, summary.made, summary.failures) == (3, 2, 2)  # both cuts of the damaged clip
    assert all("2.mp4" in example for example in summary.examples)
    return out


def test_cached_tensors_equal_encoding_directly(clips: Path, built: Path) -> None:
    task = WAN_CONFIGS["r2v-tiny"]
    vae = WanVAE(vae_pth=EMBEDDED / task.vae_checkpoint, config=task.vae)
    teacher = load_teacher("dinov3-tiny", EMBEDDED / task.teacher_folder)
    clip_set = open_clip_set(clips)
    cache = LatentCache(built, made_from(tiny_config(), REAL))
    check_rows(cache, clip_set, progress=False)
    starts = []
    for row in range(2):
        clip = clip_set[row]
        for cut in range(2):
            video = from_uint8(video_uint8(clip_set, row, clip, BUCKET, cut, REAL))
            latents = vae.encode([video])[0]
            starts.append(latents)
            assert (cache.video(clip.id, BUCKET, cut) - latents).abs().max() < 1e-6
        for choice in (ReferenceSpec(0, 0, None), ReferenceSpec(0, 1, 0)):
            image = load_reference(clip_set, row, clip, choice, BUCKET, REAL)
            latents, features = cache.reference(clip.id, BUCKET, choice)
            assert (latents - vae.encode([image[:, None]])[0]).abs().max() < 1e-6
            assert (features - teacher(image[None], (6, 6))[0]).abs().max() < 1e-6
        assert cache.reference(clip.id, BUCKET, ReferenceSpec(0, 1, None)) is None
    assert not torch.equal(starts[0], starts[2])
    encode_text = text_encoder(EMBEDDED, task, CPU, CPU)
    for prompt in ("a red square", "it moves", "", task.sample_neg_prompt):
        assert torch.equal(CachedText([cache], CPU)([prompt])[0], encode_text([prompt])[0])
    with pytest.raises(ValueError, match="2.mp4"):
        cache.video("clip-2", BUCKET, 0)
    assert cache.reference("clip-2", BUCKET, PLAIN) is not None


@pytest.mark.parametrize("reference_variants", [0, 1])
def test_training_sees_the_same_with_and_without_a_cache(
    clips: Path, built: Path, tmp_path: Path, reference_variants: int
) -> None:
    task, config = WAN_CONFIGS["r2v-tiny"], tiny_config()
    sampling, folder = replace(REAL, reference_variants=reference_variants), built
    if reference_variants != REAL.reference_variants:
        folder = tmp_path
        build_cache(config, clips, folder, sampling=sampling, device=CPU, chunk_rows=2)
    vae = WanVAE(vae_pth=EMBEDDED / task.vae_checkpoint, config=task.vae)
    features = on_grid(load_teacher("dinov3-tiny", EMBEDDED / task.teacher_folder), task)
    encoded: list[int] = []

    def encode(videos: list[torch.Tensor]) -> list[torch.Tensor]:
        encoded.append(len(videos))
        return vae.encode(videos)

    samples = []
    for caches in ([None], [LatentCache(folder, made_from(config, sampling))]):
        encoded.clear()
        source = ClipSource(
            [open_clip_set(clips)],
            sampling,
            encode=encode,
            features=features,
            caches=caches,
            settings=LoaderSettings(workers=0, max_bad_share=1.0),
        )
        samples.append([source.samples(step, range(step, step + 1))[0] for step in range(8)])
        source.close()
    # Augmentations without number are made when they are needed.
    assert not encoded if reference_variants else 0 < len(encoded) < 8
    for direct, cached in zip(*samples, strict=True):
        assert (direct.name, direct.prompt) == (cached.name, cached.prompt)
        for name in ("latents", "references", "features"):
            assert (getattr(direct, name) - getattr(cached, name)).abs().max() < 1e-5


def test_the_fingerprint_knows_the_files(tmp_path: Path, built: Path) -> None:
    LatentCache(built, made_from(tiny_config(**{"alignment.weight": 0.0}), REAL))
    folder = tmp_path / "other"
    folder.mkdir()
    for path in EMBEDDED.iterdir():
        (folder / path.name).symlink_to(path)
    name = WAN_CONFIGS["r2v-tiny"].vae_checkpoint
    (folder / name).unlink()
    (folder / name).write_bytes((EMBEDDED / name).read_bytes() + b"\0")
    with pytest.raises(ValueError, match="made with another VAE: "):
        LatentCache(built, made_from(tiny_config(ckpt_dir=str(folder)), REAL))
    with pytest.raises(ValueError, match="unknown teacher 'x'"):
        made_from(tiny_config(**{"alignment.teacher": "x"}), REAL)


def test_changed_files_are_noticed(clips: Path, built: Path) -> None:
    cache, clip_set = LatentCache(built), open_clip_set(clips)
    image = clips.parent / "1.png"
    before = image.read_bytes()
    try:
        image.write_bytes(before + b"\0")
        with pytest.raises(ValueError, match=r"data.jsonl, row 2 \(clip-1\) changed since"):
            check_rows(cache, clip_set, progress=False)
        image.unlink()
        with pytest.raises(ValueError, match=r"data.jsonl, row 2 \(clip-1\) changed since"):
            check_rows(cache, clip_set, progress=False)
    finally:
        image.write_bytes(before)


@pytest.mark.parametrize(("option", "value"), [("dtype", "float8"), ("chunk_rows", 0)])
def test_settings_are_checked(clips: Path, tmp_path: Path, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"--{option} {value}: "):
        build_cache(tiny_config(), clips, tmp_path, sampling=REAL, device=CPU, **{option: value})


def test_rows_can_be_loaded_by_other_processes(clips: Path) -> None:
    loader = RowLoader(open_clip_set(clips), REAL)
    here, there = loader(1), pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(loader))(1)))
    assert (there.clip_id, there.digest, there.prompts) == (here.clip_id, here.digest, here.prompts)
    assert here.prompts == ("a red square", "it moves") and loader.identify(1) == ("clip-1", here.digest)
    for one, other in zip(here.items, there.items, strict=True):
        assert one.name == other.name and one.levels.dtype == np.uint8 and (one.levels == other.levels).all()


def test_ranks_of_torchrun_share_the_chunks(
    clips: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        summary = build_cache(tiny_config(), clips, sampling=REAL, device=CPU, chunk_rows=2)
        assert summary.made == 1
    folder = default_folder(clips)
    assert contents(folder) == contents(built)
    shutil.rmtree(folder)


def test_clips_get_the_bucket_that_training_shows_them_in(clips: Path) -> None:
    sampling = replace(REAL, buckets=(Bucket(48, 48, 5), BUCKET, Bucket(64, 48, 13), Bucket(48, 64, 13)))
    row = RowLoader(open_clip_set(clips), sampling)(0)
    assert [item.levels.shape for item in row.items] == [(3, 13, 48, 64)] * 2 + [(3, 48, 64)] * 2
    sampling = replace(REAL, buckets=(Bucket(48, 48, 17), Bucket(64, 48, 21)))
    row = RowLoader(open_clip_set(clips), sampling)(0)
    assert row.clip_id == "clip-0" and "row 1: its 14 frames are too few for every bucket" in row.reason
