"""Values that every Wan2.1 task shares, from upstream's wan/configs/shared_config.py and module constants."""

from __future__ import annotations

import torch
from easydict import EasyDict

wan_shared_cfg = EasyDict()

# text encoder
wan_shared_cfg.t5_model = "umt5_xxl"
wan_shared_cfg.t5_dtype = torch.bfloat16
wan_shared_cfg.text_len = 512
wan_shared_cfg.text_dim = 4096
wan_shared_cfg.t5_checkpoint = "models_t5_umt5-xxl-enc-bf16.pth"
wan_shared_cfg.t5_tokenizer = "google/umt5-xxl"
wan_shared_cfg.t5 = EasyDict(
    vocab=256384, dim=4096, dim_attn=4096, dim_ffn=10240, num_heads=64, num_layers=24, num_buckets=32
)

# video autoencoder; the 16 means and standard deviations normalise its latents and are not in the checkpoint
wan_shared_cfg.vae_checkpoint = "Wan2.1_VAE.pth"
wan_shared_cfg.vae_stride = (4, 8, 8)
wan_shared_cfg.vae = EasyDict(
    dim=96,
    z_dim=16,
    dim_mult=[1, 2, 4, 4],
    num_res_blocks=2,
    attn_scales=[],
    temperal_downsample=[False, True, True],
    mean=[
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    std=[
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ],
)

# transformer
wan_shared_cfg.param_dtype = torch.bfloat16
wan_shared_cfg.patch_size = (1, 2, 2)
wan_shared_cfg.in_dim = 16
wan_shared_cfg.out_dim = 16
wan_shared_cfg.freq_dim = 256
wan_shared_cfg.window_size = (-1, -1)
wan_shared_cfg.qk_norm = True
wan_shared_cfg.cross_attn_norm = True
wan_shared_cfg.eps = 1e-6

# inference
wan_shared_cfg.num_train_timesteps = 1000
wan_shared_cfg.sample_fps = 16
# The released models are used with exactly this text (Wan-Video/Wan2.1, wan/configs/shared_config.py).
wan_shared_cfg.sample_neg_prompt = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"  # noqa: RUF001
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
