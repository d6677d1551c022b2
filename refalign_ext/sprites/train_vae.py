"""Train the embedded VAE on sprites: `python -m refalign_ext.sprites.train_vae`. Resumes by itself.

Single images first (a Wan VAE encodes a reference as one frame), then nine-frame clips mixed with images. In an
earlier trial the library's own initialisation with a usual learning rate left subjects about ten decibels worse.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample
from torch import Tensor, nn

from refalign_ext.muon import Muon
from refalign_ext.sprites.vae_onepass import decode_one_pass, encode_one_pass, lay_channels_last
from refalign_ext.sprites.world import render_clip, sample_clip, sample_reference, subjects_of

CONFIG = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 4,
}


@torch.no_grad()
def initialize(vae: AutoencoderKLWan, generator: torch.Generator) -> None:
    """Start as an image autoencoder: convolutions see the present frame only, residual branches start small."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            weight = module.weight
            fan_in = weight[0].numel() // (weight.shape[2] if weight.ndim == 5 else 1)
            target = weight[:, :, -1] if weight.ndim == 5 else weight
            weight.zero_()
            target.normal_(0, fan_in**-0.5, generator=generator)
            module.bias.zero_()
    for module in vae.modules():
        if hasattr(module, "conv2") and hasattr(module, "conv1"):
            module.conv2.weight.mul_(0.7)
        if isinstance(module, WanAttentionBlock):
            module.proj.weight.mul_(0.1)
        if isinstance(module, WanResample) and hasattr(module, "time_conv"):
            weight = module.time_conv.weight.zero_()
            for copy in range(weight.shape[0] // weight.shape[1]):
                rows = weight[copy * weight.shape[1] : (copy + 1) * weight.shape[1], :, -1, 0, 0]
                rows.copy_(torch.eye(weight.shape[1]))
    z_dim = vae.config.z_dim
    vae.quant_conv.weight[z_dim:].mul_(0.05)
    vae.quant_conv.bias[z_dim:].fill_(-6)


class Sprites:
    """Seeded batches; the random state of batch `step` depends on the seed and the step alone, so a resume is exact."""

    def __init__(self, seed: int, size: int, frames: int) -> None:
        self.seed, self.size, self.frames = seed, size, frames
        self.subjects = subjects_of("train")

    def images(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Half references, half single frames: [B, 3, 1, H, W] in [-1, 1] and subject coverage [B, 1, 1, H, W]."""
        rng = np.random.default_rng([self.seed, 1, step])
        images, masks = [], []
        for index in range(count):
            clip = sample_clip(rng, self.subjects, int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15])))
            if index % 2:
                image, _, _ = sample_reference(rng, clip.performances[0], self.size, self.size)
                mask = (image.min(-1) < 250).astype(np.float32)
            else:
                video, coverage = render_clip(clip, 3, self.size, self.size)
                pick = rng.integers(3)
                image, mask = video[pick], coverage[pick]
            images.append(image[None])
            masks.append(mask[None])
        return _to_tensors(images, masks)

    def clips(self, step: int, count: int, crop: int) -> tuple[Tensor, Tensor]:
        """Crops of clips, 85% around a subject, half played backwards: [B, 3, T, crop, crop]."""
        rng = np.random.default_rng([self.seed, 2, step])
        videos, masks = [], []
        for _ in range(count):
            clip = sample_clip(rng, self.subjects, int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15])))
            video, coverage = render_clip(clip, self.frames, self.size, self.size)
            spare = self.size - crop
            left, top = rng.integers(0, spare + 1, 2)
            if rng.random() < 0.85:
                performance = clip.performances[rng.integers(len(clip.performances))]
                wanted = np.array(performance.center) * self.size - crop / 2 + rng.uniform(-6, 6, 2)
                left, top = np.clip(np.rint(wanted), 0, spare).astype(int)
            video = video[:, top : top + crop, left : left + crop]
            coverage = coverage[:, top : top + crop, left : left + crop]
            if rng.random() < 0.5:
                video, coverage = video[::-1], coverage[::-1]
            videos.append(video)
            masks.append(coverage)
        return _to_tensors(videos, masks)


def _to_tensors(videos: list[np.ndarray], masks: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    video = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)
    return video.contiguous(), torch.from_numpy(np.stack(masks))[:, None].float()


def loss_of(
    vae: AutoencoderKLWan, video: Tensor, mask: Tensor, sample: bool, generator: torch.Generator
) -> Tensor:
    """L1 + L2 on the unclamped reconstruction, subjects weighted three times, plus a very light KL when sampling."""
    mean, log_variance = encode_one_pass(vae, video)
    latents = mean
    if sample:
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32).to(mean.dtype)
        latents = mean + noise * torch.exp(0.5 * log_variance)
    difference = decode_one_pass(vae, latents).float() - video
    weight = 1 + 2 * mask
    loss = ((difference.abs() + difference.square()) * weight).sum() / (weight.sum() * video.shape[1])
    if sample:
        mean, log_variance = mean.float(), log_variance.float()
        loss = loss + 1e-5 * 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return loss


@torch.no_grad()
def decibels(vae: AutoencoderKLWan, video: Tensor, mask: Tensor) -> tuple[float, float]:
    """Peak signal-to-noise ratio of the reconstruction, whole frames and subjects only."""
    mean, _ = encode_one_pass(vae, video)
    error = (decode_one_pass(vae, mean).float().clamp(-1, 1) - video).square().div(4).mean(1, keepdim=True)
    inside = (mask > 0.5).float()
    whole, subjects = error.mean(), (error * inside).sum() / inside.sum()
    return float(-10 * torch.log10(whole)), float(-10 * torch.log10(subjects))


@torch.no_grad()
def fold_normalization(vae: AutoencoderKLWan, data: Sprites, batches: int = 16) -> None:
    """Move the latents' mean and deviation into the 1x1x1 convolutions around them, so that they are 0 and 1.

    The released Wan VAE keeps 16 means and deviations as constants in its code; a model trained here has none.
    """
    means = torch.cat(
        [
            mean.transpose(0, 1).flatten(1)
            for step in range(batches)
            for video in (data.images(10**6 + step, 8)[0], data.clips(10**6 + step, 4, data.size)[0])
            for mean in [encode_one_pass(vae, video)[0]]
        ],
        1,
    )
    center, deviation = means.mean(1), means.std(1)
    z_dim = vae.config.z_dim
    vae.post_quant_conv.bias.add_(vae.post_quant_conv.weight[:, :, 0, 0, 0] @ center)
    vae.post_quant_conv.weight.mul_(deviation[None, :, None, None, None])
    vae.quant_conv.bias[:z_dim].sub_(center).div_(deviation)
    vae.quant_conv.weight[:z_dim].div_(deviation[:, None, None, None, None])
    vae.quant_conv.bias[z_dim:].sub_(2 * deviation.log())


@click.command(context_settings={"show_default": True})
@click.option(
    "--image_steps", type=click.IntRange(0), default=200, help="Steps on single images before clips join."
)
@click.option("--steps", type=click.IntRange(1), default=2400, help="All optimizer steps.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("outputs/vae"), help="Folder for the state."
)
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--size", default=48, help="Side of the rendered frames in pixels.")
@click.option("--frames", type=click.IntRange(1), default=9)
@click.option("--crop", default=32, help="Side of the training crops of clips in pixels.")
@click.option("--save_every", type=click.IntRange(1), default=200)
def main(
    image_steps: int, steps: int, out: Path, seed: int, size: int, frames: int, crop: int, save_every: int
) -> None:
    """Train the embedded VAE and write `vae.pt`, a state dict in the library's names with folded normalisation."""
    from tqdm import tqdm

    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    vae = AutoencoderKLWan(**CONFIG)
    initialize(vae, generator)
    lay_channels_last(vae)
    edges = {"encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out"}
    edges |= {"quant_conv", "post_quant_conv"}
    kernels, others = [], []
    for name, parameter in vae.named_parameters():
        is_kernel = name.endswith("weight") and parameter.ndim >= 4 and name.rsplit(".", 1)[0] not in edges
        (kernels if is_kernel else others).append(parameter)
    optimizers = [Muon(kernels, lr=0.03, momentum=0.9), torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.95))]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    data, start, state_file = Sprites(seed, size, frames), 0, out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        generator.set_state(state["generator"])
        start = state["step"]
    check_images, check_clips = (
        Sprites(seed + 1, size, frames).images(0, 32),
        Sprites(seed + 1, size, frames).clips(0, 16, size),
    )
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="vae", mininterval=2)
    began = time.monotonic()
    for step in bar:
        left = 1 - step / steps
        scale = min(1.0, (step + 1) / 40) * max(0.01, min(1.0, left / 0.7))
        for group, rate in zip((g for o in optimizers for g in o.param_groups), rates, strict=True):
            group["lr"] = rate * scale
        on_images = step < image_steps or step % 4 == 0
        video, mask = data.images(step, 16) if on_images else data.clips(step, 4, crop)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(vae, video, mask, sample=step >= image_steps, generator=generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            vae.eval()
            images, clips = decibels(vae, *check_images), decibels(vae, *check_clips)
            vae.train()
            line = (
                f"step {step + 1} loss {loss.item():.4f} images {images[0]:.2f} dB (subjects {images[1]:.2f}) "
                f"clips {clips[0]:.2f} dB (subjects {clips[1]:.2f}) {time.monotonic() - began:.0f} s"
            )
            tqdm.write(line)
            with open(out / "log.txt", "a") as log:
                log.write(line + "\n")
            state = {
                "vae": vae.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "generator": generator.get_state(),
                "step": step + 1,
            }
            torch.save(state, out / "state.tmp")
            (out / "state.tmp").replace(state_file)
    vae.eval()
    fold_normalization(vae, data)
    torch.save(vae.state_dict(), out / "vae.tmp")
    (out / "vae.tmp").replace(out / "vae.pt")
    click.echo(f"wrote {out / 'vae.pt'}")


if __name__ == "__main__":
    main()
