"""Which latents the embedded VAE gives: distances like those of the pixels, and channels that tell places.

Both matter to a small DiT more than the quality of the pictures. Wan's DiT knows places by rotary embeddings alone, which
are relative: among pure noise nothing tells where in the frame a token lies. A large model has learned to find out; here
subjects had the right colours after 8,000 clips and lay scattered over the frame for 20,000 more. References are never
noisy: with places in their latents they are a map for the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from refalign_ext.sprites.vae_onepass import decode_one_pass, encode_one_pass

PLACE_CHANNELS = 4  # the last ones: the decoder hardly heeds that many of the principal axes
_SMALL_CHANGE, _LEAST_WEIGHT = 0.1, 1e-3


def place_latents(rows: int, columns: int) -> Tensor:
    """What the last channels are to say at every cell: y, x, 2y^2 - 1, 2x^2 - 1 in [-1, 1]; [4, 1, rows, columns]."""
    y, x = ((torch.arange(count) + 0.5) / count * 2 - 1 for count in (rows, columns))
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([y, x, 2 * y.square() - 1, 2 * x.square() - 1])[:, None]


def place_error(mean: Tensor) -> Tensor:
    """Mean square error of the last channels of latents [B, z, t, h, w]."""
    target = place_latents(*mean.shape[3:]).to(mean.device)
    return (mean[:, -PLACE_CHANNELS:].float() - target).square().mean()


@torch.no_grad()
def decoder_metric(
    vae: AutoencoderKLWan, video: Tensor, mask: Tensor, rng: np.random.Generator, cells: int = 48
) -> Tensor:
    """Mean G [z, z] float64 of J^T J over cells of the latents that show subjects, J being the decoder's Jacobian.

    A small change d of such a cell changes the decoded pixels by d^T G d, summed over pixels and colours.

    Args:
        video, mask: [B, 3, T, H, W] in [-1, 1] and coverage [B, 1, T, H, W] in 0..1.
    """
    mean, _ = encode_one_pass(vae, video)
    side = video.shape[3] // mean.shape[3]
    # The first latent frame stands for one frame and the others for four.
    padded = torch.cat([mask[:, :, :1].expand(-1, -1, 3, -1, -1), mask], 2)
    places = (F.max_pool3d(padded, (4, side, side))[:, 0] > 0.1).nonzero()
    channels = torch.arange(mean.shape[1])
    total = torch.zeros(len(channels), len(channels), dtype=torch.float64)
    for sample, frame, row, column in places[rng.integers(len(places), size=cells)].tolist():
        changed = mean[sample].repeat(len(channels), 1, 1, 1, 1)
        changed[channels, channels, frame, row, column] += _SMALL_CHANGE
        difference = decode_one_pass(vae, changed) - decode_one_pass(vae, mean[sample : sample + 1])
        rows = difference.flatten(1).double() / _SMALL_CHANGE  # [z, pixels]
        total += rows @ rows.T
    return total / cells


@torch.no_grad()
def fold_normalization(vae: AutoencoderKLWan, videos: Sequence[Tensor], metric: Tensor) -> None:
    """Fold a linear map of the latents into the 1x1x1 convolutions around them, so that no constants remain.

    The map removes the mean and makes a distance between latents that of the pixels they decode to, in principal axes, with
    variance 1 on average. With channels as the training leaves them, or each scaled to variance 1 as the constants in
    Wan's code do, all weigh the same in the flow-matching loss, also those that hardly show: in the pixels' metric three
    axes hold three quarters of a subject's variance.

    Args:
        videos: [B, 3, T, H, W] each, for mean and variance.
        metric: of `decoder_metric`.
    """
    encoded = [encode_one_pass(vae, video) for video in videos]
    means = torch.cat([mean.transpose(0, 1).flatten(1) for mean, _ in encoded], 1).double()  # [z, n]
    values, axes = torch.linalg.eigh(metric)
    # Directions that the decoder ignores keep a little weight: the map must have an inverse.
    root = axes @ torch.diag(values.clamp_min(values.max() * _LEAST_WEIGHT).sqrt()) @ axes.T
    spread = torch.cov(root @ means)
    principal = torch.linalg.eigh(spread).eigenvectors.flip(1).T
    forward = principal @ root / spread.diagonal().mean().sqrt()  # [z, z]
    center, z_dim = means.mean(1), vae.config.z_dim

    kernel, offset = vae.post_quant_conv.weight[:, :, 0, 0, 0], vae.post_quant_conv.bias
    offset.add_(kernel.double() @ center)
    kernel.copy_(kernel.double() @ torch.linalg.inv(forward))
    kernel, offset = vae.quant_conv.weight[:, :, 0, 0, 0], vae.quant_conv.bias
    offset[:z_dim] = (forward @ (offset[:z_dim].double() - center)).float()
    kernel[:z_dim] = (forward @ kernel[:z_dim].double()).float()
    # Turned axes have no variances of their own that a linear layer could give: from here on they are constants.
    variance = torch.cat([log.exp().transpose(0, 1).flatten(1) for _, log in encoded], 1).double().mean(1)
    offset[z_dim:] = (forward.square() @ variance).log().float()
    kernel[z_dim:] = 0
