"""The one-pass VAE of training equals the library's chunked path; the embedded VAE passes its gate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from refalign_ext.backbone import WAN_CONFIGS, WanVAE
from refalign_ext.evaluation.sprites import Job, SpriteEvaluator
from refalign_ext.sprites.train_vae import CONFIG, Sprites, fold_normalization, initialize
from refalign_ext.sprites.vae_onepass import (
    decode_latents,
    decode_one_pass,
    encode_latents,
    encode_one_pass,
    lay_channels_last,
)

EMBEDDED = Path(__file__).resolve().parents[2] / "assets" / "r2v-tiny"


def small_vae() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(**{**CONFIG, "base_dim": 8}).eval().requires_grad_(False)
    initialize(vae, torch.Generator().manual_seed(0))
    for parameter in vae.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return vae


@pytest.mark.parametrize("frames", [1, 5, 9])
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_pass_equals_the_chunked_path(frames, channels_last):
    vae = small_vae()
    video = torch.randn(2, 3, frames, 16, 24, generator=torch.Generator().manual_seed(2))
    latents = vae.encode(video).latent_dist.mean
    decoded = vae.decode(latents * 0.1).sample
    if channels_last:
        lay_channels_last(vae)
    mean, log_variance = encode_one_pass(vae, video)
    assert mean.shape == (2, 16, (frames - 1) // 4 + 1, 4, 6) == log_variance.shape
    torch.testing.assert_close(mean, latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        decode_one_pass(vae, latents * 0.1).clamp(-1, 1), decoded, atol=5e-5, rtol=1e-4
    )


def test_folded_normalisation_changes_latents_and_not_pictures():
    vae, data = small_vae(), Sprites(0, 32, 5)
    video = data.images(0, 4)[0]
    before_latents, _ = encode_one_pass(vae, video)
    before = decode_one_pass(vae, before_latents)
    fold_normalization(vae, data, batches=2)
    latents, _ = encode_one_pass(vae, video)
    torch.testing.assert_close(decode_one_pass(vae, latents), before, atol=1e-4, rtol=1e-4)
    assert (latents - before_latents).abs().max() > 0.1
    everything = torch.cat([encode_one_pass(vae, data.images(10**6, 8)[0])[0].transpose(0, 1).flatten(1)], 1)
    assert everything.mean(1).abs().max() < 1.0 and 0.4 < everything.std(1).mean() < 1.6


def test_embedded_vae_keeps_both_colors():
    task = WAN_CONFIGS["r2v-tiny"]
    vae = WanVAE(vae_pth=EMBEDDED / task.vae_checkpoint, config=task.vae)
    evaluator = SpriteEvaluator(task, vae, lambda prompts: [])
    table = evaluator.reconstruct(Job(clips=24)).table()
    assert table["colors"]["share"] >= 0.95 and table["motion"]["share"] >= 0.95


def test_batched_latents_equal_the_adapters():
    task = WAN_CONFIGS["r2v-tiny"]
    vae = WanVAE(vae_pth=EMBEDDED / task.vae_checkpoint, config=task.vae)
    vae.mean, vae.std = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)
    videos = torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    latents = encode_latents(vae, videos)
    torch.testing.assert_close(latents, torch.stack(vae.encode(list(videos))), atol=1e-4, rtol=1e-4)
    decoded = torch.stack(vae.decode(list(latents)))
    torch.testing.assert_close(decode_latents(vae, latents), decoded, atol=1e-4, rtol=1e-4)
