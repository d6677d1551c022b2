"""Adapters on a small WanModel with references attached: what they change, what they leave, and their files."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from refalign_ext.backbone import ReferenceBackbone, WanModel
from refalign_ext.checkpoint.reading import merge_adapter
from refalign_ext.checkpoint.weights import Weight, read_weights
from refalign_ext.lora import (
    adapter_scale,
    add_lora,
    is_adapter_key,
    matching_layers,
    merged_weight,
    split_state_dict,
)

SIZES = {
    **{"dim": 32, "ffn_dim": 48, "freq_dim": 16, "text_dim": 12, "text_len": 6},
    **{"num_heads": 2, "num_layers": 2},
}
ATTENTION = [f"{kind}.{leaf}" for kind in ("self_attn", "cross_attn") for leaf in "qkvo"]
DEFAULT = [f"blocks.{i}.{layer}" for i in (0, 1) for layer in [*ATTENTION, "ffn.0", "ffn.2"]]


def make_model(seed: int = 0) -> WanModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WanModel(**SIZES)
        nn.init.xavier_uniform_(model.head.head.weight)
        for name, parameter in model.named_parameters():
            if name.startswith("text_embedding") and parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
    return model


def outputs(backbone: ReferenceBackbone) -> list[Tensor]:
    """Two samples with one and two references: predictions, and the first block's reference tokens."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    result = backbone(
        [noise(16, 2, 4, 4), noise(16, 2, 4, 4)],
        torch.tensor([300.0, 700.0]),
        [noise(3, 12), noise(5, 12)],
        [noise(16, 1, 4, 4), noise(16, 2, 4, 4)],
        tap_depth=1,
    )
    return [*result.prediction, *result.reference_tokens]


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    return split_state_dict(model.state_dict())[1]


def merge(base: dict[str, Tensor], adapter: dict[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    held = ({name: Weight.of(tensor) for name, tensor in part.items()} for part in (base, adapter))
    return read_weights(merge_adapter(*held, rank, alpha))


def merged(model: nn.Module) -> dict[str, Tensor]:
    return merge(*split_state_dict(model.state_dict()), *adapter_scale(model))


def loss_of(backbone: ReferenceBackbone) -> Tensor:
    return sum((output - 1).square().mean() for output in outputs(backbone))


def train(backbone: ReferenceBackbone, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        loss_of(backbone).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def trained() -> WanModel:
    """A model with trained adapters (alpha is not the rank); do not change it."""
    model = make_model()
    add_lora(model, 4, 6.0)
    backbone = ReferenceBackbone(model)
    train(backbone)
    return backbone.detach()


def assert_bitwise(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        same = found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)
        assert same and torch.equal(found[key].signbit(), tensor.signbit()), key


def test_a_new_adapter_changes_no_output_and_no_key_of_the_base() -> None:
    model = make_model()
    before, keys = outputs(ReferenceBackbone(copy.deepcopy(model))), list(model.state_dict())
    backbone = ReferenceBackbone(model)
    state = torch.get_rng_state()
    assert add_lora(model, 4, 8.0) == DEFAULT
    assert torch.equal(torch.get_rng_state(), state)
    for found, expected in zip(outputs(backbone), before, strict=True):
        assert torch.equal(found, expected)
    assert type(model) is WanModel and adapter_scale(model) == (4, 8.0)
    base, adapter = split_state_dict(model.state_dict())
    assert list(base) == keys
    assert list(adapter) == [f"{name}.lora_{factor}.weight" for name in DEFAULT for factor in "AB"]
    assert "blocks.0.self_attn.q.base_layer.weight" in model.state_dict()
    assert_bitwise(merged(model), make_model().state_dict())
    assert model.config["dim"] == 32 and "peft_config" not in model.config


def test_only_adapters_learn() -> None:
    model = make_model()
    add_lora(model, 4, 4.0)
    backbone = ReferenceBackbone(model)
    train(backbone, steps=1)  # before the first step B is zero, and so is A's gradient
    loss_of(backbone).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == is_adapter_key(name), name
        if is_adapter_key(name):
            assert parameter.dtype == torch.float32 and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    base, _ = split_state_dict(model.state_dict())
    assert_bitwise(base, dict(make_model().state_dict()))


def test_merging_plain_tensors(trained: WanModel) -> None:
    base, adapter = split_state_dict(trained.state_dict())
    whole, key = merged(trained), "blocks.1.ffn.2.weight"
    a, b = adapter["blocks.1.ffn.2.lora_A.weight"], adapter["blocks.1.ffn.2.lora_B.weight"]
    torch.testing.assert_close(whole[key], base[key] + 1.5 * b @ a)
    half = merge({name: t.bfloat16() for name, t in base.items()}, adapter, 4, 6.0)
    assert torch.equal(half[key], (base[key].bfloat16().float() + (b @ a) * 1.5).bfloat16())
    with pytest.raises(ValueError, match=r"lacks a factor of blocks\.0\.self_attn\.q"):
        merge(base, {k: t for k, t in list(adapter.items())[1:]}, 4, 6.0)


def test_merging_nothing_keeps_the_sign_of_zero() -> None:
    weight = torch.tensor([[-0.0, 1.0]])
    assert merged_weight(weight, torch.ones(1, 2), torch.zeros(1, 1), 2.0) is weight


def test_the_start_depends_on_the_seed_and_the_layer_alone() -> None:
    whole, part, other = make_model(), make_model(), make_model()
    add_lora(whole, 4, 4.0, seed=7)
    torch.manual_seed(99)
    add_lora(part, 4, 4.0, "blocks.1.ffn", seed=7)
    add_lora(other, 4, 4.0, seed=8)
    start = adapter_of(whole)
    for key, tensor in adapter_of(part).items():
        assert torch.equal(tensor, start[key])
    key = "blocks.1.ffn.0.lora_A.weight"
    assert not torch.equal(adapter_of(other)[key], start[key])
    assert not torch.equal(start["blocks.0.ffn.0.lora_A.weight"], start[key])
    a, b = start["blocks.1.ffn.2.lora_A.weight"], start["blocks.1.ffn.2.lora_B.weight"]
    assert 0.9 / 48**0.5 < a.abs().max() <= 1 / 48**0.5 and a.shape == (4, 48)
    assert abs(a.mean()) < 0.03 and not b.any() and b.shape == (32, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapters_are_float32_whatever_the_base_is(dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    add_lora(model, 4, 4.0)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if is_adapter_key(name) else dtype), name
    before = outputs(ReferenceBackbone(make_model().to(dtype)))
    backbone = ReferenceBackbone(model)
    for found, wanted in zip(outputs(backbone), before, strict=True):
        assert torch.equal(found, wanted)
    loss_of(backbone).backward()
    assert merged(model)["blocks.0.ffn.0.weight"].dtype == dtype


def test_autocast(trained: WanModel) -> None:
    backbone = ReferenceBackbone(copy.deepcopy(trained))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = outputs(backbone)
    with torch.no_grad():
        expected = outputs(backbone)
    for half, full in zip(found, expected, strict=True):
        assert (half - full).norm() < 3e-2 * full.norm()


def test_activation_checkpointing_gives_the_same_gradients(trained: WanModel) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(trained)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        backbone = ReferenceBackbone(model)
        backbone.zero_grad()
        loss_of(backbone).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 2 * len(DEFAULT)
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q,k,v,o,ffn", DEFAULT),
        (" ffn.2 ,cross_attn.v", [f"blocks.{i}.{name}" for i in (0, 1) for name in ("cross_attn.v", "ffn.2")]),
        ("blocks.1.self_attn", [f"blocks.1.self_attn.{leaf}" for leaf in "qkvo"]),
        ("text_embedding", ["text_embedding.0", "text_embedding.2"]),
        (r"re:blocks\.0\.(self_attn\.[qk]|ffn\.0)", [f"blocks.0.{x}" for x in ("self_attn.q", "self_attn.k", "ffn.0")]),
        ("re:.*_attn.{1,2}o", [f"blocks.{i}.{kind}.o" for i in (0, 1) for kind in ("self_attn", "cross_attn")]),
    ],
)  # fmt: skip
def test_targets(targets: str, expected: list[str]) -> None:
    model = make_model()
    assert matching_layers(model, targets) == expected
    assert add_lora(model, 2, 2.0, targets) == expected
    assert sorted(adapter_of(model)) == sorted(
        f"{name}.lora_{factor}.weight" for name in expected for factor in "AB"
    )


@pytest.mark.parametrize(
    "targets", ["to_q", "q,to_q", "", "q,", "re:q", "time_projection", "head", "modulation"]
)
def test_targets_that_match_nothing_list_what_there_is(targets: str) -> None:
    there_is = r"there are blocks\.\*\.cross_attn\.k, .*blocks\.\*\.ffn\.0.*text_embedding\.2$"
    with pytest.raises(ValueError, match="matches no linear layer: " + there_is):
        add_lora(make_model(), 2, 2.0, targets)


def test_mistakes() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="is no regular expression"):
        add_lora(model, 2, 2.0, "re:(")
    for rank, alpha in ((0, 1.0), (4, 0.0), (4, float("nan"))):
        with pytest.raises(ValueError, match="do not make an adapter"):
            add_lora(model, rank, alpha)
    assert list(model.state_dict()) == list(make_model().state_dict())
    add_lora(model, 2, 2.0)
    with pytest.raises(ValueError, match="already has LoRA adapters"):
        add_lora(model, 2, 2.0, "base_layer")
