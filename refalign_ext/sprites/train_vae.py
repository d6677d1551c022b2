"""Train the embedded VAE on sprites: `python -m refalign_ext sprites train-vae`. Resumes by itself.

Single images first (a Wan VAE encodes a reference as one frame), then nine-frame clips mixed with images, then whole frames
while some channels learn to tell places (`vae_latents`). In an earlier trial the library's own initialisation with a usual
learning rate left subjects about ten decibels worse.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample
from torch import Tensor, nn

from refalign_ext.atomic_io import atomic_path
from refalign_ext.sprites.training_steps import train_steps
from refalign_ext.sprites.vae_latents import PLACE_CHANNELS, decoder_metric, fold_normalization, place_error
from refalign_ext.sprites.vae_onepass import decode_one_pass, encode_one_pass, lay_channels_last
from refalign_ext.sprites.world import render_clip, sample_clip, sample_reference, subjects_of
from refalign_ext.training.muon import Muon

KL_WEIGHT = 1e-3  # keeps the decoder calm about the small errors that generated latents have
CHECKED = (32, 16)  # images and clips of which every report is
FOLDED = 16  # batches from which the normalisation is computed
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


class VaeBatches:
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


def picture_error(decoded: Tensor, video: Tensor, mask: Tensor) -> Tensor:
    """L1 + L2 with subjects weighted three times; on unclamped output, so that the gradient never ends."""
    difference, weight = decoded - video, 1 + 2 * mask
    return ((difference.abs() + difference.square()) * weight).sum() / (weight.sum() * video.shape[1])


def picture_loss(
    vae: AutoencoderKLWan, video: Tensor, mask: Tensor, sample: bool, generator: torch.Generator
) -> Tensor:
    """The error of the reconstruction, plus a light KL when sampling."""
    mean, log_variance = encode_one_pass(vae, video)
    latents = mean
    if sample:
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32).to(mean.dtype)
        latents = mean + noise * torch.exp(0.5 * log_variance)
    loss = picture_error(decode_one_pass(vae, latents).float(), video, mask)
    if sample:
        mean, log_variance = mean.float(), log_variance.float()
        loss = loss + KL_WEIGHT * 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return loss


@torch.no_grad()
def decibels(vae: AutoencoderKLWan, video: Tensor, mask: Tensor) -> tuple[float, float]:
    """Peak signal-to-noise ratio of the reconstruction, whole frames and subjects only."""
    mean, _ = encode_one_pass(vae, video)
    error = (decode_one_pass(vae, mean).float().clamp(-1, 1) - video).square().div(4).mean(1, keepdim=True)
    inside = (mask > 0.5).float()
    whole, subjects = error.mean(), (error * inside).sum() / inside.sum()
    return float(-10 * torch.log10(whole)), float(-10 * torch.log10(subjects))


def place_loss(vae: AutoencoderKLWan, video: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """The pictures' loss, with a little noise on the latents, and that of the places; the rest keeps its scale."""
    mean, _ = encode_one_pass(vae, video)
    noise = torch.randn(mean.shape, generator=generator).to(mean.dtype)
    others = mean[:, :-PLACE_CHANNELS].float()
    most = mean.shape[1] / others.shape[1]  # the variance that folding left, 1 on average over all channels
    grown = (others.square().mean() - most).clamp_min(0)
    pictures = picture_error(decode_one_pass(vae, mean + 0.05 * noise).float(), video, mask)
    return pictures + 0.1 * place_error(mean) + 0.02 * grown


def run_stage(
    vae: AutoencoderKLWan,
    name: str,
    loss_of: Callable[[int], Tensor],
    *,
    rates: tuple[float, float],
    steps: int,
    out: Path,
    save_every: int,
    data: VaeBatches,
) -> None:
    """Train from `out`'s state of the stage, or from the present weights, to the stage's end.

    Args:
        loss_of: step -> loss.
        rates: of Muon, on the kernels of convolutions, and of AdamW on the rest.
    """
    from tqdm import tqdm

    edges = {"encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out"}
    edges |= {"quant_conv", "post_quant_conv"}
    kernels, others = [], []
    for key, parameter in vae.named_parameters():
        is_kernel = key.endswith("weight") and parameter.ndim >= 4 and key.rsplit(".", 1)[0] not in edges
        (kernels if is_kernel else others).append(parameter)
    optimizers = [
        Muon(kernels, lr=rates[0], momentum=0.9),
        torch.optim.AdamW(others, lr=rates[1], betas=(0.9, 0.95)),
    ]
    first, state_file = 0, out / f"{name}.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        for optimizer, saved, rate in zip(optimizers, state["optimizers"], rates, strict=True):
            optimizer.load_state_dict(saved)
            optimizer.param_groups[0]["lr"] = rate  # the schedule starts from it
        first = state["step"]
    check = VaeBatches(data.seed + 1, data.size, data.frames)
    check_images, check_clips = check.images(0, CHECKED[0]), check.clips(0, CHECKED[1], data.size)

    def autocast_loss(step: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(step)

    def save(step: int, loss: float) -> None:
        vae.eval()
        images, clips = decibels(vae, *check_images), decibels(vae, *check_clips)
        with torch.no_grad():
            places = place_error(encode_one_pass(vae, check_clips[0])[0])
        vae.train()
        line = (
            f"{name} step {step} loss {loss:.4f} images {images[0]:.2f} dB (subjects {images[1]:.2f}) "
            f"clips {clips[0]:.2f} dB (subjects {clips[1]:.2f}) places {places:.4f}"
        )
        tqdm.write(line)
        with open(out / "log.txt", "a") as log:
            log.write(line + "\n")
        states = [optimizer.state_dict() for optimizer in optimizers]
        with atomic_path(state_file) as unfinished:
            torch.save({"vae": vae.state_dict(), "optimizers": states, "step": step}, unfinished)

    train_steps(
        vae.parameters(),
        optimizers,
        autocast_loss,
        steps=steps,
        first=first,
        warmup=40,
        decay=0.7,
        least=0.01,
        report_every=save_every,
        report=save,
        label=name,
    )


def train_vae(
    out: Path,
    *,
    image_steps: int,
    steps: int,
    place_steps: int,
    seed: int,
    size: int,
    frames: int,
    crop: int,
    save_every: int,
) -> None:
    """Train the embedded VAE and write `vae.pt`, a state dict in the library's names with folded normalisation."""
    out.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKLWan(**CONFIG)
    initialize(vae, torch.Generator().manual_seed(seed))
    lay_channels_last(vae)
    data = VaeBatches(seed, size, frames)
    stage = {"out": out, "save_every": save_every, "data": data}

    def generator(step: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed * 1000003 + step)

    def pictures(step: int) -> Tensor:
        on_images = step < image_steps or step % 4 == 0
        video, mask = data.images(step, 16) if on_images else data.clips(step, 4, crop)
        return picture_loss(vae, video, mask, sample=step >= image_steps, generator=generator(step))

    def places(step: int) -> Tensor:
        step += steps
        video, mask = data.clips(step, 2, size) if step % 2 else data.images(step, 12)
        return place_loss(vae, video, mask, generator(step))

    if not (out / "places.pt").exists():
        run_stage(vae, "pictures", pictures, rates=(0.03, 5e-3), steps=steps, **stage)
        vae.eval()
        videos = []
        for ahead in range(10**6, 10**6 + FOLDED):
            videos += [data.images(ahead, 8)[0], data.clips(ahead, 4, size)[0]]
        metric = decoder_metric(vae, *data.clips(10**6, CHECKED[1], size), np.random.default_rng([seed, 3]))
        fold_normalization(vae, videos, metric)
        vae.train()
    run_stage(vae, "places", places, rates=(0.01, 1.5e-3), steps=place_steps, **stage)
    with atomic_path(out / "vae.pt") as unfinished:
        torch.save(vae.eval().state_dict(), unfinished)
