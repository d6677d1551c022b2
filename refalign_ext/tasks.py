"""The reference-to-video tasks: what each adds to the Wan task it grows from."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from easydict import EasyDict

R2V_DEFAULTS = {
    # Paper section on inference: eq. 5 with 5.0 and 7.5, 50 Euler steps, 81 frames at 832x480, 16 fps; shift 5.
    "ref_guide_scale": 5.0,
    "text_guide_scale": 7.5,
    "sample_steps": 50,
    "sample_shift": 5.0,
    "sample_solver": "euler",
    "size": (832, 480),
    "frame_num": 81,
    "display_magnify": 1,
}


def tiny_task() -> EasyDict:
    """The embedded sprite model: real classes, small numbers; assets/r2v-tiny holds its weights."""
    import torch
    from easydict import EasyDict

    return EasyDict(
        __name__="Config: RefAlign R2V tiny",
        t5_model="umt5_tiny",
        t5_dtype=torch.bfloat16,
        text_len=64,
        text_dim=64,
        param_dtype=torch.float32,
        num_train_timesteps=1000,
        sample_fps=8,
        sample_neg_prompt="",
        t5_checkpoint="models_t5_umt5-tiny-enc-bf16.pth",
        t5_tokenizer="google/umt5-tiny",
        vae_checkpoint="Wan2.1_VAE_tiny.pth",
        vae_stride=(4, 4, 4),
        patch_size=(1, 2, 2),
        in_dim=16,
        out_dim=16,
        dim=128,
        ffn_dim=512,
        freq_dim=128,
        num_heads=4,
        num_layers=6,
        window_size=(-1, -1),
        qk_norm=True,
        cross_attn_norm=True,
        eps=1e-6,
        vae=EasyDict(
            dim=16,
            z_dim=16,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            attn_scales=[],
            temperal_downsample=[True, True],
            mean=[0.0] * 16,
            std=[1.0] * 16,
        ),
        t5=EasyDict(vocab=512, dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2, num_buckets=32),
        teacher="dinov3-tiny",
        teacher_folder="teacher",
        ref_guide_scale=5.0,
        text_guide_scale=5.0,
        sample_steps=20,
        sample_shift=6.0,
        sample_solver="euler",
        size=(48, 48),
        frame_num=9,
        display_magnify=8,
    )


def register_tasks(
    configs: dict[str, Any], sizes: dict[str, tuple[int, int]], supported: dict[str, tuple]
) -> None:
    """Add r2v-1.3B, r2v-14B and r2v-tiny to Wan's tables; safe to call twice."""
    for name, base in (("r2v-1.3B", "t2v-1.3B"), ("r2v-14B", "t2v-14B")):
        config = deepcopy(configs[base])
        config.__name__ = f"Config: RefAlign R2V {name.removeprefix('r2v-')}"
        config.update(R2V_DEFAULTS, teacher="dinov3-l")
        configs[name] = config
        supported[name] = tuple(supported[base])
    configs["r2v-tiny"] = tiny_task()
    sizes["48*48"] = (48, 48)
    supported["r2v-tiny"] = ("48*48",)
