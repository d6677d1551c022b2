"""The one-pass VAE of training equals the library's chunked path; the embedded VAE passes its gate."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from refalign_ext.backbone import WAN_CONFIGS, WanVAE
from refalign_ext.cli.sprites_parts import train_vae as train_vae_command
from refalign_ext.sprites import train_vae
from refalign_ext.sprites.evaluate import JudgingJob, SpriteEvaluator
from refalign_ext.sprites.train_vae import CONFIG, VaeBatches, initialize
from refalign_ext.sprites.vae_latents import decoder_metric, fold_normalization, place_error, place_latents
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


def test_folded_normalisation_keeps_pictures_and_makes_latents_as_far_apart_as_their_pixels():
    vae, data = small_vae(), VaeBatches(0, 32, 5)
    video = data.images(0, 4)[0]
    before_latents, _ = encode_one_pass(vae, video)
    before = decode_one_pass(vae, before_latents)

    def metric() -> torch.Tensor:
        return decoder_metric(vae, *data.clips(0, 2, 32), np.random.default_rng(0), cells=6)

    first = metric()
    videos = [data.images(step, 8)[0] for step in (1, 2)]
    fold_normalization(vae, videos, first)
    latents, _ = encode_one_pass(vae, video)
    torch.testing.assert_close(decode_one_pass(vae, latents), before, atol=1e-4, rtol=1e-4)
    assert (latents - before_latents).abs().max() > 0.1
    means = torch.cat([encode_one_pass(vae, video)[0].transpose(0, 1).flatten(1) for video in videos], 1)
    assert means.mean(1).abs().max() < 1e-4
    spread = torch.cov(means)
    assert spread.diagonal().mean() == pytest.approx(1, rel=1e-3)
    assert (spread - spread.diagonal().diag()).abs().max() < 1e-3  # principal axes, the widest first
    assert (spread.diagonal()[:-1] >= spread.diagonal()[1:] - 1e-5).all()
    # Where the decoder heeds a direction at all, a step of one length changes the pixels by one amount.
    values = torch.linalg.eigvalsh(metric())
    assert values[-1] / values[4] < 1.2 < first.diagonal().max() / first.diagonal().min()


def test_places_are_told_from_one_another():
    places = place_latents(6, 4)
    assert places.shape == (4, 1, 6, 4) and places.abs().max() <= 1
    cells = places[:, 0].flatten(1).T  # [24, 4]
    assert torch.cdist(cells, cells).fill_diagonal_(9).min() > 0.3
    mean = torch.zeros(2, 16, 3, 6, 4)
    assert place_error(mean) > 0.2
    mean[:, -4:] = places
    assert place_error(mean) == 0


def test_training_in_two_stages_resumes_and_writes_a_vae(tmp_path, monkeypatch):
    # bf16 takes many times longer on processors without it.
    monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())
    monkeypatch.setattr(train_vae, "CONFIG", {**CONFIG, "base_dim": 8})
    monkeypatch.setattr(train_vae, "CHECKED", (2, 2))
    monkeypatch.setattr(train_vae, "FOLDED", 2)
    words = ["--steps", "2", "--image_steps", "1", "--place_steps", "2", "--save_every", "1"]
    words += ["--size", "16", "--frames", "5", "--crop", "8", "--out", str(tmp_path)]
    train_vae_command.main(words, standalone_mode=False)
    whole = torch.load(tmp_path / "vae.pt", weights_only=True)
    assert {path.name for path in tmp_path.iterdir()} == {"pictures.pt", "places.pt", "vae.pt", "log.txt"}
    (tmp_path / "places.pt").unlink()
    train_vae_command.main(words, standalone_mode=False)
    again = torch.load(tmp_path / "vae.pt", weights_only=True)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_embedded_vae_keeps_both_colors():
    task = WAN_CONFIGS["r2v-tiny"]
    vae = WanVAE(vae_pth=EMBEDDED / task.vae_checkpoint, config=task.vae)
    evaluator = SpriteEvaluator(task, vae, lambda prompts: [])
    table = evaluator.reconstruct(JudgingJob(clips=12)).table()
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
