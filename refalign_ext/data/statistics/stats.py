"""What a data set consists of, counted in one pass over its rows in memory that does not grow with them.

Only files of rows that do not say their length, rate and size are opened; nothing is decoded beyond a first frame.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refalign_ext.data.clip_index import ClipFacts, measure
from refalign_ext.data.clip_set import ClipSet, open_clip_set
from refalign_ext.data.length import Length
from refalign_ext.data.pieces import chunks
from refalign_ext.data.schema import Clip
from refalign_ext.data.statistics.tally import Distribution, Tally
from refalign_ext.data.worker_pool import run_each

ASPECTS = {"21:9": 21 / 9, "16:9": 16 / 9, "3:2": 3 / 2, "4:3": 4 / 3, "1:1": 1.0}
ASPECTS |= {":".join(reversed(name.split(":"))): 1 / ratio for name, ratio in ASPECTS.items()}
CLIP_SCORES = ("aesthetic", "motion", "tech")
REFERENCE_SCORES = ("gme", "aes", "sim", "area_ratio")
_CHUNK = 512
_EXAMPLES = 5
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


DEFAULT_LENGTHS = (Length(81), Length(81, stride=3), Length(81, fps=16.0))


@dataclass
class Stats:
    """Counts of a data set; `seconds`, `frames`, `fps` and `sizes` are those of the part that is used (span, crop).

    Attributes:
        rows: all rows; clips: those that can be read; problems: why the others cannot, with examples.
        unmeasured: clips whose length or size is neither in the row nor could be had from the file.
        groups: different groups; largest_group: clips of the largest one.
        long_enough: for each training length the clips that have it, of `frames.count`.
    """

    path: str
    rows: int = 0
    clips: int = 0
    unmeasured: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: Distribution = field(default_factory=Distribution)
    frames: Distribution = field(default_factory=Distribution)
    fps: Distribution = field(default_factory=Distribution)
    sizes: Tally = field(default_factory=Tally)
    aspects: Tally = field(default_factory=Tally)
    sources: Tally = field(default_factory=Tally)
    subjects: Tally = field(default_factory=Tally)
    references: Tally = field(default_factory=Tally)
    pairs: Tally = field(default_factory=Tally)
    kinds: Tally = field(default_factory=Tally)
    classes: Tally = field(default_factory=Tally)
    prompt_words: Distribution = field(default_factory=Distribution)
    prompts: Distribution = field(default_factory=Distribution)
    scores: dict[str, Distribution] = field(default_factory=dict)
    long_enough: dict[str, int] = field(default_factory=dict)
    groups: int = 0
    largest_group: int = 0

    @property
    def hours(self) -> float:
        """Of all measured clips together."""
        return self.seconds.sum / 3600

    def merge(self, other: Stats) -> None:
        """Adds the counts of later rows; groups are not counted here, see `collect_stats`."""
        for name in ("rows", "clips", "unmeasured"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.problems = (self.problems + other.problems)[:_EXAMPLES]
        for name, value in vars(self).items():
            if isinstance(value, (Distribution, Tally)):
                value.merge(getattr(other, name))
        for name, distribution in other.scores.items():
            self.scores.setdefault(name, Distribution()).merge(distribution)
        for name, number in other.long_enough.items():
            self.long_enough[name] = self.long_enough.get(name, 0) + number

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; of names the 100 most frequent."""
        plain: dict[str, Any] = {"path": self.path, "hours": round(self.hours, 6)}
        for name, value in vars(self).items():
            if isinstance(value, Distribution):
                plain[name] = value.to_dict()
            elif isinstance(value, Tally):
                plain[name] = value.to_dict(100)
            elif name == "scores":
                plain[name] = {score: distribution.to_dict() for score, distribution in value.items()}
            else:
                plain[name] = value
        return plain

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=2) + "\n"


def collect_stats(
    clips: ClipSet | Path,
    *,
    lengths: Sequence[Length] = DEFAULT_LENGTHS,
    workers: int = 0,
    measure: bool = True,
) -> Stats:
    """Counts a manifest or packed folder.

    Args:
        clips: the data set or its path.
        lengths: training clips to count the rows long enough for.
        workers: processes; 0 counts in this one.
        measure: open files of rows that lack length, rate or size; otherwise such clips count as unmeasured.

    Raises:
        ValueError: if it cannot be opened. Rows that are not valid are counted and named in `problems`.
    """
    clip_set = open_clip_set(clips) if isinstance(clips, (str, Path)) else clips
    parts = chunks(len(clip_set), _CHUNK)
    total = Stats(str(clip_set.path), long_enough={str(length): 0 for length in lengths})
    groups = array("Q")
    work = partial(_count_rows, clip_set, tuple(lengths), measure)
    for _, (stats, hashes) in run_each(work, parts, workers=workers, description="counting", weight=len):
        total.merge(stats)
        groups.extend(hashes)
    sizes = np.unique(np.frombuffer(groups, np.uint64), return_counts=True)[1]
    total.groups, total.largest_group = len(sizes), int(sizes.max(initial=0))
    return total


def _count_rows(
    clip_set: ClipSet, lengths: tuple[Length, ...], opens_files: bool, rows: range
) -> tuple[Stats, array[int]]:
    stats, groups = Stats(str(clip_set.path)), array("Q")
    for row in rows:
        stats.rows += 1
        try:
            clip = clip_set[row]
        except (ValueError, OSError) as error:
            stats.problems = [*stats.problems, str(error)][:_EXAMPLES]
            continue
        _count_clip(stats, clip)
        try:
            facts = measure(clip_set, row, clip.video, opens_files=opens_files)
        except (ValueError, OSError):
            facts = None
        if facts is None or not facts.fps:
            stats.unmeasured += 1
        else:
            _count_video(stats, facts, lengths)
        # Groups may be as many as rows: eight bytes each, and two that share them are not worth more.
        groups.append(int.from_bytes(hashlib.blake2b(clip.group.encode(), digest_size=8).digest(), "little"))
    return stats, groups


def _count_clip(stats: Stats, clip: Clip) -> None:
    references = [reference for subject in clip.subjects for reference in subject.refs]
    stats.clips += 1
    stats.sources.add(clip.source)
    stats.subjects.add(str(len(clip.subjects)))
    stats.references.add(str(len(references)))
    for subject in clip.subjects:
        stats.kinds.add(subject.kind)
        stats.classes.add((subject.cls or subject.phrase or "(none)").strip().lower())
    for reference in references:
        stats.pairs.add(reference.pair)
    stats.prompt_words.add(count_words(clip.prompt))
    stats.prompts.add(1 + len(clip.prompt_alt))
    _count_scores(stats, "clip", CLIP_SCORES, [clip.scores])
    _count_scores(stats, "reference", REFERENCE_SCORES, [reference.scores for reference in references])


def _count_scores(stats: Stats, prefix: str, names: Sequence[str], scores: Sequence[object]) -> None:
    for name in names:
        for item in scores:
            if (value := getattr(item, name)) is not None:
                stats.scores.setdefault(f"{prefix}.{name}", Distribution()).add(value)


def _count_video(stats: Stats, facts: ClipFacts, lengths: Sequence[Length]) -> None:
    stats.seconds.add(facts.frames / facts.fps)
    stats.frames.add(facts.frames)
    stats.fps.add(facts.fps)
    stats.sizes.add(f"{facts.width}x{facts.height}")
    stats.aspects.add(nearest_aspect(facts.width, facts.height))
    for length in lengths:
        enough = length.possible(facts.frames, facts.fps) >= length.frames
        stats.long_enough[str(length)] = stats.long_enough.get(str(length), 0) + enough


def nearest_aspect(width: int, height: int) -> str:
    """The name in `ASPECTS` whose ratio is nearest, by factor."""
    return min(ASPECTS, key=lambda name: abs(math.log(width / height / ASPECTS[name])))


def count_words(text: str) -> int:
    """Words between spaces; each Chinese character or Japanese kana counts as one."""
    return len(_UNSPACED.sub(" x ", text).split())
