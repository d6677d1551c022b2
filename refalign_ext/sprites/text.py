"""The embedded text encoder before training: a small tokenizer over the sprite captions, and a UMT5 to begin with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from refalign_ext.sprites.world import sample_clip, subjects_of

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel


def write_tokenizer(folder: Path, vocabulary: int = 512, captions: int = 4000, seed: int = 0) -> int:
    """Train a byte-pair tokenizer on captions and write it where Wan expects google/umt5-xxl; returns its size.

    Every printable ASCII character is in the alphabet, so that prompts in other words are spelled, not lost.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    rng = np.random.default_rng(seed)
    subjects = subjects_of("train")
    texts = [sample_clip(rng, subjects, 1 + index % 3).caption for index in range(captions)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer.get_vocab_size()


def random_encoder(
    vocab: int,
    dim: int,
    dim_attn: int,
    dim_ffn: int,
    num_heads: int,
    num_layers: int,
    num_buckets: int,
    seed: int = 0,
) -> UMT5EncoderModel:
    """A UMT5 encoder with the library's own initialisation under `seed`."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocab,
        d_model=dim,
        d_kv=dim_attn // num_heads,
        d_ff=dim_ffn,
        num_heads=num_heads,
        num_layers=num_layers,
        relative_attention_num_buckets=num_buckets,
        dropout_rate=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UMT5EncoderModel(config).eval().requires_grad_(False)
