"""What a data set consists of: one pass over its rows; a file is opened only if its row does not tell length and size."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refalign_ext.data.clip_index import measure
from refalign_ext.data.clip_set import ClipSet, open_clip_set
from refalign_ext.data.hashing import hash64
from refalign_ext.data.length import Length, possible_frames
from refalign_ext.data.pieces import chunks
from refalign_ext.data.schema import Clip
from refalign_ext.data.worker_pool import run_each

DEFAULT_LENGTHS = (Length(81), Length(81, stride=3), Length(81, fps=16.0))
NUMBERS = ("seconds", "frames", "fps", "prompt_words", "prompts")
NAMES = ("sizes", "aspects", "sources", "subjects", "references", "pairs", "kinds", "classes")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
ASPECTS = {"21:9": 21 / 9, "16:9": 16 / 9, "3:2": 3 / 2, "4:3": 4 / 3, "1:1": 1.0}
ASPECTS |= {":".join(reversed(name.split(":"))): 1 / ratio for name, ratio in ASPECTS.items()}
_CLIP_SCORES = ("aesthetic", "motion", "tech")
_REFERENCE_SCORES = ("gme", "aes", "sim", "area_ratio")
_CHUNK = 512
_EXAMPLES = 5
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


class Stats(NamedTuple):
    """Counts of a data set; lengths and sizes are those of the part of a file that is used (span, crop).

    Attributes:
        rows: all rows; clips: those that can be read; problems: why others cannot, the first few.
        unmeasured: clips whose length or size is neither in the row nor could be had from the file.
        numbers: float64 values in the order of the rows under `NUMBERS` and scores such as "clip.motion".
        names: how often each name occurs, under `NAMES`; "subjects" and "references" are numbers per clip.
        long_enough: for each training length the measured clips that have it.
        groups: different groups; largest_group: clips of the largest one.
    """

    path: str
    rows: int
    clips: int
    unmeasured: int
    problems: list[str]
    numbers: dict[str, np.ndarray]
    names: dict[str, Counter[str]]
    long_enough: dict[str, int]
    groups: int
    largest_group: int

    @property
    def hours(self) -> float:
        return float(self.numbers["seconds"].sum()) / 3600

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; of names the 100 most frequent."""
        plain = {"path": self.path, "hours": round(self.hours, 6)} | self._asdict()
        numbers, names = plain.pop("numbers"), plain.pop("names")
        summaries = {name: summary(values) for name, values in sorted(numbers.items())}
        plain |= {name: summaries.pop(name) for name in NUMBERS}
        return plain | {name: most_frequent(names[name], 100) for name in NAMES} | {"scores": summaries}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=2) + "\n"


def summary(values: np.ndarray) -> dict[str, Any]:
    """Count, mean and quantiles of numbers [n]."""
    if not len(values):
        return {"count": 0}
    quantiles = zip(QUANTILES, np.quantile(values, QUANTILES).round(6).tolist())
    return {
        "count": len(values),
        "mean": round(float(values.mean()), 6),
        "quantiles": {f"{share:g}": value for share, value in quantiles},
    }


def most_frequent(counts: Counter[str], number: int) -> dict[str, int]:
    """The most frequent names and, if there are more, what is left under "others"."""
    shown = dict(counts.most_common(number))
    rest = counts.total() - sum(shown.values())
    return shown | ({"others": rest} if rest else {})


def collect_stats(
    clips: ClipSet | Path,
    *,
    lengths: Sequence[Length] = DEFAULT_LENGTHS,
    workers: int = 0,
    measure: bool = True,
) -> Stats:
    """Counts a manifest or packed folder.

    Args:
        lengths: training clips to count the rows long enough for.
        workers: processes; 0 counts in this one.
        measure: open files of rows that lack length, rate or size; otherwise such clips count as unmeasured.

    Raises:
        ValueError: if it cannot be opened. Rows that are not valid are named in `problems`.
    """
    clip_set = open_clip_set(clips) if isinstance(clips, (str, Path)) else clips
    columns: dict[str, list[np.ndarray]] = {name: [] for name in NUMBERS}
    names: dict[str, Counter[str]] = {name: Counter() for name in NAMES}
    problems: list[str] = []
    groups = [np.zeros(0, np.uint64)]
    work = partial(_count_rows, clip_set, measure)
    pieces = chunks(len(clip_set), _CHUNK)
    for _, (numbers, counts, hashes, found) in run_each(
        work, pieces, workers=workers, description="counting", weight=len
    ):
        for name, values in numbers.items():
            columns.setdefault(name, []).append(np.array(values, np.float64))
        for name, counted in counts.items():
            names[name].update(counted)
        problems = (problems + found)[:_EXAMPLES]
        groups.append(np.array(hashes, np.uint64))
    values = {name: np.concatenate([np.zeros(0), *parts]) for name, parts in columns.items()}
    group_sizes = np.unique(np.concatenate(groups), return_counts=True)[1]
    long_enough = {}
    for length in lengths:
        possible = possible_frames(values["frames"], values["fps"], length.fps, length.stride)
        long_enough[str(length)] = int((possible >= length.frames).sum())
    read = len(values["prompts"])
    return Stats(
        path=str(clip_set.path),
        rows=len(clip_set),
        clips=read,
        unmeasured=read - len(values["frames"]),
        problems=problems,
        numbers=values,
        names=names,
        long_enough=long_enough,
        groups=len(group_sizes),
        largest_group=int(group_sizes.max(initial=0)),
    )


def _count_rows(
    clip_set: ClipSet, opens_files: bool, rows: range
) -> tuple[dict[str, list[float]], dict[str, Counter[str]], list[int], list[str]]:
    """Numbers, names, hashes of groups and problems of some rows."""
    numbers, names = defaultdict(list), defaultdict(Counter)
    groups, problems = [], []
    for row in rows:
        try:
            clip = clip_set[row]
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        groups.append(hash64(clip.group))
        _count_clip(clip, numbers, names)
        try:
            width, height, frames, fps = measure(clip_set, row, clip.video, opens_files=opens_files)
        except (ValueError, OSError):
            continue
        if fps:
            numbers["seconds"].append(frames / fps)
            numbers["frames"].append(frames)
            numbers["fps"].append(fps)
            names["sizes"][f"{width}x{height}"] += 1
            names["aspects"][nearest_aspect(width, height)] += 1
    return dict(numbers), dict(names), groups, problems[:_EXAMPLES]


def _count_clip(clip: Clip, numbers: dict[str, list[float]], names: dict[str, Counter[str]]) -> None:
    references = [reference for subject in clip.subjects for reference in subject.refs]
    numbers["prompt_words"].append(count_words(clip.prompt))
    numbers["prompts"].append(1 + len(clip.prompt_alt))
    names["sources"][clip.source] += 1
    names["subjects"][str(len(clip.subjects))] += 1
    names["references"][str(len(references))] += 1
    names["pairs"].update(reference.pair for reference in references)
    for subject in clip.subjects:
        names["kinds"][subject.kind] += 1
        names["classes"][(subject.cls or subject.phrase or "(none)").strip().lower()] += 1
    scores = [("clip", _CLIP_SCORES, clip.scores)]
    scores += [("reference", _REFERENCE_SCORES, reference.scores) for reference in references]
    for prefix, fields, item in scores:
        for name in fields:
            if (value := getattr(item, name)) is not None:
                numbers[f"{prefix}.{name}"].append(value)


def nearest_aspect(width: int, height: int) -> str:
    """The name in `ASPECTS` whose ratio is nearest, by factor."""
    return min(ASPECTS, key=lambda name: abs(math.log(width / height / ASPECTS[name])))


def count_words(text: str) -> int:
    """Words between spaces; each Chinese character or Japanese kana counts as one."""
    return len(_UNSPACED.sub(" x ", text).split())
