import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .attention import flash_attention


def sinusoids(dim, position):
    rates = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device=position.device) / (dim // 2))
    angles = position.double()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotation_tables(length, width):
    """A table of turns per axis, side by side: what the axes of rows and columns do not take is the frames'."""
    third = 2 * (width // 6)
    tables = []
    for share in (width - 2 * third, third, third):
        rates = 10000.0 ** (-torch.arange(0, share, 2, dtype=torch.float64) / share)
        angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
        tables.append(torch.polar(torch.ones_like(angles), angles))
    return torch.cat(tables, dim=1)


def rope_apply(x, grid_sizes, freqs):
    pairs = freqs.size(1)
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    turned = x.double().clone()
    for sample, grid in zip(turned, grid_sizes.tolist()):
        places = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, 3).unbind(1)
        turns = [table[place] for table, place in zip(freqs.split(shares, dim=1), places)]
        number = len(places[0])
        tokens = torch.view_as_complex(sample[:number].unflatten(2, (pairs, 2)))
        sample[:number] = torch.view_as_real(tokens * torch.cat(turns, 1)[:, None]).flatten(2)
    return turned.float()


class WanRMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).type_as(x) * self.weight


class WanLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.float()).type_as(x)


class WanSelfAttention(nn.Module):
    def __init__(self, dim, num_heads, window_size, is_normed, eps):
        super().__init__()
        self.heads, self.window_size = num_heads, window_size
        for name in "qkvo":
            self.add_module(name, nn.Linear(dim, dim))
        for name in ("norm_q", "norm_k"):
            self.add_module(name, WanRMSNorm(dim, eps) if is_normed else nn.Identity())

    def three(self, asking, asked):
        """Queries, keys and values, [B, L, heads, C]."""
        flat = self.norm_q(self.q(asking)), self.norm_k(self.k(asked)), self.v(asked)
        return [tokens.unflatten(2, (self.heads, -1)) for tokens in flat]

    def forward(self, x, seq_lens, grid_sizes, freqs):
        q, k, v = self.three(x, x)
        q, k = (rope_apply(tokens, grid_sizes, freqs) for tokens in (q, k))
        result = flash_attention(q=q, k=k, v=v, k_lens=seq_lens, window_size=self.window_size)
        return self.o(result.flatten(2))


class WanCrossAttention(WanSelfAttention):
    def forward(self, x, context, context_lens):
        return self.o(flash_attention(*self.three(x, context), k_lens=context_lens).flatten(2))


def two_layers(first, middle, last, activation):
    return nn.Sequential(nn.Linear(first, middle), activation, nn.Linear(middle, last))


class WanAttentionBlock(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        dim, eps = sizes["dim"], sizes["eps"]
        self.self_attn, self.cross_attn = (
            kind(dim, sizes["num_heads"], sizes["window_size"], sizes["qk_norm"], eps)
            for kind in (WanSelfAttention, WanCrossAttention)
        )
        self.norm1, self.norm2 = (WanLayerNorm(dim, eps, elementwise_affine=False) for _ in range(2))
        self.norm3 = WanLayerNorm(dim, eps) if sizes["cross_attn_norm"] else nn.Identity()
        self.ffn = two_layers(dim, sizes["ffn_dim"], dim, nn.GELU("tanh"))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) * dim**-0.5)

    def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
        assert e.dtype == torch.float32
        with torch.amp.autocast("cuda", dtype=torch.float32):
            shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation[:, None] + e).unbind(2)
        seen = self.self_attn(
            torch.addcmul(shift1, self.norm1(x).float(), 1 + scale1), seq_lens, grid_sizes, freqs
        )
        with torch.amp.autocast("cuda", dtype=torch.float32):
            x = x + gate1 * seen
        x = x + self.cross_attn(self.norm3(x), context, context_lens)
        thought = self.ffn(torch.addcmul(shift2, self.norm2(x).float(), 1 + scale2))
        with torch.amp.autocast("cuda", dtype=torch.float32):
            return x + gate2 * thought


class Head(nn.Module):
    def __init__(self, dim, width, eps):
        super().__init__()
        self.norm = WanLayerNorm(dim, eps, elementwise_affine=False)
        self.head = nn.Linear(dim, width)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) * dim**-0.5)

    def forward(self, x, e):
        assert e.dtype == torch.float32
        with torch.amp.autocast("cuda", dtype=torch.float32):
            shift, scale = (self.modulation[:, None] + e[:, :, None]).unbind(2)
            return self.head(torch.addcmul(shift, self.norm(x), 1 + scale))


class WanModel(ModelMixin, ConfigMixin):
    """A transformer with the official one's names."""

    # fmt: off
    @register_to_config
    def __init__(self, model_type="t2v", patch_size=(1, 2, 2), text_len=512, in_dim=16, dim=2048, ffn_dim=8192,
                 freq_dim=256, text_dim=4096, out_dim=16, num_heads=16, num_layers=32, window_size=(-1, -1),
                 qk_norm=True, cross_attn_norm=True, eps=1e-6):
        # fmt: on
        super().__init__()
        self.patch_size, self.dim, self.num_heads = patch_size, dim, num_heads
        self.patch_embedding = nn.Conv3d(in_dim, dim, patch_size, patch_size)
        self.text_embedding = two_layers(text_dim, dim, dim, nn.GELU("tanh"))
        self.time_embedding = two_layers(freq_dim, dim, dim, nn.SiLU())
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanAttentionBlock(self.config) for _ in range(num_layers))
        self.head = Head(dim, out_dim * patch_size[0] * patch_size[1] * patch_size[2], eps)
        self.freqs = rotation_tables(1024, dim // num_heads)

    def forward(self, x, t, context, seq_len, y=None):
        self.freqs = self.freqs.to(self.patch_embedding.weight.device)
        grids = [self.patch_embedding(video[None]) for video in x]
        grid_sizes = torch.tensor([grid.shape[2:] for grid in grids])
        seq_lens = grid_sizes.prod(dim=1)
        rows = [F.pad(grid.flatten(2), (0, seq_len - grid[0, 0].numel())) for grid in grids]
        x = torch.cat(rows).transpose(1, 2)

        if t.dim() == 1:
            t = t.expand(len(t), seq_len)  # of one sample only, as upstream
        with torch.amp.autocast("cuda", dtype=torch.float32):
            waves = sinusoids(self.config["freq_dim"], t.flatten()).unflatten(0, (len(t), seq_len))
            e = self.time_embedding(waves.float())
            e0 = self.time_projection(e).unflatten(2, (6, -1))

        texts = [F.pad(text, (0, 0, 0, self.config["text_len"] - len(text))) for text in context]
        shared = dict(
            e=e0,
            seq_lens=seq_lens, grid_sizes=grid_sizes, freqs=self.freqs,
            context=self.text_embedding(torch.stack(texts)), context_lens=None,
        )  # fmt: skip
        for block in self.blocks:
            x = block(x, **shared)
        return [self.video(*pair) for pair in zip(self.head(x, e).float(), grid_sizes.tolist())]

    def video(self, tokens, grid):
        """[L, patch * C] -> [C, F, H, W]."""
        number = grid[0] * grid[1] * grid[2]
        patches = tokens[:number].view(*grid, *self.patch_size, -1).movedim(-1, 0)
        for axis in (1, 2, 3):  # each axis of the grid takes its axis of the patch beside itself
            patches = patches.movedim(4, axis + 1).flatten(axis, axis + 1)
        return patches
