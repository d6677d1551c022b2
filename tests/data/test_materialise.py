"""Materialising: the pictures that rows describe, the same bytes however the work was cut up or broken off."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from refalign_ext.atomic_io import locked
from refalign_ext.data.clip_set import open_clip_set
from refalign_ext.data.crop import read_reference
from refalign_ext.data.decoding import read_clip
from refalign_ext.data.masks import encode
from refalign_ext.data.materialise import run as module
from refalign_ext.data.materialise.files import FilesJob
from refalign_ext.data.materialise.pack import PackJob
from refalign_ext.data.materialise.run import materialise
from refalign_ext.data.materialise.trimming import trim
from refalign_ext.data.media_source import MediaBytes
from refalign_ext.data.pieces import Share
from refalign_ext.data.schema import VideoSpan, parse
from refalign_ext.data.shards import read_listing, verify_shard
from refalign_ext.data.video_file import probe
from tests.helpers.clips import RATE, SUBJECT, box_of, entry, frame, render

SIZE = (64, 48)


VIDEO = {"path": "videos/a.mp4"}


def cut_at(number: int, **more: Any) -> dict[str, Any]:
    """A reference of the subject in frame `number`."""
    box = {"bbox_xyxy": list(box_of(number)), "box_space": "frame"}
    source = {"source_id": f"clip of {number}", "source_group": "g"}
    reference = {"pair": "regular", "video": VIDEO, "frame": number, "bg": "raw", "scores": {"gme": 0.7}}
    return reference | box | source | more


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of good and bad rows in a folder with their files."""
    root = tmp_path_factory.mktemp("source")
    render(root / "videos/a.mp4", 96)
    (root / "pictures").mkdir()
    Image.fromarray(frame(4)).save(root / "pictures/b.jpg", quality=95)
    (root / "text.mp4").write_text("no video")
    part, seconds = VIDEO | {"start_frame": 50, "end_frame": 70}, VIDEO | {"start_s": 9, "end_s": 12.1}
    mask = encode(frame(7) == SUBJECT)
    white = {"bg": None, "mask_rle": {"size": list(mask.size), "counts": mask.counts}}
    target = {"target": {"frame": 55, "bbox_xyxy": list(box_of(55)), "box_space": "frame"}}
    picture = {"image": "pictures/b.jpg"}
    boxed = picture | {"pair": "generated", "bbox_xyxy": list(box_of(4)), "box_space": "frame"}
    rows: list[Any] = [
        entry("plain", VIDEO, [cut_at(5), cut_at(7, **white)], group_id="g", scores={"aesthetic": 5.5}),
        entry("../../etc/passwd \u00e9", VIDEO, [cut_at(9)]),
        entry("picture", VIDEO, [picture | {"pair": "cross", "bg": "raw"}, cut_at(200)]),
        entry("cut picture", VIDEO, [boxed]),
        {"id": "broken"},
        entry("no video", {"path": "videos/none.mp4"}, [cut_at(1), cut_at(2)]),
        entry("no reference", VIDEO, [cut_at(200), cut_at(3, video={"path": "text.mp4"})]),
        entry("part", part, [cut_at(60)]),
        entry("seconds", seconds, [cut_at(1), cut_at(90)]),
        entry("plain", VIDEO, [cut_at(11)]),
        {"id": "simple", "video": "videos/a.mp4", "prompt": "A box.", "references": ["pictures/b.jpg"]},
    ]
    rows[7]["subjects"][0] |= target
    rows[7]["subjects"].append({"subject_id": "2", "kind": "face", "refs": [cut_at(300)]})
    path = root / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def link_files(source: Path, folder: Path) -> None:
    for name in ("videos/a.mp4", "pictures/b.jpg"):
        (folder / name).parent.mkdir(parents=True)
        os.link(source.parent / name, folder / name)


KEPT = ["plain", "../../etc/passwd \u00e9", "picture", "cut picture", "part", "seconds", "plain", "simple"]


def digests(folder: Path) -> dict[str, str]:
    """The contents of all files but the records and indices of the work."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".work" not in path.parts and path.suffix != ".index"
    }


def check_rows(folder: Path, source: Path) -> None:
    """That nothing is left to be cut, and that everything else is as it was."""
    clips, old = open_clip_set(folder), open_clip_set(source)
    assert [clips[number].id for number in range(len(clips))] == KEPT
    for number, row in enumerate([0, 1, 2, 3, 7, 8, 9, 10]):
        clip, before = clips[number], old[row]
        for name in ("prompt", "source", "group_id", "scores"):
            assert getattr(clip, name) == getattr(before, name)
        assert probe(clips.media(number, clip.video.path)).width == SIZE[0]
        refs = {(s.subject_id, r.source_id, r.pair): r for s in before.subjects for r in s.refs}
        for subject in clip.subjects:
            for reference in subject.refs:
                assert reference.video is reference.frame is reference.bbox_xyxy is reference.mask_rle is None
                was = refs[subject.subject_id, reference.source_id, reference.pair]
                expected = (was.bg or ("white" if was.mask_rle else None), was.scores, was.source_group)
                assert (reference.bg, reference.scores, reference.source_group) == expected
                assert isinstance(clips.media(number, reference.image), (Path, MediaBytes))
    cut = [np.asarray(read_reference(clips, 0, ref)).astype(int) for ref in clips[0].subjects[0].refs]
    expected = [np.asarray(read_reference(old, 0, ref)) for ref in old[0].subjects[0].refs]
    assert all((one == other).all() for one, other in zip(cut, expected, strict=True))
    assert np.abs(cut[0] - SUBJECT).max() < 15
    part = clips[4]
    assert len(part.subjects) == 1
    wanted = read_clip(source.parent / "videos/a.mp4", 20, SIZE, span=VideoSpan("a.mp4", 50, 70))
    media, span = clips.media(4, part.video.path), part.video
    assert (read_clip(media, 20, SIZE, span=VideoSpan("", span.start_frame, span.end_frame)) == wanted).all()
    target = part.subjects[0].target
    there = read_clip(media, 1, SIZE, span=VideoSpan("", target.frame, target.frame + 1))
    assert (there[:, 0] == wanted[:, 5]).all()


def test_files_of_their_own(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = materialise(source, out)
    check_rows(out, source)
    assert report.next_step is None
    counts = {kind: dict(report.dropped[kind]) for kind in ("clips", "references")}
    assert counts == {
        "clips": {"invalid_row": 1, "video_missing": 1, "no_references": 1},
        "references": {"unreadable": 4, "clip_dropped": 2},
    }
    assert (report.kept["clips"], report.kept["references"]) == (8, 10)
    assert json.loads((out / "report.json").read_text()) == report.to_dict()
    assert "row 5" in report.examples["clips"]["invalid_row"][0]
    assert "(clip no reference)" in " ".join(report.examples["references"]["unreadable"])
    names = sorted(path.name for path in (out / "references").rglob("*.png"))
    assert names[2] == "00000001-_etc_passwd_-0-0.png" and len(names) == 8
    video = out / "media/videos/a.mp4"
    assert video.stat().st_ino == (source.parent / "videos/a.mp4").stat().st_ino
    assert (out / "media/pictures/b.jpg").samefile(source.parent / "pictures/b.jpg")
    copied = tmp_path / "copied"
    materialise(source, copied, copy=True)
    assert not (copied / "media/videos/a.mp4").samefile(video)
    assert digests(copied) == digests(out)
    changed = (out / "manifest.jsonl").stat().st_mtime_ns
    assert materialise(source, out).to_dict() == report.to_dict()
    assert (out / "manifest.jsonl").stat().st_mtime_ns == changed
    assert not (out / ".work/parts").exists()


def test_in_the_manifests_own_folder_files_stay_where_they_are(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    link_files(source, root / "inner")
    os.link(source, root / "inner/data.jsonl")
    for out, path in ((root / "inner", "videos/a.mp4"), (root, "inner/videos/a.mp4")):
        materialise(root / "inner/data.jsonl", out)
        assert open_clip_set(out)[0].video.path == path and not (out / "media").exists()
        check_rows(out, source)


def test_packed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = materialise(source, out, pack=True, shard_size=4)
    check_rows(out, source)
    infos = read_listing(out)
    assert [info.samples for info in infos] == [4, 1, 3]
    assert [info.name for info in infos] == [f"shards/0000{number}.tar" for number in range(3)]
    assert [verify_shard(out, info) for info in infos] == [None] * 3
    assert report.kept == {"clips": 8, "references": 10} and not (out / "references").exists()
    original = (source.parent / "videos/a.mp4").read_bytes()
    with tarfile.open(out / infos[0].name) as tar:
        members = tar.getmembers()
        assert [member.name.removeprefix("00000000") for member in members[:6]] == (
            ["0.json", "0.mp4", "0.0.png", "0.1.png", "1.json", "1.mp4"]
        )
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode, m.type) for m in members} == {
            (0, 0, 0, "", 0o644, tarfile.REGTYPE)
        }
        assert tar.extractfile("000000000.mp4").read() == original
        assert tar.extractfile("000000002.0.jpg").read() == (source.parent / "pictures/b.jpg").read_bytes()
        row = json.loads(tar.extractfile("000000000.json").read())
        assert parse(row, "").id == "plain" and row["video"]["path"] == "000000000.mp4"
    clips = open_clip_set(out)
    part, seconds = clips[4].video, clips[5].video
    assert (part.start_frame, part.end_frame) == (2, 22)  # from the key frame 48 on
    assert (seconds.start_frame, seconds.end_frame, seconds.start_s) == (0, 24, None)
    assert len(clips.media(4, part.path).data) < len(original) / 2
    # What is packed can be taken apart again, and packed again.
    apart, again = tmp_path / "apart", tmp_path / "again"
    materialise(out, apart)
    check_rows(apart, source)
    materialise(out, again, pack=True, shard_size=8)
    check_rows(again, source)


class MadePieces(list[int]):
    """The numbers of the pieces that were begun; those in `killed` are broken off once."""

    killed: frozenset[int] = frozenset()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> MadePieces:
    numbers = MadePieces()
    monkeypatch.setattr(module, "PIECE_ROWS", 2)
    for job in (FilesJob, PackJob):

        def make(self: Any, rows: range, original: Any = job.make) -> Any:
            numbers.append(self.number(rows))
            if self.number(rows) in numbers.killed:
                numbers.killed -= {self.number(rows)}
                raise KeyboardInterrupt
            return original(self, rows)

        monkeypatch.setattr(job, "make", make)
    return numbers


@pytest.mark.parametrize("pack", [False, True])
def test_work_that_is_broken_off_or_shared_gives_the_same_bytes(
    source: Path, tmp_path: Path, made: MadePieces, pack: bool
) -> None:
    settings: dict[str, Any] = {"pack": pack, "shard_size": 2}
    whole, broken, shared = tmp_path / "whole", tmp_path / "broken", tmp_path / "shared"
    first = materialise(source, whole, **settings)
    expected = digests(whole)
    assert len(expected) > 6

    made.clear()
    made.killed = frozenset(range(6))
    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            materialise(source, broken, **settings)
        assert not (broken / "manifest.jsonl").exists() and not (broken / "shards.json").exists()
    assert materialise(source, broken, **settings).to_dict() == first.to_dict()
    assert made == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert digests(broken) == expected

    for index in (2, 0):
        report = materialise(source, shared, share=Share(index, 3), **settings)
        assert "of 6 pieces are finished" in report.next_step
        assert not (shared / "report.json").exists()
    assert materialise(source, shared, share=Share(1, 3), **settings).to_dict() == first.to_dict()
    assert digests(shared) == expected


def test_a_listing_does_not_outlive_its_shards(source: Path, tmp_path: Path, made: MadePieces) -> None:
    out = tmp_path / "packed"
    materialise(source, out, pack=True, shard_size=2)
    made.killed = frozenset({1})
    with pytest.raises(KeyboardInterrupt):
        materialise(source, out, pack=True, shard_size=3)
    with pytest.raises(ValueError, match="has neither"):
        open_clip_set(out)
    materialise(source, out, pack=True, shard_size=3)
    assert all(verify_shard(out, info) is None for info in read_listing(out))


def test_rows_broken_off_in_the_middle_leave_nothing_half_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from refalign_ext.data.materialise import row as row_module

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    materialise(source, whole)
    calls: list[int] = []
    original = row_module.read_reference

    def failing(*args: Any) -> Image.Image:
        calls.append(1)
        if len(calls) == 4:
            os._exit(9)  # nothing is tidied up
        return original(*args)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(row_module, "read_reference", failing)
        materialise(source, broken)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (broken / "manifest.jsonl").exists() and list((broken / "references").rglob("*.png"))
    materialise(source, broken)
    assert digests(broken) == digests(whole)
    assert not list((broken / ".work").glob("parts"))


def test_only_pieces_that_changed_or_are_gone_are_done_again(
    source: Path, tmp_path: Path, made: MadePieces
) -> None:
    root, out, fresh = tmp_path / "root", tmp_path / "out", tmp_path / "fresh"
    link_files(source, root)
    lines = source.read_text().splitlines(keepends=True)
    (root / "data.jsonl").write_text("".join(lines))
    materialise(root / "data.jsonl", out)
    made.clear()
    lines[3] = lines[3].replace("A grey box", "Another box")
    (root / "data.jsonl").write_text("".join(lines[:9]))
    materialise(root / "data.jsonl", out)
    assert made == [1, 4]
    assert "Another box" in open_clip_set(out)[3].prompt and len(open_clip_set(out)) == 6
    made.clear()
    next((out / "references/000000").iterdir()).unlink()
    (out / ".work/000004.jsonl").write_text("{}")
    materialise(root / "data.jsonl", out)
    assert made == [0, 4]
    materialise(root / "data.jsonl", fresh)
    kept = {name: value for name, value in digests(out).items() if not name.startswith("references/000005")}
    assert kept == digests(fresh)


def test_processes_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    here, spread = tmp_path / "here", tmp_path / "spread"
    first = materialise(source, here, pack=True, shard_size=3)
    second = materialise(source, spread, pack=True, shard_size=3, workers=1)
    assert digests(here) == digests(spread) and first.to_dict() == second.to_dict()


def test_nothing_of_others_is_overwritten(source: Path, tmp_path: Path) -> None:
    for name, pack in (("manifest.jsonl", False), ("report.json", False), ("shards/00000.tar", True)):
        out = tmp_path / name.replace("/", "-")
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(ValueError, match="exists already"):
            materialise(source, out, pack=pack)
        assert (out / name).read_text() == "mine" and not (out / ".work").exists()
    out = tmp_path / "pictures"
    (out / "references/000000").mkdir(parents=True)
    (out / "references/000000/mine.png").write_text("mine")
    materialise(source, out)
    assert (out / "references/000000/mine.png").read_text() == "mine"


def test_folders_that_cannot_be_used(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file: give --out"):
        materialise(source, tmp_path / "file")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl has no rows"):
        materialise(tmp_path / "empty.jsonl", tmp_path / "x")
    out = tmp_path / "out"
    (out / ".work").mkdir(parents=True)
    with locked(out / ".work" / "share-0-of-1"), pytest.raises(ValueError, match="--shard"):
        materialise(source, out)
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", Mock(side_effect=OSError(18, "Invalid cross-device link")))
        with pytest.raises(OSError, match=r"a\.mp4 .*cross-device link\); give --copy"):
            materialise(source, out)
    materialise(source, out)
    with pytest.raises(ValueError, match=r"manifest\.jsonl exists already"):
        materialise(source, out, pack=True)
    with pytest.raises(ValueError, match="is where the clips come from"):
        materialise(out / "manifest.jsonl", out)


TRIMMED = [
    ("a.mp4", "libx264", "yuv420p"),
    ("a.mkv", "libx264", "yuv420p"),
    ("a.webm", "libvpx-vp9", "yuv420p"),
    ("f.mkv", "ffv1", "yuv444p"),
    ("a.mov", "prores_ks", "yuv422p10le"),
    ("turned.mp4", "libx264", "yuv420p"),
]


@pytest.mark.parametrize(("name", "codec", "pix_fmt"), TRIMMED, ids=[row[0] for row in TRIMMED])
def test_trimmed_files_hold_the_same_frames(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    path = render(tmp_path / name, 96, codec, pix_fmt, quarter_turns=int(name == "turned.mp4"))
    size = path.stat().st_size
    for span in (
        VideoSpan(name, start_frame=50, end_frame=70),
        VideoSpan(name, start_s=50 / RATE, end_s=70 / RATE),
    ):
        copy, shifted, before = trim(path, span, size)
        data = copy.data
        assert data == trim(MediaBytes("x", path.read_bytes()), span, size)[0].data
        assert len(data) < size / 2 and 40 <= before <= 50
        assert (shifted.start_frame, shifted.end_frame, shifted.start_s) == (50 - before, 70 - before, None)
        for options in ({}, {"fps": RATE / 2}):
            new, old = (
                read_clip(media, 9, SIZE, span=VideoSpan(name, first, first + 20), **options)
                for media, first in ((MediaBytes("copy", data), 50 - before), (path, 50))
            )
            assert (new == old).all()
    assert trim(path, VideoSpan(name, start_frame=1, end_frame=90), size) is None
    assert trim(path, VideoSpan(name), size) is None


def test_a_copy_that_does_not_verify_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refalign_ext.data.materialise import trimming

    path = render(tmp_path / "a.mp4", 96)
    other = render(tmp_path / "b.mp4", 40, size=(64, 46)).read_bytes()
    span = VideoSpan("a.mp4", start_frame=50, end_frame=70)
    assert trim(path, span, 10**6) is not None
    for wrong in (other, b"", b"text", None):
        monkeypatch.setattr(trimming, "_remux", lambda *_, wrong=wrong: wrong)
        assert trim(path, span, 10**6) is None
    with pytest.raises(ValueError, match="frames 50 to 99 are asked for"):
        trim(path, VideoSpan("a.mp4", start_frame=50, end_frame=99), 10**6)
