"""T5EncoderModel: upstream's key layout, agreement with transformers and with the formula written out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import UMT5EncoderModel

from wan.modules.t5 import (
    T5EncoderModel,
    build_t5,
    t5_state_dict_from_transformers,
    t5_state_dict_to_transformers,
)

CONFIG = dict(vocab=40, dim=32, dim_attn=48, dim_ffn=64, num_heads=4, num_layers=2, num_buckets=8)
PIECES = ["<pad>", "</s>", "<s>", "<unk>", "▁", "▁red", "▁cat", "▁runs", "▁to", "▁the", "▁sea"]
PROMPTS = ["red cat runs to the sea", "", "the  red\ncat"]
LENGTHS = [7, 1, 4]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("umt5-tiny")
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(PIECES)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(PIECES[:4])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"pad_token": "<pad>", "eos_token": "</s>"}')
    return path


@pytest.fixture(scope="module")
def library_model() -> UMT5EncoderModel:
    torch.manual_seed(0)
    model = build_t5(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms away from one, attention away from uniform
        parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    return model


@pytest.fixture(scope="module")
def checkpoint(library_model: UMT5EncoderModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t5") / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save(t5_state_dict_from_transformers(library_model.state_dict()), path)
    return path


def load(
    checkpoint: Path | None, tokenizer_folder: Path, dtype: torch.dtype = torch.float32
) -> T5EncoderModel:
    return T5EncoderModel(12, dtype, "cpu", checkpoint, tokenizer_folder, config=CONFIG)


def test_upstream_key_layout(checkpoint: Path) -> None:
    state_dict = torch.load(checkpoint, weights_only=True)
    per_block = {
        "norm1.weight": (32,),
        "attn.q.weight": (48, 32),
        "attn.k.weight": (48, 32),
        "attn.v.weight": (48, 32),
        "attn.o.weight": (32, 48),
        "norm2.weight": (32,),
        "ffn.gate.0.weight": (64, 32),
        "ffn.fc1.weight": (64, 32),
        "ffn.fc2.weight": (32, 64),
        "pos_embedding.embedding.weight": (8, 4),
    }
    expected = {"token_embedding.weight": (40, 32), "norm.weight": (32,)}
    expected |= {f"blocks.{block}.{name}": shape for block in range(2) for name, shape in per_block.items()}
    assert {name: tuple(tensor.shape) for name, tensor in state_dict.items()} == expected


def test_key_map_of_the_full_model_is_complete() -> None:
    with torch.device("meta"):
        state_dict = build_t5().state_dict()
    upstream = t5_state_dict_from_transformers(state_dict)
    assert len(upstream) == 242
    assert t5_state_dict_to_transformers(upstream).keys() == state_dict.keys() - {
        "encoder.embed_tokens.weight"
    }


def test_equals_the_library(
    library_model: UMT5EncoderModel, checkpoint: Path, tokenizer_folder: Path
) -> None:
    encoder = load(checkpoint, tokenizer_folder)
    ids, mask = encoder.tokenizer(PROMPTS, return_mask=True)
    expected = library_model(input_ids=ids, attention_mask=mask).last_hidden_state
    embeddings = encoder(PROMPTS, "cpu")
    assert [tuple(embedding.shape) for embedding in embeddings] == [(length, 32) for length in LENGTHS]
    for embedding, row in zip(embeddings, expected, strict=True):
        assert torch.equal(embedding, row[: len(embedding)])
    assert expected[1, 1:].abs().max() > 0.1  # padding rows are not zero, which is why they are cut


def test_equals_the_formula(checkpoint: Path, tokenizer_folder: Path) -> None:
    weights = {name: tensor.double() for name, tensor in torch.load(checkpoint, weights_only=True).items()}
    encoder = load(checkpoint, tokenizer_folder, torch.float64)
    for prompt in PROMPTS:
        ids = encoder.tokenizer(prompt)[0]
        torch.testing.assert_close(
            encoder([prompt], "cpu")[0], formula(weights, ids[ids > 0]), atol=1e-5, rtol=1e-5
        )


def formula(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """UMT5 encoder on tokens without padding, from upstream's parameters."""

    def normalise(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weights[f"{name}.weight"]

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.view(len(ids), 4, 12).transpose(0, 1)

    x = weights["token_embedding.weight"][ids]
    buckets = torch.tensor([[bucket(key - query) for key in range(len(ids))] for query in range(len(ids))])
    for block in ("blocks.0", "blocks.1"):
        y = normalise(x, f"{block}.norm1")
        q, k, v = (split(y @ weights[f"{block}.attn.{name}.weight"].T) for name in "qkv")
        bias = weights[f"{block}.pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        y = (q @ k.transpose(1, 2) + bias).softmax(-1) @ v  # UMT5 does not scale the scores
        x = x + y.transpose(0, 1).flatten(1) @ weights[f"{block}.attn.o.weight"].T
        y = normalise(x, f"{block}.norm2")
        gate = functional.gelu(y @ weights[f"{block}.ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ weights[f"{block}.ffn.fc1.weight"].T)) @ weights[f"{block}.ffn.fc2.weight"].T
    return normalise(x, "norm")


def bucket(distance: int) -> int:
    """Of 8 buckets, 4 per direction: distances 0 and 1 exactly, then logarithmically up to 128."""
    offset, distance = (4 if distance > 0 else 0), abs(distance)
    if distance < 2:
        return offset + distance
    return offset + min(3, 2 + int(math.log(distance / 2) / math.log(128 / 2) * 2))


def test_a_prompt_does_not_depend_on_its_batch(checkpoint: Path, tokenizer_folder: Path) -> None:
    encoder = load(checkpoint, tokenizer_folder)
    for prompt, together in zip(PROMPTS, encoder(PROMPTS, "cpu"), strict=True):
        torch.testing.assert_close(encoder(prompt, "cpu")[0], together, atol=1e-5, rtol=1e-5)


def test_empty_and_long_prompts(checkpoint: Path, tokenizer_folder: Path) -> None:
    empty, cut = load(checkpoint, tokenizer_folder)(["", "red cat " * 50], "cpu")
    assert empty.shape == (1, 32) and empty.isfinite().all()
    assert cut.shape == (12, 32)


def test_bfloat16(checkpoint: Path, tokenizer_folder: Path) -> None:
    encoder = load(checkpoint, tokenizer_folder, torch.bfloat16)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.bfloat16}
    exact = load(checkpoint, tokenizer_folder)(PROMPTS, "cpu")
    for embedding, expected in zip(encoder(PROMPTS, "cpu"), exact, strict=True):
        assert embedding.dtype == torch.bfloat16
        assert (embedding.float() - expected).norm() < 0.1 * expected.norm()


def test_weights_are_tied_frozen_and_off_the_meta_device(checkpoint: Path, tokenizer_folder: Path) -> None:
    model = load(checkpoint, tokenizer_folder).model
    assert model.shared.weight is model.encoder.embed_tokens.weight
    assert not model.training
    for tensor in (*model.parameters(), *model.buffers()):
        assert tensor.device.type == "cpu"
        assert not tensor.requires_grad


def test_shard_fn_replaces_the_move(checkpoint: Path, tokenizer_folder: Path) -> None:
    calls = []

    def shard(model: torch.nn.Module, *, sync_module_states: bool) -> torch.nn.Module:
        calls.append(sync_module_states)
        return model

    encoder = T5EncoderModel(12, torch.float32, "meta", checkpoint, tokenizer_folder, shard, config=CONFIG)
    assert calls == [False]
    assert encoder(["red"], "cpu")[0].shape == (2, 32)
    assert load(None, tokenizer_folder)(["red"], "cpu")[0].shape == (2, 32)


def test_weights_of_another_model_are_refused(
    checkpoint: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"enc-bf16\.pth: these weights do not fit UMT5EncoderModel \(10 missing"
    ):
        T5EncoderModel(
            12, torch.float32, "cpu", checkpoint, tokenizer_folder, config={**CONFIG, "num_layers": 3}
        )
    state_dict = torch.load(checkpoint, weights_only=True)
    del state_dict["token_embedding.weight"]
    state_dict["blocks.0.extra.weight"] = torch.zeros(1)
    torch.save(state_dict, tmp_path / "t5.pth")
    with pytest.raises(ValueError, match=r"shared\.weight.*1 unexpected: blocks\.0\.extra\.weight"):
        load(tmp_path / "t5.pth", tokenizer_folder)


def test_user_mistakes(checkpoint: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="overflows in float16"):
        load(checkpoint, tokenizer_folder, torch.float16)
    with pytest.raises(ValueError, match="pass tokenizer_path"):
        T5EncoderModel(12, torch.float32, "cpu", checkpoint)
    with pytest.raises(ValueError, match=r"absent\.pth: no such checkpoint file"):
        load(tmp_path / "absent.pth", tokenizer_folder)
    with pytest.raises(ValueError, match=r"1 foreign names, such as lm_head\.weight"):
        t5_state_dict_from_transformers({"lm_head.weight": torch.zeros(1)})
