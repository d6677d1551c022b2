"""`data check`: each defect is found under its reason, in its row and field, and nothing is found in what is sound."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from refalign_ext.atomic_io import locked
from refalign_ext.data.check import row as check_rows
from refalign_ext.data.check import run as module
from refalign_ext.data.check.row import Finding, RowSettings, check_row
from refalign_ext.data.check.run import CheckJob, CheckResult, check, report_path
from refalign_ext.data.clip_set import open_clip_set
from refalign_ext.data.manifest_file import write_manifest
from refalign_ext.data.masks import encode
from refalign_ext.data.pieces import Share
from refalign_ext.data.schema import parse
from refalign_ext.data.shards import LISTING
from refalign_ext.data.statistics.stats import Length

WIDTH, HEIGHT, FRAMES, RATE = 96, 64, 24, 8


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound and broken files to build manifests from."""
    root = tmp_path_factory.mktemp("media")
    noise = np.random.default_rng(0).integers(0, 255, (FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    with av.open(str(root / "clip.mp4"), "w") as container:
        stream = container.add_stream(
            "libx264", rate=RATE, options={"g": "4", "bf": "0", "preset": "ultrafast"}
        )
        stream.width, stream.height = WIDTH, HEIGHT
        for pixels in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    data = (root / "clip.mp4").read_bytes()
    (root / "noise.mp4").write_bytes(b"not a film" * 100)
    # The last key frame, which starts the last group of four, is overwritten; the index that finds it is whole.
    with av.open(str(root / "clip.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        start, end = packets[20].pos, packets[23].pos
    broken = bytearray(data)
    broken[start:end] = bytes(end - start)
    (root / "end.mp4").write_bytes(broken)
    Image.fromarray(noise[0]).save(root / "ref.png")
    Image.new("RGB", (64, 64), (254, 255, 255)).save(root / "white.png")
    Image.new("RGB", (64, 64), (10, 200, 30)).save(root / "green.png")
    Image.fromarray(noise[0, :8, :8]).save(root / "tiny.png")
    (root / "broken.png").write_bytes((root / "ref.png").read_bytes()[:500])
    return root


def line(number: int = 1) -> dict[str, Any]:
    """A sound row with everything that can be checked."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[8:40, 8:60] = True
    rle = {"size": [HEIGHT, WIDTH], "counts": encode(mask).counts}
    span = {
        "path": "clip.mp4",
        "start_frame": 2,
        "end_frame": 22,
        "fps": RATE,
        "width": WIDTH,
        "height": HEIGHT,
    }
    return {
        "id": f"clip-{number}",
        "source": "custom",
        "video": dict(span),
        "prompt": "noise",
        "subjects": [
            {
                "subject_id": "1",
                "kind": "object",
                "target": {
                    "frame": 5,
                    "bbox_xyxy": [4, 4, 90, 60],
                    "box_space": "frame",
                    "mask_rle": dict(rle),
                },
                "refs": [
                    {"pair": "cross", "image": "ref.png"},
                    {
                        "pair": "regular",
                        "video": dict(span),
                        "frame_frac": 0.5,
                        "bbox_xyxy": [0, 0, 80, 64],
                        "box_space": "frame",
                        "mask_rle": dict(rle),
                        "bg": "white",
                    },
                ],
            }
        ],
    }


def changed(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets what lies at `path` of a line; None takes it out."""

    def apply(entry: dict[str, Any]) -> None:
        *parents, last = path
        for key in parents:
            entry = entry[key]
        entry[last] = value

    return apply


def put(folder: Path, media: Path, lines: list[dict[str, Any] | str]) -> Path:
    for file in media.iterdir():
        if not (folder / file.name).exists():
            os.link(file, folder / file.name)
    texts = [item if isinstance(item, str) else json.dumps(item) for item in lines]
    (folder / "data.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return folder / "data.jsonl"


def findings(result: CheckResult) -> list[Finding]:
    return [Finding(**json.loads(item)) for item in result.report.read_text(encoding="utf-8").splitlines()]


EMPTY = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
SMALL = {"size": [10, 10], "counts": [50, 50]}
TARGET = ("subjects", 0, "target")
IMAGE, CUT = ("subjects", 0, "refs", 0), ("subjects", 0, "refs", 1)
DEFECTS = [  # what is changed, how it is found
    (changed("prompt", value=" "), "error", "schema", "prompt"),
    (changed("source", value="web"), "error", "schema", "source"),
    (changed("pro mpt", value="x"), "error", "schema", "pro mpt"),
    (changed(*IMAGE, "pair", value="x"), "error", "schema", "subjects[0].refs[0].pair"),
    (changed("video", "path", value="lost.mp4"), "error", "file_missing", "video.path"),
    (changed("video", "path", value="noise.mp4"), "error", "unreadable", "video.path"),
    (changed("video", value={"path": "end.mp4"}), "error", "unreadable", "video"),
    (changed("video", "width", value=100), "error", "size_differs", "video.width"),
    (changed("video", "fps", value=9), "warning", "fps_differs", "video.fps"),
    (changed("video", "end_frame", value=26), "error", "span_beyond_file", "video.end_frame"),
    (changed("video", "end_frame", value=25), "warning", "span_beyond_file", "video.end_frame"),
    (
        changed("video", value={"path": "clip.mp4", "start_s": 0, "end_s": 3.5}),
        "error",
        "span_beyond_file",
        "video.end_s",
    ),
    (
        changed("video", value={"path": "clip.mp4", "crop_xyxy": [0, 0, 97, 64]}),
        "error",
        "crop_beyond_frame",
        "video.crop_xyxy",
    ),
    (
        changed(*TARGET, "bbox_xyxy", value=[4, 4, 99, 60]),
        "error",
        "box_beyond_width",
        "subjects[0].target.bbox_xyxy",
    ),
    (changed(*TARGET, "mask_rle", value=SMALL), "error", "mask_size", "subjects[0].target.mask_rle"),
    (changed(*TARGET, "mask_rle", value=EMPTY), "error", "mask_empty", "subjects[0].target.mask_rle"),
    (changed(*TARGET, "box_space", value="long768"), "error", "mask_space", "subjects[0].target.mask_rle"),
    (changed(*IMAGE, "image", value="lost.png"), "error", "file_missing", "subjects[0].refs[0].image"),
    (changed(*IMAGE, "image", value="broken.png"), "error", "unreadable", "subjects[0].refs[0].image"),
    (changed(*IMAGE, "image", value="white.png"), "error", "reference_empty", "subjects[0].refs[0]"),
    (changed(*IMAGE, "image", value="green.png"), "warning", "reference_flat", "subjects[0].refs[0]"),
    (changed(*IMAGE, "image", value="tiny.png"), "warning", "reference_small", "subjects[0].refs[0]"),
    (
        changed(*CUT, "video", "path", value="lost.mp4"),
        "error",
        "file_missing",
        "subjects[0].refs[1].video.path",
    ),
    (changed(*CUT, "video", "end_frame", value=30), "error", "unreadable", "subjects[0].refs[1].video.path"),
    (
        changed(*CUT, "bbox_xyxy", value=[0, 0, 80, 70]),
        "error",
        "box_beyond_height",
        "subjects[0].refs[1].bbox_xyxy",
    ),
    (changed(*CUT, "mask_rle", value=SMALL), "error", "mask_size", "subjects[0].refs[1].mask_rle"),
    (changed(*CUT, "mask_rle", value=EMPTY), "error", "mask_empty", "subjects[0].refs[1].mask_rle"),
]


def test_every_defect_is_found_in_its_row_and_field(tmp_path: Path, media: Path) -> None:
    lines: list[dict[str, Any] | str] = [line(0)]
    for number, (change, *_) in enumerate(DEFECTS, 1):
        lines.append(line(number))
        change(lines[-1])
    path = put(tmp_path, media, [*lines, "{", line(1000)])
    result = check(path, workers=0)
    expected = [(row, *rest) for row, (_, *rest) in enumerate(DEFECTS, 2)]
    expected.append((len(DEFECTS) + 2, "error", "not_json", ""))
    found = [(item.row, item.level, item.reason, item.field) for item in findings(result)]
    assert found == expected
    assert result.rows == result.total == len(DEFECTS) + 3
    assert result.errors == result.bad_rows == sum(item[1] == "error" for item in expected)
    assert result.warnings == sum(item[1] == "warning" for item in expected)
    assert all(str(path) not in item.message.split(": ")[0] for item in findings(result))
    assert findings(result)[4].message == "lost.mp4 does not exist or is no file"
    assert findings(result)[4].id == "clip-5"


def test_sound_rows_have_no_findings_in_any_mode(tmp_path: Path, media: Path) -> None:
    path = put(tmp_path, media, [line(number) for number in range(3)])
    for decode in ("ends", "all", "none"):
        result = check(path, workers=0, decode=decode, length=Length(20))
        assert (result.rows, result.errors, result.warnings, result.groups) == (3, 0, 0, [])
    assert result.report == tmp_path / "data.jsonl.check.jsonl"
    assert result.report.read_text() == ""
    assert "3 checked, 0 with errors" in result.table()
    assert [file.name for file in tmp_path.glob(".*")] == []


def test_without_decoding_files_and_boxes_are_still_checked(tmp_path: Path, media: Path) -> None:
    lost, beyond, hidden = line(1), line(2), line(3)
    lost["subjects"][0]["refs"][0]["image"] = "lost.png"
    beyond["subjects"][0]["refs"][1]["bbox_xyxy"] = [0, 0, 99, 64]
    hidden["video"]["path"] = "noise.mp4"
    result = check(put(tmp_path, media, [lost, beyond, hidden]), workers=0, decode="none")
    assert [(item.row, item.reason) for item in findings(result)] == [
        (1, "file_missing"),
        (2, "box_beyond_width"),
    ]


def test_all_frames_are_decoded_when_asked(tmp_path: Path, media: Path) -> None:
    entry = {"id": "a", "video": "mid.mp4", "prompt": "x", "references": ["ref.png"]}
    path = put(tmp_path, media, [entry])
    with av.open(str(tmp_path / "clip.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    data[packets[12].pos : packets[15].pos] = bytes(packets[15].pos - packets[12].pos)
    (tmp_path / "mid.mp4").write_bytes(data)
    assert check(path, workers=0).errors == 0
    result = check(path, workers=0, decode="all")
    assert [item.reason for item in findings(result)] == ["unreadable"]
    assert "frames [0, 24)" in findings(result)[0].message


def test_ids_are_compared_over_the_whole_file(
    tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[dict[str, Any] | str] = [line(number) for number in range(40)]
    lines[37] = line(3)
    lines[20] = line(3)
    lines[5] = "{}"
    path = put(tmp_path, media, lines)
    # Hashes that collide must not make different ids equal.
    monkeypatch.setattr(module, "hash64", lambda name: len(name))
    result = check(path, workers=0, decode="none")
    assert [(item.row, item.reason, item.id) for item in findings(result)] == [
        (6, "schema", None),
        (21, "duplicate_id", "clip-3"),
        (38, "duplicate_id", "clip-3"),
    ]
    assert result.bad_rows == 3
    assert "already used in row 4" in findings(result)[1].message


def test_shares_check_each_row_once(tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_ROWS", 16)
    path = put(tmp_path, media, ["{}" for _ in range(70)])
    results = [check(path, workers=0, share=Share(index, 3)) for index in range(3)]
    rows = sorted(item.row for result in results for item in findings(result))
    assert rows == list(range(1, 71))
    assert [result.rows for result in results] == [32, 22, 16]
    assert results[1].report == report_path(path, Share(1, 3)) == tmp_path / "data.jsonl.check.1of3.jsonl"
    assert "share 1/3" in results[1].table()
    assert "within this share only" in results[1].table()


def test_table_groups_by_reason_and_field(tmp_path: Path, media: Path) -> None:
    lines: list[dict[str, Any] | str] = []
    for number in range(10):
        entry = line(number)
        entry["subjects"][0]["refs"][number % 2 * 0]["image"] = f"lost{number}.png"
        lines.append(entry)
    result = check(put(tmp_path, media, lines), workers=0, decode="none")
    [group] = result.groups
    assert (group.reason, group.field, group.count) == ("file_missing", "subjects[].refs[].image", 10)
    assert [item.row for item in group.examples] == [1, 2, 3]
    assert "10  error file_missing at subjects[].refs[].image" in result.table()
    assert "row 2 (clip-1), subjects[0].refs[0].image: lost1.png does not exist" in result.table()


def test_it_stops_after_too_many_errors(tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_ROWS", 16)
    path = put(tmp_path, media, ["{}" for _ in range(100)])
    result = check(path, workers=0, max_errors=20)
    assert result.stopped
    assert result.rows == result.errors == 32
    assert "stopped early" in result.table()
    assert not check(path, workers=0, max_errors=100).stopped


def test_short_videos_are_errors_if_a_length_is_asked_for(tmp_path: Path, media: Path) -> None:
    path = put(tmp_path, media, [line()])
    result = check(path, workers=0, length=Length(8, stride=3))
    assert [(item.reason, item.field) for item in findings(result)] == [("too_short", "video")]
    assert "20 frames at 8 fps are 7 of the 8 frames at stride 3 needed" in findings(result)[0].message


def test_a_killed_check_goes_on_and_looks_at_bad_rows_again(
    tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[dict[str, Any] | str] = [line(number) for number in range(60)]
    lines[3]["subjects"][0]["refs"][0]["image"] = "late.png"
    path = put(tmp_path, media, lines)
    tried: list[int] = []
    killed = [True]

    def counted(clip_set: Any, row: int, settings: Any) -> Any:
        tried.append(row)
        if killed and row == 40:
            killed.clear()
            raise KeyboardInterrupt
        return check_row(clip_set, row, settings)

    monkeypatch.setattr(module, "check_row", counted)
    monkeypatch.setattr(module, "PIECE_ROWS", 16)
    with pytest.raises(KeyboardInterrupt):
        check(path, workers=0, decode="none")
    tried.clear()
    os.link(tmp_path / "ref.png", tmp_path / "late.png")
    result = check(path, workers=0, decode="none", max_errors=1)
    assert tried == [*range(16), *range(32, 60)]
    assert (result.rows, result.errors) == (60, 0)
    tried.clear()
    assert check(path, workers=0, decode="none").rows == len(tried) == 60


def test_pieces_that_are_cut_off_or_of_another_check_are_not_believed(tmp_path: Path, media: Path) -> None:
    path = put(tmp_path, media, [line(number) for number in range(20)])
    folder = tmp_path / ".data.jsonl.check.jsonl.part"
    for text in (
        json.dumps({"key": "another check", "errors": 0}) + "\n" + "[[], 1]\n" * 20,
        '{"key": "',
        "",
    ):
        folder.mkdir()
        (folder / "000000.jsonl").write_text(text)
        (tmp_path / "ref.png").unlink(missing_ok=True)
        result = check(path, workers=0, decode="none")
        assert (result.rows, result.errors) == (20, 20)
        assert not folder.exists()


def test_the_same_check_does_not_run_twice_at_once(tmp_path: Path, media: Path) -> None:
    path = put(tmp_path, media, [line()])
    folder = tmp_path / ".data.jsonl.check.jsonl.part"
    folder.mkdir()
    with locked(folder / "share-0-of-1"), pytest.raises(ValueError, match="another process .* --shard"):
        check(path, workers=0, decode="none")
    assert check(path, workers=0, decode="none").rows == 1
    with pytest.raises(ValueError, match="has no rows"):
        check(put(tmp_path, media, []), workers=0)


def test_unexpected_errors_are_findings(tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, media, [line()])
    monkeypatch.setattr("refalign_ext.data.check.row.read_reference", lambda *_: 1 / 0)
    [finding] = check_row(open_clip_set(path), 0, RowSettings())[0]
    assert (finding.reason, finding.message) == ("unexpected", "ZeroDivisionError: division by zero")


class DyingCheck(CheckJob):
    """Its decoder has a fault in row 5."""

    def make(self, rows: range) -> Any:
        def read(clip_set: Any, row: int, *_: Any) -> Any:
            if row == 5:
                os.kill(os.getpid(), signal.SIGSEGV)
            return Image.new("RGB", (64, 64), (row, 0, 90))

        check_rows.read_reference = read
        return super().make(rows)


def test_a_row_that_kills_its_process_is_named(
    tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [
        {"id": f"clip-{row}", "video": "clip.mp4", "prompt": "x", "references": ["ref.png"]}
        for row in range(40)
    ]
    path = put(tmp_path, media, entries)
    monkeypatch.setattr(module, "CheckJob", DyingCheck)
    result = check(path, workers=1)
    assert [(item.row, item.reason, item.id) for item in findings(result) if item.level == "error"] == [
        (6, "killed_process", "clip-5"),
    ]
    assert result.rows == 40


@pytest.mark.parametrize(
    ("options", "flag"), [({"decode": "some"}, "--decode"), ({"max_errors": -1}, "--max_errors")]
)
def test_arguments_are_checked(tmp_path: Path, options: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        check(tmp_path, **options)


def test_shards_that_were_changed_are_named(tmp_path: Path, media: Path) -> None:
    from refalign_ext.data.shards import ShardInfo, ShardWriter, sha256_of, shard_name, write_listing

    packed = tmp_path / "packed"
    (packed / "shards").mkdir(parents=True)
    infos = []
    for number in range(2):
        entry = {"id": str(number), "video": "00.mp4", "prompt": "x", "references": ["00.0.png"]}
        shard = packed / shard_name(number)
        with (
            shard.open("wb") as file,
            (media / "clip.mp4").open("rb") as video,
            (media / "ref.png").open("rb") as image,
        ):
            writer = ShardWriter(file)
            sizes = [(media / name).stat().st_size for name in ("clip.mp4", "ref.png")]
            members = [("00.mp4", video, sizes[0]), ("00.0.png", image, sizes[1])]
            writer.add(json.dumps(entry).encode(), "00", members)
            writer.close()
        infos.append(ShardInfo(shard_name(number), 1, shard.stat().st_size, sha256_of(shard)))
    write_listing(packed, infos)
    assert check(packed, workers=0).errors == 0
    data = bytearray((packed / shard_name(1)).read_bytes())
    data[-1] ^= 1
    (packed / shard_name(1)).write_bytes(data)
    result = check(packed, workers=0)
    assert [(item.row, item.reason, item.field) for item in findings(result)] == [
        (0, "checksum", shard_name(1))
    ]
    assert (result.errors, result.bad_rows) == (1, 0)
    assert result.report.parent == tmp_path
    assert LISTING in os.listdir(packed)


def test_manifests_that_were_written_are_sound(tmp_path: Path, media: Path) -> None:
    put(tmp_path, media, [])
    write_manifest(tmp_path / "own.jsonl", [parse(line(), "test")])
    assert check(tmp_path / "own.jsonl", workers=0).errors == 0
