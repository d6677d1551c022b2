"""Clips by row number from manifests and tar shards; nothing that a shard holds can reach outside of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from refalign_ext.data import clip_set, shards
from refalign_ext.data.clip_set import ShardRows, open_clip_set
from refalign_ext.data.manifest_file import ManifestReader
from refalign_ext.data.media_source import MediaBytes
from refalign_ext.data.shards import ShardInfo, read_listing, sha256_of, verify_shard, write_listing

Member = tuple[str, bytes]


def row(key: str) -> bytes:
    line = {"id": f"clip {key}", "video": f"{key}.mp4", "prompt": "A box.", "references": [f"{key}.0.png"]}
    return json.dumps(line).encode()


def sample(key: str) -> list[Member]:
    return [
        (f"{key}.json", row(key)),
        (f"{key}.mp4", f"video {key}".encode() * 50),
        (f"{key}.0.png", f"picture {key}".encode() * 100),
    ]


def header(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def write_tar(path: Path, members: list[Member | tarfile.TarInfo]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                tar.addfile(header(member[0], len(member[1])), io.BytesIO(member[1]))
    return path


def pack(
    folder: Path, contents: list[list[Member | tarfile.TarInfo]], counts: list[int] | None = None
) -> ShardRows:
    """A packed folder of these shards; `counts` of samples if they are not three members each."""
    infos = []
    for number, members in enumerate(contents):
        path = write_tar(folder / shards.shard_name(number), members)
        count = len(members) // 3 if counts is None else counts[number]
        infos.append(ShardInfo(shards.shard_name(number), count, path.stat().st_size, sha256_of(path)))
    write_listing(folder, infos)
    return ShardRows(folder)


def test_rows_of_a_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"video")
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "circle.png").symlink_to("circle.png")
    (tmp_path / "secret.png").write_bytes(b"secret")
    path, names = folder / "data.jsonl", ["a.mp4", "none.mp4"]
    line = json.dumps({"id": "a.mp4", "video": "a.mp4", "prompt": "A.", "references": ["b.png"]})
    path.write_text("\n".join([line, line.replace("a.mp4", "none.mp4"), "{}"]))
    clips = open_clip_set(path)
    assert isinstance(clips, ManifestReader) and len(clips) == 3 and clips.path == path
    assert [clips[0].id, clips[1].id] == names
    assert clips.place(1) == f"{path}, row 2" and clips.shard_ranges() == [range(3)]
    assert json.loads(clips.line(0))["id"] == "a.mp4"
    with pytest.raises(ValueError, match=r"data\.jsonl, row 3: "):
        clips[2]
    assert clips.media(0, "a.mp4").read_bytes() == b"video"
    for name in ("none.mp4", "../secret.png", "out.png", "circle.png", "/etc/passwd", ".", "a" * 300, "\0"):
        with pytest.raises(ValueError, match=r"data\.jsonl, row 1: "):
            clips.media(0, name)
    again = pickle.loads(pickle.dumps(clips))
    assert again[1] == clips[1] and again.path == path


def test_what_can_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none does not exist: give a manifest"):
        open_clip_set(tmp_path / "none")
    with pytest.raises(ValueError, match="has neither manifest.jsonl nor shards.json"):
        open_clip_set(tmp_path)
    (tmp_path / "manifest.jsonl").write_bytes(row("1") + b"\n")
    assert open_clip_set(tmp_path)[0].id == "clip 1"
    pack(tmp_path, [sample("2")])
    assert open_clip_set(tmp_path)[0].id == "clip 2"


def test_rows_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_set, "_OPEN_SHARDS", 2)
    keys = [[f"{3 * shard + n:09d}" for n in range(3)] for shard in range(4)]
    contents = [sum((sample(key) for key in some), []) for some in keys]
    clips = pack(tmp_path, [*contents[:2], [], *contents[2:]])
    assert len(clips) == 12
    assert clips.shard_ranges() == [range(0, 3), range(3, 6), range(6, 9), range(9, 12)]
    flat = sum(keys, [])
    for number in (0, 11, 5, 6, 3, 0, 8, -1):
        key = flat[number]
        assert clips[number].id == f"clip {key}"
        if number >= 0:
            name = f"{clips.place(number).split(',')[0]}: {key}.mp4"
            assert clips.media(number, f"{key}.mp4") == MediaBytes(name, f"video {key}".encode() * 50)
    assert clips.place(7) == f"{tmp_path / 'shards/00003.tar'}, sample 2"
    with pytest.raises(IndexError, match="has 12 rows, there is no row 12"):
        clips[12]
    with pytest.raises(IndexError, match="no row -13"):
        clips[-13]
    for name in (
        "000000001.mp4",
        "../x.png",
        "/etc/passwd",
        "000000000.none",
        "000000000",
        "",
        "000000000./x",
    ):
        with pytest.raises(ValueError, match=r"shards/00000\.tar, sample 1: "):
            clips.media(0, name)
    assert clips._scan.cache_info().currsize == 2
    again = pickle.loads(pickle.dumps(clips))
    assert [clip.id for clip in map(again.__getitem__, range(12))] == [f"clip {key}" for key in flat]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda number: clips[number].id, 4 * [*range(12)])
        assert list(found) == 4 * [f"clip {key}" for key in flat]


def test_opened_before_a_fork_it_works_in_the_child(tmp_path: Path) -> None:
    clips = pack(tmp_path, [sample("1") + sample("2")])
    assert clips[0].id == "clip 1"
    child = os.fork()
    if child == 0:
        os._exit(0 if clips[1].id == "clip 2" and clips.media(1, "2.mp4").data else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert clips[1].id == "clip 2"


def test_twice_named_members_are_refused(tmp_path: Path) -> None:
    clips = pack(tmp_path, [[*sample("1"), ("1.mp4", b"other"), *sample("2")]], [2])
    with pytest.raises(ValueError, match="'1.mp4' occurs twice"):
        clips.media(0, "1.mp4")
    assert clips[1].id == "clip 2"


def test_members_and_rows_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path, [sample("1") + [header("2.json", 1 << 30)]], [2])
    with pytest.raises(ValueError, match="sample 2: .*'2.json' is cut off"):  # told without reserving memory
        ShardRows(tmp_path)[1]
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 500)
    clips = ShardRows(tmp_path)
    with pytest.raises(ValueError, match=r"'1\.0\.png' has 900 bytes; 500 are the most"):
        clips.media(0, "1.0.png")
    monkeypatch.setattr(clip_set, "MAX_ROW_BYTES", 10)
    with pytest.raises(ValueError, match="10 are the most"):
        clips[0]


def test_a_broken_off_or_damaged_shard_costs_its_own_rows_only(tmp_path: Path) -> None:
    pack(tmp_path, [sample("1") + sample("2") + sample("3"), sample("4")])
    path = tmp_path / shards.shard_name(0)
    whole = path.read_bytes()
    step = len(whole) // 40
    readable = []
    for length in range(0, len(whole), step):
        path.write_bytes(whole[:length])
        clips, good = ShardRows(tmp_path), 0
        for number in range(3):
            try:
                clip = clips[number]
                clips.media(number, clip.video.path)
                clips.media(number, clip.subjects[0].refs[0].image)
                good += 1
            except ValueError as error:
                assert str(error).startswith(f"{path}, sample {number + 1}: ")
        readable.append(good)
        assert clips[3].id == "clip 4"
    assert readable == sorted(readable) and readable[0] == 0 and {1, 2} <= set(readable)
    damaged = bytearray(whole)
    start = whole.index(b"2.json")
    damaged[start : start + 300] = b"\xff" * 300
    path.write_bytes(damaged)
    clips = ShardRows(tmp_path)
    assert clips[0].id == "clip 1" and clips.media(0, "1.0.png").data
    for number in (1, 2):
        with pytest.raises(ValueError, match=rf"sample {number + 1}: the shard is damaged at byte {start}"):
            clips[number]
    path.unlink()
    clips = ShardRows(tmp_path)
    with pytest.raises(ValueError, match=r"00000\.tar, sample 1: .*cannot be opened"):
        clips[0]
    assert clips[3].id == "clip 4"


def test_more_or_fewer_samples_than_listed(tmp_path: Path) -> None:
    clips = pack(tmp_path, [sample("1"), sample("2") + sample("3")], [3, 1])
    assert [len(clips), clips[0].id, clips[3].id] == [4, "clip 1", "clip 2"]
    with pytest.raises(ValueError, match=r"sample 3: the shard is shorter than shards\.json says"):
        clips[2]


def test_a_listing_that_is_none_is_named(tmp_path: Path) -> None:
    good = {"name": "shards/00000.tar", "samples": 1, "bytes": 5, "sha256": "0" * 64}
    changes = ({"name": "../a.tar"}, {"name": "/a.tar"}, {"samples": -1}, {"samples": True}, {"bytes": "5"})
    bad = [good | change for change in (*changes, {"sha256": "x"})]
    for entry in (*bad, {"name": "shards/00000.tar"}, 7):
        listing = {"version": 1, "samples": 2, "shards": [good, entry]}
        (tmp_path / "shards.json").write_text(json.dumps(listing))
        with pytest.raises(ValueError, match=r"shards\.json: .*shards\[1\]"):
            read_listing(tmp_path)
    for text in ("", "[]", "{}", "[" * 100_000, '{"version": 2, "shards": []}', '{"version": 1}', "\xff"):
        (tmp_path / "shards.json").write_text(text)
        with pytest.raises(ValueError, match=r"shards\.json: "):
            open_clip_set(tmp_path)


def test_changed_shards_are_noticed(tmp_path: Path) -> None:
    pack(tmp_path, [sample("1"), sample("2")])
    infos = read_listing(tmp_path)
    assert [verify_shard(tmp_path, info) for info in infos] == [None, None]
    path = tmp_path / infos[1].name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "SHA-256" in verify_shard(tmp_path, infos[1])
    path.write_bytes(data[:-1])
    assert f"{len(data) - 1} bytes" in verify_shard(tmp_path, infos[1])
    path.unlink()
    assert "cannot be read" in verify_shard(tmp_path, infos[1])
    assert verify_shard(tmp_path, infos[0]) is None
