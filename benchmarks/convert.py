"""The OpenS2V-5M converter on one part in the native schema: speed, and memory of all its processes, sampled.

Next to it, what json.load takes for a small slice of the same file, as a multiple of the slice's size. The files are deleted at
the end.

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
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ijson
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import processor
from refalign_ext.data.masks import bounding_box, encode, parse_mask
from tests.opens2v_fixture import Thing, make_entry, make_pair

TITLE = "Converting OpenS2V-5M"
SIZE = (1280, 720)
_SLICE_BYTES = 64 << 20
_SAMPLE_S = 0.05
_CONVERT = """
import json, sys
from pathlib import Path
from refalign_ext.data.convert.opens2v import convert_opens2v
from refalign_ext.data.convert.selection import Selection
from refalign_ext.data.work import Share
folder, workers = Path(sys.argv[1]), int(sys.argv[2])
report = convert_opens2v(sorted(folder.glob("total_part*.json")), folder / "out.jsonl", video_root=folder,
    cross_pairs=folder / "pairs", selection=Selection(), share=Share(), workers=workers, check_videos=False)
print(json.dumps(report.to_dict()))
"""
_LOAD = """
import json, os, psutil, sys, time
print(psutil.Process().memory_info().rss)
with open(sys.argv[1], encoding="utf-8") as file:
    data = json.load(file)
time.sleep(1)
"""


def ragged_mask(rng: np.random.Generator) -> dict[str, Any]:
    """A filled outline with the rough edge that segmentation gives, as COCO run lengths."""
    y, x = np.mgrid[: SIZE[1], : SIZE[0]].astype(np.float32)
    centre = rng.uniform(0.3, 0.7, 2) * SIZE
    radius = rng.uniform(0.15, 0.4, 2) * SIZE
    rough = rng.normal(0, 0.03, (SIZE[1], SIZE[0])).astype(np.float32)
    inside = ((x - centre[0]) / radius[0]) ** 2 + ((y - centre[1]) / radius[1]) ** 2 + rough < 1
    mask = encode(inside)
    return {"size": list(mask.size), "counts": mask.counts, "score": [0.9921875]}


def pool_of_things(count: int) -> list[tuple[Thing, dict[str, Any]]]:
    """Things of several names with their masks; entries draw from them."""
    rng = np.random.default_rng(0)
    names = ["woman", "person", "dog", "blue top", "necklace", "glasses", "park", "human head"]
    pool = []
    for number in range(count):
        mask = ragged_mask(rng)
        box = tuple(float(side) for side in bounding_box(parse_mask(mask)))
        gme = round(rng.uniform(0.3, 0.9), 6)
        thing = Thing(names[number % len(names)], (0, 0, 9, 9), gme, 4.5, box)
        pool.append((thing, mask))
    return pool


def write_entries(path: Path, size: int, things: int, seed: int) -> None:
    """A part of about `size` bytes; entries repeat a few dozen, under keys and paths of their own."""
    pool, rng = pool_of_things(48), random.Random(seed)
    texts = []
    for _ in range(64):
        drawn = rng.sample(pool, things)
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
    with path.open("w", encoding="utf-8") as file:
        number, separator = 0, "{"
        while file.tell() < size:
            text = texts[number % len(texts)].replace("PATH", str(number))
            file.write(f'{separator}\n"clip{number // 4:07}_segment_{number % 4}": {text}')
            number, separator = number + 1, ","
        file.write("\n}")


def write_pairs(folder: Path, entries: int) -> None:
    """One pair between the first two clips of every source of part 1."""
    folder.mkdir()
    ids = [(f"total_part1/clip{source:07}_segment_{end}" for end in (0, 1)) for source in range(entries // 4)]
    pairs = [make_pair((cur, None, "woman"), (aft, None, "woman")) for cur, aft in ids]
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")


def tree_memory(process: psutil.Process) -> int:
    """Resident bytes of a process and all below it; pages they share count for each."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def run_sampled(command: list[str]) -> tuple[str, float, int, float]:
    """(output, wall seconds, peak bytes of the process tree, processor seconds)."""
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    before = os.times()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    process, peak = psutil.Process(child.pid), 0
    while child.poll() is None:
        try:
            peak = max(peak, tree_memory(process))
        except psutil.NoSuchProcess:
            break
        time.sleep(_SAMPLE_S)
    output = child.communicate()[0]
    if child.returncode:
        raise SystemExit(f"the conversion ended with {child.returncode}")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return output, time.perf_counter() - start, peak, used


def load_ratio(folder: Path, things: int) -> float:
    """Memory of json.load for a small part, as a multiple of the file's size."""
    small = folder / "slice.json"
    write_entries(small, _SLICE_BYTES, things, 0)
    output, _, peak, _ = run_sampled([sys.executable, "-c", _LOAD, str(small)])
    return (peak - int(output)) / small.stat().st_size


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    """The results as a Markdown section."""
    per_part = int(arguments.gigabytes * 1e9 / arguments.parts)
    paths = [folder / f"total_part{number}.json" for number in range(1, arguments.parts + 1)]
    for number, path in enumerate(paths):
        write_entries(path, per_part, arguments.things, number)
    size = sum(path.stat().st_size for path in paths)
    write_pairs(folder / "pairs", arguments.pairs)
    idle = run_sampled([sys.executable, "-c", "import refalign_ext.data.convert.opens2v"])[2]
    command = [sys.executable, "-c", _CONVERT, str(folder), str(arguments.workers)]
    output, seconds, peak, used = run_sampled(command)
    report = json.loads(output.splitlines()[-1])
    count = report["clips"]["kept"] + sum(item["count"] for item in report["clips"]["dropped"].values())
    ratio = load_ratio(folder, arguments.things)
    note = f"; {arguments.note}" if arguments.note else ""
    lines = [
        f"## {TITLE}",
        "",
        f"- Date: {datetime.date.today().isoformat()}",
        f"- Machine: {processor()}, {os.cpu_count()} cores{note}",
        f"- Versions: Python {platform.python_version()}, ijson {ijson.__version__} ({ijson.backend})",
        f"- Setting: `benchmarks/convert.py`: {size / 1e9:.2f} GB in {len(paths)} part(s), {count:,} entries of "
        f"{size / count / 1e3:.0f} kB with {arguments.things} masks of {SIZE[0]} x {SIZE[1]}, "
        f"{arguments.workers} worker processes; {report['clips']['kept']:,} clips and "
        f"{report['references']['kept']:,} references kept",
        "",
        "| | convert_opens2v | json.load |",
        "|---|---|---|",
        f"| wall time, both passes | {seconds:.0f} s | |",
        f"| CPU time, both passes | {used:.0f} s | |",
        f"| per second of wall time | {size / 1e6 / seconds:.1f} MB, {count / seconds:.0f} entries | |",
        f"| per second of CPU time | {size / 1e6 / used:.1f} MB, {count / used:.0f} entries | |",
        f"| peak memory of all processes | {peak / 2**20:.0f} MiB, {idle / 2**20:.0f} of it imports | "
        f"{ratio * size / 2**20:.0f} MiB, from a slice of {_SLICE_BYTES >> 20} MiB |",
        f"| relative to the file | {peak / size:.3f} | {ratio:.3f} |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.2, help="size of all parts together")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that read a part each; 0: one for all"
    )
    parser.add_argument("--things", type=int, default=14, help="annotated things of an entry")
    parser.add_argument("--pairs", type=int, default=20000, help="entries of part 1 that pairs are made of")
    parser.add_argument("--folder", type=Path, help="where to put the files; default: the temporary folder")
    parser.add_argument("--note", default="", help="a remark on the machine for the record")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(measure(arguments, Path(folder)))


if __name__ == "__main__":
    main()
