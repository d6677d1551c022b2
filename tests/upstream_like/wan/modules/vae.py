import torch
from torch import nn


class WanVAE:
    def __init__(self, z_dim=16, vae_pth=None, dtype=torch.float, device="cuda"):
        self.dtype = dtype
        self.scale = [torch.zeros(z_dim, device=device), torch.ones(z_dim, device=device)]
        self.model = nn.Conv3d(3, z_dim, (1, 8, 8), (1, 8, 8), device=device)
        self.model.load_state_dict(torch.load(vae_pth, weights_only=True))

    def encode(self, videos):
        return [self.model(video[None, :, ::4])[0] for video in videos]

    def decode(self, zs):
        back = [nn.functional.conv_transpose3d(z[None], self.model.weight, stride=(1, 8, 8))[0] for z in zs]
        return [video.repeat_interleave(4, dim=1)[:, 3:].clamp(-1, 1) for video in back]
