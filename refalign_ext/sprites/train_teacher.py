"""Train the embedded alignment teacher: `python -m refalign_ext.sprites.train_teacher`.

A small DINOv3 learns that two views of a subject (other angle, scale, place, background) are the same and that all other
subjects are not: contrastive learning over features averaged on the subject's own patches. No label of the world enters,
and nothing is shared with the judge.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refalign_ext.sprites.world import BACKGROUNDS, Subject, paint, paint_background, subjects_of

if TYPE_CHECKING:
    from transformers import DINOv3ViTModel

PATCH = 8  # pixels: VAE stride 4 times DiT patch 2, so that teacher and DiT grids match
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_teacher(seed: int = 0) -> DINOv3ViTModel:
    """A DINOv3 of 0.8 million parameters on 8-pixel patches."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        patch_size=PATCH,
        image_size=48,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_register_tokens=4,
        layerscale_value=1.0,
        drop_path_rate=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DINOv3ViTModel(config)


def view_of(rng: np.random.Generator, subject: Subject, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One view [size, size, 3] uint8, two thirds of the time on white as references are, and its coverage."""
    if rng.random() < 2 / 3:
        canvas = np.full((size, size, 3), 255, np.float32)
    else:
        canvas = paint_background(list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))], size, size)
    scale = rng.uniform(0.3, 0.85)
    room = max(0.0, 0.5 - scale / 2)
    center = tuple(float(size * (0.5 + rng.uniform(-room, room))) for _ in range(2))
    coverage = paint(canvas, subject, center, scale * size, rng.uniform(0, 2 * np.pi))
    return np.rint(canvas).astype(np.uint8), coverage


def features_of(model: DINOv3ViTModel, images: Tensor, coverage: Tensor) -> Tensor:
    """Unit features [B, D] averaged over the patches that show the subject; images [B, 3, H, W] in 0..1."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))
    skipped = 1 + model.config.num_register_tokens
    tokens = model(pixel_values=(images - mean) / std).last_hidden_state[:, skipped:].float()  # [B, N, D]
    weight = F.avg_pool2d(coverage[:, None], PATCH).flatten(1)  # [B, N]
    pooled = (tokens * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp_min(1e-6)
    return F.normalize(pooled, dim=-1)


def batch_of(rng: np.random.Generator, subjects: list[Subject], size: int) -> tuple[Tensor, Tensor]:
    """One view of each subject: images [B, 3, size, size] in 0..1 and coverage [B, size, size]."""
    views = [view_of(rng, subject, size) for subject in subjects]
    images = torch.from_numpy(np.stack([image for image, _ in views])).permute(0, 3, 1, 2).float() / 255
    return images, torch.from_numpy(np.stack([coverage for _, coverage in views])).float()


@torch.no_grad()
def retrieval(model: DINOv3ViTModel, subjects: list[Subject], size: int, seed: int) -> float:
    """Share of subjects whose second view is nearest to their first among all second views (cross-view top-1)."""
    rng = np.random.default_rng([seed, 99])
    first = features_of(model, *batch_of(rng, subjects, size))
    second = features_of(model, *batch_of(rng, subjects, size))
    return float(((first @ second.T).argmax(1) == torch.arange(len(subjects))).float().mean())


@click.command(context_settings={"show_default": True})
@click.option("--steps", type=click.IntRange(1), default=900)
@click.option("--batch_size", type=click.IntRange(2), default=64, help="Subjects a step; each is seen twice.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("outputs/teacher"))
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--size", default=48, help="Side of the views in pixels.")
@click.option("--learning_rate", default=2e-3)
def main(steps: int, batch_size: int, out: Path, seed: int, size: int, learning_rate: float) -> None:
    """Train the embedded teacher and write it as a transformers folder."""
    from tqdm import tqdm

    model = build_teacher(seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.95))
    train, held_out = subjects_of("train"), subjects_of("held_out")
    bar = tqdm(range(steps), desc="teacher", mininterval=2)
    out.mkdir(parents=True, exist_ok=True)
    for step in bar:
        rng = np.random.default_rng([seed, step])
        chosen = [train[index] for index in rng.permutation(len(train))[:batch_size]]
        for group in optimizer.param_groups:
            group["lr"] = (
                learning_rate * min(1.0, (step + 1) / 50) * max(0.02, min(1.0, (1 - step / steps) / 0.5))
            )
        with torch.autocast("cpu", torch.bfloat16):
            first = features_of(model, *batch_of(rng, chosen, size))
            second = features_of(model, *batch_of(rng, chosen, size))
        logits = first @ second.T / 0.1
        target = torch.arange(len(chosen))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            model.eval()
            shares = [
                f"{retrieval(model, group, size, seed):.1%} of {len(group)}" for group in (train, held_out)
            ]
            line = (
                f"step {step + 1} loss {loss.item():.3f} cross-view retrieval: trained subjects {shares[0]}, "
                f"held-out {shares[1]}"
            )
            model.train()
            tqdm.write(line)
            with open(out / "log.txt", "a") as log:
                log.write(line + "\n")
    model.eval().to(torch.bfloat16).save_pretrained(out / "teacher")
    click.echo(f"wrote {out / 'teacher'}")


if __name__ == "__main__":
    main()
