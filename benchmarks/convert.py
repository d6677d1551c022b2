"""The OpenS2V-5M converter on parts in the native schema, with cross pairs: speed and memory.

Both passes are run, then the second one again from what the first has staged. The files are deleted at the end.

    python benchmarks/convert.py                              # 2.2 GB
    python benchmarks/convert.py --gigabytes 50 --folder /big --workers 4 --parts 4
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import processor
from refalign_ext.data.masks import bounding_box, encode
from tests.helpers.opens2v_fixture import Thing, make_entry, make_pair

TITLE = "Converting OpenS2V-5M"
SIZE = (1280, 720)
THINGS = 14  # of an entry
VARIANTS = (
    64  # entries that repeat in turn, with keys and paths of their own; four in a row are of one source
)
NAMES = ["woman", "person", "dog", "blue top", "necklace", "glasses", "park", "human head"]


def ragged_thing(rng: np.random.Generator, name: str) -> tuple[Thing, dict[str, Any]]:
    """A thing and its mask: a filled outline with the rough edge that segmentation gives."""
    y, x = np.mgrid[: SIZE[1], : SIZE[0]].astype(np.float32)
    centre, radius = rng.uniform(0.3, 0.7, 2) * SIZE, rng.uniform(0.15, 0.4, 2) * SIZE
    rough = rng.normal(0, 0.03, (SIZE[1], SIZE[0])).astype(np.float32)
    mask = encode(((x - centre[0]) / radius[0]) ** 2 + ((y - centre[1]) / radius[1]) ** 2 + rough < 1)
    box = tuple(float(side) for side in bounding_box(mask))
    thing = Thing(name, (0, 0, 9, 9), round(rng.uniform(0.3, 0.9), 6), 4.5, box)
    return thing, {"size": list(mask.size), "counts": mask.counts, "score": [0.9921875]}


def key_of(number: int) -> str:
    return f"clip{number // 4:07}_segment_{number % 4}"


def write_part(path: Path, size: int, seed: int) -> tuple[int, list[list[str]]]:
    """Writes a part of about `size` bytes: (entries, the things' names of each variant)."""
    numbers, rng = np.random.default_rng(0), random.Random(seed)
    pool = [ragged_thing(numbers, NAMES[number % len(NAMES)]) for number in range(48)]
    texts, names = [], []
    for _ in range(VARIANTS):
        drawn = rng.sample(pool, THINGS)
        entry = make_entry(
            "source/PATH.mp4",
            [thing for thing, _ in drawn],
            crop=(0, SIZE[0], 0, SIZE[1]),
            face_cut=(0, 300),
            num_frames=300,
            resolution={"width": SIZE[0], "height": SIZE[1]},
            face_cap_qwen="The video features individuals outdoors on a grassy area. " * 20,
        )
        entry["annotation"]["mask_annotation"] = {"0": {str(i): mask for i, (_, mask) in enumerate(drawn, 1)}}
        texts.append(json.dumps(entry, indent=4))
        names.append([thing.name for thing, _ in drawn])
    count = 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            text = texts[count % VARIANTS].replace("PATH", str(count))
            file.write(f'{"," if count else "{"}\n"{key_of(count)}": {text}')
            count += 1
        file.write("\n}")
    return count, names


def write_pairs(folder: Path, part: str, count: int, names: list[list[str]]) -> None:
    """A file of pairs for each source: neighbouring clips, one pair for every name that both have."""
    folder.mkdir(exist_ok=True)
    for first in range(0, count, 4):
        pairs = []
        for number in range(first, min(first + 3, count - 1)):
            here, there = names[number % VARIANTS], names[(number + 1) % VARIANTS]
            ids = [f"{part}/{key_of(place)}" for place in (number, number + 1)]
            for name in sorted(set(here) & set(there)):
                ends = [(ids[0], here.index(name) + 1, name), (ids[1], there.index(name) + 1, name)]
                pairs.append(make_pair(*ends, image=round(0.65 + 0.3 * (len(pairs) % 7) / 7, 4)))
        (folder / f"{part}_{first // 4:07}.json").write_text(json.dumps(pairs), encoding="utf-8")


def measure_run(name: str, folder: Path, workers: int, size: int, count: int) -> str:
    """Runs the command: a row of the table."""
    command = [
        sys.executable,
        "-m",
        "refalign_ext",
        "data",
        "convert",
        "opens2v",
        *sorted(folder.glob("total_part*.json")),
    ]
    options = ["--out", folder / "out.jsonl", "--video_root", folder, "--cross_pairs", folder / "pairs"]
    start, before = time.perf_counter(), os.times()
    subprocess.run([*command, *options, "--workers", str(workers), "--no_check_videos"], check=True)
    wall_s, after = time.perf_counter() - start, os.times()
    used_s = after.children_user + after.children_system - before.children_user - before.children_system
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    speed = f"{size / 1e6 / used_s:.1f} MB, {count / used_s:.0f} entries"
    return f"| {name} | {wall_s:.0f} s | {used_s:.0f} s | {speed} | {peak:.0f} MiB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.2, help="size of all parts together")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that read a part each; 0: one for all"
    )
    parser.add_argument("--folder", type=Path, help="where to put the files; default: the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder, size, count = Path(name), 0, 0
        for number in range(1, arguments.parts + 1):
            path = folder / f"total_part{number}.json"
            entries, names = write_part(path, int(arguments.gigabytes * 1e9 / arguments.parts), number)
            write_pairs(folder / "pairs", path.stem, entries, names)
            size, count = size + path.stat().st_size, count + entries
        runs = [
            measure_run(run, folder, arguments.workers, size, count) for run in ("both passes", "second pass")
        ]
    print(f"## {TITLE}\n\n- Date: {datetime.date.today().isoformat()}")
    print(f"- Machine: {processor()}, {os.cpu_count()} cores; Python {platform.python_version()}")
    print(
        f"- Setting: {size / 1e9:.2f} GB in {arguments.parts} part(s), {count:,} entries, {arguments.workers} workers\n"
    )
    print(
        "| data convert opens2v | wall time | CPU time | per second of CPU time | peak of the largest process |"
    )
    print("|---|---|---|---|---|", *runs, sep="\n")


if __name__ == "__main__":
    main()
