"""Phantom-Data's parquet files as a manifest: every quirk of the real ones, and memory that does not grow with the rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refalign_ext.data.boxes import box_in_frame
from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.convert import phantom
from refalign_ext.data.convert.phantom import convert_phantom
from refalign_ext.data.convert.phantom_lookup import ClipName
from refalign_ext.data.convert.phantom_pairs import Detection, PhraseDetections, parse_cross_pair
from refalign_ext.data.convert.selection import Selection
from refalign_ext.data.length import Length
from refalign_ext.data.manifest_file import ManifestReader
from refalign_ext.data.pieces import Share
from refalign_ext.data.schema import Clip, Target
from tests.helpers.phantom_fixture import info_row, pair, referred, seen, write_info, write_pairs

A, B, C = "-0_aB-c_d_3.5_13.5", "zz-9_100_110", "q__1_0_10"
ROOT = Path(__file__).resolve().parents[2]
BIG = (100, 40, 500, 400)  # in long768, of a frame of 768 x 432
ANY = Selection(min_frames=None, min_area_ratio=None, min_image_similarity=None)


class Place:
    """A folder with the two files and the videos' folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "data.jsonl"
        (root / "videos").mkdir()
        self.infos = [info_row(A), info_row(B), info_row(C)]

    def convert(self, rows: Sequence[Any] | Path, **options: Any) -> tuple[list[Clip], ConversionReport]:
        """Converts rows of (vid, caption, cross_pair), or a file of them."""
        pairs = rows if isinstance(rows, Path) else write_pairs(self.root / "pairs.parquet", rows)
        info = write_info(self.root / "info.parquet", self.infos)
        options = {"selection": ANY, "video_root": self.root / "videos"} | options
        report = convert_phantom(pairs, info, self.out, **options)
        with ManifestReader(self.out) as reader:
            clips = list(reader)
        written = json.loads((self.root / "data.jsonl.report.json").read_text(encoding="utf-8"))
        assert written == report.to_dict() and report.next_step is None
        assert report.kept["clips"] == len(clips)
        assert report.kept["references"] == sum(len(item.refs) for clip in clips for item in clip.subjects)
        assert not (self.root / "data.jsonl.parts").exists()
        return clips, report


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def reasons(report: ConversionReport, kind: str = "references") -> dict[str, int]:
    return report.dropped[kind]


@pytest.mark.parametrize("key", ["video_id", "vid"])
def test_a_row_becomes_a_clip(place: Place, key: str) -> None:
    cell = {
        "the man in red": pair(
            [seen(A, "0.25", BIG)], [referred(B, 0.5, (10, 10, 300, 420), 0.875), referred(A, "0.75", BIG)]
        ),
        "a bottle": pair(
            [seen(A, 0.25, (0, 0, 200.5, 200), "bottle")], [referred(C, "0", BIG, 0.75, "bottle")]
        ),
    }
    place.infos[1] = info_row(B, (640, 480), 90, 25.0)
    path = write_pairs(place.root / "p.parquet", [(A, " A man drinks. ", cell)], key)
    assert pq.ParquetFile(path).schema_arrow.field("cross_pair").type == pa.string()
    (clip,), report = place.convert(path)
    assert (clip.id, clip.source, clip.group_id, clip.prompt) == (A, "phantom", "-0_aB-c_d", "A man drinks.")
    assert (clip.scores.aesthetic, clip.scores.motion, clip.scores.tech) == (5.0, 3.5, 0.9)
    video = clip.video
    assert (video.path, video.start_frame, video.end_frame) == (f"videos/{A}.mp4", 0, 300)
    assert (video.fps, video.width, video.height) == (30.0, 1280, 720)
    man, bottle = clip.subjects
    assert (man.phrase, man.cls, man.kind) == ("the man in red", "person", "human")
    assert man.target == Target(frame_frac=0.25, bbox_xyxy=BIG, box_space="long768")
    assert (bottle.phrase, bottle.kind) == ("a bottle", "object")
    assert [(ref.pair, ref.source_id, ref.source_group, ref.frame_frac) for ref in man.refs] == [
        ("regular", A, "-0_aB-c_d", 0.25),
        ("regular", A, "-0_aB-c_d", 0.75),
        ("cross", B, "zz-9", 0.5),
    ]
    cross = man.refs[2]
    assert cross.video is not None and cross.bg == "raw" and cross.box_space == "long768"
    # The span of another clip is its whole file: a share of it needs no number of frames.
    assert (cross.video.path, cross.video.start_frame, cross.video.end_frame) == (
        f"videos/{B}.mp4",
        None,
        None,
    )
    assert (cross.video.width, cross.video.height, cross.video.fps) == (640, 480, 25.0)
    assert cross.scores.sim == 0.875 and cross.scores.area_ratio == pytest.approx(
        290 * 410 / 640 / 480, abs=1e-6
    )
    assert not reasons(report) and not reasons(report, "clips")


def test_boxes_map_as_the_annotators_resized(place: Place) -> None:
    cell = {"x": pair([], [referred(B, 0.5, (0, 0, 384, 216))])}
    (clip,), _ = place.convert([(A, "p", cell)])
    (reference,) = clip.subjects[0].refs
    assert clip.subjects[0].target is None
    size = (reference.video.width, reference.video.height)
    assert box_in_frame(reference.bbox_xyxy, reference.box_space, size) == (0, 0, 640, 360)


DROPS: list[tuple[str, Any, dict[str, int]]] = [
    ("rounding is kept", [referred(B, 0.5, (-0.5, 0, 768.6, 432.9))], {}),
    ("beyond the width", [referred(B, 0.5, (600, 0, 800, 300))], {"box_beyond_width": 1}),
    ("beyond the height", [referred(B, 0.5, (600, 0, 700, 440))], {"box_beyond_height": 1}),
    ("empty", [referred(B, 0.5, (600, 0, 600, 300))], {"box_empty": 1}),
    ("negative", [referred(B, 0.5, (-20, 0, 600, 300))], {"box_negative": 1}),
    ("NaN", [referred(B, 0.5, (float("nan"), 0, 600, 300))], {"box_not_finite": 1}),
    ("whole frame number", [referred(B, 17, BIG)], {"detection_not_valid": 1}),
    ("the end", [referred(B, "1.0", BIG)], {"detection_not_valid": 1}),
    ("no frame", [referred(B, "", BIG)], {"detection_not_valid": 1}),
    ("unknown clip", [referred("gone_1_2", 0.5, BIG)], {"not_in_meta_info": 1}),
    ("no clip", [referred("", 0.5, BIG)], {"detection_not_valid": 1}),
    ("three numbers", [[{"vid": B, "frame_idx": 0.5, "bbox_loc": [[1, 2, 3]]}]], {"detection_not_valid": 1}),
    ("no times in the name", [referred("plain", 0.5, BIG)], {"vid_without_times": 1}),
    ("climbing name", [referred("../../etc/x_1_2", 0.5, BIG)], {"vid_not_a_file_name": 1}),
    ("the subject itself", [referred(A, "0.25", (101, 41, 499, 399))], {"is_the_subject_itself": 1}),
    ("twice", [referred(B, 0.5, BIG), referred(B, "0.5", BIG)], {"listed_twice": 1}),
]


@pytest.mark.parametrize(
    ("references", "expected"), [drop[1:] for drop in DROPS], ids=[drop[0] for drop in DROPS]
)
def test_references_are_dropped_by_reason(place: Place, references: Any, expected: dict[str, int]) -> None:
    place.infos += [info_row("plain"), info_row("../../etc/x_1_2")]
    cell = {"x": pair([seen(A, 0.25, BIG)], [*references, referred(C, 0.5, BIG)])}
    (clip,), report = place.convert([(A, "p", cell)])
    assert reasons(report) == expected
    assert clip.subjects[0].refs[-1].source_id == C


def test_a_target_that_cannot_be_used_leaves_the_references(place: Place) -> None:
    targets = [seen(A, 0.5, (0, 0, 900, 300)), seen(B, 0.5, BIG), seen(A, "no", BIG)]
    (clip,), report = place.convert([(A, "p", {"x": pair(targets, [referred(B, 0.5, BIG)])})])
    assert clip.subjects[0].target is None and len(clip.subjects[0].refs) == 1
    assert reasons(report) == {
        "box_beyond_width": 1,
        "detection_not_valid": 1,
    }


def test_clips_are_dropped_by_reason_and_the_others_kept(place: Place) -> None:
    good = {"x": pair([seen(A, 0.25, BIG)], [referred(B, 0.5, BIG)])}
    place.infos += [
        info_row("short_0_5", frames=150),  # 81 frames at 16 fps need 150.5 at 30
        info_row("long_0_5", frames=151),
        info_row("plain"),
        info_row("holes_0_1", width=None),
        *(info_row(f"n_{number}_10") for number in range(1, 9)),
    ]
    rows = [
        (A, "p", good),
        (B, "p", '{"x": {"obj_from_tgt_video": ['),
        ("n_1_10", "p", "[1, 2]"),
        ("n_2_10", "  ", good),
        ("n_3_10", None, good),
        (None, "p", good),
        ("gone_0_9", "p", good),
        ("plain", "p", good),
        ("short_0_5", "p", good),
        ("holes_0_1", "p", good),
        ("long_0_5", "p", good),
        ("n_4_10", "p", None),
        ("n_5_10", "p", {"x": pair([], [])}),
        ("n_6_10", "p", {"x": None}),
        ("n_7_10", "p", "[" * 100_000),
        (
            "n_8_10",
            "p",
            {"x": pair([], [referred("gone_1_2", 0.1, BIG)])},
        ),
    ]
    clips, report = place.convert(rows)
    assert [clip.id for clip in clips] == [A, "long_0_5"]
    assert reasons(report, "clips") == {
        "cross_pair_not_readable": 5,
        "no_prompt": 2,
        "no_vid": 1,
        "not_in_meta_info": 2,
        "vid_without_times": 1,
        "too_short": 1,
        "no_reference": 2,
    }
    assert report.examples["clips"]["too_short"] == ["short_0_5"]
    assert B in report.examples["clips"]["cross_pair_not_readable"][0]


def test_a_clip_that_comes_twice_counts_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phantom, "PIECE_ROWS", 2)
    cell = {"x": pair([], [referred(C, 0.5, BIG)])}
    rows = [
        (A, "first", cell),
        (B, "first", cell),
        (None, "p", cell),
        (A, "second", cell),
        (B, "second", cell),
    ]
    clips, report = place.convert([*rows, (None, "p", cell)])
    assert [(clip.id, clip.prompt) for clip in clips] == [(A, "first"), (B, "first")]
    assert reasons(report, "clips") == {"id_used_twice": 2, "no_vid": 2}
    assert report.examples["clips"]["id_used_twice"] == [A, B]


def test_rules_are_options(place: Place) -> None:
    small = (0, 0, 60, 60)
    cell = {
        "large": pair([seen(A, 0.5, BIG)], [referred(B, 0.1 * n, BIG, 0.5 + 0.05 * n) for n in range(5)]),
        "small": pair([seen(A, 0.5, small)], [referred(C, 0.5, BIG), referred(C, 0.6, small)]),
    }
    rows = [(A, "p", cell)]
    (clip,), report = place.convert(
        rows, selection=Selection(min_frames=None, min_image_similarity=0.55, max_cross=2)
    )
    assert [[ref.pair for ref in item.refs] for item in clip.subjects] == [
        ["regular", "cross", "cross"],
        ["cross"],
    ]
    assert [ref.scores.sim for ref in clip.subjects[0].refs] == [
        None,
        pytest.approx(0.65),
        pytest.approx(0.7),
    ]
    assert reasons(report) == {"cross_image_low": 2, "too_many_cross": 1, "area_small": 2}
    (clip,), report = place.convert(
        rows, selection=Selection(min_frames=None, max_references=1), regular=False
    )
    assert [item.phrase for item in clip.subjects] == ["large"]
    assert {ref.pair for ref in clip.subjects[0].refs} == {"cross"}
    assert reasons(report)["too_many_subjects"] == 1
    with pytest.raises(ValueError, match="1 x clip_aesthetic_low, such as"):
        place.convert(rows, selection=Selection(min_frames=None, min_clip_aesthetic=5.5))
    with pytest.raises(ValueError, match="1 x too_short"):
        place.convert(rows, length=Length(301, None))


def test_absent_videos_can_be_dropped(place: Place) -> None:
    pattern = "{uuid}/{start}-{end}.webm"
    for name in ("-0_aB-c_d/3.5-13.5.webm", "zz-9/100-110.webm"):
        (place.root / "videos" / name).parent.mkdir()
        (place.root / "videos" / name).touch()
    cell = {"x": pair([seen(A, 0.5, BIG)], [referred(B, 0.5, BIG), referred(C, 0.5, BIG)])}
    clips, report = place.convert([(A, "p", cell), (C, "p", cell)], video_name=pattern, only_existing=True)
    assert [clip.video.path for clip in clips] == ["videos/-0_aB-c_d/3.5-13.5.webm"]
    assert [ref.source_id for ref in clips[0].subjects[0].refs] == [A, B]
    assert reasons(report) == {"video_absent": 1} and reasons(report, "clips") == {"video_absent": 1}


def test_pairs_can_be_seen_from_both_clips(place: Place) -> None:
    there = (50, 50, 350, 350)
    rows = [
        # A points to B, where B's own row knows that place, and to C, whose row does not.
        (
            A,
            "p",
            {
                "the man": pair(
                    [seen(A, 0.25, BIG)], [referred(B, 0.5, there, 0.8), referred(C, 0.5, there, 0.7)]
                )
            },
        ),
        (B, "p", {"a man": pair([seen(B, "0.5", (52, 50, 350, 350))], [])}),
        (
            C,
            "p",
            {"a dog": pair([seen(C, 0.125, (0, 0, 300, 300), "dog")], [referred(A, 0.75, BIG, cls="dog")])},
        ),
    ]
    one_way, _ = place.convert(rows)
    assert [[len(item.refs) for item in clip.subjects] for clip in one_way] == [[3], [1], [2]]
    clips, _ = place.convert(rows, both_ways=True)
    a, b, c = clips
    # A's man and, from C's row, a dog at another place of A.
    assert [item.phrase for item in a.subjects] == ["the man", "a dog"]
    assert [(ref.pair, ref.source_id, ref.frame_frac) for ref in a.subjects[1].refs] == [
        ("regular", A, 0.75),
        ("cross", C, 0.125),
    ]
    (man,) = b.subjects
    assert man.phrase == "a man"
    assert [(ref.pair, ref.source_id, ref.bbox_xyxy, ref.scores.sim) for ref in man.refs] == [
        ("regular", B, (52, 50, 350, 350), None),
        ("cross", A, BIG, 0.8),
    ]
    assert [item.phrase for item in c.subjects] == ["a dog", "the man"]
    assert c.subjects[1].target == Target(frame_frac=0.5, bbox_xyxy=there, box_space="long768")
    assert len({item.subject_id for item in c.subjects}) == 2


def test_a_mutual_pair_is_not_doubled(place: Place) -> None:
    there = (50, 50, 350, 350)
    rows = [
        (A, "p", {"he": pair([seen(A, 0.25, BIG)], [referred(B, 0.5, there)])}),
        (B, "p", {"him": pair([seen(B, 0.5, there)], [referred(A, 0.25, BIG)])}),
    ]
    assert place.convert(rows, both_ways=True)[0] == place.convert(rows)[0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"vid": A, "width": 3, "fps": 1}, "no column height"),
        ({"vid": A, "width": 3, "height": 2}, "no column fps or num_frames"),
        ({"id": A, "fps": 1}, "no column vid or video_id"),
    ],
)
def test_meta_info_without_its_columns(place: Place, columns: dict[str, Any], message: str) -> None:
    place.infos = [columns]
    with pytest.raises(ValueError, match=message):
        place.convert([(A, "p", {"x": pair([], [referred(B, 0.5, BIG)])})])


@pytest.mark.parametrize(
    "form",
    [
        lambda row: {"video_id": row["vid"], "fps": "30.0", "width": 1280, "height": 720},
        lambda row: {"vid": row["vid"], "num_frames": 300, "width": 1280.0, "height": 720.0},
    ],
)
def test_meta_info_of_rate_or_frames_alone(place: Place, form: Callable[[Any], Any]) -> None:
    place.infos = [form(row) for row in place.infos] * 2  # rows that come twice count once
    (clip,), _ = place.convert([(A, "p", {"x": pair([], [referred(B, 0.5, BIG)])})])
    video = clip.video
    assert (video.fps, video.end_frame, video.width, video.height) == (30.0, 300, 1280, 720)


@pytest.mark.parametrize(
    ("vid", "parts"),
    [
        ("a_b-c_1_2.5", ("a_b-c", "1", "2.5")),
        ("-_0_1", ("-", "0", "1")),
        ("1_2_3", ("1", "2", "3")),
        ("a_1", None),
        ("a_1_x", None),
    ],
)
def test_names_of_clips(vid: str, parts: tuple[str, str, str] | None) -> None:
    assert ClipName.parse(vid) == parts


def test_a_reference_may_have_several_boxes() -> None:
    item = {"vid": "v", "frame_idx": "0.5", "bbox_loc": [[1, 2, 3, 4], [5, "6", 7, 8]], "bbox_cls": " cat "}
    cell = json.dumps({"x": {"refer_result": [[item | {"scores": [0.25]}, 3]], "obj_from_tgt_video": None}})
    expected = [
        Detection("v", 0.5, (1.0, 2.0, 3.0, 4.0), "cat", 0.25),
        Detection("v", 0.5, (5.0, 6.0, 7.0, 8.0), "cat", None),
    ]
    report = ConversionReport()
    assert parse_cross_pair(cell, "v", report) == [PhraseDetections("x", [], expected)]
    assert reasons(report) == {"detection_not_valid": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"video_root": Path("/")}, "--video_root /: not inside"),
        ({"video_root": Path("/gone")}, "--video_root /gone: no such folder"),
        ({"video_name": "{uuid}.mp4"}, "--video_name '{uuid}.mp4': give {vid}"),
        ({"video_name": "{vid.__class__}.mp4"}, "--video_name"),
        ({"video_name": "{vid}{0}.mp4"}, "--video_name"),
        ({"workers": -1}, "--workers -1"),
    ],
)
def test_options_that_cannot_be(place: Place, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place.convert([(A, "p", {"x": pair([], [referred(B, 0.5, BIG)])})], **options)
    assert not place.out.exists()


def test_files_that_are_not_what_they_should_be(place: Place) -> None:
    path = place.root / "p.parquet"
    path.write_bytes(b"PAR1 but not really PAR1")
    for name in ("p.parquet", "gone.parquet"):
        with pytest.raises(ValueError, match=f"{name}: not a parquet file that can be read"):
            place.convert(place.root / name)
    pq.write_table(pa.table({"video_id": ["x"], "cross_pair": ["{}"]}), path)
    with pytest.raises(ValueError, match="no column video_caption; it has video_id, cross_pair"):
        place.convert(path)
    write_pairs(path, [(f"v{number}_0_9", "word " * 50, {}) for number in range(20_000)])
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"p\.parquet: .*damaged|no clip can be used"):
        place.convert(path)


def many(root: Path, count: int, usable: int = 1, words: int = 20) -> tuple[Path, Path]:
    """`count` rows of the size of real ones, each pointing to another clip; one in `usable` is long enough."""
    names = [f"uuid-{number // 3:06d}_{number}_{number + 10}" for number in range(count)]
    rows = []
    for number, name in enumerate(names):
        other = names[(number * 7 + 5) % count]
        cell = {
            "the woman in a coat": pair(
                [seen(name, "0.25", BIG)], [referred(other, f"{number / count:.4f}", BIG)]
            )
        }
        rows.append((name, f"Clip {number}. " + "A description of what happens. " * words, cell))
    pairs = write_pairs(root / "pairs.parquet", rows)
    infos = [info_row(name, frames=50 if number % usable else 300) for number, name in enumerate(names)]
    return pairs, write_info(root / "info.parquet", infos)


def test_shares_and_workers_and_a_kill_give_the_same_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path)
    monkeypatch.setattr(phantom, "PIECE_ROWS", 10)
    pairs, info = many(tmp_path, 100)
    options: dict[str, Any] = {"video_root": tmp_path / "videos", "selection": ANY}
    outs = {name: tmp_path / f"{name}.jsonl" for name in ("alone", "shares", "pool", "killed")}
    alone = convert_phantom(pairs, info, outs["alone"], **options)
    assert alone.kept["clips"] == 100

    for index in (2, 0):
        partial = convert_phantom(pairs, info, outs["shares"], share=Share(index, 3), **options)
        assert partial.next_step and not outs["shares"].exists() and partial.kept["clips"] in (30, 40)
    last = convert_phantom(pairs, info, outs["shares"], share=Share(1, 3), **options)
    assert last.next_step is None

    convert_phantom(pairs, info, outs["pool"], workers=1, **options)

    original, done = phantom._PhantomJob.make, []

    def stopping(job: Any, rows: range) -> Any:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(rows.start)
        return original(job, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(phantom._PhantomJob, "make", stopping)
        convert_phantom(pairs, info, outs["killed"], **options)
    monkeypatch.setattr(
        phantom._PhantomJob, "make", lambda job, rows: done.append(rows.start) or original(job, rows)
    )
    report = convert_phantom(pairs, info, outs["killed"], **options)
    assert sorted(done) == list(range(0, 100, 10))
    texts = {out.read_bytes() for out in outs.values()}
    assert len(texts) == 1 and report.to_dict() == last.to_dict() == alone.to_dict()
    assert not list(place.root.glob("*.parts")) and not list(place.root.glob(".*"))


def test_two_shares_that_end_at_once_both_tell_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Place(tmp_path)
    pairs, info = many(tmp_path, 10)
    original = phantom._join

    def late(job: Any, out: Path) -> ConversionReport:
        original(job, out)
        job.folder.mkdir()  # which the other share is removing
        return original(job, out)

    monkeypatch.setattr(phantom, "_join", late)
    report = convert_phantom(
        pairs, info, tmp_path / "data.jsonl", video_root=tmp_path / "videos", selection=ANY
    )
    assert report.kept["clips"] == 10 and report.next_step is None


def test_other_settings_do_not_take_up_old_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Place(tmp_path)
    monkeypatch.setattr(phantom, "PIECE_ROWS", 32)
    pairs, info = many(tmp_path, 64)
    options: dict[str, Any] = {"video_root": tmp_path / "videos", "selection": ANY}
    out = tmp_path / "data.jsonl"
    convert_phantom(pairs, info, out, share=Share(0, 2), **options)
    report = convert_phantom(pairs, info, out, share=Share(1, 2), regular=False, **options)
    assert report.next_step and not out.exists()
    report = convert_phantom(pairs, info, out, regular=False, **options)
    with ManifestReader(out) as rows:
        assert {ref.pair for clip in rows for item in clip.subjects for ref in item.refs} == {"cross"}


MEASURE = """
import sys
from pathlib import Path
from refalign_ext.data.convert.phantom import convert_phantom
import pyarrow.acero, pyarrow.compute, pyarrow.parquet, sqlite3, tqdm
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
root = Path(sys.argv[1])
before = peak()
report = convert_phantom(root / "pairs.parquet", root / "info.parquet", root / "data.jsonl", video_root=root / "videos")
print(before, peak(), report.kept["clips"])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    pairs, _ = many(tmp_path, 20_000, usable=20, words=400)
    with pq.ParquetFile(pairs) as parquet:
        assert parquet.metadata.num_row_groups == 1
        held = parquet.metadata.row_group(0).total_byte_size >> 10
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    before, after, clips = map(int, done.stdout.split())
    assert clips == 1_000
    assert held > 240_000 and after - before < 150_000, (held, before, after)  # KiB
