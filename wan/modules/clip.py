"""The image encoder of Wan2.1's image-to-video models: open-CLIP's visual tower in transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from wan.utils.weights import load_strict, read_state_dict

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

_DEFAULTS = dict(image_size=224, patch_size=14, dim=1280, dim_ffn=5120, num_heads=16, num_layers=32)
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_UNUSED = ("textual.", "log_scale", "visual.head")
# upstream -> transformers, for parts of names, in this order
_RENAMES = (
    ("visual.", ""),
    ("transformer.", "encoder.layers."),
    ("attn.proj.", "self_attn.out_proj."),
    ("mlp.0.", "mlp.fc1."),
    ("mlp.2.", "mlp.fc2."),
    ("norm1.", "layer_norm1."),
    ("norm2.", "layer_norm2."),
    ("pre_norm.", "pre_layrnorm."),
    ("post_norm.", "post_layernorm."),
    ("patch_embedding.", "embeddings.patch_embedding."),
    ("cls_embedding", "embeddings.class_embedding"),
    ("pos_embedding", "embeddings.position_embedding.weight"),
)


class CLIPModel:
    """Turns images into visual tokens. Matches ``wan/modules/clip.py`` upstream, less the text tower.

    Attributes:
        model: the ``CLIPVisionModel``, frozen and in evaluation mode.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: str | torch.device,
        checkpoint_path: str | Path,
        tokenizer_path: str | Path | None = None,
        *,
        config: Mapping[str, int] | None = None,
    ) -> None:
        """
        Args:
            dtype: of weights and computation.
            device: where the model lives.
            checkpoint_path: ``models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`` or one like it.
            tokenizer_path: accepted for upstream's signature; images need no tokenizer.
            config: image_size, patch_size, dim, dim_ffn, num_heads, num_layers; ``None`` means ViT-H/14.

        Raises:
            ValueError: the checkpoint is unreadable or of another model.
        """
        self.dtype = dtype
        self.config = {**_DEFAULTS, **(config or {})}
        with torch.device("meta"):
            self.model = build_clip(self.config)
        state_dict = clip_state_dict_to_transformers(read_state_dict(checkpoint_path))
        if any(name.startswith("vision_model.") for name in self.model.state_dict()):  # transformers before 5
            state_dict = {f"vision_model.{name}": tensor for name, tensor in state_dict.items()}
        _fill_position_ids(self.model)
        load_strict(self.model, state_dict, str(checkpoint_path), dtype=dtype)
        self.model.eval().requires_grad_(False).to(device)

    def visual(self, videos: Sequence[torch.Tensor]) -> torch.Tensor:
        """Tokens after the last block but one, every frame by itself.

        Args:
            videos: each [3, F, H, W] in [-1, 1], sizes may differ; frames are squashed to a square.

        Returns:
            [sum of F, 1 + patches, dim], class token first.

        Raises:
            ValueError: a video has another shape, or there is none.
        """
        if not videos or any(video.ndim != 4 or video.shape[0] != 3 for video in videos):
            raise ValueError("image encoder: give videos of shape [3, frames, height, width], at least one")
        device = next(self.model.parameters()).device
        frames = torch.cat([self._prepare(video.to(device)) for video in videos])  # [F, 3, size, size]
        output = self.model(pixel_values=frames.to(self.dtype), output_hidden_states=True)
        return output.hidden_states[-2]  # [F, 1 + patches, dim]

    def _prepare(self, video: torch.Tensor) -> torch.Tensor:
        size = (self.config["image_size"], self.config["image_size"])
        # no antialiasing and no cropping: the released models were trained on exactly this
        frames = functional.interpolate(
            video.float().transpose(0, 1), size, mode="bicubic", align_corners=False
        )
        mean, std = (frames.new_tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
        return (frames * 0.5 + 0.5 - mean) / std


def build_clip(config: Mapping[str, int] | None = None) -> CLIPVisionModel:
    """An untrained ``CLIPVisionModel`` of a configuration (see :class:`CLIPModel`), on the default device."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = {**_DEFAULTS, **(config or {})}
    return CLIPVisionModel(
        CLIPVisionConfig(
            image_size=config["image_size"],
            patch_size=config["patch_size"],
            hidden_size=config["dim"],
            intermediate_size=config["dim_ffn"],
            num_attention_heads=config["num_heads"],
            num_hidden_layers=config["num_layers"],
            hidden_act="gelu",
        )
    )


def clip_state_dict_to_transformers(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Visual tower of upstream's checkpoint under transformers' names.

    Query, key and value, one matrix upstream, become three. The text tower, the temperature and the
    projection of the class token are left out; any other foreign name stays as it is.
    """
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        if key.startswith(_UNUSED):
            continue
        name = key
        for ours, theirs in _RENAMES:
            name = name.replace(ours, theirs)
        if name == "embeddings.class_embedding":
            tensor = tensor.flatten()
        elif name == "embeddings.position_embedding.weight":
            tensor = tensor.flatten(0, -2)
        if ".attn.to_qkv." in name:
            for head, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("attn.to_qkv", f"self_attn.{head}_proj")] = rows
        else:
            renamed[name] = tensor
    return renamed


def _fill_position_ids(model: CLIPVisionModel) -> None:
    """The position numbers are in no checkpoint, so a meta-initialised model lacks them."""
    for module in model.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, torch.Tensor):
            module.position_ids = torch.arange(ids.shape[-1]).expand(1, -1)
