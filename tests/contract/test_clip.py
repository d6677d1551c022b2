"""CLIPModel: upstream's key layout, upstream's preprocessing, exact agreement with transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import CLIPVisionModel

from wan.modules.clip import CLIPModel, build_clip, clip_state_dict_to_transformers

CONFIG = {"image_size": 28, "patch_size": 7, "dim": 32, "dim_ffn": 64, "num_heads": 4, "num_layers": 3}


@pytest.fixture(scope="module")
def library_model() -> CLIPVisionModel:
    torch.manual_seed(0)
    model = build_clip(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def checkpoint(library_model: CLIPVisionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library model written by hand as the open-CLIP file holds it, text tower and head included."""
    theirs = {
        name.removeprefix("vision_model."): tensor for name, tensor in library_model.state_dict().items()
    }
    ours = {
        "log_scale": torch.zeros(()),
        "textual.token_embedding.weight": torch.zeros(5, 8),
        "visual.head": torch.zeros(32, 16),
        "visual.cls_embedding": theirs["embeddings.class_embedding"].view(1, 1, 32),
        "visual.pos_embedding": theirs["embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": theirs["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        ours[f"visual.pre_norm.{kind}"] = theirs[f"pre_layrnorm.{kind}"]
        ours[f"visual.post_norm.{kind}"] = theirs[f"post_layernorm.{kind}"]
        for layer in range(3):
            block, source = f"visual.transformer.{layer}", f"encoder.layers.{layer}"
            heads = [theirs[f"{source}.self_attn.{head}_proj.{kind}"] for head in ("q", "k", "v")]
            ours[f"{block}.attn.to_qkv.{kind}"] = torch.cat(heads)
            ours[f"{block}.attn.proj.{kind}"] = theirs[f"{source}.self_attn.out_proj.{kind}"]
            ours[f"{block}.norm1.{kind}"] = theirs[f"{source}.layer_norm1.{kind}"]
            ours[f"{block}.norm2.{kind}"] = theirs[f"{source}.layer_norm2.{kind}"]
            ours[f"{block}.mlp.0.{kind}"] = theirs[f"{source}.mlp.fc1.{kind}"]
            ours[f"{block}.mlp.2.{kind}"] = theirs[f"{source}.mlp.fc2.{kind}"]
    path = tmp_path_factory.mktemp("clip") / "models_clip.pth"
    torch.save(ours, path)
    return path


def load(checkpoint: Path, dtype: torch.dtype = torch.float32) -> CLIPModel:
    return CLIPModel(dtype, "cpu", checkpoint, config=CONFIG)


def videos() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.rand(3, frames, *size, generator=generator) * 2 - 1
        for frames, size in ((2, (40, 64)), (1, (20, 12)))
    ]


def test_equals_the_library(library_model: CLIPVisionModel, checkpoint: Path) -> None:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    frames = torch.cat(
        [
            functional.interpolate(video.transpose(0, 1), (28, 28), mode="bicubic", antialias=False)
            for video in videos()
        ]
    )
    pixels = ((frames + 1) / 2 - mean) / std
    expected = library_model(pixel_values=pixels, output_hidden_states=True)
    tokens = load(checkpoint).visual(videos())
    assert tokens.shape == (3, 17, 32)
    torch.testing.assert_close(tokens, expected.hidden_states[-2], atol=1e-5, rtol=1e-5)
    assert (tokens - expected.last_hidden_state).abs().max() > 0.1


def test_loaded_tower_is_the_library_model(library_model: CLIPVisionModel, checkpoint: Path) -> None:
    model = load(checkpoint).model
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    assert torch.equal(model(pixels).last_hidden_state, library_model(pixels).last_hidden_state)
    assert model.state_dict().keys() == library_model.state_dict().keys()


def test_full_model_takes_every_visual_tensor() -> None:
    names = ["cls_embedding", "pos_embedding", "patch_embedding.weight", "head"]
    parts = ["norm1", "attn.to_qkv", "attn.proj", "norm2", "mlp.0", "mlp.2"]
    modules = [
        "pre_norm",
        "post_norm",
        *(f"transformer.{layer}.{part}" for layer in range(32) for part in parts),
    ]
    names += [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    assert len(names) == 392  # half of the 784 tensors of upstream's file
    renamed = clip_state_dict_to_transformers({f"visual.{name}": torch.zeros(3, 1, 1) for name in names})
    with torch.device("meta"):
        expected = {name.removeprefix("vision_model.") for name in build_clip().state_dict()}
    assert renamed.keys() == expected


def test_bfloat16(checkpoint: Path) -> None:
    tokens = load(checkpoint, torch.bfloat16).visual(videos())
    exact = load(checkpoint).visual(videos())
    assert tokens.dtype == torch.bfloat16
    assert (tokens.float() - exact).norm() < 0.05 * exact.norm()


def test_mistakes(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[3, frames, height, width\]"):
        load(checkpoint).visual([torch.zeros(3, 28, 28)])
    with pytest.raises(ValueError, match="at least one"):
        load(checkpoint).visual([])
    state_dict = torch.load(checkpoint, weights_only=True)
    state_dict["visual.extra.weight"] = state_dict.pop("visual.pre_norm.weight")
    torch.save(state_dict, tmp_path / "clip.pth")
    with pytest.raises(ValueError, match=r"pre_layrnorm\.weight; 1 unexpected: .*extra\.weight"):
        load(tmp_path / "clip.pth")
