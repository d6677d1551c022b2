"""Random checkpoints of small models in upstream's layout and formats, for tests."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from easydict import EasyDict
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from refalign_ext.backbone import (
    WAN_CONFIGS,
    WanModel,
    t5_state_dict_from_transformers,
    vae_state_dict_from_diffusers,
)
from wan.modules.t5 import build_t5
from wan.modules.vae import build_vae

WORDS = (
    *("a", "the", "red", "blue", "green", "circle", "square", "star", "small", "large", "moves"),
    *("left", "right", "up", "down", "still", "on", "and", "background"),
)


def tiny_config(**changes: object) -> EasyDict:
    """A copy of the r2v-tiny configuration with a smaller network."""
    config = copy.deepcopy(WAN_CONFIGS["r2v-tiny"])
    config.update(dim=48, ffn_dim=96, freq_dim=32, num_heads=2, num_layers=2, **changes)
    return config


def build(folder: Path, config: EasyDict | None = None, *, seed: int = 0) -> Path:
    """Writes DiT, VAE, text encoder and tokenizer with random weights.

    Args:
        folder: where to; created.
        config: the task configuration, r2v-tiny when left out.
        seed: of the weights.
    """
    config = WAN_CONFIGS["r2v-tiny"] if config is None else config
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _write_dit(folder, config)
        vae = build_vae(config.vae)
        torch.save(
            vae_state_dict_from_diffusers(vae.state_dict(), config.vae), folder / config.vae_checkpoint
        )
        t5 = build_t5(config.t5).to(torch.bfloat16)
        torch.save(t5_state_dict_from_transformers(t5.state_dict()), folder / config.t5_checkpoint)
    _write_tokenizer(folder / config.t5_tokenizer, config)
    return folder


def dit_settings(config: EasyDict) -> dict[str, object]:
    """The constructor arguments of `WanModel` in a configuration."""
    names = (
        *("patch_size", "text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "out_dim"),
        *("num_heads", "num_layers", "window_size", "qk_norm", "cross_attn_norm", "eps"),
    )
    return {name: config[name] for name in names}


def _write_dit(folder: Path, config: EasyDict) -> None:
    model = WanModel(model_type="t2v", **dit_settings(config))
    # The head starts at zero, which would make every prediction zero.
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    settings = {"_class_name": "WanModel", "model_type": "t2v", **dit_settings(config)}
    (folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _write_tokenizer(folder: Path, config: EasyDict) -> None:
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    assert len(vocabulary) <= config.t5.vocab
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
