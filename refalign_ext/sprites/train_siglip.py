"""A tiny SigLIP2 that learns from the world's captions: a teacher of another kind than the embedded DINOv3.

Captions never name patterns or colours, so it need not know them. Half of its images are the opening frames of clips and
half are references on white, as a teacher gets them, with the caption of a clip that shows the same subject.
"""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from refalign_ext.sprites.pixels import to_images
from refalign_ext.sprites.teacher_settings import HEAD, HIDDEN, LAYERS, PATCH, SIDE
from refalign_ext.sprites.text import write_tokenizer
from refalign_ext.sprites.world import (
    SpriteSubject,
    render_clip,
    sample_clip,
    sample_reference,
    subjects_of,
)
from refalign_ext.teachers import SIGLIP_MEAN, SIGLIP_STD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, SiglipModel

VOCABULARY, TEXT_LENGTH = 512, 40  # that of the longest of 20,000 captions
RETRIEVED = 200  # held-out frames whose captions are looked up


def build_siglip(seed: int = 0, size: str = "tiny") -> SiglipModel:
    """A SigLIP2 of fixed resolution on 8-pixel patches, with half as many text as vision layers."""
    from transformers import SiglipConfig, SiglipModel

    hidden = HIDDEN[size]
    tower = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": hidden // HEAD,
        "attn_implementation": "eager",  # trains twice as fast on a CPU
    }
    config = SiglipConfig(
        vision_config={**tower, "num_hidden_layers": LAYERS, "image_size": SIDE, "patch_size": PATCH},
        text_config={
            **tower,
            "num_hidden_layers": LAYERS // 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": TEXT_LENGTH,
            **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
        },
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SiglipModel(config)
    with torch.no_grad():  # the publication's start: nearly every pair is none
        model.logit_scale.fill_(np.log(10.0))
        model.logit_bias.fill_(-10.0)
    return model


def draw_pair(
    rng: np.random.Generator, subjects: list[SpriteSubject], on_white: bool
) -> tuple[np.ndarray, str]:
    """An image [SIDE, SIDE, 3] uint8 and its caption."""
    count = 1 if on_white else int(rng.integers(1, 4))
    clip = sample_clip(rng, subjects, count, free_colors=rng.random() < 0.5, tilted=rng.random() < 0.5)
    if on_white:
        return sample_reference(rng, clip.performances[0], SIDE, SIDE)[0], clip.caption
    return render_clip(clip, 1, SIDE, SIDE)[0][0], clip.caption


class CaptionLesson:
    """Every image belongs to its own caption and to no other of the batch: SigLIP's sigmoid loss."""

    def __init__(self, seed: int, size: str, batch_size: int) -> None:
        self.seed, self.batch_size = seed, batch_size
        self.model = build_siglip(seed, size)
        self.attributes = None
        self.tokenizer = _tokenizer()
        self.subjects = subjects_of("train")

    def inputs(self, pairs: list[tuple[np.ndarray, str]]) -> dict[str, Tensor]:
        """What the model takes of images [SIDE, SIDE, 3] and captions."""
        mean, std = (torch.tensor(value)[:, None, None] for value in (SIGLIP_MEAN, SIGLIP_STD))
        tokens = self.tokenizer(
            [caption for _, caption in pairs],
            padding="max_length",
            truncation=True,
            max_length=TEXT_LENGTH,
            return_tensors="pt",
        )
        images = to_images([image for image, _ in pairs])
        return {"input_ids": tokens["input_ids"], "pixel_values": (images - mean) / std}

    def loss(self, rng: np.random.Generator) -> Tensor:
        pairs = [draw_pair(rng, self.subjects, index % 2 == 0) for index in range(self.batch_size)]
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**self.inputs(pairs), return_loss=True).loss.float()

    @torch.no_grad()
    def report(self) -> str:
        rng, subjects = np.random.default_rng([self.seed, 99]), subjects_of("held_out")
        pairs = [draw_pair(rng, subjects, on_white=False) for _ in range(RETRIEVED)]
        logits = self.model(**self.inputs(pairs)).logits_per_image
        right = (logits.argmax(1) == torch.arange(RETRIEVED)).float().mean()
        return f"captions found for held-out frames: {right:.1%} of {RETRIEVED}"


@lru_cache(maxsize=1)
def _tokenizer() -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), VOCABULARY)
        return PreTrainedTokenizerFast.from_pretrained(folder)
