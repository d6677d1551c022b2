"""Train the embedded text encoder: `python -m refalign_ext sprites train-text`. Minutes on one core.

A random frozen encoder keeps the words but hardly says which words belong together: read back from its tokens with one
attention per lane, the subject's order is right in 69% and its motion in 81% of clips with two or three subjects, and a DiT
that had to find this out by itself never did. Here the encoder learns that very reading, and nothing of pictures.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refalign_ext.atomic_io import atomic_path
from refalign_ext.sprites.text import random_encoder, write_tokenizer
from refalign_ext.sprites.world import (
    BACKGROUNDS,
    LANES,
    MOTIONS,
    SHAPES,
    SIZES,
    Performance,
    Subject,
    caption_of,
)
from refalign_ext.tasks import TASKS

PLACES = tuple(sorted({name for names in LANES.values() for name in names}))
# What is asked of every lane: is there a subject, which one of the caption, and what does it look like.
QUESTIONS = (2, 3, len(SHAPES), len(SIZES), len(MOTIONS))
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
        subject = Subject(SHAPES[shape], "halves", "red", "green")
        performances.append(Performance(subject, tuple(SIZES)[size], motion, lane, 0.0, (0.5, 0.5)))
    return caption_of(list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))], tuple(performances)), answers


class Readout(nn.Module):
    """Answers by one attention per lane over the tokens, as a DiT's cross-attention would read them."""

    def __init__(self, dim: int, heads: int = 4, channels: int = 32) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(len(PLACES), heads, channels))
        self.key, self.value = nn.Linear(dim, heads * channels), nn.Linear(dim, heads * channels)
        self.answers = nn.ModuleList(nn.Linear(heads * channels, choices) for choices in QUESTIONS)

    def forward(self, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        """tokens [B, L, dim], mask [B, L] -> per question logits [B, places, choices]."""
        shape = self.query.shape[1:]
        key, value = self.key(tokens).unflatten(2, shape), self.value(tokens).unflatten(2, shape)
        scores = torch.einsum("phc,blhc->bphl", self.query, key) * shape[1] ** -0.5
        weights = scores.masked_fill((mask == 0)[:, None, None], -torch.inf).softmax(-1)
        read = torch.einsum("bphl,blhc->bphc", weights, value).flatten(2)
        return [answer(read) for answer in self.answers]


def read_back(
    encoder: nn.Module,
    tokenizer,
    *,
    train_encoder: bool,
    steps: int,
    seed: int = 0,
    batch: int = 64,
    rate: float = 3e-3,
) -> tuple[list[float], float]:
    """Fit a `Readout`, and the encoder if asked; shares of right answers on fresh captions of two or three, and seconds."""
    torch.manual_seed(seed)
    readout = Readout(encoder.config.d_model)
    encoder.requires_grad_(train_encoder)
    parameters = [p for module in (readout, encoder) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    rng, began = np.random.default_rng([seed, 30]), time.monotonic()

    def answer(rng: np.random.Generator, count: int) -> tuple[list[Tensor], Tensor]:
        captions, truth = zip(*(draw_caption(rng) for _ in range(count)), strict=True)
        tokens = tokenizer(list(captions), padding=True, return_tensors="pt", return_token_type_ids=False)
        features = encoder(**tokens).last_hidden_state
        return readout(features, tokens["attention_mask"]), torch.stack(truth)

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (1 - step / steps)
        found, truth = answer(rng, batch)
        loss = sum(
            F.cross_entropy(logits.flatten(0, 1), truth[..., i].flatten(), ignore_index=NOT_ASKED)
            for i, logits in enumerate(found)
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    encoder.requires_grad_(False)
    with torch.no_grad():
        found, truth = answer(np.random.default_rng([seed, 31]), 600)
    several = (truth[..., 0].sum(1) > 1)[:, None]
    asked = [(truth[..., i] != NOT_ASKED) & several for i in range(len(QUESTIONS))]
    shares = [
        (logits.argmax(-1) == truth[..., i])[asked[i]].float().mean().item() for i, logits in enumerate(found)
    ]
    return shares, time.monotonic() - began


def train_text_encoder(out: Path, *, steps: int, seed: int) -> None:
    """Train the embedded text encoder and write `text.pt`, a state dict in transformers' names."""
    from transformers import PreTrainedTokenizerFast

    config = TASKS["r2v-tiny"].configuration({})
    write_tokenizer(out / "tokenizer", config.t5.vocab)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    encoder = random_encoder(**dict(config.t5), seed=seed)
    lines = []
    for label, train, count in (
        ("random encoder, frozen", False, steps // 2),
        ("trained together with the readout", True, steps),
        ("trained encoder, frozen, new readout", False, steps // 4),
    ):
        shares, seconds = read_back(encoder, tokenizer, train_encoder=train, steps=count, seed=seed)
        names = ("present", "order", "shape", "size", "motion")
        answers = ", ".join(f"{name} {share:.1%}" for name, share in zip(names, shares, strict=True))
        lines.append(f"{label}: {answers} ({count} steps, {seconds:.0f} s)")
        print(lines[-1], flush=True)
        if train:
            with atomic_path(out / "text.pt") as aside:
                torch.save(encoder.state_dict(), aside)
    (out / "log.txt").write_text("\n".join(lines) + "\n")
