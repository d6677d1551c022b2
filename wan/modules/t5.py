"""The text encoder of Wan2.1: upstream's UMT5 checkpoint in transformers' UMT5EncoderModel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wan.modules.tokenizers import HuggingfaceTokenizer
from wan.utils.weights import load_strict, read_state_dict

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

_DEFAULTS = dict(
    vocab=256384, dim=4096, dim_attn=4096, dim_ffn=10240, num_heads=64, num_layers=24, num_buckets=32
)
_OUTER = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_TIED = "encoder.embed_tokens.weight"


class T5EncoderModel:
    """Turns prompts into text embeddings. Matches ``wan/modules/t5.py`` upstream.

    Attributes:
        model: the ``UMT5EncoderModel``, frozen and in evaluation mode (or what ``shard_fn`` made of it).
        tokenizer: the :class:`HuggingfaceTokenizer`.
    """

    def __init__(
        self,
        text_len: int,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        checkpoint_path: str | Path | None = None,
        tokenizer_path: str | Path | None = None,
        shard_fn: Callable[..., torch.nn.Module] | None = None,
        *,
        config: Mapping[str, int] | None = None,
    ) -> None:
        """
        Args:
            text_len: tokens per prompt, longer ones are cut.
            dtype: of weights and computation; float16 is refused because UMT5 overflows in it.
            device: where the model lives.
            checkpoint_path: checkpoint under upstream's names; ``None``: random weights.
            tokenizer_path: folder of the tokenizer.
            shard_fn: called as ``shard_fn(model, sync_module_states=False)`` instead of moving to ``device``.
            config: ``t5`` section of a task's configuration (vocab, dim, dim_attn, dim_ffn, num_heads,
                num_layers, num_buckets); ``None`` means umt5-xxl.

        Raises:
            ValueError: no tokenizer; the checkpoint is unreadable or of another model; float16.
        """
        if dtype == torch.float16:
            raise ValueError("text encoder: UMT5 overflows in float16; use bfloat16 or float32")
        if tokenizer_path is None:
            raise ValueError("text encoder: no tokenizer folder given; pass tokenizer_path")
        self.text_len = text_len
        self.dtype = dtype
        self.tokenizer = HuggingfaceTokenizer(tokenizer_path, seq_len=text_len, clean="whitespace")
        if checkpoint_path is None:
            model = build_t5(config).to(dtype)
        else:
            with torch.device("meta"):
                model = build_t5(config)
            state_dict = t5_state_dict_to_transformers(read_state_dict(checkpoint_path))
            model.encoder.embed_tokens = None  # the library's second name for the first embedding
            load_strict(model, state_dict, str(checkpoint_path), dtype=dtype)
            model.set_input_embeddings(model.shared)
        model.eval().requires_grad_(False)
        self.model = model.to(device) if shard_fn is None else shard_fn(model, sync_module_states=False)

    def __call__(self, texts: str | Sequence[str], device: str | torch.device) -> list[torch.Tensor]:
        """Embed prompts; the work is done where the model is.

        Args:
            texts: one prompt or several; an empty one has its end token only.
            device: where the embeddings are put.

        Returns:
            Per prompt [L, dim] with L <= text_len. Rows of padding are cut; they are not zero.
        """
        tokens, mask = self.tokenizer(texts, return_mask=True, add_special_tokens=True)  # [B, text_len]
        home = next(self.model.parameters()).device
        output = self.model(input_ids=tokens.to(home), attention_mask=mask.to(home))
        lengths = mask.sum(dim=1).tolist()
        hidden = output.last_hidden_state  # [B, text_len, dim]
        return [row[:length].to(device) for row, length in zip(hidden, lengths, strict=True)]


def build_t5(config: Mapping[str, int] | None = None) -> UMT5EncoderModel:
    """An untrained ``UMT5EncoderModel`` of a configuration (see :class:`T5EncoderModel`), on the default device."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = {**_DEFAULTS, **(config or {})}
    assert config["dim_attn"] % config["num_heads"] == 0
    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=config["vocab"],
            d_model=config["dim"],
            d_kv=config["dim_attn"] // config["num_heads"],
            d_ff=config["dim_ffn"],
            num_layers=config["num_layers"],
            num_heads=config["num_heads"],
            relative_attention_num_buckets=config["num_buckets"],
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            # Exactly upstream's arithmetic; the library's fused kernel differs by 0.08 of 5 in bfloat16.
            attn_implementation="eager",
        )
    )
    model.set_input_embeddings(model.shared)  # not every release of the library ties them under "meta"
    return model


def t5_state_dict_to_transformers(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename upstream's parameters to transformers'; foreign names stay as they are."""
    names = dict(_key_pairs(state_dict))
    return {names.get(name, name): tensor for name, tensor in state_dict.items()}


def t5_state_dict_from_transformers(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a ``UMT5EncoderModel`` state dict to those of upstream's ``models_t5_umt5-xxl-enc-bf16.pth``.

    Raises:
        ValueError: a name does not belong to a gated UMT5 encoder.
    """
    state_dict = {name: tensor for name, tensor in state_dict.items() if name != _TIED}
    names = {theirs: ours for ours, theirs in _key_pairs(state_dict)}
    foreign = [name for name in state_dict if name not in names]
    if foreign:
        raise ValueError(
            f"text encoder weights: {len(foreign)} foreign names, such as {foreign[0]}; "
            f"give those of a UMT5EncoderModel"
        )
    return {names[name]: tensor for name, tensor in state_dict.items()}


def _key_pairs(state_dict: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Upstream's and transformers' names for as many blocks as a state dict of either can have."""
    yield from _OUTER.items()
    indices = {part for name in state_dict for part in name.split(".")[1:3] if part.isdigit()}
    for index in indices:
        for ours, theirs in _BLOCK.items():
            yield f"blocks.{index}.{ours}.weight", f"encoder.block.{index}.{theirs}.weight"
