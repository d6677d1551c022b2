"""The sprite world as a source of training batches, rendered and encoded once and then read from memory.

Rendering and encoding a clip costs several times what training on it costs, so a fixed number of clips and reference
views is encoded before training and kept in a file; which clip meets which views is drawn anew for every sample. The clips
are the same whatever a run's seed, and the teacher's features lie in a file of their own, so that runs of other seeds and
other teachers share what is already there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from refalign_ext.atomic_io import atomic_path
from refalign_ext.data.batch import EncodedSample
from refalign_ext.sprites.pixels import to_video_tensor
from refalign_ext.sprites.world import (
    WORLD_VERSION,
    render_clip,
    render_cross_reference,
    sample_clip,
    sample_reference,
    subjects_of,
)

Encode = Callable[[Tensor], Tensor]  # [B, 3, T, H, W] in [-1, 1] -> [B, C, t, h, w]
Features = Callable[[Tensor], Tensor]  # [B, 3, H, W] in [-1, 1] -> [B, N, D]


WORLD_SEED = 0  # of the cached clips and views
_CHUNK = 16  # clips that are encoded together


@dataclass(frozen=True)
class SpriteSettings:
    """What determines the cached clips; part of the cache's fingerprint."""

    clips: int
    views: int
    frames: int
    height: int
    width: int
    regular_pairs: float
    counts: tuple[float, float, float]
    free_colors: bool = False


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
        found = []
        for index in indices:
            is_second = np.random.default_rng([self.first.seed, 22, index]).random() < self.share
            found += (self.second if is_second else self.first).samples(step, range(index, index + 1))
        return found


class SpriteSource:
    """Seeded sprite samples; all samples of one optimizer step show the same number of subjects."""

    def __init__(
        self,
        settings: SpriteSettings,
        seed: int,
        encode: Encode,
        features: Features | None,
        folder: Path,
        vae_digest: str,
        teacher_digest: str,
        draw_shares: tuple[float, float, float] | None = None,
        progress: bool = True,
        split: str = "train",
    ) -> None:
        """Plan the clips; nothing is rendered or written before `prepare`.

        Args:
            seed: of the samples: which clip meets which views, in what order. The clips do not depend on it.
            encode: the VAE's encoder.
            features: the teacher on the DiT grid, or None.
            folder: where the cache lies or will be written.
            vae_digest, teacher_digest: identify their weights; others mean other files.
            draw_shares: shares of steps with one, two and three subjects; None: as in the cache.
            progress: show a bar while the cache is built.
            split: whose subjects, `train` or `held_out`.
        """
        self.settings, self.seed = settings, seed
        self.subjects = subjects_of(split)
        rng = np.random.default_rng([WORLD_SEED, 10])
        shares = np.array(settings.counts) / sum(settings.counts)
        counts = rng.choice([1, 2, 3], settings.clips, p=shares)
        self.is_regular = rng.random(settings.clips) < settings.regular_pairs
        # A cut-out shows the subject as its clip does, in whatever pose: the clip alone could not teach copying it.
        self.clips = [
            sample_clip(
                np.random.default_rng([WORLD_SEED, 14 if settings.free_colors else 11, index]),
                self.subjects,
                int(count),
                settings.free_colors,
                tilted=bool(is_regular),
            )
            for index, (count, is_regular) in enumerate(zip(counts, self.is_regular, strict=True))
        ]
        self._by_count = {count: np.flatnonzero(counts == count) for count in (1, 2, 3)}
        self._shares = np.array(draw_shares or settings.counts) / sum(draw_shares or settings.counts)
        # Subjects in palette colours recur and share their reference views; free colours and cut-outs are a clip's own.
        own = settings.views if settings.free_colors else 0
        self._own_views = [1 if regular else own for regular in self.is_regular]
        self._first_own = np.cumsum([0, *(counts * self._own_views)])
        sharing = {
            performance.subject
            for clip, views in zip(self.clips, self._own_views, strict=True)
            if not views
            for performance in clip.performances
        }
        self._sharing = [subject for subject in self.subjects if subject in sharing]
        self._subject_index = {subject: index for index, subject in enumerate(self._sharing)}
        world = [asdict(settings), WORLD_VERSION, split]
        self._latents_path = _cache_path(folder, "sprites", [*world, vae_digest])
        self._features_path = _cache_path(folder, "features", [*world, teacher_digest])
        self._encode, self._teacher, self._progress = encode, features, progress
        self._latents: dict[str, Tensor] = {}
        self._features: dict[str, Tensor] = {}

    def prepare(self) -> None:
        """Load the cache, or build what is missing of it (with a progress bar) and write it.

        Raises:
            ValueError: if a file of the cache is damaged.
        """
        self._latents = _cached(self._latents_path, self._encode_all)
        if self._teacher is not None:
            teacher = self._teacher
            self._features = _cached(
                self._features_path, lambda: self._references("teacher features", teacher)
            )

    @torch.no_grad()
    def _encode_all(self) -> dict[str, Tensor]:
        settings, latents = self.settings, []
        with self._bar("encoding clips", "clip", len(self.clips)) as bar:
            for start in range(0, len(self.clips), _CHUNK):
                chunk = self.clips[start : start + _CHUNK]
                videos = [
                    render_clip(clip, settings.frames, settings.height, settings.width)[0] for clip in chunk
                ]
                stack = torch.stack([to_video_tensor(video) for video in videos])
                latents.append(self._encode(stack).bfloat16())
                bar.update(len(chunk))

        def encode_images(images: Tensor) -> Tensor:
            return self._encode(images[:, :, None])[:, :, 0]

        return {"latents": torch.cat(latents), **self._references("encoding references", encode_images)}

    @torch.no_grad()
    def _references(self, what: str, function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """A function of all references: `regular` (clips' own, in their order) and `views` (of subjects, in theirs)."""
        found: dict[str, list[Tensor]] = {}
        total = int(self._first_own[-1]) + len(self._sharing) * self.settings.views
        with self._bar(what, "image", total) as bar:
            for name, images in self._render_references():
                stack = torch.stack([to_video_tensor(image[None])[:, 0] for image in images])  # [K, 3, H, W]
                found.setdefault(name, []).append(function(stack).bfloat16())
                bar.update(len(images))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _bar(self, what: str, unit: str, total: int) -> tqdm:
        return tqdm(total=total, desc=what, unit=unit, disable=not self._progress, mininterval=1)

    def _render_references(self) -> Iterator[tuple[str, list[np.ndarray]]]:
        height, width = self.settings.height, self.settings.width
        for start in range(0, len(self.clips), _CHUNK):
            rng = np.random.default_rng([WORLD_SEED, 12, start])
            images = []
            for index in range(start, min(start + _CHUNK, len(self.clips))):
                pair = "regular" if self.is_regular[index] else "cross"
                for performance in self.clips[index].performances:
                    for _ in range(self._own_views[index]):
                        images.append(sample_reference(rng, performance, height, width, pair)[0])
            if images:
                yield "regular", images
        for subject in self._sharing:
            rng = np.random.default_rng([WORLD_SEED, 13, self.subjects.index(subject)])
            views = range(self.settings.views)
            yield "views", [render_cross_reference(rng, subject, height, width)[0] for _ in views]

    def samples(self, step: int, indices: range) -> list[EncodedSample]:
        """Samples for the global positions `indices` of optimizer step `step`; see `Source`."""
        if not self._latents:
            self.prepare()
        count = int(np.random.default_rng([self.seed, 20, step]).choice([1, 2, 3], p=self._shares))
        pool = self._by_count[count] if len(self._by_count[count]) else np.arange(len(self.clips))
        return [self._sample(np.random.default_rng([self.seed, 21, index]), pool) for index in indices]

    def _sample(self, rng: np.random.Generator, pool: np.ndarray) -> EncodedSample:
        index = int(pool[rng.integers(len(pool))])
        clip = self.clips[index]
        if own := self._own_views[index]:
            first, name = int(self._first_own[index]), "regular"
            firsts = [first + offset * own for offset in range(len(clip.performances))]
        else:
            own, name = self.settings.views, "views"
            firsts = [self._subject_index[performance.subject] * own for performance in clip.performances]
        rows = [first + int(rng.integers(own)) for first in firsts]
        return EncodedSample(
            name=f"sprite-{index}",
            prompt=clip.caption,
            latents=self._latents["latents"][index].float(),
            references=self._latents[name][rows].float().transpose(0, 1),  # [C, M, h, w]
            features=self._features[name][rows].float() if self._features else None,
        )


def _cache_path(folder: Path, kind: str, identity: list) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return folder / f"{kind}-{digest[:16]}.safetensors"


def _cached(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in a file, made and written before if it is not there."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    if not path.exists():
        tensors = {name: tensor.contiguous() for name, tensor in make().items()}
        with atomic_path(path) as unfinished:
            save_file(tensors, unfinished)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run again") from error
