"""The video autoencoder of Wan2.1: upstream's checkpoint in diffusers' AutoencoderKLWan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wan.utils.weights import load_strict, read_state_dict

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

TEMPORAL_STRIDE = 4
"""Frames per latent frame. AutoencoderKLWan encodes 4 frames at a time, so no other stride works."""

_DEFAULTS: dict[str, Any] = {
    "dim": 96,
    "z_dim": 16,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "attn_scales": (),
    "temperal_downsample": (False, True, True),
}
_RESIDUAL = (
    ("residual.0.gamma", "norm1.gamma"),
    ("residual.2.weight", "conv1.weight"),
    ("residual.2.bias", "conv1.bias"),
    ("residual.3.gamma", "norm2.gamma"),
    ("residual.6.weight", "conv2.weight"),
    ("residual.6.bias", "conv2.bias"),
)
_SHORTCUT = (("shortcut.weight", "conv_shortcut.weight"), ("shortcut.bias", "conv_shortcut.bias"))
_ATTENTION = ("norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias")
_HEAD = (
    ("head.0.gamma", "norm_out.gamma"),
    ("head.2.weight", "conv_out.weight"),
    ("head.2.bias", "conv_out.bias"),
)
_CONVOLUTION = ("weight", "bias")


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
                attn_scales, temperal_downsample, mean, std); ``None`` means Wan2.1's own.

        Raises:
            ValueError: the configuration cannot be built; the checkpoint is unreadable or of another model.
        """
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.config = _completed({"z_dim": z_dim} if config is None else config)
        if vae_pth is None:
            self.model = build_vae(self.config)
            if self.dtype == torch.float64:
                self.model.double()
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
        device = self.device
        with torch.autocast(device.type, enabled=False):
            posterior = self.model.encode(video[None].to(device, self.dtype)).latent_dist  # [1, 3, T, H, W]
            mean, scale = self._normalisation(device)
            return (posterior.mode()[0] - mean) * scale  # [z, t, h, w]

    def _decode_one(self, latent: torch.Tensor) -> torch.Tensor:
        device = self.device
        with torch.autocast(device.type, enabled=False):
            mean, scale = self._normalisation(device)
            latent = latent.to(device, self.dtype) / scale + mean  # [z, t, h, w]
            return self.model.decode(latent[None]).sample[0].clamp(-1, 1)  # [3, T, H, W]

    def _normalisation(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        # multiplying by the reciprocal rounds as upstream does
        shape = (-1, 1, 1, 1)
        return self.mean.to(device).view(shape), (1.0 / self.std.to(device)).view(shape)

    def _check_video(self, video: torch.Tensor) -> None:
        if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
            raise ValueError(f"video has shape {list(video.shape)}; it must be [3, frames, height, width]")
        frames, height, width = video.shape[1:]
        if (frames - 1) % self.stride[0]:
            nearest = round((frames - 1) / self.stride[0]) * self.stride[0] + 1
            raise ValueError(f"{frames} frames; must be {self.stride[0]}n+1, the nearest is {nearest}")
        if height % self.stride[1] or width % self.stride[2]:
            near_width, near_height = (
                max(stride, round(size / stride) * stride)
                for size, stride in ((width, self.stride[2]), (height, self.stride[1]))
            )
            raise ValueError(
                f"video size {width}x{height} is not divisible by {self.stride[1]}; "
                f"the nearest valid size is {near_width}x{near_height}"
            )


def build_vae(config: Mapping[str, Any] | None = None) -> AutoencoderKLWan:
    """An untrained ``AutoencoderKLWan`` of a configuration, on the default device.

    Args:
        config: as for :class:`WanVAE`.

    Raises:
        ValueError: the configuration contradicts itself or needs what the library does not offer.
    """
    from diffusers import AutoencoderKLWan

    config = _completed(config)
    statistics = {}
    for ours, theirs in (("mean", "latents_mean"), ("std", "latents_std")):
        if config.get(ours) is not None:
            statistics[theirs] = [float(value) for value in config[ours]]
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
    for name in ("latents_mean", "latents_std"):
        if len(model.config[name]) != config["z_dim"]:
            raise ValueError(
                f"autoencoder configuration: {config['z_dim']} latent channels but {len(model.config[name])} "
                f"statistics; give mean and std as many values as z_dim"
            )
    return model


def vae_key_map(config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Upstream's parameter names to diffusers', for every parameter of a configuration.

    Upstream numbers all blocks of a half in one row (``encoder.downsamples.N``, ``decoder.upsamples.N``),
    resampling included; diffusers keeps that in the encoder and nests the decoder by level.
    """
    return dict(_key_pairs(_completed(config)))


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


def _completed(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """``config`` with Wan2.1's values where it is silent, checked."""
    complete = {**_DEFAULTS, **(config or {})}
    levels = len(complete["dim_mult"])
    if complete["attn_scales"]:
        raise ValueError("autoencoder configuration: attn_scales must be empty, diffusers' decoder has none")
    if len(complete["temperal_downsample"]) != levels - 1:
        raise ValueError(
            f"autoencoder configuration: {levels} levels in dim_mult need {levels - 1} values "
            f"in temperal_downsample"
        )
    if 2 ** sum(bool(value) for value in complete["temperal_downsample"]) != TEMPORAL_STRIDE:
        raise ValueError(
            f"autoencoder configuration: temperal_downsample must be true twice (stride {TEMPORAL_STRIDE}), "
            f"the encoder works on {TEMPORAL_STRIDE} frames at a time"
        )
    return complete


def _key_pairs(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for ours, theirs in (("conv1", "quant_conv"), ("conv2", "post_quant_conv")):
        yield from _prefixed(ours, theirs, _CONVOLUTION)
    for half in ("encoder", "decoder"):
        yield from _prefixed(f"{half}.conv1", f"{half}.conv_in", _CONVOLUTION)
        yield from _prefixed(f"{half}.middle.0", f"{half}.mid_block.resnets.0", _RESIDUAL)
        yield from _prefixed(f"{half}.middle.1", f"{half}.mid_block.attentions.0", _ATTENTION)
        yield from _prefixed(f"{half}.middle.2", f"{half}.mid_block.resnets.1", _RESIDUAL)
        yield from _prefixed(half, half, _HEAD)
    yield from _encoder_pairs(config)
    yield from _decoder_pairs(config)


def _encoder_pairs(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    index, width = 0, 1
    for level, multiplier in enumerate(config["dim_mult"]):
        for _ in range(config["num_res_blocks"]):
            names = _RESIDUAL if width == multiplier else _RESIDUAL + _SHORTCUT
            yield from _prefixed(f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}", names)
            index, width = index + 1, multiplier
        if level < len(config["dim_mult"]) - 1:
            names = _resampling(config["temperal_downsample"][level])
            yield from _prefixed(f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}", names)
            index += 1


def _decoder_pairs(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    multipliers = list(config["dim_mult"])[::-1]
    is_temporal = list(config["temperal_downsample"])[::-1]
    index, width = 0, config["dim"] * multipliers[0]
    for level, multiplier in enumerate(multipliers):
        block = f"decoder.up_blocks.{level}"
        for resnet in range(config["num_res_blocks"] + 1):
            names = _RESIDUAL if width == config["dim"] * multiplier else _RESIDUAL + _SHORTCUT
            yield from _prefixed(f"decoder.upsamples.{index}", f"{block}.resnets.{resnet}", names)
            index, width = index + 1, config["dim"] * multiplier
        if level < len(multipliers) - 1:
            yield from _prefixed(
                f"decoder.upsamples.{index}", f"{block}.upsamplers.0", _resampling(is_temporal[level])
            )
            index, width = index + 1, width // 2  # upsampling halves the channels


def _resampling(is_temporal: bool) -> tuple[str, ...]:
    spatial = ("resample.1.weight", "resample.1.bias")
    return (*spatial, "time_conv.weight", "time_conv.bias") if is_temporal else spatial


def _prefixed(
    ours: str, theirs: str, names: Sequence[str] | Sequence[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    for name in names:
        our_name, their_name = (name, name) if isinstance(name, str) else name
        yield f"{ours}.{our_name}", f"{theirs}.{their_name}"
