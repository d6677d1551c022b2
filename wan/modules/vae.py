"""The video autoencoder of Wan2.1: upstream's checkpoint in diffusers' AutoencoderKLWan."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wan.utils.weights import load_strict, read_state_dict

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

TEMPORAL_STRIDE = 4
"""Frames per latent frame. AutoencoderKLWan encodes 4 frames at a time, so no other stride works."""

_DEFAULTS: dict[str, Any] = dict(
    dim=96, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2, temperal_downsample=(False, True, True)
)
# diffusers -> upstream, for parts of names, in this order
_RENAMES = (
    ("post_quant_conv.", "conv2."),
    ("quant_conv.", "conv1."),
    (".conv1.", ".residual.2."),
    (".conv2.", ".residual.6."),
    (".norm1.", ".residual.0."),
    (".norm2.", ".residual.3."),
    (".conv_shortcut.", ".shortcut."),
    (".conv_in.", ".conv1."),
    (".norm_out.", ".head.0."),
    (".conv_out.", ".head.2."),
    (".mid_block.resnets.0.", ".middle.0."),
    (".mid_block.attentions.0.", ".middle.1."),
    (".mid_block.resnets.1.", ".middle.2."),
    (".down_blocks.", ".downsamples."),
)


class WanVAE:
    """Encodes videos to normalised latents and back. Matches ``wan/modules/vae.py`` upstream.

    Weights and computation stay in float32 whatever half-precision ``dtype`` is asked for, autocast included:
    bfloat16 costs 8e-3 on encoding and 2e-2 on decoding. Only float64 raises the precision.

    Attributes:
        model: the ``AutoencoderKLWan``, frozen and in evaluation mode.
        mean, std: per-channel statistics of the latents, [z_dim].
        stride: (frames, rows, columns) of a video per latent element.
    """

    def __init__(
        self,
        z_dim: int = 16,
        vae_pth: str | Path | None = None,
        dtype: torch.dtype = torch.float,
        device: str | torch.device = "cpu",
        *,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            z_dim: latent channels; taken from ``config`` when one is given.
            vae_pth: checkpoint under upstream's names (``Wan2.1_VAE.pth``); ``None``: random weights.
            dtype: float32 or float64; anything narrower is raised to float32.
            device: where the model lives.
            config: ``vae`` section of a task's configuration (dim, z_dim, dim_mult, num_res_blocks,
                temperal_downsample, mean, std); ``None`` means Wan2.1's own.

        Raises:
            ValueError: the checkpoint is unreadable or of another model.
        """
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.config = {**_DEFAULTS, **({"z_dim": z_dim} if config is None else config)}
        if vae_pth is None:
            self.model = build_vae(self.config).to(self.dtype)
        else:
            with torch.device("meta"):
                self.model = build_vae(self.config)
            state_dict = vae_state_dict_to_diffusers(read_state_dict(vae_pth), self.config)
            load_strict(self.model, state_dict, str(vae_pth), dtype=self.dtype)
        self.model.eval().requires_grad_(False).to(device)
        self.mean = torch.tensor(self.model.config.latents_mean, dtype=self.dtype, device=device)
        self.std = torch.tensor(self.model.config.latents_std, dtype=self.dtype, device=device)
        spatial = 2 ** (len(self.config["dim_mult"]) - 1)
        self.stride = (TEMPORAL_STRIDE, spatial, spatial)

    @property
    def device(self) -> torch.device:
        """Where the model is now; moving ``model`` moves the adapter."""
        return self.model.quant_conv.weight.device

    def encode(self, videos: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Means of the posterior, normalised; each video alone, so sizes may differ.

        Args:
            videos: each [3, T, H, W] in [-1, 1]; T = 4n + 1, H and W divisible by the spatial stride.

        Returns:
            Each [z_dim, (T - 1) / 4 + 1, H / stride, W / stride], in ``self.dtype``.

        Raises:
            ValueError: a shape does not fit (the message says the nearest that does).
        """
        for video in videos:
            self._check_video(video)
        return [self._encode_one(video) for video in videos]

    def decode(self, latents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inverse of :meth:`encode`; each latent alone, so sizes may differ.

        Args:
            latents: each [z_dim, t, h, w], normalised.

        Returns:
            Each [3, 4 (t - 1) + 1, h * stride, w * stride], clamped to [-1, 1], in ``self.dtype``.

        Raises:
            ValueError: a tensor is not a latent of this model.
        """
        for latent in latents:
            if latent.ndim != 4 or latent.shape[0] != self.config["z_dim"] or 0 in latent.shape:
                wanted = f"[{self.config['z_dim']}, t, h, w]"
                raise ValueError(
                    f"latents have shape {list(latent.shape)}; this autoencoder decodes {wanted}"
                )
        return [self._decode_one(latent) for latent in latents]

    def _encode_one(self, video: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, enabled=False):
            posterior = self.model.encode(
                video[None].to(self.device, self.dtype)
            ).latent_dist  # [1, 3, T, H, W]
            mean, scale = self._normalisation()
            return (posterior.mode()[0] - mean) * scale  # [z, t, h, w]

    def _decode_one(self, latent: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, enabled=False):
            mean, scale = self._normalisation()
            latent = latent.to(self.device, self.dtype) / scale + mean  # [z, t, h, w]
            return self.model.decode(latent[None]).sample[0].clamp(-1, 1)  # [3, T, H, W]

    def _normalisation(self) -> tuple[torch.Tensor, torch.Tensor]:
        # multiplying by the reciprocal rounds as upstream does
        mean, std = (values.to(self.device).view(-1, 1, 1, 1) for values in (self.mean, self.std))
        return mean, 1.0 / std

    def _check_video(self, video: torch.Tensor) -> None:
        if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
            raise ValueError(f"video has shape {list(video.shape)}; it must be [3, frames, height, width]")
        frames, height, width = video.shape[1:]
        if (frames - 1) % self.stride[0]:
            nearest = round((frames - 1) / self.stride[0]) * self.stride[0] + 1
            raise ValueError(f"{frames} frames; must be {self.stride[0]}n+1, the nearest is {nearest}")
        unit = self.stride[1]
        if height % unit or width % unit:
            near_width, near_height = (max(unit, round(side / unit) * unit) for side in (width, height))
            raise ValueError(
                f"video size {width}x{height} is not divisible by {unit}; "
                f"the nearest valid size is {near_width}x{near_height}"
            )


def build_vae(config: Mapping[str, Any] | None = None) -> AutoencoderKLWan:
    """An untrained ``AutoencoderKLWan`` of a configuration (see :class:`WanVAE`), on the default device."""
    from diffusers import AutoencoderKLWan

    config = {**_DEFAULTS, **(config or {})}
    assert 2 ** sum(map(bool, config["temperal_downsample"])) == TEMPORAL_STRIDE
    statistics = {
        theirs: [float(value) for value in config[ours]]
        for ours, theirs in (("mean", "latents_mean"), ("std", "latents_std"))
        if config.get(ours) is not None
    }
    model = AutoencoderKLWan(
        base_dim=config["dim"],
        z_dim=config["z_dim"],
        dim_mult=list(config["dim_mult"]),
        num_res_blocks=config["num_res_blocks"],
        temperal_downsample=list(config["temperal_downsample"]),
        scale_factor_temporal=TEMPORAL_STRIDE,
        scale_factor_spatial=2 ** (len(config["dim_mult"]) - 1),
        **statistics,
    )
    assert len(model.config.latents_mean) == len(model.config.latents_std) == config["z_dim"]
    return model


def vae_key_map(config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Upstream's parameter names to diffusers', for every parameter of a configuration.

    Upstream numbers all blocks of a half in one row (``encoder.downsamples.N``, ``decoder.upsamples.N``),
    resampling included; diffusers keeps that in the encoder and nests the decoder by level.
    """
    with torch.device("meta"):
        names = build_vae(config).state_dict()
    resnets = {**_DEFAULTS, **(config or {})}["num_res_blocks"] + 1
    return {_upstream_key(name, resnets): name for name in names}


def vae_state_dict_to_diffusers(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """Rename upstream's parameters to diffusers'; names foreign to the configuration stay as they are."""
    names = vae_key_map(config)
    return {names.get(name, name): tensor for name, tensor in state_dict.items()}


def vae_state_dict_from_diffusers(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """Rename an ``AutoencoderKLWan`` state dict to upstream's names, as ``Wan2.1_VAE.pth`` holds them.

    Raises:
        ValueError: the state dict is not that of an autoencoder of this configuration.
    """
    names = {theirs: ours for ours, theirs in vae_key_map(config).items()}
    odd = sorted(names.keys() ^ state_dict.keys())
    if odd:
        raise ValueError(
            f"autoencoder weights: {len(odd)} names are missing or foreign, such as {odd[0]}; "
            f"use the configuration that the model was built with"
        )
    return {names[name]: tensor for name, tensor in state_dict.items()}


def _upstream_key(name: str, resnets: int) -> str:
    for theirs, ours in _RENAMES:
        name = name.replace(theirs, ours)
    match = re.match(r"decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)", name)
    if match is None:
        return name
    level, resnet = int(match[1]), resnets if match[2] is None else int(match[2])
    return f"decoder.upsamples.{level * (resnets + 1) + resnet}{name[match.end() :]}"
