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
import torch.nn.functional as F
from torch import Tensor

from refalign_ext.data.batch import EncodedSample
from refalign_ext.references import prepare_reference, reference_to_tensor

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
    root, rows = path.parent.resolve(), []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            rows.append(_parse_row(line, f"{path}, line {number}", root))
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
    for key, kind in (("id", str), ("video", str), ("prompt", str), ("references", list)):
        if not isinstance(entry.get(key), kind) or not entry[key]:
            raise ValueError(
                f"{place}: {key!r} is missing, empty or not a {'list' if kind is list else 'string'}"
            )
    if not all(isinstance(name, str) for name in entry["references"]) or len(entry["references"]) > 8:
        raise ValueError(f"{place}: 'references' must be 1 to 8 file names")
    paths = []
    for name in (entry["video"], *entry["references"]):
        inside = (root / name).resolve()
        if not inside.is_relative_to(root):
            raise ValueError(f"{place}: {name!r} lies outside the manifest's folder")
        paths.append(inside)
    return Row(entry["id"], paths[0], entry["prompt"], tuple(paths[1:]))


def read_clip(path: Path, frame_num: int, size: tuple[int, int], start_share: float = 0.0) -> Tensor:
    """`frame_num` consecutive frames, scaled and centre-cropped to `size` (width, height): [3, T, H, W] in [-1, 1].

    Args:
        start_share: where to start, as a share of the frames that can be spared.

    Raises:
        ValueError: if the file cannot be decoded or is too short.
    """
    import av

    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise ValueError(f"{path}: cannot be decoded ({error})") from error
    if len(frames) < frame_num:
        raise ValueError(f"{path}: {len(frames)} frames, {frame_num} are needed")
    first = int(start_share * (len(frames) - frame_num))
    clip = (
        torch.from_numpy(np.stack(frames[first : first + frame_num])).permute(0, 3, 1, 2).float()
    )  # [T, 3, H, W]
    width, height = size
    scale = max(height / clip.shape[2], width / clip.shape[3])
    scaled = (max(height, round(clip.shape[2] * scale)), max(width, round(clip.shape[3] * scale)))
    clip = F.interpolate(clip, size=scaled, mode="bilinear", antialias=True, align_corners=False)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    clip = clip[:, :, top : top + height, left : left + width]
    return clip.transpose(0, 1).div(127.5).sub(1).clamp(-1, 1)


class ManifestSource:
    """Seeded samples from a manifest; a clip that cannot be used is replaced, counted and named in the log.

    Args:
        rows: from `read_manifest`.
        size: (width, height) in pixels; frame_num: frames of a clip.
        encode, features: the VAE and the teacher (None: no alignment).
        seed: the order of rows and the cuts depend on it and the global position alone.
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

    def samples(self, step: int, indices: range) -> list[EncodedSample]:
        """Samples for the global positions `indices`; see `Source`."""
        return [self._sample(index) for index in indices]

    def _order(self, index: int) -> int:
        epoch, position = divmod(index, len(self.rows))
        return int(np.random.default_rng([self.seed, 30, epoch]).permutation(len(self.rows))[position])

    def _sample(self, index: int) -> EncodedSample:
        first = self._order(index)
        for attempt in range(len(self.rows)):
            row = self.rows[(first + attempt) % len(self.rows)]
            if row.name in self.bad:
                continue
            try:
                return self._load(row, np.random.default_rng([self.seed, 31, index]))
            except (ValueError, OSError) as error:
                self.bad[row.name] = str(error)
                logger.warning("skipping clip %s (%d skipped so far): %s", row.name, len(self.bad), error)
        raise ValueError(
            f"none of the {len(self.rows)} clips can be used; the last: {list(self.bad.values())[-1]}"
        )

    def _load(self, row: Row, rng: np.random.Generator) -> EncodedSample:
        video = read_clip(row.video, self.frame_num, self.size, float(rng.random()))
        images = torch.stack(
            [reference_to_tensor(prepare_reference(path, self.size)) for path in row.references]
        )
        latents = self.encode([video])[0]
        references = torch.cat(self.encode([image[:, None] for image in images]), 1)  # [C, M, h, w]
        features = None if self.features is None else self.features(images)
        return EncodedSample(row.name, row.prompt, latents, references, features)
