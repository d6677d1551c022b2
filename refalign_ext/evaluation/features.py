"""Reference tokens of a model, block by block, for plots of how its references are told apart (paper, Fig. 2b).

A sample is a prompt with its references in one or more views; every view is one pass of the model. Tokens whose patch
shows nothing but white are left out: letterboxed references have many of them, all alike, and what is to be told apart
is what the references show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from refalign_ext.backbone import ReferenceBackbone, initial_noise, placed
from refalign_ext.encoders import token_stride
from refalign_ext.evaluation.separability import Place, SampleTokens
from refalign_ext.layout import TokenLayout
from refalign_ext.pipeline import R2VPipeline
from refalign_ext.references import reference_to_tensor
from refalign_ext.tasks import Conditions

WHITE_LEVEL = 250 / 127.5 - 1  # in [-1, 1]; a patch is white if nothing in it is darker
MAX_TIMESTEP = 1000.0


@dataclass(frozen=True)
class Sample:
    """One prompt with references."""

    prompt: str
    views: list[list[Image.Image]]  # for each view the prepared pictures of all references in the same order
    video: Tensor | None = None  # the clip that shows them, [3, F, H, W] in [-1, 1]


@dataclass(frozen=True)
class EncodedView:
    """One pass of the model: its conditions, and which reference tokens count, [M, N] boolean."""

    conditions: Conditions
    kept: Tensor


@dataclass(frozen=True)
class EncodedViews:
    """A sample as the model sees it: the clip's latents [C, F, h, w] or None, and the views."""

    latents: Tensor | None
    views: list[EncodedView]


def tokens_with_content(image: Image.Image, stride: tuple[int, int]) -> Tensor:
    """Which tokens of a prepared reference show more than white, [N] boolean; `stride`: pixels per token."""
    pixels = reference_to_tensor(image)  # [3, H, W]
    darkest = (-F.max_pool2d(-pixels, stride, stride)).amin(0)  # [rows, columns]
    return (darkest < WHITE_LEVEL).flatten()


def encode_samples(
    pipeline: R2VPipeline, samples: Sequence[Sample], *, most_tokens: int, seed: int
) -> tuple[list[EncodedViews], dict[str, int]]:
    """Encodes texts, references and clips, and chooses the tokens that count.

    Args:
        most_tokens: of each reference; more are thinned out at random (the same ones in every block and checkpoint).

    Returns:
        The samples, and how many tokens there were: `total`, `white` (left out), `thinned` (left out), `kept`.

    Raises:
        ValueError: if a picture shows fewer than two tokens that are not white.
    """
    config, generator = pipeline.config, torch.Generator().manual_seed(seed)
    count = {"total": 0, "white": 0, "thinned": 0, "kept": 0}
    encoded = []
    for sample in samples:
        views = []
        for images in sample.views:
            rows = [tokens_with_content(image, token_stride(config)) for image in images]
            for place, row in enumerate(rows, 1):
                if int(row.sum()) < 2:
                    raise ValueError(
                        f"reference {place} shows (almost) nothing but white: give pictures with something on them"
                    )
            thin = [_thinned(row, most_tokens, generator) for row in rows]
            count["total"] += sum(len(row) for row in rows)
            count["white"] += sum(int((~row).sum()) for row in rows)
            count["kept"] += sum(int(row.sum()) for row in thin)
            request = pipeline.task.request(sample.prompt, images, size=images[0].size)
            views.append(EncodedView(pipeline.prepare(request), torch.stack(thin)))
        latents = None
        if sample.video is not None:
            latents = pipeline.encode_videos([sample.video])[0].float()
        encoded.append(EncodedViews(latents, views))
    count["thinned"] = count["total"] - count["white"] - count["kept"]
    return encoded, count


def _thinned(row: Tensor, most: int, generator: torch.Generator) -> Tensor:
    places = row.nonzero()[:, 0]
    if len(places) <= most:
        return row
    chosen = torch.zeros_like(row)
    chosen[places[torch.randperm(len(places), generator=generator)[:most]]] = True
    return chosen


@torch.no_grad()
def reference_tokens(
    pipeline: R2VPipeline,
    samples: Sequence[EncodedViews],
    *,
    blocks: Sequence[int],
    timesteps: Sequence[float],
    shape: tuple[int, int, int, int],
    tap: str = "block",
    seed: int = 0,
    passed: Callable[[], object] = lambda: None,
) -> dict[Place, list[SampleTokens]]:
    """The tokens of every sample after each block at each noise level, taken to the CPU block by block.

    The noisy video is the sample's clip with noise on it or, where there is none, what the model itself makes of pure
    noise in one Euler step from level to level.

    Args:
        shape: the video latents' [C, F, h, w].
        tap: see `ReferenceBackbone.forward`.
        seed: of the noise, which is the same for every checkpoint.
        passed: called after each view.
    """
    found: dict[Place, list[SampleTokens]] = {(t, block): [] for t in timesteps for block in blocks}
    with placed(pipeline.backbone.model, pipeline.device, offload=pipeline.offload_model):
        for index, sample in enumerate(samples):
            noise = initial_noise(shape, seed * 100003 + index).to(pipeline.device)
            views: dict[Place, list[Tensor]] = {place: [] for place in found}
            for view in sample.views:
                for timestep, latents in _noisy_latents(pipeline.backbone, sample, view, noise, timesteps):
                    with _taps(pipeline.backbone, latents, view, blocks, tap) as taken:
                        _velocity(pipeline.backbone, latents, timestep, view)
                    for block, tokens in taken.items():
                        views[timestep, block].append(tokens)
                passed()
            references = torch.cat([view.kept.nonzero()[:, 0] for view in sample.views])
            numbers = torch.cat(
                [torch.full((int(view.kept.sum()),), number) for number, view in enumerate(sample.views)]
            )
            for place, tokens in views.items():
                found[place].append(SampleTokens(torch.cat(tokens), references, numbers))
    return found


def _noisy_latents(
    backbone: ReferenceBackbone,
    sample: EncodedViews,
    view: EncodedView,
    noise: Tensor,
    timesteps: Sequence[float],
) -> Iterator[tuple[float, Tensor]]:
    """Noise levels from the highest, with the video latents at each."""
    latents, level = noise, MAX_TIMESTEP
    for timestep in sorted(timesteps, reverse=True):
        if sample.latents is not None:
            sigma = timestep / MAX_TIMESTEP
            latents = (1 - sigma) * sample.latents + sigma * noise
        elif timestep < level:
            velocity = _velocity(backbone, latents, level, view)
            latents, level = latents + (timestep - level) / MAX_TIMESTEP * velocity, timestep
        yield timestep, latents


def _velocity(backbone: ReferenceBackbone, latents: Tensor, timestep: float, view: EncodedView) -> Tensor:
    conditions = view.conditions
    times = torch.tensor([timestep], dtype=torch.float32, device=latents.device)
    return backbone([latents], times, [conditions.prompt], [conditions.references]).prediction[0].float()


@contextmanager
def _taps(
    backbone: ReferenceBackbone, latents: Tensor, view: EncodedView, blocks: Sequence[int], tap: str
) -> Iterator[dict[int, Tensor]]:
    """Collects tokens by block while the model runs inside.

    The backbone's own taps would keep the outputs of all blocks on the device until the end: 16 GB in the 14B model.
    """
    model = backbone.model
    layout = TokenLayout.of([latents], [view.conditions.references], tuple(model.patch_size))
    taken: dict[int, Tensor] = {}

    def take(index: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        tokens = layout.gather_references(output)[0]  # [M, N, D]
        taken[index] = F.normalize(tokens[view.kept.to(tokens.device)].float(), dim=1).half().cpu()

    places = {index: model.blocks[index] for index in blocks}
    if tap == "self_attn":
        places = {index: block.self_attn for index, block in places.items()}
    handles = [module.register_forward_hook(partial(take, index)) for index, module in places.items()]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()
