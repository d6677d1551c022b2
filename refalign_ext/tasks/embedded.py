"""r2v-tiny: the embedded sprite model. Real classes, small numbers; assets/r2v-tiny holds its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refalign_ext.tasks.reference import ReferenceToVideo

if TYPE_CHECKING:
    from easydict import EasyDict


@dataclass(frozen=True, kw_only=True)
class EmbeddedReferenceToVideo(ReferenceToVideo):
    """Reference to video in the sprite world, whose networks no entry of WAN_CONFIGS describes."""

    def configuration(self, configs: Mapping[str, EasyDict]) -> EasyDict:
        import torch
        from easydict import EasyDict

        config = EasyDict(
            t5_model="umt5_tiny",
            t5_dtype=torch.bfloat16,
            text_len=64,
            text_dim=64,
            param_dtype=torch.float32,
            num_train_timesteps=1000,
            sample_fps=self.fps,
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
            t5=EasyDict(
                vocab=512, dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2, num_buckets=32
            ),
            teacher_folder="teacher",
        )
        return super().configuration({self.base: config})
