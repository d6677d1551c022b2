"""The Wan2.1 diffusion transformer.

Class names, constructor arguments, forward signature and state-dict keys are those of Wan-Video/Wan2.1,
wan/modules/model.py. Numerics: tables of angles are computed in float64; the time embedding, the modulation,
the residual stream and the head stay in float32 (or float64 for a float64 model) whatever the dtype of the
matmuls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .attention import Lengths, announce_kernel, attention, kernel_name
from .functional import (
    MAX_POSITIONS,
    rms_norm,
    rms_norm_rotate,
    rope_apply,
    rope_multipliers,
    rope_params,
    sinusoidal_embedding_1d,
)

__all__ = ["WanModel", "rope_apply", "rope_multipliers", "rope_params", "sinusoidal_embedding_1d"]


def _autocast_off(x: torch.Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _matmul_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear layer with this weight computes here."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class FullPrecisionLinear(nn.Linear):
    """A linear layer that computes in its input's dtype, whatever autocast or its weight's dtype say."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with _autocast_off(x):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)


class PatchEmbedding(nn.Conv3d):
    """Convolution whose stride is its kernel, computed as one matmul: the tokens come out contiguous."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, F, H, W] -> [B, dim, F / pf, H / ph, W / pw]; the sizes are multiples of the patch."""
        batch, _, *sizes = x.shape
        grid = [size // patch for size, patch in zip(sizes, self.kernel_size, strict=True)]
        (frames, rows, columns), (pf, ph, pw) = grid, self.kernel_size
        patches = x.reshape(batch, -1, frames, pf, rows, ph, columns, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        tokens = F.linear(patches.flatten(4), self.weight.flatten(1), self.bias)  # [B, f, h, w, dim]
        return tokens.permute(0, 4, 1, 2, 3)


class WanRMSNorm(nn.Module):
    """Root mean square norm over the last dimension, in at least float32 inside, in x's dtype outside."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class WanLayerNorm(nn.LayerNorm):
    """Layer norm in at least float32; also takes a scale and shift per sample, fused where possible."""

    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = False) -> None:
        super().__init__(dim, elementwise_affine=elementwise_affine, eps=eps)

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """norm(x) * (1 + scale) + shift, x [B, L, C], scale and shift [B, 1, C] -> [B, L, C] in x's dtype."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        with _autocast_off(x):
            if scale is None:
                return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
            if weight is None and x.size(0) == 1:
                # of one sample the modulation is an ordinary affine, which the norm's kernel applies for free
                weight, bias = (1 + scale).flatten(), shift.flatten()
                return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
            normed = F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)
            return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


class AttentionCore(nn.Module):
    """Softmax attention of rotated queries and keys; no parameters, a module only so that hooks can reach it.

    What divides a sequence among devices exchanges tokens and heads before and after this and nowhere else.
    """

    def __init__(self, window_size: tuple[int, int] = (-1, -1)) -> None:
        super().__init__()
        self.window_size = tuple(window_size)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: Lengths) -> torch.Tensor:
        """q [B, Lq, heads, C], k and v [B, Lk, heads, C] -> [B, Lq, heads, C]; see `attention`."""
        return attention(q, k, v, k_lens=k_lens, window_size=self.window_size)


class WanSelfAttention(nn.Module):
    """Self-attention over all tokens, with RMS-normed and rotated queries and keys."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, int] = (-1, -1),
        qk_norm: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads

        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = WanRMSNorm(dim, eps=eps) if qk_norm else nn.Identity()
        self.norm_k = WanRMSNorm(dim, eps=eps) if qk_norm else nn.Identity()
        self.core = AttentionCore(window_size)

    def forward(
        self, x: torch.Tensor, seq_lens: Lengths, grid_sizes: torch.Tensor | None, freqs: torch.Tensor
    ) -> torch.Tensor:
        """[B, L, dim] -> [B, L, dim]; the other arguments as in `WanAttentionBlock.forward`."""
        q = self._rotate(self.norm_q, self.q(x), grid_sizes, freqs)  # [B, L, heads, C]
        k = self._rotate(self.norm_k, self.k(x), grid_sizes, freqs)
        v = self.v(x).unflatten(2, (self.num_heads, self.head_dim))
        return self.o(self.core(q, k, v, seq_lens).flatten(2))  # [B, L, heads, C] -> [B, L, dim]

    def _rotate(
        self, norm: nn.Module, x: torch.Tensor, grid_sizes: torch.Tensor | None, freqs: torch.Tensor
    ) -> torch.Tensor:
        if isinstance(norm, WanRMSNorm):
            return rms_norm_rotate(x, norm.weight, norm.eps, self.num_heads, grid_sizes, freqs)
        return rope_apply(norm(x).unflatten(2, (self.num_heads, self.head_dim)), grid_sizes, freqs)


class WanT2VCrossAttention(WanSelfAttention):
    """Attention from the tokens to the text."""

    def forward(self, x: torch.Tensor, context: torch.Tensor, context_lens: Lengths) -> torch.Tensor:
        """x [B, L, dim], context [B, text_len, dim] -> [B, L, dim]; `context_lens` None: padding counts."""
        heads = (self.num_heads, self.head_dim)
        q = self.norm_q(self.q(x)).unflatten(2, heads)
        k = self.norm_k(self.k(context)).unflatten(2, heads)
        v = self.v(context).unflatten(2, heads)
        return self.o(self.core(q, k, v, context_lens).flatten(2))  # [B, L, heads, C] -> [B, L, dim]


class WanAttentionBlock(nn.Module):
    """Self-attention, cross-attention to the text, and a feed-forward network, modulated by the timestep."""

    def __init__(
        self,
        cross_attn_type: str,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        window_size: tuple[int, int] = (-1, -1),
        qk_norm: bool = True,
        cross_attn_norm: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if cross_attn_type != "t2v_cross_attn":
            raise ValueError(
                f"cross-attention {cross_attn_type!r} is not supported yet, only 't2v_cross_attn'"
            )
        self.norm1 = WanLayerNorm(dim, eps)
        self.self_attn = WanSelfAttention(dim, num_heads, window_size, qk_norm, eps)
        self.norm3 = WanLayerNorm(dim, eps, elementwise_affine=True) if cross_attn_norm else nn.Identity()
        self.cross_attn = WanT2VCrossAttention(dim, num_heads, (-1, -1), qk_norm, eps)
        self.norm2 = WanLayerNorm(dim, eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim)
        )

        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: torch.Tensor,
        e: torch.Tensor,
        seq_lens: Lengths,
        grid_sizes: torch.Tensor | None,
        freqs: torch.Tensor,
        context: torch.Tensor,
        context_lens: Lengths,
    ) -> torch.Tensor:
        """One block.

        Args:
            x: [B, L, dim] tokens, float32 (float64 in a float64 model).
            e: [B, 6, dim] projected time embedding, float32 or float64.
            seq_lens: [B] tokens per sample, the rest is padding that nobody attends to; None: no padding.
            grid_sizes: [B, 3] frames, rows and columns of tokens; only read when `freqs` is the raw table.
            freqs: `WanModel.freqs`, or the result of `rope_multipliers`, made once for all blocks.
            context: [B, text_len, dim] embedded text.
            context_lens: [B] text tokens to attend to; None: all, padding included, as upstream does.

        Returns:
            [B, L, dim] in x's dtype.
        """
        dtype = _matmul_dtype(self.ffn[0].weight)
        modulation = (self.modulation + e).chunk(6, dim=1)  # six [B, 1, dim]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        y = self.self_attn(self.norm1(x, scale1, shift1).to(dtype), seq_lens, grid_sizes, freqs)
        x = _gated_add(x, y, gate1)
        x = x + self.cross_attn(self.norm3(x).to(dtype), context, context_lens)
        y = self.ffn(self.norm2(x, scale2, shift2).to(dtype))
        return _gated_add(x, y, gate2)


def _gated_add(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + y * gate in x's dtype, which is at least float32."""
    with _autocast_off(x):
        return torch.addcmul(x, y, gate)


class Head(nn.Module):
    """Final norm, modulation and projection of the tokens to patches, all in at least float32."""

    def __init__(self, dim: int, out_dim: int, patch_size: tuple[int, int, int], eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = WanLayerNorm(dim, eps)
        self.head = FullPrecisionLinear(dim, math.prod(patch_size) * out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """x [B, L, dim], e [B, dim] time embedding -> [B, L, prod(patch_size) * out_dim]."""
        shift, scale = (self.modulation + e.unsqueeze(1)).chunk(2, dim=1)
        return self.head(self.norm(x, scale, shift))


class WanModel(ModelMixin, ConfigMixin):
    """Text-to-video diffusion transformer of Wan2.1.

    Args:
        model_type: "t2v"; the image-to-video variants are not supported yet.
        patch_size: (frames, rows, columns) of latents per token.
        text_len: number of text tokens to which prompts are zero-padded.
        in_dim, out_dim: channels of the latents and of the prediction.
        dim, ffn_dim, freq_dim, text_dim: widths of tokens, feed-forward network, time and text embedding.
        num_heads, num_layers: attention heads, of which dim / num_heads must be even, and blocks.
        window_size: (left, right) extent of self-attention, -1 for no limit.
        qk_norm, cross_attn_norm: whether queries and keys, and the queries' input of cross-attention, are normed.
        eps: epsilon of all norms.

    Raises:
        ValueError: the model type is not supported or the sizes do not fit each other.
    """

    _no_split_modules: ClassVar[list[str]] = ["WanAttentionBlock"]
    _supports_gradient_checkpointing = True

    float32_modules: ClassVar[tuple[str, ...]] = (
        "time_embedding",
        "time_projection",
        "head",
        "modulation",
        "norm3",
    )
    """Parts of parameters' names: these compute in float32 and are worth keeping so in a half model."""

    @register_to_config
    def __init__(
        self,
        model_type: str = "t2v",
        patch_size: tuple[int, int, int] = (1, 2, 2),
        text_len: int = 512,
        in_dim: int = 16,
        dim: int = 2048,
        ffn_dim: int = 8192,
        freq_dim: int = 256,
        text_dim: int = 4096,
        out_dim: int = 16,
        num_heads: int = 16,
        num_layers: int = 32,
        window_size: tuple[int, int] = (-1, -1),
        qk_norm: bool = True,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if model_type != "t2v":
            raise ValueError(
                f"model type {model_type!r} is not supported yet; use a text-to-video ('t2v') model"
            )
        if dim % num_heads or (dim // num_heads) % 2:
            raise ValueError(f"dim / num_heads must be an even whole number, got {dim} / {num_heads}")
        self.model_type = model_type
        self.patch_size = tuple(patch_size)
        self.text_len = text_len
        self.in_dim = in_dim
        self.dim = dim
        self.ffn_dim = ffn_dim
        self.freq_dim = freq_dim
        self.text_dim = text_dim
        self.out_dim = out_dim
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.window_size = tuple(window_size)
        self.qk_norm = qk_norm
        self.cross_attn_norm = cross_attn_norm
        self.eps = eps

        self.patch_embedding = PatchEmbedding(
            in_dim, dim, kernel_size=self.patch_size, stride=self.patch_size
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            FullPrecisionLinear(freq_dim, dim), nn.SiLU(), FullPrecisionLinear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), FullPrecisionLinear(dim, dim * 6))
        self.blocks = nn.ModuleList(
            WanAttentionBlock(
                "t2v_cross_attn", dim, ffn_dim, num_heads, window_size, qk_norm, cross_attn_norm, eps
            )
            for _ in range(num_layers)
        )
        self.head = Head(dim, out_dim, self.patch_size, eps)

        self.gradient_checkpointing = False
        self._freqs: torch.Tensor | None = None
        self.init_weights()

    @property
    def freqs(self) -> torch.Tensor:
        """[1024, C / 2] complex128 on the CPU: the rotary table of frames, rows and columns side by side.

        Neither a buffer, whose dtype would follow the model's, nor part of the state dict. Built when first
        read, so a model made on the meta device has it too.
        """
        if self._freqs is None:
            channels = self.dim // self.num_heads
            spatial = 2 * (channels // 6)
            sizes = (channels - 2 * spatial, spatial, spatial)
            self._freqs = torch.cat([rope_params(MAX_POSITIONS, size) for size in sizes], dim=1)
        return self._freqs

    def forward(
        self,
        x: Sequence[torch.Tensor],
        t: torch.Tensor,
        context: Sequence[torch.Tensor],
        seq_len: int,
        clip_fea: torch.Tensor | None = None,
        y: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Predict the flow for a batch whose samples may differ in size, timestep and prompt.

        Args:
            x: per sample the noisy latents [in_dim, F, H, W]; F, H, W are multiples of the patch size.
            t: [B] timesteps in [0, 1000], float (never rounded below float32 here) or integer.
            context: per sample the text embedding [L, text_dim], L <= text_len, without padding.
            seq_len: number of tokens to which samples are padded, at least that of the largest.
            clip_fea: must be None (image-to-video only).
            y: per sample further latents to concatenate to x on the channel axis, or None.

        Returns:
            Per sample the prediction [out_dim, F, H, W], float32 (float64 from a float64 model).

        Raises:
            ValueError: the inputs do not fit each other or the model.
        """
        if clip_fea is not None:
            raise ValueError(
                "clip_fea is for image-to-video models, which are not supported yet; leave it out"
            )
        if y is not None:
            x = [torch.cat([u, v], dim=0) for u, v in zip(x, y, strict=True)]
        self._check(x, t, context, seq_len)

        dtype = _matmul_dtype(self.text_embedding[0].weight)
        stream_dtype = torch.promote_types(dtype, torch.float32)
        device = self.patch_embedding.weight.device
        announce_kernel(kernel_name(device, dtype, self.dim // self.num_heads))

        tokens, grid_sizes = self._embed_patches([u.to(device, dtype) for u in x], seq_len)
        tokens = tokens.to(stream_dtype)  # [B, seq_len, dim]
        lengths = [math.prod(grid) for grid in grid_sizes]

        sinusoid = sinusoidal_embedding_1d(self.freq_dim, t.to(device))
        e = self.time_embedding(sinusoid.to(stream_dtype))  # [B, dim]
        e0 = self.time_projection(e).unflatten(1, (6, self.dim))  # [B, 6, dim]

        padded = torch.stack([F.pad(u.to(device, dtype), (0, 0, 0, self.text_len - len(u))) for u in context])
        # the padding is embedded and attended to as well, which the released weights expect
        embedded = self.text_embedding(padded)  # [B, text_len, dim]

        arguments = (
            e0,
            None if min(lengths) == seq_len else torch.tensor(lengths, device="cpu"),
            torch.tensor(grid_sizes, device="cpu"),
            rope_multipliers(self.freqs, grid_sizes, seq_len, stream_dtype, device),
            embedded,
            None,
        )
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._gradient_checkpointing_func(block, tokens, *arguments)
            else:
                tokens = block(tokens, *arguments)
        return self.unpatchify(self.head(tokens, e), grid_sizes)

    def _check(
        self, x: Sequence[torch.Tensor], t: torch.Tensor, context: Sequence[torch.Tensor], seq_len: int
    ) -> None:
        if t.dim() != 1 or not len(x) == len(context) == len(t):
            raise ValueError(
                "latents, timesteps and prompts must be equally many, "
                f"got {len(x)}, {tuple(t.shape)}, {len(context)}"
            )
        for latents, text in zip(x, context, strict=True):
            shape = list(latents.shape)
            if len(shape) != 4 or shape[0] != self.in_dim:
                raise ValueError(f"latents must be [{self.in_dim}, F, H, W], got {shape}")
            if any(size % patch for size, patch in zip(shape[1:], self.patch_size, strict=True)):
                raise ValueError(f"latents {shape} do not divide into patches of {self.patch_size}")
            tokens = math.prod(shape[1:]) // math.prod(self.patch_size)
            if not 0 < tokens <= seq_len:
                raise ValueError(
                    f"latents of {tokens} tokens do not fit into seq_len {seq_len}; raise seq_len"
                )
            if text.dim() != 2 or len(text) > self.text_len or text.size(1) != self.text_dim:
                limits = f"[at most {self.text_len}, {self.text_dim}]"
                raise ValueError(f"text embeddings must be {limits}, got {list(text.shape)}")

    def _embed_patches(
        self, x: list[torch.Tensor], seq_len: int
    ) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
        """Tokens [B, seq_len, dim], zero-padded, and each sample's grid of tokens (frames, rows, columns)."""
        batches = [torch.stack(x)] if len({u.shape for u in x}) == 1 else [u.unsqueeze(0) for u in x]
        embedded = [self.patch_embedding(batch) for batch in batches]  # each [B or 1, dim, f, h, w]
        grid_sizes = [tuple(sample.shape[1:]) for batch in embedded for sample in batch]
        tokens = [F.pad(u.flatten(2).transpose(1, 2), (0, 0, 0, seq_len - u[0, 0].numel())) for u in embedded]
        return torch.cat(tokens) if len(tokens) > 1 else tokens[0], grid_sizes

    def unpatchify(
        self, x: torch.Tensor, grid_sizes: Sequence[Sequence[int]] | torch.Tensor
    ) -> list[torch.Tensor]:
        """[B, L, prod(patch_size) * out_dim] -> per sample [out_dim, F, H, W], padding cut off."""
        grids = grid_sizes.tolist() if isinstance(grid_sizes, torch.Tensor) else grid_sizes
        videos = []
        for tokens, grid in zip(x, grids, strict=True):
            patches = tokens[: math.prod(grid)].view(*grid, *self.patch_size, self.out_dim)
            video = patches.permute(6, 0, 3, 1, 4, 2, 5)  # [C, f, pf, h, ph, w, pw]
            sizes = [count * patch for count, patch in zip(grid, self.patch_size, strict=True)]
            videos.append(video.reshape(self.out_dim, *sizes))
        return videos

    def init_weights(self) -> None:
        """As upstream: Xavier for linear layers, N(0, .02) for text and time embedding, zero for the head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for embedding in (self.text_embedding, self.time_embedding):
            for module in embedding.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)
