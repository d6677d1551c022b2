"""References cut out of videos and pictures: exactly the pixels that box, crop and mask mean, in whichever space."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from refalign_ext.data import decoding as video
from refalign_ext.data.clip_set import open_clip_set
from refalign_ext.data.crop import CropError, FrameMemory, read_reference
from refalign_ext.data.decoding import read_clip, read_frame
from refalign_ext.data.masks import encode
from refalign_ext.data.media_source import MediaBytes
from refalign_ext.data.schema import VideoSpan
from refalign_ext.data.video_file import probe
from refalign_ext.references import load_image
from tests.helpers.clips import BEHIND, BOX, RATE, SUBJECT, box_of, entry, frame, render

NEAR = 14  # levels of grey that lossy codecs may be off
CROP = (4, 6, 60, 46)

FILES = [
    ("a.mp4", "libx264", "yuv420p", (64, 48), 0),
    ("deep.mp4", "libx265", "yuv420p10le", (64, 48), 0),
    ("a.mkv", "libvpx-vp9", "yuv420p", (67, 51), 0),
    ("odd.mkv", "ffv1", "yuv444p", (71, 49), 0),
    ("a.webm", "libvpx-vp9", "yuv420p", (64, 48), 0),
    ("a.mov", "prores_ks", "yuv422p10le", (64, 48), 0),
    ("right.mp4", "libx264", "yuv420p", (64, 48), 1),
    ("over.mp4", "libx264", "yuv420p", (64, 48), 2),
    ("left.mp4", "libx264", "yuv420p", (72, 48), 3),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    render(root / "a.mkv", 30, "ffv1", "yuv444p")
    (root / "text.mp4").write_text("not a video")
    return root


def cut(folder: Path, reference: dict[str, Any], frames: FrameMemory | None = None) -> np.ndarray:
    """[H, W] of the only reference of a manifest with this one."""
    path = folder / "data.jsonl"
    path.write_text(json.dumps(entry("a", {"path": "a.mp4"}, [{"pair": "regular"} | reference])) + "\n")
    clips = open_clip_set(path)
    image = read_reference(clips, 0, clips[0].subjects[0].refs[0], frames)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int).mean(2)


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    encoded = encode(mask)
    return {"size": list(encoded.size), "counts": encoded.counts}


@pytest.mark.parametrize(("name", "codec", "pix_fmt", "size", "turns"), FILES, ids=[row[0] for row in FILES])
def test_boxes_and_masks_land_on_the_subject(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, size: tuple[int, int], turns: int
) -> None:
    render(tmp_path / name, 30, codec, pix_fmt, size, turns)
    for number in (0, 13, 29):
        x0, y0, x1, y1 = box_of(number)
        whole = cut(tmp_path, {"video": {"path": name}, "frame": number})
        assert whole.shape == size[::-1]
        assert np.abs(whole - frame(number, size)).max() <= 2 * NEAR  # at the subject's edges
        assert np.abs(whole - frame(number, size)).mean() < 4
        box = {"bbox_xyxy": [x0, y0, x1, y1], "box_space": "frame"}
        inside = cut(tmp_path, {"video": {"path": name}, "frame": number} | box)
        assert inside.shape == BOX[::-1]
        assert np.abs(inside - SUBJECT).max() <= NEAR
    # An L of the subject, in the coordinates of the crop: its left half and its lowest four rows.
    left, top, right, bottom = CROP
    mask = np.zeros((bottom - top, right - left), bool)
    mask[y0 - top : y1 - top, x0 - left : x0 - left + 8] = True
    mask[y1 - top - 4 : y1 - top, x0 - left : x1 - left] = True
    box = {"bbox_xyxy": [x0 - left, y0 - top, x1 - left, y1 - top], "box_space": "cropped_frame"}
    marked = box | {"mask_rle": run_lengths(mask), "bg": "white"}
    masked = cut(tmp_path, {"video": {"path": name, "crop_xyxy": CROP}, "frame": 29} | marked)
    shape = mask[y0 - top : y1 - top, x0 - left : x1 - left]
    assert masked.shape == shape.shape and not shape.all()
    assert (masked[~shape] == 255).all()
    assert np.abs(masked[shape] - SUBJECT).max() <= NEAR


def test_crop_alone_mask_alone_and_what_bg_means(tmp_path: Path) -> None:
    render(tmp_path / "a.mkv", 12, "ffv1", "yuv444p")
    span = {"path": "a.mkv", "crop_xyxy": CROP}
    x0, y0, x1, y1 = box_of(5)
    shown = frame(5).astype(int)[CROP[1] : CROP[3], CROP[0] : CROP[2]]
    assert np.abs(cut(tmp_path, {"video": span, "frame": 5}) - shown).max() <= 2
    mask = frame(5) == SUBJECT
    base = {"video": span, "frame": 5, "mask_rle": run_lengths(mask), "box_space": "frame"}
    assert np.abs(cut(tmp_path, base | {"bg": "raw"}) - shown).max() <= 2
    for background in ({}, {"bg": "white"}):  # a mask that is given is meant to be used
        white = cut(tmp_path, base | background)
        assert white.shape == shown.shape
        assert (white[shown == BEHIND] == 255).all() and np.abs(white[shown == SUBJECT] - SUBJECT).max() <= 2
    # A box of the whole frame that protrudes from the crop ends at the crop.
    protruding = cut(tmp_path, {"video": span, "frame": 5, "bbox_xyxy": [0, 0, x1, y1], "box_space": "frame"})
    assert protruding.shape == (y1 - CROP[1], x1 - CROP[0])
    assert np.abs(protruding - shown[: y1 - CROP[1], : x1 - CROP[0]]).max() <= 2


def test_boxes_of_the_frame_scaled_to_768_are_mapped_once(tmp_path: Path) -> None:
    render(tmp_path / "a.mp4", 3, size=(1024, 64))
    x0, y0, x1, y1 = (value * 0.75 for value in box_of(2))
    box = {"bbox_xyxy": [x0, y0, x1, y1], "box_space": "long768"}
    shown = cut(tmp_path, {"video": {"path": "a.mp4"}, "frame_frac": 0.99} | box)
    assert shown.shape == BOX[::-1] and np.abs(shown - SUBJECT).max() <= NEAR
    beyond = box | {"bbox_xyxy": [0, 0, 770, 9]}
    with pytest.raises(CropError, match="row 1: a.mp4: box .* 1024x64 pixels: box_beyond_width") as error:
        cut(tmp_path, {"video": {"path": "a.mp4"}, "frame": 0} | beyond)
    assert error.value.reason == "box_beyond_width"
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.reason) == (str(error.value), "box_beyond_width")


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ({"frame": 17}, 17),
        ({"frame_frac": 0.0}, 0),
        ({"frame_frac": 0.5}, 15),
        ({"frame_frac": 0.999}, 29),
        ({"frame": 11, "video": {"start_frame": 10, "end_frame": 20}}, 11),
        ({"frame_frac": 0.25, "video": {"start_frame": 10, "end_frame": 20}}, 12),
        ({"frame_frac": 0.5, "video": {"start_s": 1.0, "end_s": 2.0}}, 12),
        ({"frame_frac": 0.5, "video": {"start_s": 1.0}}, 19),
        ({"frame_frac": 0.0, "video": {"start_s": 1.0009}}, 8),
        ({"frame_frac": 0.0, "video": {"start_s": 1.0011}}, 9),
        ({"frame_frac": 0.99, "video": {"end_s": 3.75 + 0.99 / RATE}}, 29),
        ({"frame_frac": 0.99, "video": {"start_frame": 10, "end_frame": 31}}, 29),
    ],
)
def test_the_frame_that_is_meant(folder: Path, place: dict[str, Any], number: int) -> None:
    place = place | {"video": {"path": "a.mkv"} | place.get("video", {})}
    assert np.abs(cut(folder, place) - frame(number)).max() <= 2


def of_video(crop: list[int] | None = None, **more: Any) -> dict[str, Any]:
    """A reference of the first frame, if no other one is asked for."""
    name = more.pop("name", "a.mkv")
    span = {key: more.pop(key) for key in ("end_frame", "start_s", "end_s") if key in more}
    crops = {} if crop is None else {"crop_xyxy": crop}
    return {"video": {"path": name} | span | crops, "frame": 0} | more


def of_mask(size: str, crop: list[int] | None = None, space: str = "frame") -> dict[str, Any]:
    """A reference with an empty mask."""
    width, height = map(int, size.split("x"))
    return of_video(crop, box_space=space, mask_rle=run_lengths(np.zeros((height, width), bool)))


BAD = [
    (of_video(name="none.mp4"), "file_missing", "none.mp4 does not exist"),
    (of_video(name="text.mp4"), "unreadable", "text.mp4: cannot be decoded"),
    ({"image": "text.mp4"}, "unreadable", "text.mp4 is not a picture"),
    (of_video(frame=30), "unreadable", "frame 30 is not one of the 30 frames"),
    (of_video(end_frame=32), "unreadable", "frames 0 to 32 are asked for, the file has 30"),
    (
        of_video(start_s=1, end_s=4.1),
        "unreadable",
        "from 1 s to 4.1 s are asked for, the file has 30 over 3.75 s",
    ),
    (of_video(start_s=3.75), "unreadable", "frames from 3.75 s to 3.75 s"),
    (of_video([0, 0, 65, 48]), "crop_beyond_frame", "does not lie in the frame of 64x48"),
    (of_video(bbox_xyxy=[0, 0, 5, 50], box_space="frame"), "box_beyond_height", "box_beyond_height"),
    (
        of_video([0, 0, 9, 9], bbox_xyxy=[20, 20, 30, 30], box_space="frame"),
        "box_outside_crop",
        "lies outside of",
    ),
    (of_mask("64x47"), "mask_size", r"the mask is \[47, 64\] .* its frame \[48, 64\]"),
    (of_mask("64x48", [0, 0, 10, 20], "cropped_frame"), "mask_size", r"its cropped_frame \[20, 10\]"),
    (of_mask("64x48"), "mask_empty", "the mask is empty"),
    (of_mask("64x48", space="long768"), "mask_space", "long768"),
]


@pytest.mark.parametrize(("reference", "reason", "message"), BAD, ids=[f"{row[1]}-{row[2]}" for row in BAD])
def test_what_cannot_be_cut_says_why(
    folder: Path, reference: dict[str, Any], reason: str, message: str
) -> None:
    with pytest.raises(CropError, match=f"data.jsonl, row 1: .*{message}") as error:
        cut(folder, reference)
    assert error.value.reason == reason and "\n" not in str(error.value)


def test_pictures_are_cut_only_if_asked(tmp_path: Path) -> None:
    Image.fromarray(frame(3)).save(tmp_path / "a.png")
    x0, y0, x1, y1 = box_of(3)
    assert (cut(tmp_path, {"image": "a.png", "bg": "white"}) == frame(3)).all()
    box = {"image": "a.png", "bbox_xyxy": [x0, y0, x1, y1], "box_space": "frame"}
    assert (cut(tmp_path, box) == SUBJECT).all() and cut(tmp_path, box).shape == BOX[::-1]
    within = box | {"bbox_xyxy": [x0 + 0.9, y0 + 0.1, x1 - 0.1, y1 - 0.9]}  # widened to whole pixels
    assert cut(tmp_path, within).shape == BOX[::-1]
    mask = {"image": "a.png", "mask_rle": run_lengths(frame(3) == SUBJECT), "box_space": "frame"}
    assert (cut(tmp_path, mask) == np.where(frame(3) == SUBJECT, SUBJECT, 255)).all()


def test_references_of_one_frame_decode_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render(tmp_path / "a.mp4", 20)
    calls: list[int] = []
    original = video.read_frame
    monkeypatch.setattr(video, "read_frame", lambda *args, **more: calls.append(1) or original(*args, **more))
    frames = FrameMemory()
    for box in ([0, 0, 9, 9], [9, 9, 30, 30]):
        reference = {"video": {"path": "a.mp4"}, "frame": 7, "bbox_xyxy": box, "box_space": "frame"}
        cut(tmp_path, reference, frames)
    assert len(calls) == 1
    seven = cut(tmp_path, {"video": {"path": "a.mp4"}, "frame": 7}, frames)
    eight = cut(tmp_path, {"video": {"path": "a.mp4"}, "frame": 8}, frames)
    assert len(calls) == 2 and np.abs(seven - eight).max() > NEAR


def test_files_in_memory_are_read_like_others_and_named(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", 20)
    media = MediaBytes("shards/00000.tar: a.mp4", path.read_bytes())
    assert probe(media) == probe(path)
    parts = ({"span": VideoSpan("a.mp4", 2), "stride": 3}, {"span": VideoSpan("a.mp4", start_s=0.5)})
    for options in ({}, {"fps": 4.0}, *parts):
        clip = read_clip(path, 4, (64, 48), **options)
        assert (read_clip(media, 4, (64, 48), **options) == clip).all()
    assert (read_frame(media, frame=7) == read_frame(path, frame=7)).all()
    for data in (b"", b"text", media.data[:500]):
        with pytest.raises(ValueError, match=r"^shards/00000.tar: a.mp4: cannot be decoded"):
            read_frame(MediaBytes(media.name, data), frame=0)
    Image.fromarray(frame(3)).save(tmp_path / "a.png")
    picture = MediaBytes("shards/00000.tar: a.png", (tmp_path / "a.png").read_bytes())
    assert (np.asarray(load_image(picture)) == np.asarray(load_image(tmp_path / "a.png"))).all()
    for data, message in ((b"", "is empty"), (b"text", "is not a picture"), (picture.data[:60], "")):
        with pytest.raises(ValueError, match=rf"^reference image shards/00000.tar: a.png .*{message}"):
            load_image(MediaBytes(picture.name, data))
    assert "data" not in repr(media) and len(repr(media)) < 100


def test_every_nth_frame_of_the_file(folder: Path) -> None:
    path = folder / "a.mkv"
    everything = read_clip(path, 30, (64, 48))
    assert (read_clip(path, 10, (64, 48), stride=3) == everything[:, ::3]).all()
    assert (read_clip(path, 4, (64, 48), 1.0, stride=3) == everything[:, 20::3]).all()
    part = read_clip(path, 3, (64, 48), stride=2, span=VideoSpan("a.mkv", start_s=1, end_s=1.7))
    assert (part == everything[:, 8:13:2]).all()
    with pytest.raises(ValueError, match=r"a\.mkv: 30 frames are 10 at stride 3, 11 are needed"):
        read_clip(path, 11, (64, 48), stride=3)


@pytest.mark.parametrize("span", [{"start_frame": 20, "end_frame": 31}, {"start_s": 2.5, "end_s": 3.87}])
def test_ends_that_are_rounded_are_the_files(folder: Path, span: dict[str, float]) -> None:
    clip = read_clip(folder / "a.mkv", 10, (64, 48), span=VideoSpan("a.mkv", **span))
    assert (clip == read_clip(folder / "a.mkv", 30, (64, 48))[:, 20:]).all()
