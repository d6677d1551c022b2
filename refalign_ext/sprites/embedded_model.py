"""Write the embedded model's folder, assets/r2v-tiny, from its trained parts, in the layout and formats of Wan2.1."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from refalign_ext.atomic_io import atomic_path, write_json
from refalign_ext.backbone import (
    WAN_CONFIGS,
    build_dit,
    t5_state_dict_from_transformers,
    vae_state_dict_from_diffusers,
)
from refalign_ext.checkpoint.reading import read_any_dit
from refalign_ext.sprites.text import write_tokenizer

TASK = "r2v-tiny"
DIT_FILE = "diffusion_pytorch_model.safetensors"


def write_text_encoder(folder: Path, trained: Path) -> None:
    """Tokenizer folder and the text encoder of `sprites.train_text` as a bf16 `.pth` under upstream's keys."""
    config = WAN_CONFIGS[TASK]
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder / config.t5_tokenizer, config.t5.vocab)
    assert size <= config.t5.vocab, f"the tokenizer has {size} pieces, the encoder knows {config.t5.vocab}"
    weights = t5_state_dict_from_transformers(torch.load(trained, weights_only=True, map_location="cpu"))
    _save_pth(
        {key: value.to(torch.bfloat16).clone() for key, value in weights.items()},
        folder / config.t5_checkpoint,
    )


def write_vae(folder: Path, trained: Path) -> None:
    """The VAE as a float32 `.pth` under upstream's keys, from the state dict that `sprites.train_vae` wrote."""
    config = WAN_CONFIGS[TASK]
    weights = torch.load(trained, weights_only=True, map_location="cpu")
    upstream = vae_state_dict_from_diffusers(weights, config.vae)
    folder.mkdir(parents=True, exist_ok=True)
    _save_pth(
        {key: value.contiguous().clone() for key, value in upstream.items()}, folder / config.vae_checkpoint
    )


def write_teacher(folder: Path, trained: Path) -> None:
    """The teacher's transformers folder."""
    target = folder / WAN_CONFIGS[TASK].teacher_folder
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(trained, target)


def write_dit(folder: Path, checkpoint: Path) -> None:
    """The DiT and its configuration, from a checkpoint of `train_refalign.py`; checked by loading it strictly."""
    from safetensors.torch import save_file

    found = read_any_dit(checkpoint)
    model = build_dit(found, WAN_CONFIGS[TASK], checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_path(folder / DIT_FILE) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    write_json(folder / "config.json", found.config, indent=2)


def _save_pth(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with atomic_path(path) as unfinished:
        torch.save(tensors, unfinished)
