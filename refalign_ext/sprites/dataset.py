"""The sprite world as a source of training batches, rendered and encoded once and then read from memory.

Rendering and encoding a clip costs several times what training on it costs, so a fixed number of clips and reference
views is encoded before training and kept in a file; which clip meets which views is drawn anew for every sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from refalign_ext.aside import aside_path
from refalign_ext.data.batch import EncodedSample
from refalign_ext.sprites.world import (
    Clip,
    render_clip,
    render_reference,
    sample_clip,
    sample_reference,
    subjects_of,
)

Encode = Callable[[Tensor], Tensor]  # [B, 3, T, H, W] in [-1, 1] -> [B, C, t, h, w]
Features = Callable[[Tensor], Tensor]  # [B, 3, H, W] in [-1, 1] -> [B, N, D]


@dataclass(frozen=True)
class SpriteSettings:
    """What determines the cached clips; part of the cache's fingerprint."""

    clips: int
    views: int
    frames: int
    height: int
    width: int
    regular_pairs: float
    seed: int
    counts: tuple[float, float, float]
    free_colors: bool = False


def to_video_tensor(frames: np.ndarray) -> Tensor:
    """[T, H, W, 3] uint8 -> [3, T, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float().div(127.5).sub(1)


def to_frames(video: Tensor) -> np.ndarray:
    """[3, T, H, W] in [-1, 1] -> [T, H, W, 3] uint8."""
    return video.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu().numpy()


class MixedSprites:
    """Samples from two sprite sources, `share` of them from the second; seeded by position like either."""

    def __init__(self, first: SpriteSource, second: SpriteSource, share: float) -> None:
        self.first, self.second, self.share = first, second, share

    def prepare(self) -> None:
        """Load or build both caches."""
        self.first.prepare()
        self.second.prepare()

    def samples(self, step: int, indices: range) -> list[EncodedSample]:
        """See `Source`; both sources draw the same number of subjects for a step."""
        lots = [np.random.default_rng([self.first.settings.seed, 22, index]).random() for index in indices]
        return [
            (self.second if lot < self.share else self.first).samples(step, range(index, index + 1))[0]
            for index, lot in zip(indices, lots, strict=True)
        ]


class SpriteSource:
    """Seeded sprite samples; all samples of one optimizer step show the same number of subjects."""

    def __init__(
        self,
        settings: SpriteSettings,
        encode: Encode,
        features: Features | None,
        folder: Path,
        fingerprint: str,
        draw_shares: tuple[float, float, float] | None = None,
        progress: bool = True,
        split: str = "train",
    ) -> None:
        """Plan the clips; nothing is rendered or written before `prepare`.

        Args:
            encode: the VAE's encoder.
            features: the teacher on the DiT grid, or None.
            folder: where the cache lies or will be written.
            fingerprint: identifies VAE and teacher weights; another one means another cache file.
            draw_shares: shares of steps with one, two and three subjects; None: as in the cache.
            progress: show a bar while the cache is built.
            split: whose subjects, `train` or `held_out`.
        """
        self.settings = settings
        self.subjects = subjects_of(split)
        rng = np.random.default_rng([settings.seed, 10])
        shares = np.array(settings.counts) / sum(settings.counts)
        self.clips = [
            sample_clip(
                np.random.default_rng([settings.seed, 14 if settings.free_colors else 11, index]),
                self.subjects,
                int(count),
                settings.free_colors,
            )
            for index, count in enumerate(rng.choice([1, 2, 3], settings.clips, p=shares))
        ]
        self.is_regular = rng.random(settings.clips) < settings.regular_pairs
        self._by_count = {
            count: np.array([i for i, clip in enumerate(self.clips) if len(clip.performances) == count])
            for count in (1, 2, 3)
        }
        self._shares = np.array(draw_shares or settings.counts) / sum(draw_shares or settings.counts)
        # Subjects in palette colours recur and share their reference views; free colours and cut-outs are a clip's own.
        own = settings.views if settings.free_colors else 0
        self._own_views = [1 if regular else own for regular in self.is_regular]
        rows = [len(c.performances) * views for c, views in zip(self.clips, self._own_views, strict=True)]
        self._first_own = np.cumsum([0, *rows])
        self._subject_index = {subject: index for index, subject in enumerate(self.subjects)}
        identity = [settings.__dict__, fingerprint, features is not None]
        key = json.dumps(identity if split == "train" else [*identity, split], sort_keys=True)
        self._path = folder / f"sprites-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        self._encode, self._features, self._progress = encode, features, progress
        self._loaded: dict[str, Tensor] | None = None

    def prepare(self) -> None:
        """Load the cache, or build it (with a progress bar) and write it.

        Raises:
            ValueError: if the cache's file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not self._path.exists():
            self._build(self._path, self._encode, self._features, self._progress)
        try:
            self._loaded = load_file(self._path)
        except SafetensorError as error:
            raise ValueError(f"{self._path} is damaged ({error}): delete it and run again") from error

    @property
    def _tensors(self) -> dict[str, Tensor]:
        if self._loaded is None:
            self.prepare()
        return self._loaded

    @torch.no_grad()
    def _build(self, path: Path, encode: Encode, features: Features | None, progress: bool) -> None:
        from safetensors.torch import save_file
        from tqdm import tqdm

        settings, (height, width) = self.settings, (self.settings.height, self.settings.width)
        tensors: dict[str, list[Tensor]] = {"latents": [], "regular": [], "views": []}
        if features is not None:
            tensors |= {"regular_features": [], "view_features": []}

        def add_references(images: list[np.ndarray], name: str, feature_name: str) -> None:
            stack = torch.stack([to_video_tensor(image[None]) for image in images])  # [K, 3, 1, H, W]
            tensors[name].append(encode(stack)[:, :, 0].bfloat16())
            if features is not None:
                tensors[feature_name].append(features(stack[:, :, 0]).bfloat16())

        bar = tqdm(
            total=len(self.clips), desc="encoding clips", unit="clip", disable=not progress, mininterval=1
        )
        for start in range(0, len(self.clips), 16):
            chunk = self.clips[start : start + 16]
            videos = [render_clip(clip, settings.frames, height, width)[0] for clip in chunk]
            tensors["latents"].append(
                encode(torch.stack([to_video_tensor(video) for video in videos])).bfloat16()
            )
            rng = np.random.default_rng([settings.seed, 12, start])
            images = [
                sample_reference(rng, performance, height, width, "regular" if is_regular else "cross")[0]
                for clip, is_regular, views in zip(
                    chunk, self.is_regular[start:], self._own_views[start:], strict=False
                )
                for performance in clip.performances
                for _ in range(views)
            ]
            if images:
                add_references(images, "regular", "regular_features")
            bar.update(len(chunk))
        bar.close()
        shared = [] if settings.free_colors else self.subjects
        for index, subject in enumerate(
            tqdm(shared, desc="encoding references", disable=not progress or not shared, mininterval=1)
        ):
            rng = np.random.default_rng([settings.seed, 13, index])
            images = []
            for _ in range(settings.views):
                angle, scale = rng.uniform(0, 2 * np.pi), rng.uniform(0.45, 0.85)
                offset = tuple(float(value) for value in rng.uniform(-0.05, 0.05, 2))
                images.append(render_reference(subject, height, width, angle, scale, offset))
            add_references(images, "views", "view_features")
        with aside_path(path) as aside:
            save_file(
                {name: torch.cat(parts).contiguous() for name, parts in tensors.items() if parts}, aside
            )

    def samples(self, step: int, indices: range) -> list[EncodedSample]:
        """Samples for the global positions `indices` of optimizer step `step`; see `Source`."""
        count = int(np.random.default_rng([self.settings.seed, 20, step]).choice([1, 2, 3], p=self._shares))
        pool = self._by_count[count] if len(self._by_count[count]) else np.arange(len(self.clips))
        return [
            self._sample(np.random.default_rng([self.settings.seed, 21, index]), pool) for index in indices
        ]

    def _sample(self, rng: np.random.Generator, pool: np.ndarray) -> EncodedSample:
        index = int(pool[rng.integers(len(pool))])
        clip: Clip = self.clips[index]
        own = self._own_views[index]
        if own:
            first = int(self._first_own[index])
            rows = [first + offset * own + int(rng.integers(own)) for offset in range(len(clip.performances))]
            names = ("regular", "regular_features")
        else:
            views = self.settings.views
            rows = [
                self._subject_index[performance.subject] * views + int(rng.integers(views))
                for performance in clip.performances
            ]
            names = ("views", "view_features")
        features = self._tensors.get(names[1])
        return EncodedSample(
            name=f"sprite-{index}",
            prompt=clip.caption,
            latents=self._tensors["latents"][index].float(),
            references=self._tensors[names[0]][rows].float().transpose(0, 1),  # [C, M, h, w]
            features=None if features is None else features[rows].float(),
        )
