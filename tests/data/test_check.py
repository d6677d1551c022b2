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

from refalign_ext.data.check import row as check_rows
from refalign_ext.data.check import run as module
from refalign_ext.data.check.row import Finding, check_row
from refalign_ext.data.check.run import CheckJob, CheckResult, check
from refalign_ext.data.clip_set import open_clip_set
from refalign_ext.data.length import Length
from refalign_ext.data.masks import encode
from refalign_ext.data.materialise.run import materialise
from refalign_ext.data.pieces import Share
from refalign_ext.data.shards import shard_name

WIDTH, HEIGHT, FRAMES, RATE = 96, 64, 24, 8


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound and broken files to build manifests from."""
    root = tmp_path_factory.mktemp("media")
    noise = np.random.default_rng(0).integers(0, 255, (FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    with av.open(str(root / "clip.mp4"), "w") as container:
        options = {"g": "4", "bf": "0", "preset": "ultrafast"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height = WIDTH, HEIGHT
        for pixels in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    # Groups of four frames are overwritten; the index that finds them is whole.
    with av.open(str(root / "clip.mp4")) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    for name, first in (("end.mp4", 20), ("middle.mp4", 12)):
        broken = bytearray((root / "clip.mp4").read_bytes())
        broken[places[first] : places[first + 3]] = bytes(places[first + 3] - places[first])
        (root / name).write_bytes(broken)
    (root / "noise.mp4").write_bytes(b"not a film" * 100)
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
    masked = {"box_space": "frame", "mask_rle": {"size": [HEIGHT, WIDTH], "counts": encode(mask).counts}}
    size = {"width": WIDTH, "height": HEIGHT}
    span = {"path": "clip.mp4", "start_frame": 2, "end_frame": 22, "fps": RATE} | size
    cut = {
        "pair": "regular",
        "video": dict(span),
        "frame_frac": 0.5,
        "bbox_xyxy": [0, 0, 80, 64],
        "bg": "white",
    }
    subject = {
        "subject_id": "1",
        "kind": "object",
        "target": {"frame": 5, "bbox_xyxy": [4, 4, 90, 60]} | masked,
        "refs": [{"pair": "cross", "image": "ref.png"}, cut | masked],
    }
    return {
        "id": f"clip-{number}",
        "source": "custom",
        "video": dict(span),
        "prompt": "noise",
        "subjects": [subject],
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
CROPPED = {"path": "clip.mp4", "crop_xyxy": [0, 0, 97, 64]}
LATE = {"path": "clip.mp4", "start_s": 0, "end_s": 3.5}
TARGET, BOX = ("subjects", 0, "target"), "subjects[0].target"
IMAGE, CUT = ("subjects", 0, "refs", 0), ("subjects", 0, "refs", 1)
FIRST, SECOND = "subjects[0].refs[0]", "subjects[0].refs[1]"
DEFECTS = [  # what is changed, how it is found
    (changed("prompt", value=" "), "error", "schema", "prompt"),
    (changed("source", value="web"), "error", "schema", "source"),
    (changed("pro mpt", value="x"), "error", "schema", "pro mpt"),
    (changed(*IMAGE, "pair", value="x"), "error", "schema", f"{FIRST}.pair"),
    (changed("video", "path", value="lost.mp4"), "error", "file_missing", "video.path"),
    (changed("video", "path", value="noise.mp4"), "error", "unreadable", "video.path"),
    (changed("video", value={"path": "end.mp4"}), "error", "unreadable", "video"),
    (changed("video", "width", value=100), "error", "size_differs", "video.width"),
    (changed("video", "fps", value=9), "warning", "fps_differs", "video.fps"),
    (changed("video", "end_frame", value=26), "error", "span_beyond_file", "video.end_frame"),
    (changed("video", "end_frame", value=25), "warning", "span_beyond_file", "video.end_frame"),
    (changed("video", value=LATE), "error", "span_beyond_file", "video.end_s"),
    (changed("video", value=CROPPED), "error", "crop_beyond_frame", "video.crop_xyxy"),
    (changed(*TARGET, "bbox_xyxy", value=[4, 4, 99, 60]), "error", "box_beyond_width", f"{BOX}.bbox_xyxy"),
    (changed(*TARGET, "mask_rle", value=SMALL), "error", "mask_size", f"{BOX}.mask_rle"),
    (changed(*TARGET, "mask_rle", value=EMPTY), "error", "mask_empty", f"{BOX}.mask_rle"),
    (changed(*TARGET, "box_space", value="long768"), "error", "mask_space", f"{BOX}.mask_rle"),
    (changed(*IMAGE, "image", value="lost.png"), "error", "file_missing", f"{FIRST}.image"),
    (changed(*IMAGE, "image", value="broken.png"), "error", "unreadable", f"{FIRST}.image"),
    (changed(*IMAGE, "image", value="white.png"), "error", "reference_empty", FIRST),
    (changed(*IMAGE, "image", value="green.png"), "warning", "reference_flat", FIRST),
    (changed(*IMAGE, "image", value="tiny.png"), "warning", "reference_small", FIRST),
    (changed(*CUT, "video", "path", value="lost.mp4"), "error", "file_missing", f"{SECOND}.video.path"),
    (changed(*CUT, "video", "end_frame", value=30), "error", "unreadable", f"{SECOND}.video.path"),
    (changed(*CUT, "bbox_xyxy", value=[0, 0, 80, 70]), "error", "box_beyond_height", f"{SECOND}.bbox_xyxy"),
    (changed(*CUT, "mask_rle", value=SMALL), "error", "mask_size", f"{SECOND}.mask_rle"),
    (changed(*CUT, "mask_rle", value=EMPTY), "error", "mask_empty", f"{SECOND}.mask_rle"),
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
        assert (result.rows, result.errors, result.warnings, result.counts) == (3, 0, 0, {})
    assert result.report == tmp_path / "data.jsonl.check.jsonl"
    assert result.report.read_text() == ""
    assert "3 checked, 0 with errors" in result.table()
    assert [file.name for file in tmp_path.glob(".*")] == []
    found = findings(check(path, workers=0, length=Length(8, stride=3)))
    assert [(item.reason, item.field) for item in found] == [("too_short", "video")] * 3
    assert "7 of the 8 frames" in found[0].message


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
    entry = {"id": "a", "video": "middle.mp4", "prompt": "x", "references": ["ref.png"]}
    path = put(tmp_path, media, [entry])
    assert check(path, workers=0).errors == 0
    [finding] = findings(check(path, workers=0, decode="all"))
    assert finding.reason == "unreadable" and "frames [0, 24)" in finding.message


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


def test_shares_check_each_row_once_and_stop_at_too_many_errors(
    tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_ROWS", 16)
    path = put(tmp_path, media, ["{}"] * 70)
    results = [check(path, workers=0, share=Share(index, 3)) for index in range(3)]
    assert sorted(item.row for result in results for item in findings(result)) == list(range(1, 71))
    assert [result.rows for result in results] == [32, 22, 16]
    assert results[1].report == tmp_path / "data.jsonl.check.1of3.jsonl"
    assert "share 1/3" in results[1].table()
    stopped = check(path, workers=0, max_errors=20)
    assert stopped.stopped and stopped.rows == stopped.errors == 32
    assert "--max_errors" in stopped.table()
    assert not check(path, workers=0, max_errors=70).stopped


def test_table_counts_by_reason_and_field(tmp_path: Path, media: Path) -> None:
    lines: list[dict[str, Any] | str] = [line(number) for number in range(10)]
    for number, entry in enumerate(lines):
        entry["subjects"][0]["refs"][0]["image"] = f"lost{number}.png"
    result = check(put(tmp_path, media, lines), workers=0, decode="none")
    [(kind, count)] = result.counts.items()
    assert (*kind, count) == ("error", "file_missing", "subjects[].refs[].image", 10)
    assert [item.row for item in result.examples[kind]] == [1, 2, 3]
    assert "10  error file_missing at subjects[].refs[].image" in result.table()
    assert "row 2 (clip-1), subjects[0].refs[0].image: lost1.png does not exist" in result.table()


def test_a_killed_check_goes_on_and_looks_at_bad_rows_again(
    tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[dict[str, Any] | str] = [line(number) for number in range(60)]
    lines[3]["subjects"][0]["refs"][0]["image"] = "late.png"
    path = put(tmp_path, media, lines)
    tried: list[int] = []
    killed = [True]

    def counted(clip_set: Any, row: int, *settings: Any) -> Any:
        tried.append(row)
        if killed and row == 40:
            killed.clear()
            raise KeyboardInterrupt
        return check_row(clip_set, row, *settings)

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


def test_unexpected_errors_are_findings(tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, media, [line()])
    monkeypatch.setattr("refalign_ext.data.check.row.read_reference", lambda *_: 1 / 0)
    [finding] = check_row(open_clip_set(path), 0)[0]
    assert finding.reason == "unexpected" and "ZeroDivisionError" in finding.message


class DyingCheck(CheckJob):
    """Row 5 has something that ends the process."""

    def make(self, rows: range) -> Any:
        original = check_rows.RowCheck.check

        def dying(row_check: check_rows.RowCheck) -> None:
            if row_check.row == 5:
                os.kill(os.getpid(), signal.SIGSEGV)
            original(row_check)

        check_rows.RowCheck.check = dying
        return super().make(rows)


def test_a_row_that_kills_its_process_is_named(
    tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path, media, [line(number) for number in range(10)])
    monkeypatch.setattr(module, "CheckJob", DyingCheck)
    result = check(path, workers=1, decode="none")
    assert [(item.row, item.reason, item.id) for item in findings(result)] == [
        (6, "killed_process", "clip-5"),
    ]
    assert result.rows == 10


def test_shards_that_were_changed_are_named(tmp_path: Path, media: Path) -> None:
    packed = tmp_path / "packed"
    path = put(tmp_path, media, [line(number) for number in range(2)])
    materialise(path, packed, pack=True, shard_size=1)
    assert check(packed, workers=0).errors == 0
    shard = packed / shard_name(1)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = check(packed, workers=0)
    assert [(item.row, item.reason, item.field) for item in findings(result)] == [
        (0, "checksum", shard_name(1))
    ]
    assert (result.errors, result.bad_rows) == (1, 0) and shard_name(1) in result.table()
    assert result.report.parent == tmp_path
