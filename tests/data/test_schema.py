"""The manifest's lines: what is accepted comes back as it was, what is not is named; boxes; rows read by offset."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refalign_ext.data import manifest_file as rows
from refalign_ext.data import schema
from refalign_ext.data.boxes import BoxProblem, box_in_frame
from refalign_ext.data.manifest_file import ManifestReader, index_path, write_manifest
from refalign_ext.data.masks import RunLengthMask, encode
from refalign_ext.data.schema import (
    Clip,
    Reference,
    VideoSpan,
    parse,
    parse_line,
    relative_path_problem,
    resolve_inside,
    to_dict,
)

# Every key of the schema once, in its order.
FULL = r"""
{"id": "dog-1", "source": "opens2v", "group_id": "cluster-7",
 "video": {"path": "videos/dog.mp4", "start_frame": 10, "end_frame": 91, "fps": 23.976, "width": 1920,
  "height": 1080, "crop_xyxy": [100, 0, 1820, 1000]},
 "prompt": "A dog \u2028 runs, größer.", "prompt_alt": ["A dog."],
 "scores": {"aesthetic": 5.25, "motion": 1, "tech": 0.5},
 "subjects": [
  {"subject_id": "1", "phrase": "a dog", "cls": "dog", "kind": "object",
   "target": {"frame": 10, "bbox_xyxy": [1, 2.5, 30, 40], "box_space": "cropped_frame",
    "mask_rle": {"size": [2, 2], "counts": "13"}},
   "refs": [
    {"pair": "regular", "video": {"path": "videos/dog.mp4", "start_s": 0.0, "end_s": 2.5}, "frame_frac": 0.25,
     "bbox_xyxy": [0, 0, 5, 5], "box_space": "long768", "mask_rle": {"size": [2, 2], "counts": [1, 3]},
     "bg": "white", "scores": {"gme": 0.7, "aes": 4.6, "sim": 0.61, "area_ratio": 0.1}, "source_id": "dog-1"},
    {"pair": "generated", "image": "refs/dog.png", "bg": "raw"}]},
  {"subject_id": "2", "kind": "human",
   "target": {"frame_frac": 0, "bbox_xyxy": [0, 0, 1, 1], "box_space": "frame"},
   "refs": [
    {"pair": "cross", "video": {"path": "b.mkv", "start_frame": 3, "end_frame": 5, "crop_xyxy": [0, 0, 9, 9]},
     "frame": 4, "bbox_xyxy": [0, 0, 5, 5], "box_space": "cropped_frame"}]}],
 "meta": {"words": ["x", null, {}], "nested": {"a": []}}}
"""


def full_line() -> dict[str, Any]:
    return json.loads(FULL)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The full line with one value replaced or, given ..., removed; `path` is like `subjects.0.kind`."""
    line = full_line()
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inner: Any = line
    for part in parents:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return line


def clips(count: int) -> list[Clip]:
    return [
        parse({"id": f"c{n}", "video": "a.mp4", "prompt": "p" * (n % 7 + 1), "references": ["a.png"]}, "")
        for n in range(count)
    ]


def test_full_lines_come_back_as_they_were() -> None:
    line = full_line()
    clip = parse(line, "here")
    assert json.dumps(to_dict(clip)) == json.dumps(line)  # values, their types and the order of keys
    assert parse(to_dict(clip), "here") == clip
    assert line == full_line()
    assert clip.video == VideoSpan(
        "videos/dog.mp4", 10, 91, None, None, 23.976, 1920, 1080, (100, 0, 1820, 1000)
    )
    assert clip.subjects[1].refs[0].frame == 4
    assert clip.group == "cluster-7" and parse(changed("group_id", ...), "").group == "dog-1"
    assert hash(clip) == hash(parse(line, "there"))


def test_the_order_of_keys_is_fixed_and_absent_values_are_not_written() -> None:
    line = full_line()
    shuffled = {key: line[key] for key in reversed(line)}
    shuffled["video"] = {key: line["video"][key] for key in reversed(line["video"])} | {"start_s": None}
    shuffled["subjects"][1]["phrase"] = None
    shuffled["subjects"][1]["refs"][0]["scores"] = {}
    assert json.dumps(to_dict(parse(shuffled, ""))) == json.dumps(full_line())


def test_simple_lines_are_cross_pairs_of_one_subject_each() -> None:
    line = {"id": "a", "video": "clips/a.mp4", "prompt": "a dog", "references": ["a.png", "b.png"]}
    clip = parse(line, "here")
    assert (clip.source, clip.video, clip.group) == ("custom", VideoSpan("clips/a.mp4"), "a")
    assert [subject.refs for subject in clip.subjects] == [
        (Reference(pair="cross", image=name, bg="raw"),) for name in ("a.png", "b.png")
    ]
    assert [subject.subject_id for subject in clip.subjects] == ["1", "2"]
    assert parse(to_dict(clip), "here") == clip
    extended = parse({**line, "group_id": "g", "meta": {"k": 1}}, "here")
    assert (extended.group, extended.meta) == ("g", {"k": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"references": []}, "references: is missing"),
        ({"references": "a.png"}, "references: expected a list"),
        ({"references": ["a.png", "../b.png"]}, r"references\[1\]: '../b.png' lies outside"),
        ({"references": ["a.png"] * 9}, "references: expected a list of length <= 8"),
        ({"video": None}, "video: is missing"),
        ({"video": "/a.mp4"}, "video.path: '/a.mp4' is absolute"),
        ({"caption": "x"}, "caption: unknown key"),
        ({"referneces": ["a.png"]}, "referneces: unknown key; did you mean 'references'"),
    ],
)
def test_wrong_simple_lines_are_named(changes: dict[str, Any], message: str) -> None:
    line = {"id": "a", "video": "a.mp4", "prompt": "a dog", "references": ["a.png"], **changes}
    with pytest.raises(ValueError, match=f"^data.jsonl, row 3: {message}"):
        parse(line, "data.jsonl, row 3")


REFERENCE = "subjects.0.refs.0."


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("id", ..., "id: is missing"),
        ("id", 7, "id: expected text that is not empty.*, got 7"),
        ("id", "\ud800", "id: expected text"),
        ("source", "koala", "source: expected one of opens2v, phantom, custom, got 'koala'"),
        ("prompt", "", "prompt: expected text"),
        ("promt", "x", "promt: unknown key; did you mean 'prompt'"),
        ("scores", {"aes": 1}, "scores.aes: unknown key; "),
        ("scores.motion", float("nan"), "scores.motion: expected a finite number"),
        ("scores.motion", "1", "scores.motion: expected a finite number, got '1'"),
        ("scores.motion", 10**400, "scores.motion: expected a whole number <= 999"),
        ("meta.words", {1, 2}, "meta: cannot be written as JSON"),
        ("meta.words", float("inf"), "meta: cannot be written as JSON"),
        ("video", ..., "video: is missing"),
        ("video.path", ..., "video.path: is missing"),
        ("video.path", "a/../../b.mp4", "video.path: 'a/../../b.mp4' lies outside the manifest's folder"),
        ("video.path", "a\0.mp4", r"video.path: 'a\\x00.mp4' is not a file name"),
        ("video.start_frame", -1, "video.start_frame: expected a whole number >= 0"),
        ("video.start_frame", True, "video.start_frame: expected a whole number"),
        ("video.start_s", 0, "video: the span is given in frames and in seconds"),
        ("video.end_frame", 10, "video.end_frame: 10 is not after the start 10; ends are exclusive"),
        ("video.fps", 0, "video.fps: expected a number above 0"),
        ("video.width", ..., "video: give width and height, or neither"),
        ("video.crop_xyxy", [0, 0, 1921, 10], "video.crop_xyxy: .* exceeds the frame of 1920x1080"),
        ("video.crop_xyxy", [0, 0, 10.5, 10], r"video.crop_xyxy\[2\]: expected four whole pixels"),
        ("video.crop_xyxy", [-1, 0, 10, 10], r"video.crop_xyxy\[0\]: expected four whole pixels, none"),
        ("video.crop_xyxy", ..., r"subjects\[0\].target.box_space: is cropped_frame, but its video"),
        ("subjects", ..., "subjects: is missing"),
        ("subjects", {"a": 1}, "subjects.a: unknown key"),
        ("subjects.1", "x", r"subjects\[1\]: expected an object"),
        ("subjects.1.subject_id", "1", r"subjects\[1\].subject_id: is used twice"),
        ("subjects.1.kind", "dog", r"subjects\[1\].kind: expected one of human, face"),
        ("subjects.1.kind", ..., r"subjects\[1\].kind: is missing"),
        ("subjects.1.refs", [], r"subjects\[1\].refs: is missing"),
        ("subjects.0.target.frame", 91, r"target.frame: 91 lies outside the span \[10, 91\)"),
        ("subjects.0.target.frame", ..., r"target.frame: a video needs one of frame and"),
        ("subjects.0.target.box_space", ..., r"subjects\[0\].target.box_space: is missing"),
        ("subjects.1.target.bbox_xyxy", ..., r"target.box_space: has no bbox_xyxy or mask_rle"),
        ("subjects.1.target", {"frame": 10}, "target: has neither bbox_xyxy nor mask_rle"),
        (REFERENCE + "pair", "self", r"subjects\[0\].refs\[0\].pair: expected one of regular, cross,"),
        (REFERENCE + "box_space", ..., r"subjects\[0\].refs\[0\].box_space: is missing"),
        (REFERENCE + "box_space", "cropped_frame", r"refs\[0\].box_space: is cropped_frame, but its video"),
        (REFERENCE + "bbox_xyxy", [0, 0, 5], r"refs\[0\].bbox_xyxy: expected four finite numbers"),
        (REFERENCE + "bbox_xyxy", [0, 6, 5, 5], r"refs\[0\].bbox_xyxy: expected x0 < x1 and y0 < y1"),
        (REFERENCE + "bbox_xyxy", [0, 0, float("inf"), 5], r"refs\[0\].bbox_xyxy\[2\]: expected four finite"),
        (REFERENCE + "mask_rle", "13", r"refs\[0\].mask_rle: expected an object"),
        (REFERENCE + "mask_rle.counts", "14", r"refs\[0\].mask_rle: the runs of the mask add up to 5"),
        (REFERENCE + "mask_rle.score", [1], r"refs\[0\].mask_rle.score: unknown key"),
        (REFERENCE + "mask_rle", ..., r"refs\[0\].mask_rle: is missing: bg \"white\""),
        (REFERENCE + "frame_frac", 1, r"refs\[0\].frame_frac: expected a number, at least 0 and below 1"),
        (REFERENCE + "image", "a.png", r"refs\[0\].image: a reference needs one of"),
        (REFERENCE + "video.end_s", 0, r"refs\[0\].video.end_s: 0 is not after the start 0"),
        ("subjects.0.refs.1.frame", 0, r"refs\[1\].frame: a picture has no frames"),
        ("subjects.0.refs.1.image", "C:\\a.png", r"refs\[1\].image: 'C:.+' is absolute"),
    ],
)
def test_wrong_lines_are_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse(changed(path, value), "data.jsonl, row 3")
    assert str(error.value).startswith("data.jsonl, row 3: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("space", ["cropped_frame", "frame"])
def test_boxes_of_pictures_are_in_the_picture(space: str) -> None:
    line = changed("subjects.0.refs.1.bbox_xyxy", [0, 0, 5, 5])
    line["subjects"][0]["refs"][1]["box_space"] = space
    if space == "frame":
        assert parse(line, "").subjects[0].refs[1].bbox_xyxy == (0, 0, 5, 5)
    else:
        with pytest.raises(ValueError, match="a picture has no cropped_frame: use frame"):
            parse(line, "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON in UTF-8"),
        (b"[]", "expected an object"),
        (b"3", "expected an object"),
        (b'{"id": NaN}', "not valid JSON"),
        (b'{"id": ' + b"9" * 5000 + b"}", ""),
        (b'{"id": ' + b"[" * 100_000, "not valid JSON"),
        (b'{"subjects": ' + b"[" * 900 + b"]" * 900 + b"}", ""),
    ],
)
def test_damaged_lines_are_value_errors(line: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^here: .*{message}"):
        parse_line(line, "here")


def test_paths_stay_in_the_folder(tmp_path: Path) -> None:
    for name in ("a.mp4", "a/b.mp4", "a/../b.mp4", "./a.mp4", "..a/b..mp4", "ä b.png"):
        assert relative_path_problem(name) is None
    for name in ("..", "../a", "a/../../b", "/a", "C:\\a", "C:a", "\\\\host\\a", "..\\a", "", ".", "\0"):
        assert relative_path_problem(name) is not None
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (tmp_path / "secret.png").touch()
    (root / "link").symlink_to(tmp_path)
    (root / "inside").symlink_to(root / "inner")
    assert resolve_inside(root, "inside/a.png") == (root / "inner" / "a.png").resolve()
    for name in ("link/secret.png", "../secret.png"):
        with pytest.raises(ValueError, match="outside the manifest's folder"):
            resolve_inside(root, name)


@pytest.mark.parametrize(
    ("box", "space", "size", "crop", "expected"),
    [
        ((1, 2, 3, 4), "frame", (10, 10), None, (1, 2, 3, 4)),
        ((1, 2, 3, 4), "frame", (10, 10), (5, 5, 9, 9), (1, 2, 3, 4)),
        ((-0.5, 0, 10.9, 10), "frame", (10, 10), None, (0, 0, 10, 10)),
        ((0, 0, 12, 10), "frame", (10, 10), None, BoxProblem.BEYOND_WIDTH),
        ((-2, 0, 10, 10), "frame", (10, 10), None, BoxProblem.NEGATIVE),
        ((0, 5, 4, 5), "frame", (10, 10), None, BoxProblem.EMPTY),
        ((10.2, 0, 10.8, 5), "frame", (10, 10), None, BoxProblem.EMPTY),
        ((float("nan"), 0, 4, 5), "frame", (10, 10), None, BoxProblem.NOT_FINITE),
        ((1, 2, 30, 40), "cropped_frame", (100, 90), (10, 20, 60, 80), (11, 22, 40, 60)),
        ((1, 2, 50.4, 60.9), "cropped_frame", (100, 90), (10, 20, 60, 80), (11, 22, 60, 80)),
        ((1, 2, 52, 40), "cropped_frame", (100, 90), (10, 20, 60, 80), BoxProblem.BEYOND_WIDTH),
        ((1, 2, 30, 40), "cropped_frame", (50, 90), (10, 20, 60, 80), BoxProblem.CROP_BEYOND_FRAME),
        # 1920 wide is shown at 768: 2.5 times; 1080 high becomes 432.
        ((100, 40, 768, 432), "long768", (1920, 1080), None, (250, 100, 1920, 1080)),
        ((100, 40, 300, 434), "long768", (1920, 1080), None, BoxProblem.BEYOND_HEIGHT),
        # The upright frame is 432 wide: what protrudes there cannot be recovered.
        ((100, 40, 600, 432), "long768", (1080, 1920), None, BoxProblem.BEYOND_WIDTH),
        # Downscale only: a smaller frame was shown as it is.
        ((100, 40, 300, 200), "long768", (640, 360), None, (100, 40, 300, 200)),
        ((100, 40, 300, 200), "long768", (768, 432), (0, 0, 10, 10), (100, 40, 300, 200)),
    ],
)
def test_boxes_are_mapped_to_the_frame(
    box: tuple[float, ...],
    space: str,
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None,
    expected: Any,
) -> None:
    mapped = box_in_frame(box, space, size, crop)
    if isinstance(expected, BoxProblem):
        assert mapped is expected
    else:
        assert mapped == pytest.approx(expected)


def test_written_manifests_are_read_by_row(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    rows = [parse(full_line(), ""), *clips(5)]
    assert write_manifest(path, iter(rows)) == 6
    assert sorted(tmp_path.iterdir()) == [path, index_path(path)]
    (tmp_path / "other").touch()  # as readable as any new file
    assert path.stat().st_mode == index_path(path).stat().st_mode == (tmp_path / "other").stat().st_mode
    with ManifestReader(path) as reader:
        assert len(reader) == 6
        assert list(reader) == rows
        assert [reader[n] for n in (5, 0, -1, -6, 3)] == [rows[n] for n in (5, 0, 5, 0, 3)]
        for row in (6, -7):
            with pytest.raises(IndexError, match="has 6 rows"):
                reader[row]
        with pickle.loads(pickle.dumps(reader)) as second:
            assert list(second) == rows
    # The index is what its description says.
    stored = index_path(path).read_bytes()
    magic, count, size, changed_at = struct.unpack_from("<8sQQQ", stored)
    offsets = np.frombuffer(stored, "<u8", offset=32).tolist()
    lines = path.read_bytes().splitlines(keepends=True)
    status = path.stat()
    assert (magic, count, size, changed_at) == (b"RAROWS1\n", 6, status.st_size, status.st_mtime_ns)
    assert offsets == [sum(map(len, lines[:n])) for n in range(6)]


def test_an_index_is_built_where_it_is_missing_or_stale(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    rows = clips(20)
    write_manifest(path, rows)
    good = index_path(path).read_bytes()
    for damaged in (None, b"", good[:20], good[:-8], good + bytes(8), b"X" + good[1:]):
        index_path(path).unlink()
        if damaged is not None:
            index_path(path).write_bytes(damaged)
        assert list(ManifestReader(path)) == rows
        assert index_path(path).read_bytes() == good
    # Other rows at the same time, as far as the clock can tell: another size.
    lines, status = path.read_bytes().splitlines(keepends=True), path.stat()
    path.write_bytes(b"".join(lines[:7]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert list(ManifestReader(path)) == rows[:7]
    # The same size, another order: only the time tells.
    path.write_bytes(b"".join(lines[6::-1]))
    os.utime(path, ns=(0, 1))
    assert list(ManifestReader(path)) == rows[6::-1]
    assert sorted(tmp_path.iterdir()) == [path, index_path(path)]


def test_an_index_that_is_current_is_not_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(tmp_path / "m.jsonl", clips(3))
    monkeypatch.setattr(rows, "_scan", lambda *_: pytest.fail("the manifest was read through"))
    assert len(list(ManifestReader(tmp_path / "m.jsonl"))) == 3


def test_folders_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    write_manifest(path, clips(3))
    index_path(path).unlink()

    def refuse(_: Path) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(rows, "atomic_open", refuse)
    assert list(ManifestReader(path)) == clips(3)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text", [b"A\nB\nC", b"\xef\xbb\xbfA\r\nB\r\nC\r\n", b"\n\nA\n  \t\nB\n\r\n\nC\n\n  "]
)
def test_blank_lines_marks_and_missing_ends_are_no_rows(tmp_path: Path, text: bytes) -> None:
    rows = clips(3)
    for letter, clip in zip(b"ABC", rows):
        text = text.replace(bytes([letter]), json.dumps(to_dict(clip)).encode())
    (tmp_path / "m.jsonl").write_bytes(text)
    reader = ManifestReader(tmp_path / "m.jsonl")
    assert list(reader) == rows
    assert [reader[n] for n in (2, 0, 1)] == [rows[n] for n in (2, 0, 1)]


def test_empty_manifests_have_no_rows(tmp_path: Path) -> None:
    assert write_manifest(tmp_path / "m.jsonl", []) == 0
    (tmp_path / "blank.jsonl").write_bytes(b" \n\n")
    for name in ("m.jsonl", "blank.jsonl"):
        assert list(ManifestReader(tmp_path / name)) == []


def test_errors_name_the_file_and_the_row(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(
        "\n".join([json.dumps(full_line()), json.dumps(changed(REFERENCE + "box_space", ...)), "{"])
    )
    reader = ManifestReader(path)
    assert reader[0].id == "dog-1"
    with pytest.raises(ValueError) as error:
        reader[1]
    assert str(error.value) == f"{path}, row 2: subjects[0].refs[0].box_space: is missing"
    with pytest.raises(ValueError, match=r"m.jsonl, row 3: not valid JSON"):
        reader[-1]
    assert reader.line(2) == b"{"
    for name in ("absent.jsonl", "."):
        with pytest.raises(ValueError, match="cannot be opened"):
            ManifestReader(tmp_path / name)


def test_what_is_not_json_lines_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 1000)
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"[" + b"1," * 1000 + b"1]")
    with pytest.raises(ValueError, match="row 1: more than 1000 bytes in one line"):
        ManifestReader(path)[0]
    with pytest.raises(ValueError, match="row 1: .* bytes; a row has at most 1000"):
        write_manifest(path, [parse(changed("prompt", "x" * 1000), "")])


def test_manifests_that_change_while_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_manifest(path, clips(10))
    reader = ManifestReader(path)
    write_manifest(path, clips(4))  # replaces the file; who has it open keeps what they opened
    assert list(reader) == clips(10)
    reader = ManifestReader(path)
    path.write_bytes(b"{}\n" * 200)  # overwrites it
    with pytest.raises(ValueError, match="was changed while it was in use"):
        reader[1]


def test_a_manifest_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_manifest(path, clips(3))
    before = path.read_bytes(), index_path(path).read_bytes()

    def failing() -> Any:
        yield from clips(2)
        raise KeyError("upstream")

    with pytest.raises(KeyError):
        write_manifest(path, failing())
    bad = Clip("x", "custom", VideoSpan("../a.mp4"), "p", clips(1)[0].subjects)
    with pytest.raises(ValueError, match=r"m.jsonl, row 2: video.path: '../a.mp4' lies outside"):
        write_manifest(path, [clips(1)[0], bad])
    assert (path.read_bytes(), index_path(path).read_bytes()) == before
    assert sorted(tmp_path.iterdir()) == [path, index_path(path)]


def test_masks_of_clips_are_written_as_they_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).random((40, 50)) < 0.4
    compressed = encode(pixels)
    for mask in (compressed, RunLengthMask(compressed.size, tuple(compressed.runs.tolist()))):
        reference = Reference("cross", "a.png", bbox_xyxy=(0, 0, 9.5, 9), box_space="frame", mask_rle=mask)
        subject = schema.Subject("1", refs=(reference,))
        write_manifest(tmp_path / "m.jsonl", [Clip("x", "custom", VideoSpan("a.mp4"), "p", (subject,))])
        assert ManifestReader(tmp_path / "m.jsonl")[0].subjects[0].refs[0] == reference


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    line = json.dumps(to_dict(clips(1)[0])).encode() + b"\n"
    peaks = []
    for count in (1_000, 100_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_bytes(line * count)
        tracemalloc.start()
        reader = ManifestReader(path)
        assert len(reader) == count and reader[count - 1] == reader[count // 2] == clips(1)[0]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The offsets of the larger one alone take 0.8 MB.
    assert peaks[1] < peaks[0] + 200_000
