"""The OpenS2V-5M converter on parts in the native schema, with cross pairs: speed, and memory of all its processes.

Both passes are run, then the second one again, with and without its pairs, from what the first has staged. Next to them,
what json.load takes for a small slice of the same file, as a multiple of the slice's size. The files are deleted at the end.

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import processor
from refalign_ext.data.masks import bounding_box, encode, parse_mask
from tests.helpers.opens2v_fixture import Thing, make_entry, make_pair

TITLE = "Converting OpenS2V-5M"
SIZE = (1280, 720)
_SLICE_BYTES = 64 << 20
_SAMPLE_S = 0.25  # looking at every process of the machine costs several milliseconds
_CONVERT = """
import json, sys
from pathlib import Path
from refalign_ext.data.convert.opens2v import convert_opens2v
from refalign_ext.data.convert.selection import Selection
from refalign_ext.data.pieces import Share
folder, workers = Path(sys.argv[1]), int(sys.argv[2])
report = convert_opens2v(sorted(folder.glob("total_part*.json")), folder / "out.jsonl", video_root=folder,
    cross_pairs=folder / sys.argv[3] if sys.argv[3:] else None, selection=Selection(), share=Share(), workers=workers,
    check_videos=False)
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


def write_entries(path: Path, size: int, things: int, seed: int) -> tuple[int, list[list[str]]]:
    """Writes a part of about `size` bytes: (entries, the things' names of each of the few that they repeat in turn).

    Repeated entries have keys and paths of their own; four in a row are of one source.
    """
    pool, rng = pool_of_things(48), random.Random(seed)
    texts, names = [], []
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
        names.append([thing.name for thing, _ in drawn])
    with path.open("w", encoding="utf-8") as file:
        number, separator = 0, "{"
        while file.tell() < size:
            text = texts[number % len(texts)].replace("PATH", str(number))
            file.write(f'{separator}\n"{key_of(number)}": {text}')
            number, separator = number + 1, ","
        file.write("\n}")
    return number, names


def key_of(number: int) -> str:
    """The key of an entry by its place in the part."""
    return f"clip{number // 4:07}_segment_{number % 4}"


def write_pairs(folder: Path, part: str, count: int, names: Sequence[Sequence[str]]) -> int:
    """Pairs between neighbouring clips of each source, one for every name that both have: how many.

    As in the data set, a file lists the pairs of one source; things are meant by their number and name.
    """
    folder.mkdir(exist_ok=True)
    written = 0
    for first in range(0, count, 4):
        pairs = []
        for number in range(first, min(first + 3, count - 1)):
            here, there = (names[place % len(names)] for place in (number, number + 1))
            ids = [f"{part}/{key_of(place)}" for place in (number, number + 1)]
            for name in sorted(set(here) & set(there)):
                ends = [(ids[0], here.index(name) + 1, name), (ids[1], there.index(name) + 1, name)]
                pairs.append(make_pair(*ends, image=round(0.65 + 0.3 * (len(pairs) % 7) / 7, 4)))
        (folder / f"{part}_{first // 4:07}.json").write_text(json.dumps(pairs), encoding="utf-8")
        written += len(pairs)
    return written


@dataclass(frozen=True)
class Run:
    """What a command gave, and what it took.

    Attributes:
        output: its standard output.
        wall_s, used_s: seconds, and processor seconds of all its processes.
        peak: the most bytes that all its processes had together at a time when this was looked at.
        peaks: the sum of what each of them had at its own peak, which no moment exceeds; 0 where the system does not tell.
    """

    output: str
    wall_s: float
    used_s: float
    peak: int
    peaks: int


def tree_memory(process: psutil.Process, own_peaks: dict[int, int]) -> int:
    """Resident bytes of a process and all below it, and the highest of each; pages they share count for each."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            total += member.memory_info().rss
            status = Path(f"/proc/{member.pid}/status").read_text(encoding="utf-8")
        except (psutil.NoSuchProcess, OSError):
            continue
        highest = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
        own_peaks[member.pid] = max([own_peaks.get(member.pid, 0), *(int(kib) << 10 for kib in highest)])
    return total


def run_sampled(command: Iterable[str]) -> Run:
    """Runs a command to its end.

    Raises:
        SystemExit: if it fails.
    """
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    before = os.times()
    child = subprocess.Popen(list(command), stdout=subprocess.PIPE, text=True, env=environment)
    process, peak = psutil.Process(child.pid), 0
    own_peaks: dict[int, int] = {}
    while child.poll() is None:
        try:
            peak = max(peak, tree_memory(process, own_peaks))
        except psutil.NoSuchProcess:
            break
        time.sleep(_SAMPLE_S)
    output = child.communicate()[0]
    wall_s = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"the conversion ended with {child.returncode}")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(output, wall_s, used, peak, sum(own_peaks.values()))


def count_cross(manifest: Path) -> int:
    """References of other clips in a manifest."""
    with manifest.open(encoding="utf-8") as file:
        rows = (json.loads(line) for line in file)
        references = (ref for row in rows for subject in row["subjects"] for ref in subject["refs"])
        return sum(reference["pair"] == "cross" for reference in references)


def load_ratio(folder: Path, things: int) -> float:
    """Memory of json.load for a small part, as a multiple of the file's size."""
    small = folder / "slice.json"
    write_entries(small, _SLICE_BYTES, things, 0)
    run = run_sampled([sys.executable, "-c", _LOAD, str(small)])
    return (run.peak - int(run.output)) / small.stat().st_size


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    """The results as a Markdown section."""
    per_part = int(arguments.gigabytes * 1e9 / arguments.parts)
    paths = [folder / f"total_part{number}.json" for number in range(1, arguments.parts + 1)]
    count = pairs = 0
    for number, path in enumerate(paths):
        entries, names = write_entries(path, per_part, arguments.things, number)
        count += entries
        pairs += write_pairs(folder / "pairs", path.stem, entries, names)
    size = sum(path.stat().st_size for path in paths)
    idle = run_sampled([sys.executable, "-c", "import refalign_ext.data.convert.opens2v"]).peak
    command = [sys.executable, "-c", _CONVERT, str(folder), str(arguments.workers)]
    before = os.getloadavg()[0]
    both = run_sampled([*command, "pairs"])
    load = f"{before:.1f} before and {os.getloadavg()[0]:.1f} after both passes"
    cross = count_cross(folder / "out.jsonl")
    (folder / "out.jsonl.staging" / "pairs.sqlite").unlink()
    second, without_pairs = run_sampled([*command, "pairs"]), run_sampled(command)
    report = json.loads(both.output.splitlines()[-1])
    if json.loads(second.output.splitlines()[-1]) != report:
        raise SystemExit("the second pass alone gave another manifest")
    ratio = load_ratio(folder, arguments.things)
    note = f"; {arguments.note}" if arguments.note else ""
    lines = [
        f"## {TITLE}",
        "",
        f"- Date: {datetime.date.today().isoformat()}",
        f"- Machine: {processor()}, {os.cpu_count()} cores, load average {load}{note}",
        f"- Versions: Python {platform.python_version()}",
        f"- Setting: `benchmarks/convert.py --gigabytes {arguments.gigabytes:g} --parts {arguments.parts} "
        f"--workers {arguments.workers}`: {size / 1e9:.2f} GB in {len(paths)} part(s), "
        f"{count:,} entries of {size / count / 1e3:.0f} kB with {arguments.things} masks of {SIZE[0]} x {SIZE[1]}, "
        f"{pairs:,} cross pairs in {count // 4:,} files, {arguments.workers} worker processes",
        f"- Kept: {report['clips']['kept']:,} clips and {report['references']['kept']:,} references, {cross:,} of them "
        "of other clips",
        "",
        "| convert_opens2v | wall time | CPU time | per second of CPU time | peak memory of all processes |",
        "|---|---|---|---|---|",
    ]
    runs = {"both passes": both, "second pass": second, "second pass without pairs": without_pairs}
    lines += [
        f"| {name} | {run.wall_s:.0f} s | {run.used_s:.0f} s | {size / 1e6 / run.used_s:.1f} MB, "
        f"{count / run.used_s:.0f} entries | {run.peak / 2**20:.0f} MiB |"
        for name, run in runs.items()
    ]
    lines += [
        "",
        f"Memory: {idle / 2**20:.0f} MiB of each process are imports. The peaks of the processes, each at its own time, "
        f"add up to {both.peaks / 2**20:.0f} MiB, {both.peaks / size:.3f} of the file. json.load takes {ratio:.2f} times "
        f"a slice of {_SLICE_BYTES >> 20} MiB, so {ratio * size / 2**20:.0f} MiB for all of it.",
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
    parser.add_argument("--folder", type=Path, help="where to put the files; default: the temporary folder")
    parser.add_argument("--note", default="", help="a remark on the machine for the record")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(measure(arguments, Path(folder)))


if __name__ == "__main__":
    main()
