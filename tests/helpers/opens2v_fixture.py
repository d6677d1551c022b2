"""A small OpenS2V-5M in its native files: part JSONs, cross pairs, clusters, backgrounds, and videos that can be decoded.

The videos show a thing of a known colour in a known place, so that what is cut out of them can be checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from refalign_ext.data.masks import encode

SIZE = (96, 64)  # width and height of every video
CROP = (8, 88, 4, 60)  # in the data set's order: x0, x1, y0, y1
FRAMES = 24
GREY = (90, 90, 90)

Rectangle = tuple[int, int, int, int]  # x0, y0, x1, y1 in the cropped frame


@dataclass(frozen=True)
class Thing:
    """One annotated thing: its mask is the rectangle, None an empty one, for which the data set has no scores."""

    name: str
    rectangle: Rectangle | None
    gme: float | None = 0.7
    aes: float | None = 5.0
    box: tuple[float, ...] | None = None


def mask_entry(rectangle: Rectangle | None, size: tuple[int, int]) -> dict[str, Any]:
    """A mask as in `mask_annotation`; size is (width, height)."""
    pixels = np.zeros((size[1], size[0]), bool)
    if rectangle is not None:
        pixels[rectangle[1] : rectangle[3], rectangle[0] : rectangle[2]] = True
    mask = encode(pixels)
    return {"size": list(mask.size), "counts": mask.counts, "score": [0.9921875]}


def make_entry(
    path: str,
    things: Sequence[Thing],
    *,
    crop: Sequence[int] = CROP,
    face_cut: Sequence[int] = (2, 400),
    num_frames: int = FRAMES,
    **metadata: Any,
) -> dict[str, Any]:
    """One entry of a part; `face_cut` ends far behind the last frame, as some of the real ones do."""
    size = (crop[1] - crop[0], crop[3] - crop[2])
    annotations = []
    for thing in things:
        box = thing.box or [float(side) for side in thing.rectangle or (1, 1, 9, 9)]
        annotation: dict[str, Any] = {"class_name": thing.name, "bbox": list(box)}
        if thing.rectangle is not None:
            annotation |= {"gme_score": thing.gme, "aes_score": thing.aes}
        annotations.append({key: value for key, value in annotation.items() if value is not None})
    numbered = list(enumerate(things, 1))
    return {
        "metadata": {
            "cut": [0, num_frames],
            "crop": list(crop),
            "tech": 2.082,
            "motion": 0.0122,
            "fps": 8.0,
            "num_frames": num_frames,
            "resolution": {"height": SIZE[1], "width": SIZE[0]},
            "cap": ["A short caption."],
            "path": path,
            "aesthetic": 5.07,
            "face_cut": list(face_cut),
            "face_cap_qwen": "A long caption of the face clip.",
        }
        | metadata,
        "word_tags": {
            "background": ["grassy area", "green grass"],
            "subject": [thing.name for thing in things[:2]],
            "object": [thing.name for thing in things[2:]],
            "pre_define": ["person", "human head"],
        },
        "annotation": {
            "ann_frame_data": {
                "ann_frame_idx": face_cut[0],
                "annotations": annotations,
                "box_format": "xyxy",
                "img_width": size[0],
                "img_height": size[1],
                "foreground_ase_score": 4.97,
                "background_ase_score": 4.65,
            },
            "mask_map": {str(number): {"class_name": thing.name} for number, thing in numbered},
            "mask_annotation": {
                str(face_cut[0]): {
                    str(number): mask_entry(thing.rectangle, size) for number, thing in numbered
                }
            },
        },
    }


def make_pair(
    cur: tuple[str, int, str], aft: tuple[str, int, str], text: float = 1.0, image: float = 0.9
) -> dict[str, Any]:
    """One cross pair of two (clip, number, class name)."""
    names = {"cur_id": cur[0], "aft_id": aft[0], "cur_class_name": cur[2], "aft_class_name": aft[2]}
    numbers = {"cur_class_id": cur[1], "aft_class_id": aft[1], "cur_frame_idx": 2, "aft_frame_idx": 2}
    return names | numbers | {"text_similarity": text, "image_similarity": image}


def write_part(path: Path, entries: Iterable[tuple[str, Any]], indent: int | None = 4) -> Path:
    """Writes entries as one JSON object, keys as often as they are given, one entry at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        separator = "{"
        for key, entry in entries:
            file.write(f"{separator}\n{json.dumps(key)}: {json.dumps(entry, indent=indent)}")
            separator = ","
        file.write("\n}" if separator == "," else "{}")
    return path


def render_video(
    path: Path, patches: Sequence[tuple[Rectangle, tuple[int, int, int]]] = (), frames: int = FRAMES
) -> Path:
    """A grey video with patches of colour that stand still, given in the cropped frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.empty((SIZE[1], SIZE[0], 3), np.uint8)
    picture[:] = GREY
    for (x0, y0, x1, y1), colour in patches:
        picture[CROP[2] + y0 : CROP[2] + y1, CROP[0] + x0 : CROP[0] + x1] = colour
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "4", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@dataclass(frozen=True)
class NativeSet:
    """Where the files of a small data set are, in the layout of the downloads."""

    root: Path
    parts: tuple[Path, ...]
    videos: Path
    cross_pairs: Path
    backgrounds: Path


LEFT, RIGHT = (4, 8, 36, 48), (44, 8, 76, 48)  # rectangles of 32x40 pixels: 0.286 of the cropped frame
RED, BLUE = (200, 30, 30), (30, 30, 200)


def write_native_set(root: Path) -> NativeSet:
    """Two parts with three clips of one source and one of another; all pass `Selection(min_frames=20)`.

    `alpha_segment_0` (part 1): a woman on the left, found as "person" as well, a dog on the right and glasses without a
    mask. `alpha_segment_1` (part 1): a woman on the right. `alpha_segment_2` (part 2): a woman on the left. `beta` (part
    2): a ball. The pairs link the three women, both ways round, twice, and one with itself; `beta` has no background.
    """
    first = [
        Thing("person", LEFT, gme=0.62),
        Thing("woman", LEFT, gme=0.8),
        Thing("dog", RIGHT),
        Thing("glasses", None),
    ]
    clips = {
        "total_part1": {
            "alpha_segment_0": (first, [(LEFT, RED), (RIGHT, BLUE)]),
            "alpha_segment_1": ([Thing("woman", RIGHT)], [(RIGHT, RED)]),
        },
        "total_part2": {
            "alpha_segment_2": ([Thing("woman", LEFT)], [(LEFT, BLUE)]),
            "beta_part1": ([Thing("ball", LEFT)], [(LEFT, RED)]),
        },
    }
    places = NativeSet(
        root,
        tuple(root / "Jsons" / "mask_and_bbox_High-Quality" / f"{part}.json" for part in clips),
        root / "Videos",
        root / "Jsons" / "cross_video_pairs",
        root / "Background",
    )
    for path, part in zip(places.parts, clips.values()):
        entries = []
        for key, (things, patches) in part.items():
            name = f"source/{key}.mp4"
            render_video(places.videos / path.stem / name, patches)
            entries.append((key, make_entry(name, things)))
            if key != "beta_part1":
                picture = places.backgrounds / path.stem / f"{key}.png"
                picture.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (CROP[1] - CROP[0], CROP[3] - CROP[2]), GREY).save(picture)
        write_part(path, entries)
    zero, one, two = (
        "total_part1/alpha_segment_0",
        "total_part1/alpha_segment_1",
        "total_part2/alpha_segment_2",
    )
    pairs = [
        make_pair((zero, 1, "person"), (one, 1, "woman"), text=0.66, image=0.8),
        make_pair((zero, 2, "woman"), (one, 1, "woman"), image=0.95),  # the same pair under the other name
        make_pair((two, 1, "woman"), (zero, 2, "woman"), image=0.7),
        make_pair((one, 1, "woman"), (one, 1, "woman")),
        make_pair((one, 1, "woman"), (two, 1, "woman"), image=0.6),  # not above the limit
        make_pair((zero, 3, "dog"), (one, 1, "woman"), text=0.5),
    ]
    places.cross_pairs.mkdir(parents=True)
    (places.cross_pairs / "alpha.json").write_text(json.dumps(pairs, indent=2), encoding="utf-8")
    clusters = {"alpha": [zero, one, two]}
    (places.cross_pairs / "cluster_videos.json").write_text(json.dumps(clusters, indent=4), encoding="utf-8")
    return places
