"""OpenS2V-5M's native files to a manifest: every trap of the format with known truth, damage, resuming, shares, memory."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import sqlite3
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refalign_ext.atomic_io import locked
from refalign_ext.data.clip_set import open_clip_set
from refalign_ext.data.conversion_report import ConversionReport, report_path
from refalign_ext.data.convert import json_stream, opens2v, opens2v_join
from refalign_ext.data.convert.opens2v import convert_opens2v
from refalign_ext.data.convert.opens2v_entry import EntryReader
from refalign_ext.data.convert.selection import Selection, kind_of_class
from refalign_ext.data.crop import read_reference
from refalign_ext.data.manifest_file import ManifestReader
from refalign_ext.data.masks import decode, iou, parse_mask
from refalign_ext.data.pieces import Share
from refalign_ext.data.schema import Clip
from tests.helpers.opens2v_fixture import (
    BLUE,
    CROP,
    LEFT,
    RED,
    RIGHT,
    NativeSet,
    Thing,
    make_entry,
    make_pair,
    mask_entry,
    write_native_set,
    write_part,
)

SHORT = Selection(min_frames=20)
ZERO, ONE, TWO = "total_part1/alpha_segment_0", "total_part1/alpha_segment_1", "total_part2/alpha_segment_2"
BETA = "total_part2/beta_part1"


def convert(
    native: NativeSet, name: str = "all.jsonl", **changes: Any
) -> tuple[dict[str, Clip], ConversionReport]:
    """The clips by id and the report."""
    arguments: dict[str, Any] = {
        "video_root": native.videos,
        "cross_pairs": native.cross_pairs,
        "backgrounds": native.backgrounds,
        "selection": SHORT,
        "share": Share(),
        "workers": 0,
    }
    report = convert_opens2v(native.parts, native.root / name, **arguments | changes)
    clips = {} if report.next_step else {clip.id: clip for clip in ManifestReader(native.root / name)}
    return clips, report


def convert_entries(
    folder: Path, entries: list[tuple[str, Any]], selection: Selection = SHORT, **changes: Any
) -> tuple[dict[str, Clip], ConversionReport]:
    """The clips, by the keys, and the report of one part whose videos are not looked for."""
    part = write_part(folder / "part.json", entries)
    return convert_file(part, selection, **changes)


def convert_file(
    part: Path, selection: Selection = SHORT, **changes: Any
) -> tuple[dict[str, Clip], ConversionReport]:
    out = part.parent / "out.jsonl"
    arguments: dict[str, Any] = {"share": Share(), "workers": 0, "check_videos": False} | changes
    report = convert_opens2v([part], out, video_root=part.parent, selection=selection, **arguments)
    return {clip.id.removeprefix("part/"): clip for clip in ManifestReader(out)}, report


def good(*things: Thing, **changes: Any) -> dict[str, Any]:
    return make_entry("clip.mp4", things or (Thing("woman", LEFT),), **changes)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> NativeSet:
    return write_native_set(tmp_path_factory.mktemp("opens2v"))


@pytest.fixture(scope="module")
def converted(native: NativeSet) -> tuple[dict[str, Clip], ConversionReport]:
    return convert(native)


def test_a_clip_is_what_its_entry_says(converted: tuple[dict[str, Clip], ConversionReport]) -> None:
    clips, _ = converted
    assert list(clips) == [ZERO, ONE, TWO, BETA]
    clip = clips[ZERO]
    video = clip.video
    assert video.path == "Videos/total_part1/source/alpha_segment_0.mp4"
    assert (video.start_frame, video.end_frame) == (2, 24)  # face_cut [2, 400) of 24 frames
    assert video.crop_xyxy == (CROP[0], CROP[2], CROP[1], CROP[3])
    assert (video.width, video.height, video.fps) == (96, 64, 8.0)
    assert (clip.prompt, clip.prompt_alt) == ("A long caption of the face clip.", ("A short caption.",))
    assert (clip.scores.aesthetic, clip.scores.motion, clip.scores.tech) == (5.07, 0.0122, 2.082)
    assert [(subject.subject_id, subject.cls, subject.kind) for subject in clip.subjects] == [
        ("2", "woman", "human"),
        ("3", "dog", "object"),
        ("background", None, "background"),
    ]
    target, reference = clip.subjects[1].target, clip.subjects[1].refs[0]
    assert (target.frame, target.bbox_xyxy, target.box_space) == (2, RIGHT, "cropped_frame")
    assert (reference.pair, reference.frame, reference.bbox_xyxy) == ("regular", 2, RIGHT)
    assert (reference.box_space, reference.bg, reference.source_id) == ("cropped_frame", "white", None)
    rows, columns = np.nonzero(decode(reference.mask_rle))
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == RIGHT
    assert reference.scores.area_ratio == pytest.approx(32 * 40 / (80 * 56), abs=1e-6)
    assert (reference.scores.gme, reference.scores.aes) == (0.7, 5.0)


def test_references_cut_from_the_videos_show_the_thing(
    native: NativeSet, converted: tuple[dict[str, Clip], ConversionReport]
) -> None:
    rows = open_clip_set(native.root / "all.jsonl")
    expected = {
        (ZERO, "2"): [RED, RED, BLUE],
        (ZERO, "3"): [BLUE],
        (ONE, "1"): [RED, RED],
        (TWO, "1"): [BLUE, RED],
        (BETA, "1"): [RED],
    }
    seen = {}
    for row in range(len(rows)):
        clip = rows[row]
        for subject in clip.subjects:
            if subject.kind != "background":
                pictures = [np.asarray(read_reference(rows, row, item), int) for item in subject.refs]
                assert all(picture.shape == (40, 32, 3) for picture in pictures)
                seen[clip.id, subject.subject_id] = [picture[8:-8, 8:-8].mean((0, 1)) for picture in pictures]
    assert seen.keys() == expected.keys()
    for name, colours in expected.items():
        assert np.allclose(seen[name], colours, atol=12), name


def test_pairs_are_joined_both_ways_under_either_name(
    converted: tuple[dict[str, Clip], ConversionReport],
) -> None:
    clips, report = converted

    def cross(name: str, subject: int = 0) -> list[tuple[str | None, float | None, str | None]]:
        references = clips[name].subjects[subject].refs
        return [
            (item.source_id, item.scores.sim, item.source_group)
            for item in references
            if item.pair == "cross"
        ]

    assert cross(ZERO) == [
        (ONE, 0.95, "alpha"),
        (TWO, 0.7, "alpha"),
    ]  # "person" is the woman; the likest first
    assert cross(ONE) == [(ZERO, 0.95, "alpha")]
    assert cross(TWO) == [(ZERO, 0.7, "alpha")]
    assert not cross(ZERO, 1) and not cross(BETA)
    assert [clip.group_id for clip in clips.values()] == ["alpha", "alpha", "alpha", "beta"]
    dropped = report.dropped["references"]
    assert dropped == {
        "cross_duplicate": 2,
        "cross_self": 2,
        "cross_text_low": 2,
        "cross_image_low": 2,
        "mask_duplicate": 1,
        "mask_empty": 1,
        "background_missing": 1,
    }


def test_everything_seen_is_counted_once(
    native: NativeSet, converted: tuple[dict[str, Clip], ConversionReport]
) -> None:
    clips, report = converted
    assert report.kept == {"clips": 4, "references": 12}
    assert report.total("references") == 7 + 2 * 6 + 4  # things, two directions of each pair, backgrounds
    assert report.kept["references"] == sum(
        len(item.refs) for clip in clips.values() for item in clip.subjects
    )
    assert json.loads(report_path(native.root / "all.jsonl").read_text()) == report.to_dict()
    assert "such as total_part2/beta_part1.png" in report.table()


def test_pairs_without_parts_broken_pairs_and_clusters_that_share_a_clip(native: NativeSet) -> None:
    folder = native.root / "other"
    folder.mkdir()
    zero, one, two = (name.split("/")[1] for name in (ZERO, ONE, TWO))
    pairs = [
        make_pair((zero, 1, "person"), (one, 1, "woman")) | {"cur_class_id": "1"},
        make_pair((one, 9, "man"), (two, 1, "woman")),
        make_pair((zero, 1, "dog"), (two, 1, "woman")),  # the number belongs to another name
        make_pair(("nowhere", 1, "man"), (two, 1, "woman")),
        {"cur_id": 3},
        make_pair((one, 1, "woman"), (two, 1, "woman")) | {"aft_class_id": 1.5},
    ]
    (folder / "alpha.json").write_text(json.dumps(pairs))
    (folder / "clusters.json").write_text(json.dumps({"beta": [zero], "gamma": [zero, two], "delta": [one]}))
    (folder / "cut.json").write_text('[{"cur_id": "a"')
    clips, report = convert(native, "other.jsonl", cross_pairs=folder)
    sources = {
        (clip.id, subject.cls): [item.source_id for item in subject.refs if item.pair == "cross"]
        for clip in clips.values()
        for subject in clip.subjects
    }
    assert sources[ZERO, "woman"] == [ONE] and sources[ONE, "woman"] == [ZERO]
    assert not sources[ZERO, "dog"] and not sources[TWO, "woman"]
    dropped = report.dropped["references"]
    assert dropped["cross_broken"] == 4
    assert dropped["cross_thing_missing"] == 4
    assert dropped["cross_clip_missing"] == 1
    assert report.incomplete == {"cut.json": "the file is cut off"}
    # Clusters that share a clip must not be split.
    assert [clips[name].group_id for name in (ZERO, ONE, TWO)] == ["beta", "delta", "beta"]


def test_videos_may_be_missing_and_pairs_and_backgrounds_are_optional(
    native: NativeSet, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.mp4"
    video = native.videos / "total_part1/source/alpha_segment_1.mp4"
    video.rename(moved)
    try:
        clips, report = convert(native, "missing.jsonl")
    finally:
        moved.rename(video)
    assert list(clips) == [ZERO, TWO, BETA]
    assert report.dropped["clips"] == {"video_missing": 1}
    assert report.dropped["references"]["cross_video_missing"] == 2
    assert {item.source_id for item in clips[ZERO].subjects[0].refs} == {None, TWO}
    clips, report = convert(native, "plain.jsonl", cross_pairs=None, backgrounds=None)
    references = [item for clip in clips.values() for subject in clip.subjects for item in subject.refs]
    assert len(references) == 5 and {item.pair for item in references} == {"regular"}
    assert clips[ZERO].group_id == "alpha" and clips[BETA].group_id == "beta"
    assert report.total("references") == 7


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda entry: entry["metadata"].pop("path"), "bad_entry"),
        (lambda entry: entry["metadata"].update(path="../out.mp4"), "bad_entry"),
        (lambda entry: entry["metadata"].update(num_frames="many"), "bad_entry"),
        (lambda entry: entry["metadata"].update(aesthetic=float("nan")), "bad_entry"),
        (lambda entry: entry["metadata"].update(fps=float("inf")), "bad_entry"),
        (lambda entry: entry["metadata"].update(fps=0), "bad_entry"),
        (lambda entry: entry["metadata"].update(resolution=[64, 96]), "bad_entry"),
        (lambda entry: entry["metadata"].update(crop=[8, 4, 88, 60]), "crop_beyond_frame"),
        (lambda entry: entry["metadata"].update(crop=[8, 98, 4, 60]), "crop_beyond_frame"),
        (lambda entry: entry["metadata"].update(face_cut=[30, 400]), "cut_empty"),
        (lambda entry: entry["metadata"].update(face_cut=[3, 400]), "frame_outside_clip"),
        (lambda entry: entry["metadata"].update(face_cap_qwen=" ", cap=[]), "no_prompt"),
        (lambda entry: entry["metadata"].update(cap={"a": 1}), "bad_entry"),
        (lambda entry: entry.pop("annotation"), "bad_entry"),
        (lambda entry: entry.update(annotation=[]), "bad_entry"),
        (lambda entry: entry["annotation"]["ann_frame_data"].update(img_width=81), "crop_differs"),
        (lambda entry: entry["annotation"]["ann_frame_data"].update(box_format="xywh"), "bad_entry"),
        (lambda entry: entry["annotation"]["ann_frame_data"].update(annotations=None), "bad_entry"),
        (lambda entry: entry["annotation"].update(mask_annotation={}), "no_references"),
        (lambda entry: entry["metadata"].update(num_frames=21), "too_short"),
    ],
)
def test_a_bad_entry_is_dropped_counted_and_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    bad = good()
    change(bad)
    clips, report = convert_entries(tmp_path, [("one", good()), ("bad", bad), ("two", good())])
    assert list(clips) == ["one", "two"]
    assert report.dropped["clips"] == {reason: 1}
    assert report.examples["clips"][reason][0].startswith("part/bad")


@pytest.mark.parametrize("entry", [None, 3, "text", [], {}, {"metadata": None}], ids=repr)
def test_an_entry_of_another_type_is_dropped(tmp_path: Path, entry: object) -> None:
    clips, report = convert_entries(tmp_path, [("bad", entry), ("../up", good()), ("one", good())])
    assert list(clips) == ["one"]
    assert report.dropped["clips"] == {"bad_entry": 2}


@pytest.mark.parametrize(
    ("thing", "selection", "reason"),
    [
        (Thing("dog", None), SHORT, "mask_empty"),
        (Thing("dog", RIGHT, gme=0.5, aes=4.4), SHORT, "quality_low"),
        (Thing("dog", RIGHT, gme=0.6, aes=4.4), SHORT, None),
        (Thing("dog", RIGHT, gme=0.5, aes=4.5), SHORT, None),
        (Thing("dog", RIGHT, gme=0.5, aes=4.5), replace(SHORT, min_aesthetic=None), "quality_low"),
        (Thing("dog", RIGHT, gme=0.1, aes=1.0), replace(SHORT, min_aesthetic=None, min_gme=None), None),
        (Thing("dog", RIGHT, gme=None, aes=None), SHORT, None),
        (Thing("dog", RIGHT, gme=float("nan")), SHORT, "bad_annotation"),
        (Thing("dog", (44, 8, 64, 28)), SHORT, "area_small"),  # 20 x 20 of 80 x 56: 0.089
        (Thing("dog", (44, 8, 64, 28)), replace(SHORT, min_area_ratio=None), None),
        (Thing("dog", RIGHT, box=(44, 8, 90, 48)), SHORT, "box_beyond_width"),
        (Thing("dog", RIGHT, box=(44, 8, 80.9, 48)), SHORT, None),
        (Thing("dog", RIGHT, box=(44, 8, 90, 48)), replace(SHORT, overflow="clamp"), None),
        (Thing("dog", RIGHT, box=(90, 8, 95, 48)), replace(SHORT, overflow="clamp"), "box_empty"),
        (Thing("dog", RIGHT, box=(44, 8, 76)), SHORT, "bad_annotation"),
        (Thing("", RIGHT), SHORT, "bad_annotation"),
        (Thing("woman", (4, 8, 36, 47), gme=0.65), SHORT, "mask_duplicate"),
        (Thing("woman", (4, 8, 36, 47), gme=0.65), replace(SHORT, max_mask_iou=None), None),
    ],
)
def test_things_are_kept_or_dropped_by_the_rules(
    tmp_path: Path, thing: Thing, selection: Selection, reason: str | None
) -> None:
    clips, report = convert_entries(tmp_path, [("one", good(Thing("woman", LEFT), thing))], selection)
    assert report.dropped["references"] == ({} if reason is None else {reason: 1})
    assert [subject.subject_id for subject in clips["one"].subjects] == (["1"] if reason else ["1", "2"])
    if thing.box and not reason:
        assert clips["one"].subjects[1].target.bbox_xyxy == (44, 8, 80, 48)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda notes, frame: notes["mask_map"].pop("2"), "mask_missing"),
        (lambda notes, frame: notes["mask_map"]["2"].update(class_name="cat"), "mask_missing"),
        (lambda notes, frame: frame.pop("2"), "mask_broken"),
        (lambda notes, frame: frame["2"].update(counts="~"), "mask_broken"),
        (lambda notes, frame: frame["2"].update(size=[56]), "mask_broken"),
        (lambda notes, frame: frame.update({"2": mask_entry(RIGHT, (96, 64))}), "mask_broken"),
    ],
)
def test_broken_masks_drop_their_thing_only(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object], reason: str
) -> None:
    entry = good(Thing("woman", LEFT), Thing("dog", RIGHT))
    change(entry["annotation"], entry["annotation"]["mask_annotation"]["2"])
    clips, report = convert_entries(tmp_path, [("one", entry)])
    assert [subject.cls for subject in clips["one"].subjects] == ["woman"]
    assert report.dropped["references"] == {reason: 1}


def test_the_largest_are_kept_in_the_order_of_the_entry(tmp_path: Path) -> None:
    boxes = [(0, 0, 20, 30), (20, 0, 60, 30), (0, 30, 40, 56), (40, 30, 80, 56), (60, 0, 80, 29)]
    things = [Thing(f"thing {number}", box) for number, box in enumerate(boxes)]
    clips, report = convert_entries(tmp_path, [("one", good(*things))])
    assert [subject.subject_id for subject in clips["one"].subjects] == ["2", "3", "4"]
    assert report.dropped["references"] == {"beyond_largest": 2}
    clips, report = convert_entries(tmp_path, [("one", good(*things))], replace(SHORT, max_references=None))
    assert len(clips["one"].subjects) == 5


def test_rules_for_clips(tmp_path: Path) -> None:
    entries = [("slow", good(motion=0.001)), ("ugly", good(aesthetic=3.0)), ("fine", good())]
    rules = replace(SHORT, min_clip_motion=0.01, min_clip_aesthetic=4.0, min_clip_tech=2.0)
    clips, report = convert_entries(tmp_path, entries, rules)
    assert list(clips) == ["fine"]
    assert report.dropped["clips"] == {"clip_motion_low": 1, "clip_aesthetic_low": 1}
    assert Selection().min_frames == 241
    assert not convert_entries(tmp_path, entries, Selection())[0]


def test_few_cross_references_of_each_subject_are_kept(native: NativeSet) -> None:
    clips, report = convert(native, "few.jsonl", selection=replace(SHORT, max_cross=1))
    assert [item.source_id for item in clips[ZERO].subjects[0].refs] == [None, ONE]
    assert report.dropped["references"]["beyond_max_cross"] == 1


def test_duplicates_are_those_that_all_pairs_of_masks_give() -> None:
    rng = random.Random(4)
    for _ in range(30):
        things = []
        for number in range(12):
            x, y = rng.choice([(4, 4), (6, 4), (5, 5), (30, 10)])
            box = (x, y, x + rng.randint(30, 34), y + rng.randint(30, 34))
            things.append(Thing(f"thing {number}", box, gme=rng.choice([0.61, 0.7, 0.8])))
        threshold = rng.choice([0.6, 0.8, 0.9])
        rules = replace(SHORT, max_mask_iou=threshold, min_area_ratio=None)
        record = EntryReader(rules, ConversionReport()).read("key", good(*things), "here")
        masks = [parse_mask(mask_entry(thing.rectangle, (80, 56))) for thing in things]
        kept: list[int] = []
        for index in sorted(range(12), key=lambda position: -things[position].gme):
            # A mask that is dropped does not drop others: of a chain the ends stay.
            if all(iou(masks[index], masks[other]) < threshold for other in kept):
                kept.append(index)
        assert [int(subject["subject_id"]) - 1 for subject in record["clip"]["subjects"]] == sorted(kept)
        assert len(record["ids"]) == len(things) and set(record["ids"].values()) == {str(k + 1) for k in kept}


def test_keys_that_come_twice_and_damaged_files(tmp_path: Path) -> None:
    entries = [("one", good()), ("one", good(motion=9.0)), ("two", good())]
    entries[2][1]["metadata"] |= {"face_cut": None, "cut": [1, 23]}
    clips, report = convert_entries(tmp_path, entries)
    assert list(clips) == ["one", "two"] and clips["one"].scores.motion == 0.0122
    assert (clips["two"].video.start_frame, clips["two"].video.end_frame) == (1, 23)
    assert report.dropped["clips"] == {"duplicate_key": 1}
    assert not report.incomplete

    part = tmp_path / "part.json"
    data = part.read_bytes()
    part.write_bytes(data[:-300])
    clips, report = convert_file(part)
    assert list(clips) == ["one"]
    assert report.incomplete == {"part.json": "the file is cut off"}

    part.write_bytes(data[:-300] + b"]" + data[-300:])
    clips, report = convert_file(part)
    assert list(clips) == ["one"]
    assert "the JSON is damaged" in report.incomplete["part.json"]
    for other in (b"", b"[1, 2]", b"7"):
        part.write_bytes(other)
        clips, report = convert_file(part)
        assert not clips and (report.incomplete or report.dropped["clips"] == {"bad_entry": 2})


@pytest.mark.parametrize("indent", [None, 4])
def test_numbers_that_json_lacks_and_bad_bytes_do_not_end_the_file(
    tmp_path: Path, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan, endless = float("nan"), float("inf")
    value = {
        "score": nan,
        "box": [1, nan, -endless],
        "said": '": NaN, and, NaN, [NaN] \\',
        "again": ": NaN, x",
        "": endless,
        "rows": [[nan, 1.5], []],
    }
    expected = repr({"first": value, "NaN": nan, "last": 1})
    path = tmp_path / "a.json"
    text = json.dumps({"first": value, "NaN": nan, "last": 1}, indent=indent).encode()
    for chunk in (7, 17, 64, 1 << 18):  # tokens lie across the borders of what is read at once
        monkeypatch.setattr(json_stream, "_CHUNK", chunk)
        for pad in range(0, 24, 5):
            path.write_bytes(b"\xef\xbb\xbf" + b" " * pad + text)
            assert repr(dict(json_stream.read_entries(path))) == expected
        path.write_bytes('{"caf\u00e9": "gr\u00fcn'.encode() + b'\xff\xc3"}')
        assert dict(json_stream.read_entries(path)) == {"caf\u00e9": "gr\u00fcn\ufffd\ufffd"}


def test_an_entry_without_end_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_ENTRY_CHARACTERS", 1 << 20)
    path = tmp_path / "a.json"
    path.write_text('{"a": 1, "b": [' + "1, " * (1 << 20) + "1]}")
    found = []
    with pytest.raises(json_stream.IncompleteFile, match="more than 1 million"):
        for pair in json_stream.read_entries(path):
            found.append(pair)
    assert len(found) <= 1


def counting_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the part files that are read from now on."""
    names: list[str] = []
    original = opens2v.read_entries
    monkeypatch.setattr(
        opens2v, "read_entries", lambda path, *rest: names.append(path.name) or original(path, *rest)
    )
    return names


def files_of(native: NativeSet, name: str) -> tuple[bytes, bytes]:
    out = native.root / name
    return out.read_bytes(), report_path(out).read_bytes()


def test_killed_work_goes_on_with_the_part_it_was_at(
    native: NativeSet, converted: tuple[dict[str, Clip], ConversionReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = EntryReader.read

    def fatal(reader: EntryReader, key: str, *rest: Any) -> dict[str, Any]:
        if key == "beta_part1":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(reader, key, *rest)

    child = os.fork()
    if not child:
        EntryReader.read = fatal
        try:
            convert(native, "killed.jsonl")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    folder = native.root / "killed.jsonl.staging"
    assert (folder / "total_part1.part.sqlite").exists()
    assert (folder / "total_part2.part.sqlite.part").exists()
    assert not (native.root / "killed.jsonl").exists()
    names = counting_reads(monkeypatch)
    convert(native, "killed.jsonl")
    assert names == ["total_part2.json"]
    assert files_of(native, "killed.jsonl") == files_of(native, "all.jsonl")


def test_only_what_changed_is_read_again(native: NativeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(native, "again.jsonl")
    names = counting_reads(monkeypatch)
    convert(native, "again.jsonl", selection=replace(SHORT, max_references=1))  # a rule of the second pass
    assert names == []
    convert(native, "again.jsonl", selection=replace(SHORT, min_gme=0.65))
    assert names == ["total_part1.json", "total_part2.json"]
    names.clear()
    status = native.parts[1].stat()
    os.utime(native.parts[1], ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    (native.root / "again.jsonl.staging" / "total_part1.part.sqlite").write_bytes(b"damaged")
    convert(native, "again.jsonl", selection=replace(SHORT, min_gme=0.65), keep_staging=False)
    assert names == ["total_part1.json", "total_part2.json"]
    assert not (native.root / "again.jsonl.staging").exists()


def test_shares_make_what_one_run_makes(
    native: NativeSet, converted: tuple[dict[str, Clip], ConversionReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = counting_reads(monkeypatch)
    _, report = convert(native, "shared.jsonl", share=Share(0, 2))
    assert names == ["total_part1.json"]
    assert "total_part2.json" in report.next_step and "without --shard" in report.next_step
    assert not (native.root / "shared.jsonl").exists()
    _, report = convert(native, "shared.jsonl", share=Share(1, 2))
    assert report.next_step is None and names == ["total_part1.json", "total_part2.json"]
    assert files_of(native, "shared.jsonl") == files_of(native, "all.jsonl")


def test_what_workers_are_handed_can_be_pickled(
    native: NativeSet, converted: tuple[dict[str, Clip], ConversionReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    def each(work: Any, items: Any, *, workers: int, **rest: Any) -> Iterator[tuple[Any, Any]]:
        assert workers == 2
        for item in items:
            work, item = pickle.loads(pickle.dumps((work, item)))
            yield item, pickle.loads(pickle.dumps(work(item)))

    monkeypatch.setattr(opens2v, "run_each", each)
    convert(native, "pickled.jsonl", workers=2)
    assert files_of(native, "pickled.jsonl") == files_of(native, "all.jsonl")


def test_a_staged_file_that_was_damaged_is_named(native: NativeSet) -> None:
    convert(native, "damaged.jsonl")
    staged = native.root / "damaged.jsonl.staging" / "total_part1.part.sqlite"
    with sqlite3.connect(staged) as connection:
        connection.execute("DROP TABLE entry")
    with pytest.raises(OSError, match="damaged.jsonl.staging: a staged file is damaged .*delete the folder"):
        convert(native, "damaged.jsonl")


def test_two_shards_do_not_join_at_once(native: NativeSet) -> None:
    (native.root / "busy.jsonl.staging").mkdir()
    convert(native, "busy.jsonl", share=Share(0, 2))
    with locked(native.root / "busy.jsonl.staging" / "join"):
        _, report = convert(native, "busy.jsonl", share=Share(1, 2))
        assert report.next_step == f"another shard is writing {native.root / 'busy.jsonl'}"
        with pytest.raises(ValueError, match="another process is writing it"):
            convert(native, "busy.jsonl")
    assert not (native.root / "busy.jsonl").exists()


def test_memory_does_not_grow_with_the_number_of_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opens2v_join, "_CACHED_RECORDS", 4)
    monkeypatch.setattr(json_stream, "_CHUNK", 1 << 14)
    things = [Thing("woman", LEFT), Thing("dog", RIGHT)]
    peaks = []
    for count in (8, 64):
        folder = tmp_path / str(count)
        folder.mkdir()
        entry = make_entry("clip.mp4", things, cap=["word " * 5000])
        part = write_part(folder / "part.json", ((f"key{number}", entry) for number in range(count)), None)
        pairs = folder / "pairs"
        pairs.mkdir()
        chain = [
            make_pair((f"part/key{number}", 1, "woman"), (f"part/key{number + 1}", 1, "woman"))
            for number in range(count - 1)
        ]
        (pairs / "chain.json").write_text(json.dumps(chain))
        del chain
        tracemalloc.start()
        clips = convert_opens2v(
            [part],
            folder / "out.jsonl",
            video_root=folder,
            cross_pairs=pairs,
            selection=SHORT,
            share=Share(),
            workers=0,
            check_videos=False,
        ).kept["clips"]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert clips == count
    assert part.stat().st_size > 1_500_000
    assert peaks[1] < 1.3 * peaks[0] + 200_000 and peaks[1] < part.stat().st_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": []}, "PARTS: give at least one"),
        ({"parts": ["missing.json"]}, "missing.json: no such file"),
        ({"parts": ["part.json", "other/part.json"]}, "part.json: .*has the same name"),
        ({"video_root": "nowhere"}, "--video_root .*nowhere: no such folder"),
        ({"video_root": "/"}, "--video_root /: not inside .*the folder of --out"),
        ({"backgrounds": "nowhere"}, "--backgrounds .*nowhere: no such folder"),
        ({"cross_pairs": "nowhere"}, "--cross_pairs .*nowhere: no such folder"),
        ({"cross_pairs": "empty"}, r"--cross_pairs .*empty: no \*.json files"),
        ({"out": "no/out.jsonl"}, "--out .*its folder does not exist"),
        ({"out": "other"}, "--out .*other is a folder: name a file"),
    ],
)
def test_errors_name_the_flag(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    for folder in ("", "other", "empty"):
        (tmp_path / folder).mkdir(exist_ok=True)
    for name in ("part.json", "other/part.json"):
        write_part(tmp_path / name, [("one", good())])
    named: dict[str, Any] = {"parts": ["part.json"], "out": "out.jsonl", "video_root": "."} | changes
    paths = {name: tmp_path / value for name, value in named.items() if name != "parts"}
    parts = [tmp_path / part for part in named["parts"]]
    with pytest.raises(ValueError, match=message):
        convert_opens2v(parts, **paths, selection=SHORT, share=Share(), check_videos=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_mask_iou": 0.0}, "--max_mask_iou 0.0"),
        ({"min_gme": float("nan")}, "--min_gme nan"),
        ({"max_references": 0}, "--max_references 0"),
        ({"overflow": "keep"}, "--overflow keep: choose one of drop, clamp"),
    ],
)
def test_rules_that_cannot_be_name_their_flag(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(**changes)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("woman", "human"),
        ("Young Woman", "human"),
        ("woman in red dress", "human"),
        ("human head", "face"),
        ("face", "face"),
        ("baby stroller", "object"),
        ("man's hat", "object"),
        ("white lace top", "object"),
        ("", "object"),
    ],
)
def test_kinds_of_classes(name: str, kind: str) -> None:
    assert kind_of_class(name) == kind


def test_reports_add_up_and_come_back(tmp_path: Path) -> None:
    first, second = ConversionReport(), ConversionReport()
    for number in range(9):
        first.drop("clips", "too_short", f"clip {number}")
        second.drop("clips", "too_short", f"other {number}")
    second.keep("references", 3)
    second.drop("references", "mask_empty", "x" * 1000, 4)
    second.incomplete["a.json"] = "the file is cut off"
    first.merge(second)
    assert first.dropped["clips"] == {"too_short": 18}
    assert first.examples["clips"]["too_short"] == [f"clip {number}" for number in range(5)]
    assert (first.kept["references"], first.total("references")) == (3, 7)
    assert len(first.examples["references"]["mask_empty"][0]) == 200
    first.write(tmp_path / "report.json")
    again = ConversionReport.from_dict(json.loads((tmp_path / "report.json").read_text()))
    assert again.to_dict() == first.to_dict()
    assert "clips: 0 of 18 kept (0.0%)" in first.table() and "incomplete: a.json" in first.table()
