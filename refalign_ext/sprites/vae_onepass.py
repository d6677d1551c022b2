"""Encode and decode a whole clip in one pass, as training needs.

diffusers' AutoencoderKLWan streams a clip through caches in chunks of four frames. That computes what one causal pass
over all frames computes, at 2.5 times the cost; only the temporal resampling differs between the first frame and the
others. These two functions run the library's own layers on the whole clip. A test holds them to the chunked path.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from torch import Tensor, nn

from refalign_ext.backbone import WanVAE


def lay_channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Store convolution kernels channels-last, which doubles their speed on a CPU; values stay the same."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return vae


def _resample(layer: WanResample, x: Tensor) -> Tensor:
    batch, channels, frames, height, width = x.shape
    if layer.mode == "upsample3d" and frames > 1:
        later = layer.time_conv(x[:, :, 1:])  # [B, 2C, T-1, H, W], causal and zero-padded at the second frame
        later = later.view(batch, 2, channels, frames - 1, height, width)
        later = torch.stack((later[:, 0], later[:, 1]), 3).reshape(batch, channels, -1, height, width)
        x = torch.cat([x[:, :, :1], later], 2)  # [B, C, 1 + 2(T-1), H, W]
    frames = x.shape[2]
    x = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
    x = layer.resample(x)
    x = x.view(batch, frames, *x.shape[1:]).transpose(1, 2)
    if layer.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], 2)  # [B, C, 1 + (T-1)/2, H, W]
    return x


def encode_one_pass(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """video [B, 3, T, H, W] in [-1, 1], T = 4n + 1 -> mean and log-variance, each [B, z, t, h, w]."""
    encoder = vae.encoder
    x = encoder.conv_in(video)
    for layer in encoder.down_blocks:
        x = _resample(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.mid_block(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(x)))
    mean, log_variance = vae.quant_conv(x).chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode_one_pass(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """latents [B, z, t, h, w] -> video [B, 3, T, H, W], not clamped (a clamp has no gradient where it bites)."""
    decoder = vae.decoder
    x = decoder.conv_in(vae.post_quant_conv(latents))
    x = decoder.mid_block(x)
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = layer(x)
        if block.upsamplers is not None:
            x = _resample(block.upsamplers[0], x)
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))


@torch.no_grad()
def encode_latents(vae: WanVAE, videos: Tensor) -> Tensor:
    """videos [B, 3, T, H, W] in [-1, 1] -> normalised latents [B, z, t, h, w], as `WanVAE.encode` gives one by one."""
    mean, _ = encode_one_pass(vae.model, videos.to(vae.mean.device))
    return (mean - vae.mean.view(-1, 1, 1, 1)) / vae.std.view(-1, 1, 1, 1)


@torch.no_grad()
def decode_latents(vae: WanVAE, latents: Tensor) -> Tensor:
    """Normalised latents [B, z, t, h, w] -> videos [B, 3, T, H, W] in [-1, 1], as `WanVAE.decode` gives one by one."""
    latents = latents * vae.std.view(-1, 1, 1, 1) + vae.mean.view(-1, 1, 1, 1)
    return decode_one_pass(vae.model, latents).clamp(-1, 1)
