"""Damaged input of every kind: it is refused with a ValueError, or skipped, and nothing else ever happens.

What is skipped is counted, and costs nothing but itself. REFALIGN_FUZZ=10 tries ten times as many cases.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image

from refalign_ext.data.cache.files import CacheHeader, ChunkRecord, chunk_path, write_chunk, write_header
from refalign_ext.data.cache.names import (
    cache_fingerprint,
    features_name,
    reference_name,
    row_digest,
    text_name,
    video_name,
)
from refalign_ext.data.cache.reader import CachedText, LatentCache
from refalign_ext.data.check.run import check
from refalign_ext.data.clip_index import clip_index_paths, delete_clip_index
from refalign_ext.data.clip_set import ClipSet, open_clip_set
from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.convert.folder import convert_folder
from refalign_ext.data.convert.opens2v import convert_opens2v
from refalign_ext.data.convert.phantom import convert_phantom
from refalign_ext.data.convert.selection import Selection
from refalign_ext.data.decoding import read_clip, read_frame
from refalign_ext.data.loading.source import ClipSource
from refalign_ext.data.manifest_file import ManifestReader, index_path
from refalign_ext.data.masks import decode, encode, parse_mask
from refalign_ext.data.materialise.run import materialise
from refalign_ext.data.pieces import Share
from refalign_ext.data.sampling.sample_spec import Bucket, Sampling, possible_references
from refalign_ext.data.schema import Clip, parse, to_dict
from refalign_ext.data.shards import LISTING, read_listing, verify_shard
from refalign_ext.data.sheets.contact import contact_sheet
from refalign_ext.data.statistics.stats import collect_stats
from refalign_ext.data.statistics.table import stats_table
from refalign_ext.data.video_file import probe
from refalign_ext.references import load_image
from tests.helpers.clips import entry, render
from tests.helpers.mutations import CASES_FACTOR, STRANGE, cases, damage, distort, json_text
from tests.helpers.opens2v_fixture import NativeSet, make_pair, write_native_set
from tests.helpers.phantom_fixture import info_row, pair, referred, seen, write_info, write_pairs

pytestmark = pytest.mark.timeout(180 * CASES_FACTOR)


def refused(work: Callable[[], object]) -> bool:
    """Whether it ended in a ValueError that was meant to; anything else but success fails the test."""
    try:
        work()
    except ValueError as error:
        # Not one that Python's own functions raise about a byte or a character of what they were given.
        if type(error) is not ValueError and not type(error).__module__.startswith("refalign_ext."):
            raise
        said = str(error)
        assert said.strip() and said.encode("utf-8")  # what cannot be encoded cannot be logged
        return True
    return False


def fuzz(
    path: Path, count: int, seed: int, read: Callable[[], object], *, is_json: bool = False
) -> list[bool]:
    """Whether `read` refused each of so many damaged versions of a file; every other one is distorted JSON if it is."""
    rng, whole, outcomes = random.Random(seed), path.read_bytes(), []
    for number in cases(count):
        if is_json and number % 2 == 0:
            path.write_text(json_text(distort(json.loads(whole), rng)))
        else:
            path.write_bytes(damage(whole, rng))
        outcomes.append(refused(read))
    path.write_bytes(whole)
    return outcomes


def test_rows_of_damaged_manifests(tmp_path: Path) -> None:
    path, rng, outcomes = tmp_path / "data.jsonl", random.Random(2), []
    write_rows(path, [good_row(name) for name in GOOD])

    def row_comes_back(clip: Clip) -> None:
        assert parse(json.loads(json.dumps(to_dict(clip))), "") == clip

    def read() -> None:
        with ManifestReader(path) as rows:
            for row in range(len(rows)):
                outcomes.append(refused(lambda row=row: row_comes_back(rows[row])))

    fuzz(path, 150, 1, read)
    for _ in cases(300):
        write_rows(path, [distort(good_row("a"), rng)])
        read()
    assert True in outcomes and False in outcomes


def test_distorted_masks() -> None:
    rng, mask = random.Random(3), encode(np.random.default_rng(0).random((12, 9)) < 0.5)
    whole = {"size": list(mask.size), "counts": mask.counts}
    outcomes = [refused(lambda: decode(parse_mask(distort(whole, rng)))) for _ in cases(200)]
    for _ in cases(200):
        counts = damage(mask.counts.encode(), rng).decode("latin-1")
        outcomes.append(refused(lambda counts=counts: decode(parse_mask({**whole, "counts": counts}))))
    assert True in outcomes


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.ts", "libx264"),
        ("a.mkv", "ffv1"),
        ("a.webm", "libvpx-vp9"),
        ("a.avi", "mjpeg"),
    ],
)
def test_damaged_videos(tmp_path: Path, name: str, codec: str) -> None:
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = render(tmp_path / name, 10, codec, pixel_format, (32, 24))

    def read() -> None:
        refused(lambda: probe(path))
        refused(lambda: read_clip(path, 5, (16, 16), fps=3))
        try:
            clip = read_clip(path, 5, (16, 16), 0.5)
        except ValueError as error:
            assert str(error).startswith(str(path))
            raise
        assert clip.shape == (3, 5, 16, 16) and torch.isfinite(clip).all()

    assert True in fuzz(path, 40, 4, read)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("JPEG", "RGB"),
        ("WEBP", "RGB"),
        ("TIFF", "L"),
        ("GIF", "P"),
        ("BMP", "RGB"),
    ],
)
def test_damaged_pictures(tmp_path: Path, name: str, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)
    path = tmp_path / "picture"
    Image.fromarray(pixels).convert(mode).save(path, name)
    assert True in fuzz(path, 40, 5, lambda: load_image(path))


# --- Conversions: a damaged file or entry costs nothing but itself


def listed(out: Path, report: ConversionReport) -> set[str]:
    """The ids of a manifest whose rows are all as they should be and as many as its report says."""
    with ManifestReader(out) as reader:
        clips = list(reader)
    assert report.kept["clips"] == len(clips)
    assert report.kept["references"] == sum(len(item.refs) for clip in clips for item in clip.subjects)
    json.dumps(report.to_dict(), ensure_ascii=False).encode("utf-8")
    assert report.table().encode("utf-8")
    return {clip.id for clip in clips}


class OpenS2V:
    """The small OpenS2V-5M of the fixture, converted again and again."""

    ids = ("total_part1/alpha_segment_0", "total_part1/alpha_segment_1") + (
        "total_part2/alpha_segment_2",
        "total_part2/beta_part1",
    )

    def __init__(self, root: Path) -> None:
        self.places: NativeSet = write_native_set(root)
        self.out = root / "data.jsonl"

    def convert(self) -> tuple[set[str], ConversionReport]:
        shutil.rmtree(self.out.with_name(self.out.name + ".staging"), ignore_errors=True)
        report = convert_opens2v(
            self.places.parts,
            self.out,
            video_root=self.places.videos,
            selection=Selection(min_frames=20),
            share=Share(),
            cross_pairs=self.places.cross_pairs,
            backgrounds=self.places.backgrounds,
        )
        return listed(self.out, report), report


@pytest.fixture
def opens2v(tmp_path: Path) -> OpenS2V:
    return OpenS2V(tmp_path)


def test_opens2v_parts_with_damaged_bytes(opens2v: OpenS2V) -> None:
    counts = []

    def read() -> None:
        ids, report = opens2v.convert()
        assert ids >= set(opens2v.ids[2:])
        counts.append((len(ids), bool(report.incomplete)))

    fuzz(opens2v.places.parts[0], 40, 6, read)
    kept, is_cut = zip(*counts)
    assert {len(opens2v.ids), 2} <= {*kept} and {True, False} <= {*is_cut}


def test_opens2v_entries_that_are_distorted(opens2v: OpenS2V) -> None:
    rng, path = random.Random(7), opens2v.places.parts[0]
    text, reasons = path.read_text(), set()
    whole = json.loads(text)
    for _ in cases(70):
        entries = {key: distort(value, rng) if key.endswith("_0") else value for key, value in whole.items()}
        path.write_text(json_text(entries))
        ids, report = opens2v.convert()
        # The decoder goes no further than an integer of thousands of digits, or a hundred thousand lists.
        assert ids >= set(opens2v.ids[2 if report.incomplete else 1 :])
        reasons |= report.dropped["clips"].keys() | report.dropped["references"].keys()
    assert len(reasons) >= 6, reasons


@pytest.mark.parametrize("name", ["alpha.json", "cluster_videos.json"])
def test_opens2v_pairs_and_clusters_that_are_damaged(opens2v: OpenS2V, name: str) -> None:
    def read() -> None:
        assert opens2v.convert()[0] == set(opens2v.ids)

    assert not any(fuzz(opens2v.places.cross_pairs / name, 40, 8, read, is_json=True))


def test_opens2v_similarities_of_every_kind(opens2v: OpenS2V) -> None:
    path = opens2v.places.cross_pairs / "alpha.json"
    ends = ((opens2v.ids[0], 2, "woman"), (opens2v.ids[1], 1, "woman"))
    for value in STRANGE:
        changes = [{"image_similarity": value}, {"text_similarity": value}, {"cur_class_id": value}]
        changes += [{"cur_class_name": value}, {"aft_id": value}]
        path.write_text(json_text([make_pair(*ends) | change for change in changes]))
        assert opens2v.convert()[0] == set(opens2v.ids)


A, B, C = "-0_aB-c_d_3.5_13.5", "zz-9_100_110", "q__1_0_10"
BIG = (100, 40, 500, 400)


class Phantom:
    """Three rows of Phantom-Data, each with a subject of its own and of another clip."""

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "data.jsonl"
        (root / "videos").mkdir()
        self.info = write_info(root / "info.parquet", [info_row(vid) for vid in (A, B, C)])
        self.pairs = self.write(lambda vid, cell: cell)

    def write(self, change: Callable[[str, Any], Any]) -> Path:
        rows = []
        for vid, other in ((A, B), (B, C), (C, A)):
            cell = {"the man": pair([seen(vid, "0.25", BIG)], [referred(other, 0.5, BIG)])}
            rows.append((vid, "A man.", json_text(change(vid, cell))))
        return write_pairs(self.root / "pairs.parquet", rows)

    def convert(self) -> tuple[set[str], ConversionReport]:
        shutil.rmtree(self.out.with_name(self.out.name + ".parts"), ignore_errors=True)
        report = convert_phantom(
            self.pairs, self.info, self.out, video_root=self.root / "videos", both_ways=True
        )
        return listed(self.out, report), report


@pytest.mark.parametrize("name", ["pairs", "info"])
def test_phantom_parquets_with_damaged_bytes(tmp_path: Path, name: str) -> None:
    place = Phantom(tmp_path)
    outcomes = fuzz(getattr(place, name), 60, 9, place.convert)
    assert True in outcomes and False in outcomes


def test_phantom_cells_that_are_distorted(tmp_path: Path) -> None:
    rng, place, kept = random.Random(10), Phantom(tmp_path), []
    for _ in cases(40):
        place.write(lambda vid, cell: distort(cell, rng) if vid == A else cell)
        ids, _ = place.convert()
        assert ids >= {B, C}
        kept.append(A in ids)
    assert True in kept and False in kept


class Folder:
    """A clip that is as it should be and another that is not, with prompt files or in a table."""

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "data.jsonl"
        for name in ("good", "other"):
            render(root / f"{name}.mp4", frames=6)
            Image.new("RGB", (20, 30), "red").save(root / f"{name}.ref1.png")
            (root / f"{name}.txt").write_text(f"A {name} box.")

    def convert(self, source: Path, **options: Any) -> set[str]:
        return listed(self.out, convert_folder(source, self.out, **options))


@pytest.mark.parametrize("suffix", [".mp4", ".ref1.png", ".txt"])
def test_folders_with_damaged_files(tmp_path: Path, suffix: str) -> None:
    place, kept = Folder(tmp_path), []

    def read() -> None:
        kept.append(place.convert(tmp_path))
        assert "good" in kept[-1]

    assert not any(fuzz(tmp_path / f"other{suffix}", 10, 11, read))
    assert any("other" in ids for ids in kept) or suffix == ".mp4"


def table_row(name: str) -> dict[str, Any]:
    row = {"id": name, "video": f"{name}.mp4", "prompt": "A box.", "references": [[f"{name}.ref1.png"]]}
    return row | {"ref1_phrase": "a box", "group": "1", "start_s": 0, "end_s": 0.7, "fps": 8.0}


def csv_bytes(rows: list[dict[str, Any]], encoding: str) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, rows[0])
    writer.writeheader()
    writer.writerows(row | {"references": json.dumps(row["references"])} for row in rows)
    return stream.getvalue().encode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_tables_with_damaged_bytes(tmp_path: Path, encoding: str) -> None:
    place, path = Folder(tmp_path), tmp_path / "table.csv"
    path.write_bytes(csv_bytes([table_row("good"), table_row("other")], encoding))
    outcomes = fuzz(path, 60, 12, lambda: place.convert(path))
    assert True in outcomes and False in outcomes


def test_tables_with_distorted_rows(tmp_path: Path) -> None:
    rng, place, path, kept = random.Random(13), Folder(tmp_path), tmp_path / "table.jsonl", []
    for _ in cases(80):
        other = distort(table_row("other"), rng)
        write_rows(path, [table_row("good"), other])
        ids = place.convert(path)
        assert "good" in ids
        kept.append(len(ids) == 2)
    assert True in kept and False in kept


# --- Clip sets, packed or not, up to the samples of training

BUCKET = Bucket(32, 32, 5)
SAMPLING = Sampling((BUCKET,), clip_variants=1, augment=False, seed=3)
GOOD = ("good-1", "good-2", "good-3", "good-4")


def good_row(name: str) -> dict[str, Any]:
    """A row with every kind of reference and a target."""
    mask = encode(np.pad(np.ones((12, 16), bool), ((10, 26), (8, 40))))
    cut = {
        "pair": "regular",
        "video": {"path": "clip.mp4"},
        "frame": 0,
        "box_space": "frame",
        "bbox_xyxy": [8, 10, 24, 22],
        "mask_rle": {"size": list(mask.size), "counts": mask.counts},
        "bg": "white",
    }
    row = entry(name, {"path": "clip.mp4"}, [cut, {"pair": "cross", "image": "picture.png"}])
    row["subjects"][0]["target"] = {"frame": 0, "bbox_xyxy": [8, 10, 24, 22], "box_space": "frame"}
    video = {"start_frame": 0, "end_frame": 12, "fps": 8.0, "width": 64, "height": 48}
    row["video"] |= video | {"crop_xyxy": [0, 0, 60, 44]}
    return row | {"group_id": "a", "scores": {"aesthetic": 5.0}, "prompt_alt": ["Another."], "meta": {"x": 1}}


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json_text(row) + "\n" for row in rows))
    return path


def write_set(root: Path) -> Path:
    """A manifest of the good rows with their files."""
    render(root / "clip.mp4", frames=12)
    Image.new("RGB", (20, 30), "red").save(root / "picture.png")
    return write_rows(root / "data.jsonl", [good_row(name) for name in GOOD])


def clip_source(clips: ClipSet, **options: Any) -> ClipSource:
    return ClipSource(
        [clips],
        SAMPLING,
        encode=lambda videos: [video.mean(dim=(2, 3), keepdim=True) for video in videos],
        features=None,
        max_bad_share=1,
        **options,
    )


def drawn(clips: ClipSet, count: int, **options: Any) -> tuple[set[str], int]:
    """The names of so many samples, and how many clips were skipped on the way."""
    delete_clip_index(clips)
    source, names = clip_source(clips, **options), set()

    def draw(position: int) -> None:
        (sample,) = source.samples(0, range(position, position + 1))
        assert torch.isfinite(sample.references).all() and sample.latents.shape[1] == BUCKET.frames
        names.add(sample.name)

    for position in range(count):
        refused(lambda position=position: draw(position))  # where nine clips in a row are bad, it says so
    source.close()
    return names, source.bad_clips


def looked_through(path: Path) -> None:
    """Everything that reads a clip set, each refusing it or not."""
    refused(lambda: check(path, workers=0))
    refused(lambda: stats_table(collect_stats(path)))
    refused(lambda: contact_sheet(path, samples=3, width=600))


def every_file(clips: ClipSet, row: int) -> bool:
    """Whether a row, and everything that it names, can be read."""

    def read() -> None:
        clip = clips[row]
        read_frame(clips.media(row, clip.video.path), frame_share=0.5)
        for subject in clip.subjects:
            for reference in subject.refs:
                assert clips.file_size(row, reference.image) > 0
                load_image(clips.media(row, reference.image))

    return not refused(read)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Two shards with two rows each."""
    materialise(write_set(tmp_path), tmp_path / "packed", pack=True, shard_size=2)
    shutil.rmtree(tmp_path / "packed" / ".work")
    return tmp_path / "packed"


def test_tars_with_damaged_bytes(packed: Path) -> None:
    path, outcomes = packed / read_listing(packed)[0].name, []
    whole = path.read_bytes()

    def read() -> None:
        clips = open_clip_set(packed)
        found = [every_file(clips, row) for row in range(len(clips))]
        assert found[2:] == [True, True]
        assert (path.read_bytes() == whole) == (verify_shard(packed, read_listing(packed)[0]) is None)
        outcomes.extend(found[:2])
        if len(outcomes) % 8 == 0:
            assert drawn(clips, 4)[0] >= {*GOOD[2:]}
        if len(outcomes) % 32 == 0:
            looked_through(packed)

    fuzz(path, 80, 14, read)
    assert True in outcomes and False in outcomes


def test_tars_with_headers_of_every_kind(packed: Path) -> None:
    """Damage of one field each, with a checksum that is right."""
    rng, path, outcomes = random.Random(15), packed / read_listing(packed)[0].name, []
    whole = path.read_bytes()
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == 8
    for _ in cases(150):
        data, at = bytearray(whole), rng.choice(headers)
        start, length = rng.choice(((0, 100), (124, 12), (156, 1), (157, 100), (345, 155)))
        kind = rng.randrange(3)
        if kind == 0:
            data[at + start : at + start + length] = rng.randbytes(length)
        elif kind == 1:
            data[at + start + rng.randrange(length)] = rng.randrange(256)
        else:
            value = rng.choice(
                (b"../x.json", b"/etc/passwd", b"77777777777", b"\x80\xff\xff", b"-1", b"5", b"S")
            )
            data[at + start : at + start + length] = value.ljust(length, b"\0")[:length]
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        path.write_bytes(data)
        clips = open_clip_set(packed)
        outcomes += [every_file(clips, row) for row in range(2)]
    assert True in outcomes and False in outcomes


def test_lists_of_shards_that_are_damaged(packed: Path) -> None:
    readable: list[int] = []

    def read() -> None:
        clips = open_clip_set(packed)
        for row in range(min(len(clips), 8)):
            every_file(clips, row)
        readable.append(len(clips))
        if len(readable) % 5 == 0:
            refused(lambda: drawn(clips, 4))
            looked_through(packed)

    assert True in fuzz(packed / LISTING, 150, 16, read, is_json=True) and readable


def test_indexes_that_are_damaged(tmp_path: Path) -> None:
    """Files that the code made itself are not beyond disks and interrupted copies."""
    path = write_set(tmp_path)
    clips = open_clip_set(path)
    drawn(clips, 1)

    def read() -> None:
        rows = open_clip_set(path)
        for row in range(len(rows)):
            refused(lambda row=row: rows[row])
        source = clip_source(rows)
        for position in range(2):
            source.samples(0, range(position, position + 1))

    for made in (index_path(path), clip_index_paths(clips)[0]):
        fuzz(made, 40, 17, read)


def no_text_encoder() -> NoReturn:
    raise ValueError("a prompt is not in the cache")


class Cache:
    """A cache of four clips in two chunks, made from their rows."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "cache"
        self.clips = open_clip_set(write_set(root))
        files = {"VAE": "a" * 64, "text encoder": "b" * 64, "tokenizer": "c" * 64, "teacher": "d" * 64}
        self.expected = cache_fingerprint(
            SAMPLING, files, teacher="dinov3-tiny", token_stride=(8, 8), text_length=64, dtype="float32"
        )
        self.folder.mkdir()
        header = CacheHeader(self.expected, len(GOOD), 2)
        write_header(self.folder, header)
        for number in range(header.chunks):
            tensors, rows = {}, []
            for row in header.chunk(number):
                clip = self.clips[row]
                rows.append([clip.id, row_digest(self.clips, row, clip)])
                tensors[video_name(clip.id, BUCKET, 0)] = torch.rand(3, 5, 1, 1)
                tensors[text_name(clip.prompt)] = torch.rand(4, 2)
                for choice in possible_references(clip, SAMPLING):
                    name = reference_name(clip.id, BUCKET, choice)
                    tensors |= {name: torch.rand(3, 1, 1, 1), features_name(name): torch.rand(4, 2)}
            write_chunk(self.folder, number, tensors, ChunkRecord(self.expected, rows))

    def read(self) -> None:
        """Everything in it, as training does."""
        cache = LatentCache(self.folder, self.expected)
        cache.check_rows(self.clips)
        encode = CachedText([cache], "cpu", no_text_encoder)
        for clip in (self.clips[row] for row in range(len(GOOD))):
            cache.video(clip.id, BUCKET, 0)
            for choice in possible_references(clip, SAMPLING):
                cache.reference(clip.id, BUCKET, choice)
            encode([clip.prompt])
        source = clip_source(self.clips, caches=[cache])
        for position in range(len(GOOD)):
            source.samples(0, range(position, position + 1))


@pytest.fixture
def cached(tmp_path: Path) -> Cache:
    return Cache(tmp_path)


def test_headers_of_caches_that_are_damaged(cached: Cache) -> None:
    path = cached.folder / "cache.json"
    assert not refused(cached.read)

    def read() -> None:
        refused(lambda: LatentCache(cached.folder))
        cached.read()

    assert True in fuzz(path, 150, 18, read, is_json=True)
    whole = path.read_bytes()
    for value in STRANGE:
        for key in ("rows", "chunk_rows", "fingerprint"):
            path.write_text(json_text(json.loads(whole) | {key: value}))
            assert refused(cached.read)


def test_chunks_with_damaged_bytes(cached: Cache) -> None:
    assert True in fuzz(chunk_path(cached.folder, 0), 80, 19, cached.read)


def test_chunks_with_distorted_headers(cached: Cache) -> None:
    rng, path, outcomes = random.Random(20), chunk_path(cached.folder, 0), []
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, tensors = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    for number in cases(150):
        if number % 2:
            changed = distort(header, rng)
        else:
            record = json.loads(header["__metadata__"]["refalign_cache"])
            changed = header | {"__metadata__": {"refalign_cache": json_text(distort(record, rng))}}
        text = json_text(changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + tensors)
        outcomes.append(refused(cached.read))
    assert True in outcomes and False in outcomes


# --- The whole way


def damaged_set(root: Path, rng: random.Random, bad: int) -> Path:
    """A manifest of the good rows among others, most of which are distorted or name damaged files."""
    path = write_set(root)
    clip, picture = (root / "clip.mp4").read_bytes(), (root / "picture.png").read_bytes()
    rows = [good_row(name) for name in GOOD]
    for number in range(bad):
        row = good_row(f"bad-{number}")
        if number % 3 == 0:
            (root / f"bad-{number}.mp4").write_bytes(damage(clip, rng))
            row["video"]["path"] = f"bad-{number}.mp4"
            row["subjects"][0]["refs"] = row["subjects"][0]["refs"][1:]
            if number % 2:
                row["video"] = {"path": f"bad-{number}.mp4"}
        elif number % 3 == 1:
            (root / f"bad-{number}.png").write_bytes(damage(picture, rng))
            row["subjects"][0]["refs"] = [{"pair": "cross", "image": f"bad-{number}.png"}]
        else:
            row = distort(row, rng)
        rows.insert(rng.randrange(len(rows) + 1), row)
    return write_rows(path, rows)


@pytest.mark.parametrize("seed", cases(2))
def test_good_rows_come_through_among_bad_ones(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rows = 90
    path = damaged_set(tmp_path, random.Random(1000 + seed), rows - len(GOOD))
    clips = open_clip_set(path)
    is_parsed = [not refused(lambda row=row: clips[row]) for row in range(len(clips))]

    result = check(path, workers=0, decode="all")
    findings = [json.loads(line) for line in result.report.read_text().splitlines()]
    faulty = {finding["row"] for finding in findings if finding["level"] == "error"}
    assert (result.rows, result.bad_rows) == (rows, len(faulty)) and 10 < len(faulty) < rows - len(GOOD)
    assert {row + 1 for row in range(rows) if not is_parsed[row]} <= faulty
    sound = {clips[row].id for row in range(rows) if row + 1 not in faulty}
    assert sound >= {*GOOD} and result.table()

    stats = collect_stats(path)
    assert (stats.rows, stats.clips) == (rows, sum(is_parsed)) and stats_table(stats) and stats.to_json()
    assert contact_sheet(path, samples=30, width=600).width == 600

    for pack in (False, True):
        report = materialise(path, tmp_path / f"out-{pack}", pack=pack, shard_size=16)
        made = open_clip_set(tmp_path / f"out-{pack}")
        ids = {made[row].id for row in range(len(made))}
        assert ids >= sound and report.total("clips") == rows
        assert report.kept["clips"] == len(made) < rows
        names, _ = drawn(made, len(made))
        assert names >= sound

    with caplog.at_level(logging.WARNING):
        names, skipped = drawn(clips, rows)
    assert names >= sound and skipped > 0
    told = [message for message in caplog.messages if message.startswith("skipping ")]
    assert len(told) >= skipped and "clips cannot be used" in caplog.text


@pytest.mark.parametrize("key", ["end_frame", "width", "height", "fps", "crop_xyxy", "end_s"])
@pytest.mark.parametrize("value", [1e-12, 2**31, 1e11])
def test_numbers_that_no_video_has(tmp_path: Path, key: str, value: float) -> None:
    path = write_set(tmp_path)
    row = good_row("bad")
    video = {name: item for name, item in row["video"].items() if "frame" not in name or key != "end_s"}
    row["video"] = video | {key: [0, 0, value, value] if key == "crop_xyxy" else value}
    write_rows(path, [row, *map(good_row, GOOD)])
    refused(lambda: (check(path, workers=0), stats_table(collect_stats(path))))
    assert drawn(open_clip_set(path), 6)[0] >= {*GOOD}
    assert materialise(path, tmp_path / "out", pack=True).kept["clips"] >= len(GOOD)
