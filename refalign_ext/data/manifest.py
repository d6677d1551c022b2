"""Clips from a manifest: JSON lines with a video, a prompt and reference images, encoded as they are needed.

One line: `{"id": "dog-1", "video": "clips/dog.mp4", "prompt": "A dog runs.", "references": ["refs/dog.png"]}`; paths are
relative to the manifest's folder and may not leave it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from refalign_ext.data.batch import EncodedSample
from refalign_ext.data.video import read_clip
from refalign_ext.references import MAX_REFERENCES, prepare_reference, reference_to_tensor

logger = logging.getLogger(__name__)

Encode = Callable[[list[Tensor]], list[Tensor]]  # each [3, T, H, W] in [-1, 1] -> [C, t, h, w]
Features = Callable[[Tensor], Tensor]  # [M, 3, H, W] in [-1, 1] -> [M, N, D]


@dataclass(frozen=True)
class Row:
    """One validated line of a manifest."""

    name: str
    video: Path
    prompt: str
    references: tuple[Path, ...]


def read_manifest(path: Path) -> list[Row]:
    """All rows of a manifest.

    Raises:
        ValueError: naming the file and the line that is not as it should be.
    """
    if not path.is_file():
        raise ValueError(f"--data {path}: no such manifest")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--data {path}: not UTF-8 text ({error}); save it as JSON lines") from error
    root, rows = path.parent.resolve(), []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = _parse_row(line, f"{path}, line {number}", root)
        if row.name in lines:
            raise ValueError(
                f"{path}, line {number}: id {row.name!r} is already used in line {lines[row.name]}"
            )
        lines[row.name] = number
        rows.append(row)
    if not rows:
        raise ValueError(f"--data {path}: the manifest has no rows")
    return rows


def _parse_row(line: str, place: str, root: Path) -> Row:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(entry, dict):
        raise ValueError(f'{place}: expected an object like {{"id", "video", "prompt", "references"}}')
    for key in ("id", "video", "prompt"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise ValueError(f"{place}: {key!r} is missing, empty or not a string")
    references = entry.get("references")
    if not isinstance(references, list) or not all(isinstance(name, str) and name for name in references):
        raise ValueError(f"{place}: 'references' is missing or not a list of file names")
    if not 1 <= len(references) <= MAX_REFERENCES:
        raise ValueError(f"{place}: {len(references)} references; 1 to {MAX_REFERENCES} are possible")
    paths = []
    for name in (entry["video"], *references):
        if "\0" in name:
            raise ValueError(f"{place}: {name!r} is not a file name")
        inside = (root / name).resolve()
        if not inside.is_relative_to(root):
            raise ValueError(f"{place}: {name!r} lies outside the manifest's folder")
        paths.append(inside)
    return Row(entry["id"], paths[0], entry["prompt"], tuple(paths[1:]))


class ManifestSource:
    """Seeded samples from a manifest; a clip that cannot be used is replaced, counted and named in the log.

    Args:
        rows: from `read_manifest`.
        size: (width, height) in pixels; frame_num: frames of a clip.
        encode, features: the VAE and the teacher (None: no alignment).
        seed: the order of rows and the cuts depend on it and the global position alone.

    Raises:
        ValueError: if every row names a file that does not exist.
    """

    def __init__(
        self,
        rows: list[Row],
        size: tuple[int, int],
        frame_num: int,
        encode: Encode,
        features: Features | None,
        seed: int,
    ) -> None:
        self.rows, self.size, self.frame_num = rows, size, frame_num
        self.encode, self.features, self.seed = encode, features, seed
        self.bad: dict[str, str] = {}
        self._permutation: tuple[int, np.ndarray] | None = None
        absent = [(row, path) for row in rows for path in (row.video, *row.references) if not path.is_file()]
        if len({row.name for row, _ in absent}) == len(rows):
            listed = ", ".join(str(path) for _, path in absent[:8])
            raise ValueError(
                f"no clip of the manifest has all its files: {len(absent)} are missing: {listed}"
            )
        for row, path in absent:
            self._skip(row, f"{path} does not exist")

    def prepare(self) -> None:
        """Nothing: clips are read when they are needed."""

    def samples(self, step: int, indices: range) -> list[EncodedSample]:
        """Samples for the global positions `indices`; see `Source`."""
        return [self._sample(index) for index in indices]

    def _order(self, index: int) -> int:
        epoch, position = divmod(index, len(self.rows))
        if self._permutation is None or self._permutation[0] != epoch:
            order = np.random.default_rng([self.seed, 30, epoch]).permutation(len(self.rows))
            self._permutation = (epoch, order)
        return int(self._permutation[1][position])

    def _skip(self, row: Row, reason: str) -> None:
        if row.name not in self.bad:
            self.bad[row.name] = reason
            logger.warning("skipping clip %s (%d skipped so far): %s", row.name, len(self.bad), reason)

    def _sample(self, index: int) -> EncodedSample:
        first, reason = self._order(index), ""
        for attempt in range(len(self.rows)):
            row = self.rows[(first + attempt) % len(self.rows)]
            try:
                # A clip skipped before is tried again: what a position gives must not depend on what came before it.
                return self._load(row, np.random.default_rng([self.seed, 31, index]))
            except (ValueError, OSError) as error:
                reason = str(error)
                self._skip(row, reason)
        raise ValueError(f"none of the {len(self.rows)} clips can be used; the last: {reason}")

    def _load(self, row: Row, rng: np.random.Generator) -> EncodedSample:
        video = read_clip(row.video, self.frame_num, self.size, float(rng.random()))
        images = torch.stack(
            [reference_to_tensor(prepare_reference(path, self.size)) for path in row.references]
        )
        latents = self.encode([video])[0]
        references = torch.cat(self.encode([image[:, None] for image in images]), 1)  # [C, M, h, w]
        features = None if self.features is None else self.features(images)
        return EncodedSample(row.name, row.prompt, latents, references, features)
