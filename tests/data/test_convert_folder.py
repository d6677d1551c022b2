"""A folder of clips or a table as a manifest: what belongs together, what is dropped and what the user is told."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from refalign_ext.atomic_io import FileLocked, locked
from refalign_ext.data import clip_index, video_file
from refalign_ext.data.conversion_report import ConversionReport
from refalign_ext.data.convert.folder import convert_folder
from refalign_ext.data.convert.selection import FOLDER_SELECTION, Selection
from refalign_ext.data.decoding import read_clip
from refalign_ext.data.length import Length
from refalign_ext.data.manifest_file import ManifestReader
from refalign_ext.data.schema import Clip
from refalign_ext.data.video_file import VideoInfo
from tests.helpers.clips import render

SHORT = Length(5)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten frames of 48 x 32 at 8 fps."""
    return render(tmp_path_factory.mktemp("sample") / "clip.mp4", 10, size=(48, 32))


class Place:
    """A folder that clips are put into by name."""

    def __init__(self, root: Path, sample: Path) -> None:
        self.root, self.sample = root, sample

    def clip(self, name: str, *references: str, prompt: str | bytes | None = "A fox runs.") -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.sample, path)
        if isinstance(prompt, str):
            path.with_suffix(".txt").write_text(prompt, encoding="utf-8")
        elif prompt is not None:
            path.with_suffix(".txt").write_bytes(prompt)
        for reference in references:
            self.picture(str(Path(name).with_name(reference)))
        return path

    def picture(self, name: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (200, 30, 30)).save(self.root / name, format="PNG")

    def table(
        self, name: str, rows: list[dict[str, Any]], encoding: str = "utf-8", delimiter: str = ","
    ) -> Path:
        with (self.root / name).open("w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        return self.root / name

    def convert(self, source: Path | None = None, **options: Any) -> tuple[list[Clip], ConversionReport]:
        out = options.pop("out", self.root / "data.jsonl")
        report = convert_folder(source or self.root, out, length=options.pop("length", SHORT), **options)
        with ManifestReader(out) as rows:
            clips = list(rows)
        written = json.loads(out.with_name(out.name + ".report.json").read_text(encoding="utf-8"))
        assert written == report.to_dict()
        assert report.kept["clips"] == len(clips)
        assert report.kept["references"] == sum(len(item.refs) for clip in clips for item in clip.subjects)
        return clips, report


@pytest.fixture
def place(tmp_path: Path, sample: Path) -> Place:
    return Place(tmp_path, sample)


def forget_files() -> None:
    """What the next process would know of them: only what is written down."""
    clip_index._probe_file.cache_clear()


def pictures(clip: Clip) -> dict[str, list[str]]:
    return {item.subject_id: [str(reference.image) for reference in item.refs] for item in clip.subjects}


def reasons(report: ConversionReport, kind: str = "clips") -> dict[str, int]:
    return report.dropped[kind]


def test_files_that_belong_together_become_one_row(place: Place) -> None:
    place.clip(
        "a/one.mp4", "one.ref1.png", "one.ref2a.JPG", "one.ref2b.webp", prompt="\ufeffA fox\nand a hen.\n"
    )
    (place.root / "a/one.ref2.txt").write_text("the hen", encoding="utf-8")
    place.clip("b/deep/TWO.MP4", "two.Ref1.PNG", prompt="Rain.".encode("utf-16"))
    place.clip("three.mov", "three.ref.png")
    clips, report = place.convert(group="folder")
    assert [clip.id for clip in clips] == ["three", "a/one", "b/deep/TWO"]
    three, one, two = clips
    assert (three.group_id, one.group_id, two.group_id) == (None, "a", "b/deep")
    assert (one.prompt, two.prompt) == ("A fox and a hen.", "Rain.")
    assert pictures(one) == {"1": ["a/one.ref1.png"], "2": ["a/one.ref2a.JPG", "a/one.ref2b.webp"]}
    assert [item.phrase for item in one.subjects] == [None, "the hen"]
    assert pictures(two) == {"1": ["b/deep/two.Ref1.PNG"]} and pictures(three) == {"1": ["three.ref.png"]}
    assert {reference.pair for item in one.subjects for reference in item.refs} == {"cross"}
    video = one.video
    assert (video.path, video.start_frame, video.end_frame) == ("a/one.mp4", 0, 10)
    assert (video.width, video.height, video.fps) == (48, 32, pytest.approx(8))
    assert read_clip(place.root / video.path, 10, (48, 32)).shape == (3, 10, 32, 48)
    assert not reasons(report) and not reasons(report, "references")


def test_what_cannot_be_used_is_counted_by_reason_and_the_rest_kept(
    place: Place, tmp_path_factory: Any
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(place.sample, elsewhere / "far.mp4")
    place.clip("good.mp4", "good.ref1.png")
    place.clip("silent.mp4", "silent.ref1.png", prompt=None)
    place.clip("blank.mp4", "blank.ref1.png", prompt=" \n")
    place.clip("latin.mp4", "latin.ref1.png", prompt="Caf\xe9".encode("latin-1"))
    place.clip("long.mp4", "long.ref1.png", prompt="word " * 20_000)
    place.clip("alone.mp4")
    place.clip("hollow.mp4").with_name("hollow.ref1.png").touch()
    place.clip("broken.mp4", "broken.ref1.png").write_bytes(b"not a video at all" * 50)
    place.clip("linked.mp4", "linked.ref1.png").unlink()
    (place.root / "linked.mp4").symlink_to(elsewhere / "far.mp4")
    place.clip("good.mov", prompt=None)
    place.clip("._good.mp4", "._good.ref1.png")
    place.clip(".hidden/clip.mp4", "clip.ref1.png")
    place.picture("nobody.ref1.png")
    (place.root / "aside").symlink_to(elsewhere, target_is_directory=True)
    clips, report = place.convert()
    assert [clip.id for clip in clips] == ["good"]
    assert reasons(report) == {
        "no_prompt": 2,
        "prompt_unreadable": 2,
        "no_reference": 2,
        "video_unreadable": 1,
        "outside_folder": 1,
        "name_used_twice": 1,
        "folder_is_a_link": 1,
    }
    assert reasons(report, "references") == {"file_missing": 1, "no_video_beside": 1}
    assert report.examples["clips"]["outside_folder"] == ["linked.mp4: linked.mp4"]


def test_lengths_are_judged_at_the_wanted_rate(place: Place) -> None:
    place.clip("one.mp4", "one.ref1.png")  # ten frames at 8 fps: twenty at 16, five at 4
    for frame_num, fps in ((10, None), (10, 8.0), (20, 16.0), (5, 4.0)):
        assert len(place.convert(length=Length(frame_num, fps))[0]) == 1
        with pytest.raises(ValueError, match="1 x too_short, such as one"):
            place.convert(length=Length(frame_num + 1, fps))
    assert len(place.convert(length=None)[0]) == 1
    with pytest.raises(ValueError, match="too_short"):
        place.convert(selection=Selection(min_frames=11))


@pytest.mark.parametrize(("frames", "fps", "wanted"), [(10, 8.0, 16.0), (81, 30.0, 16.0), (33, 24.0, 25.0)])
def test_as_many_frames_as_the_decoder_finds(tmp_path: Path, frames: int, fps: float, wanted: float) -> None:
    path = render(tmp_path / "clip.mp4", frames, rate=int(fps))
    possible = Length(1, wanted).possible(frames, fps)
    assert read_clip(path, possible, (16, 16), fps=wanted).shape[1] == possible
    with pytest.raises(ValueError, match="are needed"):
        read_clip(path, possible + 1, (16, 16), fps=wanted)


def test_limits_and_pairs_are_options(place: Place) -> None:
    names = ("one.ref1a.png", "one.ref1b.png", "one.ref1c.png", "one.ref2.png", "one.ref3.png")
    place.clip("one.mp4", *names, prompt=None)
    (place.root / "one.caption.TXT").write_text("A hen.", encoding="utf-8")
    chosen = Selection(min_frames=None, max_references=2, max_cross=2)
    (clip,), report = place.convert(selection=chosen, pair="regular", prompt_suffix=".caption.txt")
    assert clip.prompt == "A hen."
    assert pictures(clip) == {"1": ["one.ref1a.png", "one.ref1b.png"], "2": ["one.ref2.png"]}
    assert {reference.pair for item in clip.subjects for reference in item.refs} == {"regular"}
    assert reasons(report, "references") == {"too_many": 2}
    assert FOLDER_SELECTION.max_references is None


HINTS = [
    (lambda place: None, r"found no video; known are \.avi"),
    (lambda place: place.picture("a.png"), "found no video"),
    (
        lambda place: [place.clip(f"{number}.MP4", prompt=None) for number in range(3)],
        r"3 x no_prompt, such as 0\.MP4; .*clip\.txt",
    ),
    (lambda place: place.clip("one.mp4"), r"1 x no_reference, such as one.mp4; .*clip\.ref1\.png"),
    (
        lambda place: [place.clip("one.mp4"), place.picture("two.ref1.png")],
        "references: 1 x no_video_beside, such as two",
    ),
]


@pytest.mark.parametrize(
    ("fill", "hint"), HINTS, ids=["empty", "no-video", "no-prompt", "no-reference", "other-name"]
)
def test_the_user_is_told_what_is_missing(place: Place, fill: Any, hint: str) -> None:
    fill(place)
    (place.root / "data.jsonl").write_text("precious", encoding="utf-8")
    with pytest.raises(ValueError, match=hint):
        place.convert()
    assert (place.root / "data.jsonl").read_text(encoding="utf-8") == "precious"
    assert not list(place.root.glob(".data.jsonl.draft"))


def test_the_manifest_has_to_lie_above_the_clips(place: Place, tmp_path_factory: Any) -> None:
    place.clip("clips/one.mp4", "one.ref1.png")
    other = tmp_path_factory.mktemp("other") / "data.jsonl"
    with pytest.raises(ValueError, match=rf"give an --out such as {place.root / 'clips' / 'manifest.jsonl'}"):
        place.convert(place.root / "clips", out=other)
    clips, _ = place.convert(place.root / "clips")
    assert clips[0].video.path == "clips/one.mp4"
    table = place.table("list.csv", [{"video": "clips/one.mp4", "prompt": "x", "ref1": "clips/one.ref1.png"}])
    with pytest.raises(
        ValueError, match=r"1 x outside_folder.*; paths in a manifest are relative to its folder"
    ):
        place.convert(table, out=other)


def test_videos_are_probed_once_even_after_a_kill(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        place.clip(f"{number}.mp4", f"{number}.ref1.png")
    probed: list[str] = []
    original = video_file.probe

    def stopping(path: Path) -> VideoInfo:
        if len(probed) == 4:
            raise KeyboardInterrupt
        return probing(path)

    def probing(path: Path) -> VideoInfo:
        probed.append(path.name)
        return original(path)

    monkeypatch.setattr(clip_index, "_CHUNK", 1)
    monkeypatch.setattr(video_file, "probe", stopping)
    with pytest.raises(KeyboardInterrupt):
        place.convert()
    assert not (place.root / "data.jsonl").exists()
    monkeypatch.setattr(video_file, "probe", probing)
    forget_files()
    clips, _ = place.convert()
    assert len(clips) == 6 and sorted(probed) == [f"{number}.mp4" for number in range(6)]
    shutil.copy(place.sample, place.root / "3.mp4")
    os.utime(place.root / "3.mp4", (1, 1))
    place.clip("7.mp4", "7.ref1.png")
    forget_files()
    place.convert()
    assert probed[6:] == ["3.mp4", "7.mp4"]
    (place.root / ".data.jsonl.draft.clip_index").write_bytes(b"damaged" * 1000)
    forget_files()
    assert len(place.convert()[0]) == 7 and len(probed) == 15


def test_a_video_of_many_rows_is_probed_once_and_a_broken_one_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.clip("one.mp4", "one.ref1.png")
    row = {"prompt": "x", "ref1": "one.ref1.png", "start_frame": 0}
    (place.root / "two.mp4").write_bytes(b"nothing")
    rows = [row | {"video": "one.mp4", "start_frame": start} for start in range(3)]
    table = place.table("list.csv", [*rows, row | {"video": "two.mp4"}])
    probed: list[str] = []
    original = video_file.probe
    monkeypatch.setattr(video_file, "probe", lambda path: probed.append(path.name) or original(path))
    assert len(place.convert(table)[0]) == 3 and probed.count("one.mp4") == 1
    probed.clear()
    forget_files()
    place.convert(table)
    assert {*probed} == {"two.mp4"}  # what could not be read may have been on a disk that was away


def test_two_processes_do_not_write_one_manifest(place: Place) -> None:
    place.clip("one.mp4", "one.ref1.png")
    with locked(place.root / ".data.jsonl.draft"), pytest.raises(FileLocked, match=r"data\.jsonl"):
        place.convert()
    assert len(place.convert()[0]) == 1


def test_workers_find_the_same(place: Place) -> None:
    for number in range(3):
        place.clip(f"{number}.mp4", f"{number}.ref1.png")
    (place.root / "1.mp4").write_bytes(b"nothing")
    alone, first = place.convert(out=place.root / "alone.jsonl")
    pooled, second = place.convert(out=place.root / "pooled.jsonl", workers=1)
    assert pooled == alone and second.to_dict() == first.to_dict() and len(alone) == 2


@pytest.mark.parametrize(
    ("name", "encoding", "delimiter"),
    [
        ("t.csv", "utf-8", ","),
        ("t.csv", "utf-8-sig", ";"),
        ("t.TSV", "utf-16", "\t"),
        ("t.csv", "utf-8", "\t"),
    ],
)
def test_tables_are_read_as_programs_write_them(
    place: Place, name: str, encoding: str, delimiter: str
) -> None:
    place.clip("in/one.mp4", "fox.png", "hen 1.png", "hen 2.png", prompt=None)
    row = {
        "Video Path": " in/one.mp4 ",
        "Caption": "Über a fox, and;\n a hen",
        "Ref1": "in/fox.png",
        "ref2A": "in/hen 1.png",
        "REF2b": "in/hen 2.png",
        "ref2_phrase": "a hen",
        "Group ID": "g",
        "remark": "",
    }
    (clip,), report = place.convert(place.table(name, [row], encoding, delimiter))
    assert (clip.id, clip.group_id, clip.prompt) == ("in/one", "g", "Über a fox, and; a hen")
    assert pictures(clip) == {"1": ["in/fox.png"], "2": ["in/hen 1.png", "in/hen 2.png"]}
    assert clip.subjects[1].phrase == "a hen" and not reasons(report)


def test_parts_of_a_video(place: Place) -> None:
    place.clip("v.mp4", "r.png", prompt=None)
    numbers = ("start_s", "end_s", "start_frame", "end_frame", "fps")
    base = {"video": "v.mp4", "prompt": "p", "references": "r.png", **dict.fromkeys(numbers, "")}
    rows = [
        base | {"start_frame": "2", "end_frame": "8"},
        base | {"start_frame": "4"},
        base | {"start_s": "0.25", "end_s": "1.26"},  # a hundredth beyond the end
        base | {"start_frame": "0", "end_frame": "8", "fps": "8"},
        base,
        base,
        base | {"start_frame": "3", "end_frame": "24", "fps": "24"},
        base | {"end_frame": "12"},
        base | {"start_s": "2"},
        base | {"start_s": "0", "end_frame": "8"},
        base | {"start_s": "nan"},
        base | {"start_frame": "3", "end_frame": "3"},
        base | {"end_frame": "7.5"},
        base | {"start_frame": "7"},
    ]
    clips, report = place.convert(place.table("t.csv", rows))
    spans = [
        (clip.video.start_frame, clip.video.end_frame, clip.video.start_s, clip.video.end_s) for clip in clips
    ]
    assert spans == [
        (2, 8, None, None),
        (4, 10, None, None),
        (None, None, 0.25, 1.25),
        (None, None, 0, 1),
        (0, 10, None, None),
        (0, 10, None, None),
        (None, None, 0.125, 1),
    ]
    assert [clip.id for clip in clips] == ["v@2", "v@4", "v@0.25", "v@0", "v", "v#6", "v@3"]
    assert reasons(report) == {
        "span_outside_video": 2,
        "not_valid": 4,
        "too_short": 1,
    }
    assert "start_s" in " ".join(report.examples["clips"]["not_valid"])


def test_json_lines_and_columns_by_name(place: Place) -> None:
    place.clip("one.mp4", "a.png", "b.png", "c.png", prompt=None)
    lines = [
        {
            "name": "x",
            "movie": "one.mp4",
            "said": "p",
            "cut_outs": ["a.png", ["b.png", "c.png"]],
            "other": {"k": 1},
        },
        {"name": "y", "movie": "one.mp4", "said": "q", "cut_outs": "a.png; b.png"},
        {"name": "x", "movie": "one.mp4", "said": "again", "cut_outs": ["a.png"]},
        {"name": "z", "movie": "one.mp4", "said": "r", "cut_outs": ["none.png", 7, "../up.png"]},
        {"name": "w", "movie": "gone.mp4", "said": "r", "cut_outs": ["a.png"]},
        {"name": "v", "movie": 5, "said": ["r"], "cut_outs": ["a.png"]},
    ]
    table = place.root / "t.jsonl"
    text = "\n".join([json.dumps(lines[0]), "", "{broken", "[1]", *map(json.dumps, lines[1:])])
    table.write_text(text, encoding="utf-8")
    columns = {"id": "name", "video": "movie", "prompt": "said", "references": "cut_outs"}
    clips, report = place.convert(table, columns=columns)
    assert [clip.id for clip in clips] == ["x", "y"]
    assert pictures(clips[0]) == {"1": ["a.png"], "2": ["b.png", "c.png"]}
    assert pictures(clips[1]) == {"1": ["a.png"], "2": ["b.png"]}
    assert reasons(report) == {
        "row_not_readable": 2,
        "id_used_twice": 1,
        "no_reference": 1,
        "video_unreadable": 1,
        "no_video": 1,
    }
    assert reasons(report, "references") == {"file_missing": 1, "not_a_file_name": 1, "outside_folder": 1}


def test_rows_of_a_table_that_are_damaged_cost_themselves_alone(place: Place) -> None:
    place.clip("one.mp4", "a.png", prompt=None)
    table = place.root / "t.csv"
    table.write_bytes(
        b"id,video,prompt,ref1\n1,one.mp4,fine,a.png\n2,one.mp4,caf\xe9,a.png\n3,one.mp4,too,many,a.png\n\n"
        b'4,one.mp4,"quoted, fine",a.png\n5,one.mp4,,a.png\n6,,p,a.png\n7,one.mp4,p,\n8,C:\\x\\one.mp4,p,a.png\n'
    )
    clips, report = place.convert(table)
    assert [clip.id for clip in clips] == ["1", "4"]
    assert reasons(report) == {
        "not_valid": 1,
        "row_not_readable": 1,
        "no_prompt": 1,
        "no_video": 1,
        "no_reference": 1,
        "outside_folder": 1,
    }


def test_a_table_may_lie_elsewhere_than_its_files(place: Place, tmp_path_factory: Any) -> None:
    place.clip("one.mp4", "a.png", prompt=None)
    other = Place(tmp_path_factory.mktemp("lists"), place.sample)
    table = other.table("t.csv", [{"video": "one.mp4", "text": "p", "refs": str(place.root / "a.png")}])
    clips, _ = place.convert(table, media_root=place.root)
    assert pictures(clips[0]) == {"1": ["a.png"]}


@pytest.mark.parametrize(
    ("header", "columns", "message"),
    [
        (
            "movie,prompt,ref1",
            None,
            r"t\.csv: no column of movie, prompt, ref1 holds the video: name it with --column",
        ),
        ("video,said,ref1", None, "holds the prompt"),
        ("video,prompt,fox", None, "no column of video, prompt, fox holds the references: call them ref1"),
        ("video,prompt,ref1", {"video": "vidoe"}, "has no such column; did you mean 'video'"),
        ("video,prompt,ref1", {"length": "video"}, "--column length=video: unknown 'length'"),
        ("video,video,prompt", None, "two columns are called 'video'"),
        ("vid\udce9o,prompt,ref1", None, "holds the video"),
    ],
)
def test_tables_without_the_columns(place: Place, header: str, columns: Any, message: str) -> None:
    table = place.root / "t.csv"
    table.write_bytes(f"{header}\none.mp4,p,a.png\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        place.convert(table, columns=columns)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (".", {"prompt_suffix": "txt"}, "--prompt_suffix 'txt': give a suffix with its dot"),
        (".", {"workers": -1}, "--workers -1"),
        (".", {"columns": {"video": "movie"}}, "--column and --media_root are for tables"),
        ("t.xlsx", {}, r"t\.xlsx: expected a folder or a table"),
        ("gone.csv", {}, "no such folder or table"),
        ("t.csv", {}, "it has no rows"),
    ],
)
def test_sources_and_options_that_cannot_be(
    place: Place, source: str, options: dict[str, Any], message: str
) -> None:
    place.clip("one.mp4", "one.ref1.png")
    for name in ("t.xlsx", "t.csv"):
        (place.root / name).touch()
    with pytest.raises(ValueError, match=message):
        place.convert(place.root / source, **options)
