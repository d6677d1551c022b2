"""Train the embedded text encoder: `python -m refalign_ext sprites train-text`. Minutes on one core.

A random frozen encoder keeps the words but hardly says which words belong together: read back from its tokens with one
attention per lane, the subject's order is right in 69% and its motion in 81% of clips with two or three subjects, and a DiT
that had to find this out by itself never did. Here the encoder learns that very reading, and nothing of pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refalign_ext.atomic_io import atomic_path, write_text
from refalign_ext.sprites.text import random_encoder, write_tokenizer
from refalign_ext.sprites.training_steps import train_steps
from refalign_ext.sprites.world import (
    BACKGROUNDS,
    LANES,
    MOTIONS,
    SHAPES,
    SIZES,
    Performance,
    SpriteSubject,
    caption_of,
)
from refalign_ext.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLACES = tuple(sorted({name for names in LANES.values() for name in names}))
# What is asked of every lane: is there a subject, which one of the caption, and what does it look like.
QUESTIONS = {"present": 2, "order": 3, "shape": len(SHAPES), "size": len(SIZES), "motion": len(MOTIONS)}
NOT_ASKED = -100


def draw_caption(rng: np.random.Generator) -> tuple[str, Tensor]:
    """A caption of the world and its answers [places, questions]; every attribute is drawn alone."""
    count = int(rng.choice([1, 2, 3], p=[0.25, 0.5, 0.25]))
    layout = ("rows", "columns")[rng.integers(2)]
    ways = ("left", "right") if layout == "rows" else ("up", "down")
    lanes = [str(lane) for lane in rng.permutation(LANES[layout, max(count, 2)])[:count]]
    answers = torch.full((len(PLACES), len(QUESTIONS)), NOT_ASKED)
    answers[:, 0] = 0
    performances = []
    for order, lane in enumerate(lanes):
        shape, size = int(rng.integers(len(SHAPES))), int(rng.integers(len(SIZES)))
        motion = ways[rng.integers(len(ways))]
        answers[PLACES.index(lane)] = torch.tensor([1, order, shape, size, tuple(MOTIONS).index(motion)])
        subject = SpriteSubject(SHAPES[shape], "halves", "red", "green")
        performances.append(Performance(subject, tuple(SIZES)[size], motion, lane, 0.0, (0.5, 0.5)))
    return caption_of(list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))], tuple(performances)), answers


class Readout(nn.Module):
    """Answers by one attention per lane over the tokens, as a DiT's cross-attention would read them."""

    def __init__(self, dim: int, heads: int = 4, channels: int = 32) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(len(PLACES), heads, channels))
        self.key, self.value = nn.Linear(dim, heads * channels), nn.Linear(dim, heads * channels)
        self.answers = nn.ModuleList(nn.Linear(heads * channels, choices) for choices in QUESTIONS.values())

    def forward(self, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        """tokens [B, L, dim], mask [B, L] -> per question logits [B, places, choices]."""
        shape = self.query.shape[1:]
        key, value = self.key(tokens).unflatten(2, shape), self.value(tokens).unflatten(2, shape)
        scores = torch.einsum("phc,blhc->bphl", self.query, key) * shape[1] ** -0.5
        weights = scores.masked_fill((mask == 0)[:, None, None], -torch.inf).softmax(-1)
        read = torch.einsum("bphl,blhc->bphc", weights, value).flatten(2)
        return [answer(read) for answer in self.answers]


def train_readout(
    encoder: nn.Module, tokenizer: PreTrainedTokenizerFast, *, steps: int, seed: int
) -> dict[str, float]:
    """Train an encoder together with a `Readout`; shares of right answers on fresh captions of two or three."""
    torch.manual_seed(seed)
    readout = Readout(encoder.config.d_model)
    encoder.requires_grad_(True)
    rng = np.random.default_rng([seed, 30])

    def answer(rng: np.random.Generator, count: int) -> tuple[list[Tensor], Tensor]:
        captions, truth = zip(*(draw_caption(rng) for _ in range(count)), strict=True)
        tokens = tokenizer(list(captions), padding=True, return_tensors="pt", return_token_type_ids=False)
        features = encoder(**tokens).last_hidden_state
        return readout(features, tokens["attention_mask"]), torch.stack(truth)

    def loss_of(step: int) -> Tensor:
        found, truth = answer(rng, 64)
        return sum(
            F.cross_entropy(logits.flatten(0, 1), truth[..., i].flatten(), ignore_index=NOT_ASKED)
            for i, logits in enumerate(found)
        )

    parameters = [*readout.parameters(), *encoder.parameters()]
    train_steps(
        parameters,
        [torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)],
        loss_of,
        steps=steps,
        warmup=50,
        decay=1.0,
        least=0.0,
        report_every=steps,
        report=lambda step, loss: None,
        label="text encoder",
    )
    encoder.requires_grad_(False)
    with torch.no_grad():
        found, truth = answer(np.random.default_rng([seed, 31]), 600)
    several = (truth[..., 0].sum(1) > 1)[:, None]
    shares = {}
    for i, (name, logits) in enumerate(zip(QUESTIONS, found, strict=True)):
        asked = (truth[..., i] != NOT_ASKED) & several
        shares[name] = (logits.argmax(-1) == truth[..., i])[asked].float().mean().item()
    return shares


def train_text_encoder(out: Path, *, steps: int, seed: int) -> None:
    """Train the embedded text encoder and write `text.pt`, a state dict in transformers' names."""
    from transformers import PreTrainedTokenizerFast

    config = TASKS["r2v-tiny"].configuration({})
    write_tokenizer(out / "tokenizer", config.t5.vocab)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    encoder = random_encoder(**dict(config.t5), seed=seed)
    shares = train_readout(encoder, tokenizer, steps=steps, seed=seed)
    answers = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    write_text(out / "log.txt", f"read back after {steps} steps: {answers}\n")
    with atomic_path(out / "text.pt") as unfinished:
        torch.save(encoder.state_dict(), unfinished)
