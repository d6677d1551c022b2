"""Task configurations."""

from __future__ import annotations

import torch
from easydict import EasyDict

from wan.configs import MAX_AREA_CONFIGS, SIZE_CONFIGS, SUPPORTED_SIZES, TASKS, WAN_CONFIGS


def test_tasks() -> None:
    assert set(TASKS) == {"t2v-14B", "t2v-1.3B", "t2i-14B"}
    assert set(TASKS) <= set(WAN_CONFIGS) and set(TASKS) <= set(SUPPORTED_SIZES)
    assert all(isinstance(WAN_CONFIGS[task], EasyDict) for task in TASKS)


def test_architectures() -> None:
    fields = ("dim", "ffn_dim", "num_heads", "num_layers")
    assert [WAN_CONFIGS["t2v-1.3B"][field] for field in fields] == [1536, 8960, 12, 30]
    for task in ("t2v-14B", "t2i-14B"):
        assert [WAN_CONFIGS[task][field] for field in fields] == [5120, 13824, 40, 40]


def test_shared_values() -> None:
    for task in TASKS:
        config = WAN_CONFIGS[task]
        assert config.patch_size == (1, 2, 2) and config.vae_stride == (4, 8, 8)
        assert config.text_len == 512 and config.text_dim == config.t5.dim == 4096
        assert config.param_dtype == config.t5_dtype == torch.bfloat16
        assert config.num_train_timesteps == 1000 and config.sample_fps == 16 and config.eps == 1e-6
        assert len(config.vae.mean) == len(config.vae.std) == config.vae.z_dim == config.in_dim
        assert config.sample_neg_prompt.startswith("色调艳丽，") and config.sample_neg_prompt.endswith(
            "，倒着走"
        )
        assert config.sample_neg_prompt.count("，") == 27


def test_configurations_share_nothing_mutable() -> None:
    assert WAN_CONFIGS["t2v-14B"].vae is not WAN_CONFIGS["t2i-14B"].vae


def test_sizes() -> None:
    for name, size in SIZE_CONFIGS.items():
        assert name == "{}*{}".format(*size)
        assert MAX_AREA_CONFIGS.get(name, size[0] * size[1]) == size[0] * size[1]
    for sizes in SUPPORTED_SIZES.values():
        assert set(sizes) <= set(SIZE_CONFIGS)
    assert SUPPORTED_SIZES["t2v-1.3B"] == ("480*832", "832*480")
    assert SUPPORTED_SIZES["t2v-14B"] == ("720*1280", "1280*720", "480*832", "832*480")
    assert SUPPORTED_SIZES["t2i-14B"] == (*SUPPORTED_SIZES["t2v-14B"], "1024*1024")
