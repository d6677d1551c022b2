import torch
from easydict import EasyDict

wan_shared_cfg = EasyDict(
    t5_model="umt5_xxl",
    t5_dtype=torch.bfloat16,
    text_len=512,
    param_dtype=torch.bfloat16,
    num_train_timesteps=1000,
    sample_fps=24,
    sample_neg_prompt="blurred",
    t5_checkpoint="models_t5_umt5-xxl-enc-bf16.pth",
    t5_tokenizer="google/umt5-xxl",
    vae_checkpoint="Wan2.1_VAE.pth",
    vae_stride=(4, 8, 8),
    patch_size=(1, 2, 2),
    freq_dim=256,
    window_size=(-1, -1),
    qk_norm=True,
    cross_attn_norm=True,
    eps=1e-6,
)
