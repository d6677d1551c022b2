"""WanVAE against diffusers: key maps, files in upstream's layout, identical results, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from wan.modules.vae import (
    WanVAE,
    build_vae,
    vae_key_map,
    vae_state_dict_from_diffusers,
    vae_state_dict_to_diffusers,
)

FULL: dict[str, Any] = {
    "dim": 4,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}
SMALL: dict[str, Any] = {
    "dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "mean": [0.5, -0.25, 0.125, 0.75],
    "std": [1.5, 2.5, 0.7, 1.1],
}


@pytest.fixture(scope="module")
def library_model() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return build_vae(SMALL).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(library_model: AutoencoderKLWan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "Wan2.1_VAE.pth"
    torch.save(vae_state_dict_from_diffusers(library_model.state_dict(), SMALL), path)
    return path


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_full_key_map_equals_the_library_converter() -> None:
    ours = vae_key_map(FULL)
    converted = convert_wan_vae_to_diffusers({name: name for name in ours})
    assert {upstream: library for library, upstream in converted.items()} == ours
    assert ours.keys() == vae_key_map(None).keys()
    assert len(ours) == 194


@pytest.mark.parametrize(
    "config",
    [
        FULL,
        SMALL,
        {**SMALL, "dim_mult": [2, 2, 3], "num_res_blocks": 3},
        {**SMALL, "dim_mult": [1, 1, 2, 2, 4], "temperal_downsample": [True, False, True, False]},
    ],
)
def test_key_map_covers_every_parameter(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        state_dict = build_vae(config).state_dict()
    assert sorted(vae_key_map(config).values()) == sorted(state_dict)
    upstream = vae_state_dict_from_diffusers(state_dict, config)
    assert list(vae_state_dict_to_diffusers(upstream, config)) == list(state_dict)


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_saved_file_computes_what_the_library_model_does(
    library_model: AutoencoderKLWan, checkpoint: Path, frames: int
) -> None:
    vae = WanVAE(vae_pth=checkpoint, config=SMALL)
    assert vae.stride == (4, 4, 4)
    video = noise(3, frames, 16, 24).clamp(-1, 1)
    mean, std = (torch.tensor(SMALL[name]).view(-1, 1, 1, 1) for name in ("mean", "std"))

    (latent,) = vae.encode([video])
    expected = (library_model.encode(video[None]).latent_dist.mean[0] - mean) * (1 / std)
    assert latent.shape == (4, (frames - 1) // 4 + 1, 4, 6)
    assert torch.equal(latent, expected)

    (decoded,) = vae.decode([latent])
    assert decoded.shape == video.shape
    assert torch.equal(decoded, library_model.decode((latent / (1 / std) + mean)[None]).sample[0])


def test_lists_of_different_sizes(checkpoint: Path) -> None:
    vae = WanVAE(vae_pth=checkpoint, config=SMALL)
    videos = [noise(3, 5, 8, 12), noise(3, 1, 16, 8)]
    latents = vae.encode(videos)
    assert [tuple(latent.shape) for latent in latents] == [(4, 2, 2, 3), (4, 1, 4, 2)]
    decoded = vae.decode(latents)
    for video, latent, image in zip(videos, latents, decoded, strict=True):
        assert torch.equal(vae.encode([video])[0], latent)
        assert torch.equal(vae.decode([latent])[0], image)
    assert vae.encode([]) == vae.decode([]) == []


def test_precision_is_float32_or_what_is_finer(checkpoint: Path) -> None:
    video = noise(3, 5, 8, 8)
    expected = WanVAE(vae_pth=checkpoint, config=SMALL).encode([video])[0]
    vae = WanVAE(vae_pth=checkpoint, config=SMALL, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latent = vae.encode([video])[0]
        decoded = vae.decode([latent.to(torch.bfloat16)])[0]
    assert latent.dtype == decoded.dtype == torch.float32
    assert torch.equal(latent, expected)
    double = WanVAE(vae_pth=checkpoint, config=SMALL, dtype=torch.float64).encode([video])[0]
    assert double.dtype == torch.float64
    torch.testing.assert_close(expected.double(), double, atol=1e-5, rtol=1e-5)


def test_latents_carry_gradients_and_videos_are_clamped(checkpoint: Path) -> None:
    vae = WanVAE(vae_pth=checkpoint, config=SMALL)
    latent = (noise(4, 1, 2, 2) * 0.1).requires_grad_()
    vae.decode([latent])[0].sum().backward()
    assert latent.grad is not None and latent.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in vae.model.parameters())
    assert vae.decode([noise(4, 2, 2, 2) * 1e3])[0].abs().max() <= 1


def test_default_statistics_are_those_of_the_library() -> None:
    vae = WanVAE(config=FULL)
    assert vae.stride == (4, 8, 8)
    assert vae.mean[0].item() == pytest.approx(-0.7571)
    assert vae.std[-1].item() == pytest.approx(1.9160)


@pytest.mark.parametrize(("frames", "nearest"), [(2, 1), (4, 5), (8, 9), (6, 5)])
def test_frame_number_is_refused_with_the_nearest(checkpoint: Path, frames: int, nearest: int) -> None:
    with pytest.raises(ValueError, match=rf"{frames} frames; must be 4n\+1, the nearest is {nearest}$"):
        WanVAE(vae_pth=checkpoint, config=SMALL).encode([noise(3, 1, 8, 8), noise(3, frames, 8, 8)])


def test_sizes_and_shapes_are_refused(checkpoint: Path) -> None:
    vae = WanVAE(vae_pth=checkpoint, config=SMALL)
    with pytest.raises(ValueError, match="11x16 is not divisible by 4; the nearest valid size is 12x16"):
        vae.encode([noise(3, 1, 16, 11)])
    with pytest.raises(ValueError, match="nearest valid size is 4x4"):
        vae.encode([noise(3, 1, 1, 1)])
    with pytest.raises(ValueError, match=r"\[1, 8, 8\]; it must be \[3, frames, height, width\]"):
        vae.encode([noise(1, 8, 8)])
    with pytest.raises(ValueError, match=r"decodes \[4, t, h, w\]"):
        vae.decode([noise(16, 1, 2, 2)])


def test_weights_of_another_model_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Wan2\.1_VAE\.pth: these weights do not fit AutoencoderKLWan"):
        WanVAE(vae_pth=checkpoint, config=FULL)
    state_dict = torch.load(checkpoint, weights_only=True)
    del state_dict["conv1.weight"]
    state_dict["extra.weight"] = torch.zeros(1)
    torch.save(state_dict, tmp_path / "vae.pth")
    with pytest.raises(ValueError, match=r"1 missing: quant_conv\.weight; 1 unexpected: extra\.weight"):
        WanVAE(vae_pth=tmp_path / "vae.pth", config=SMALL)


def test_foreign_state_dict_is_not_written() -> None:
    with pytest.raises(ValueError, match="missing or foreign"):
        vae_state_dict_from_diffusers({"encoder.conv_in.weight": torch.zeros(1)}, SMALL)
