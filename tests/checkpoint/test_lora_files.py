"""LoRA files of every tool: read by name, scale and shape, and worked into the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from refalign_ext.backbone import diffusers_key
from refalign_ext.checkpoint.lora_files import read_lora, with_loras
from refalign_ext.checkpoint.weights import Weight, read_weights
from refalign_ext.request import parse_lora

DIM, FFN, RANKS = 12, 20, {"ffn.0": 3}  # any other layer has rank 2
LAYERS = {
    **{
        f"blocks.{block}.{attention}.{name}": (DIM, DIM)
        for block in (0, 1, 10)
        for attention in ("self_attn", "cross_attn")
        for name in "qkvo"
    },
    **{f"blocks.{block}.ffn.0": (FFN, DIM) for block in (0, 1, 10)},
    **{f"blocks.{block}.ffn.2": (DIM, FFN) for block in (0, 1, 10)},
    "text_embedding.0": (DIM, 7),
    "time_projection.1": (6 * DIM, DIM),
    "head.head": (16, DIM),
    "patch_embedding": (DIM, 4, 1, 2, 2),
}
NORMS = ("blocks.0.norm3", "blocks.1.norm3")
Factors = dict[str, tuple[Tensor, Tensor]]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    tensors = {}
    for seed, (layer, shape) in enumerate(LAYERS.items()):
        tensors[f"{layer}.weight"] = random(*shape, seed=seed)
        tensors[f"{layer}.bias"] = random(shape[0], seed=1000 + seed)
    for name in NORMS:
        tensors |= {f"{name}.weight": torch.ones(DIM), f"{name}.bias": torch.zeros(DIM)}
    return tensors


def rank_of(layer: str) -> int:
    return next((rank for end, rank in RANKS.items() if layer.endswith(end)), 2)


def factors_of(layers: list[str]) -> Factors:
    """A [rank, in] and B [out, rank] of linear layers."""
    return {
        layer: (
            random(rank_of(layer), LAYERS[layer][1], seed=2000 + seed),
            random(LAYERS[layer][0], rank_of(layer), seed=3000 + seed),
        )
        for seed, layer in enumerate(layers)
    }


IN_BLOCKS = [layer for layer in LAYERS if layer.startswith("blocks.")]
SOME = ["blocks.1.self_attn.q", "blocks.10.ffn.0", "blocks.0.cross_attn.o"]
OUTSIDE = ["text_embedding.0", "time_projection.1", "head.head"]


def read(file: Path, base: dict[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    lora = read_lora(file, {name: tensor.shape for name, tensor in base.items()})
    assert not lora.unknown
    weights = {name: Weight.of(tensor) for name, tensor in base.items()}
    return read_weights(with_loras(weights, [(lora, strength)]))


def merged(base: dict[str, Tensor], factors: Factors, scale: Callable[[str], float]) -> dict[str, Tensor]:
    """The definition: W + scale B A, in float64."""
    changed = {
        f"{layer}.weight": base[f"{layer}.weight"].double() + scale(layer) * b.double() @ a.double()
        for layer, (a, b) in factors.items()
    }
    return {**base, **changed}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=1e-5, atol=1e-5, msg=name)


ALPHA = 6.0


def with_alpha(layer: str) -> float:
    return ALPHA / rank_of(layer)


def as_it_is(layer: str) -> float:
    return 1.0


def theirs(layer: str) -> str:
    return diffusers_key(f"{layer}.weight").removesuffix(".weight")


# name -> (prefix and layer, the two factors, whether a file of this style has alphas)
STYLES = {
    "peft": (lambda layer: f"base_model.model.{layer}", ("lora_A.weight", "lora_B.weight"), False),
    "diffusers": (lambda layer: f"transformer.{theirs(layer)}", ("lora_A.weight", "lora_B.weight"), False),
    "older diffusers": (
        lambda layer: f"transformer.{theirs(layer)}",
        ("lora.down.weight", "lora.up.weight"),
        False,
    ),
    "ComfyUI": (lambda layer: f"diffusion_model.{layer}", ("lora_A.weight", "lora_B.weight"), False),
    "ComfyUI with alpha": (
        lambda layer: f"diffusion_model.{layer}",
        ("lora_down.weight", "lora_up.weight"),
        True,
    ),
    "musubi-tuner": (
        lambda layer: f"lora_unet_{layer.replace('.', '_')}",
        ("lora_down.weight", "lora_up.weight"),
        True,
    ),
    "sd-scripts": (
        lambda layer: f"lora_transformer_{theirs(layer).replace('.', '_')}",
        ("lora_down.weight", "lora_up.weight"),
        True,
    ),
    "DiffSynth": (lambda layer: layer, ("lora_A.default.weight", "lora_B.default.weight"), False),
    "LightX2V": (lambda layer: f"diffusion_model.{layer}", ("lora_down.weight", "lora_up.weight"), False),
}


def write(style: str, file: Path, factors: Factors) -> None:
    name, (down, up), has_alpha = STYLES[style]
    tensors = {}
    for layer, (a, b) in factors.items():
        tensors |= {f"{name(layer)}.{down}": a, f"{name(layer)}.{up}": b}
        if has_alpha:
            tensors[f"{name(layer)}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, file)


@pytest.mark.parametrize(
    "layers", [IN_BLOCKS, SOME, OUTSIDE], ids=["all", "some layers", "outside the blocks"]
)
@pytest.mark.parametrize("style", STYLES)
def test_every_style_changes_the_layers_it_names(
    style: str, layers: list[str], base: dict[str, Tensor], tmp_path: Path
) -> None:
    factors = factors_of(layers)
    write(style, tmp_path / "lora.safetensors", factors)
    scale = with_alpha if STYLES[style][2] else as_it_is
    assert_same(read(tmp_path / "lora.safetensors", base), merged(base, factors, scale))


@pytest.mark.parametrize("style", ["ComfyUI", "ComfyUI with alpha", "musubi-tuner", "LightX2V"])
def test_diffusers_reads_the_same(style: str, base: dict[str, Tensor], tmp_path: Path) -> None:
    """Oracle: diffusers' conversion of the files it knows, then the definition."""
    from diffusers.loaders import WanLoraLoaderMixin

    layers = [layer for layer in IN_BLOCKS if not layer.startswith("blocks.10")]  # it counts blocks from 0
    write(style, tmp_path / "lora.safetensors", factors_of(layers))
    converted = WanLoraLoaderMixin.lora_state_dict(str(tmp_path), weight_name="lora.safetensors")
    wanted = dict(base)
    for layer in layers:
        a, b = (converted[f"transformer.{theirs(layer)}.lora_{factor}.weight"] for factor in "AB")
        wanted[f"{layer}.weight"] = base[f"{layer}.weight"] + b @ a
    assert_same(read(tmp_path / "lora.safetensors", base), wanted)


def test_peft_settings_beside_the_file_give_the_scales(base: dict[str, Tensor], tmp_path: Path) -> None:
    factors = factors_of(SOME)
    write("peft", tmp_path / "adapter_model.safetensors", factors)
    settings = {"r": 2, "lora_alpha": 5, "alpha_pattern": {"ffn.0": 9}, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    expected = merged(base, factors, lambda layer: 9 / 3 if layer.endswith("ffn.0") else 5 / 2)
    assert_same(read(tmp_path, base), expected)

    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 5, "use_rslora": True}))
    assert_same(read(tmp_path, base), merged(base, factors, lambda layer: 5 / rank_of(layer) ** 0.5))


def test_diffusers_settings_in_the_file_give_the_scales(base: dict[str, Tensor], tmp_path: Path) -> None:
    factors = factors_of(SOME)
    tensors = {
        f"transformer.{theirs(layer)}.lora_{name}.weight": tensor
        for layer, pair in factors.items()
        for name, tensor in zip("AB", pair, strict=True)
    }
    note = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 7})
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": note})
    assert_same(
        read(tmp_path / "lora.safetensors", base), merged(base, factors, lambda layer: 7 / rank_of(layer))
    )


def test_whole_differences_are_added(base: dict[str, Tensor], tmp_path: Path) -> None:
    changes = {
        "blocks.0.self_attn.q.diff_b": random(DIM, seed=1),
        "blocks.0.norm3.diff": random(DIM, seed=2),
        "blocks.0.norm3.diff_b": random(DIM, seed=3),
        "head.head.diff": random(16, DIM, seed=4),
    }
    save_file(
        {f"diffusion_model.{name}": value for name, value in changes.items()}, tmp_path / "a.safetensors"
    )
    wanted = dict(base)
    for name, value in changes.items():
        parameter = name.replace(".diff_b", ".bias").replace(".diff", ".weight")
        wanted[parameter] = base[parameter] + 0.5 * value
    assert_same(read(tmp_path / "a.safetensors", base, strength=0.5), wanted)


def test_convolutions_have_kernels_as_factors(base: dict[str, Tensor], tmp_path: Path) -> None:
    a, b = random(2, 4, 1, 2, 2, seed=1), random(DIM, 2, 1, 1, 1, seed=2)
    save_file(
        {
            "diffusion_model.patch_embedding.lora_down.weight": a,
            "diffusion_model.patch_embedding.lora_up.weight": b,
        },
        tmp_path / "a.safetensors",
    )
    change = (b.flatten(1) @ a.flatten(1)).view(DIM, 4, 1, 2, 2)
    found = read(tmp_path / "a.safetensors", base)["patch_embedding.weight"]
    torch.testing.assert_close(found, base["patch_embedding.weight"] + change)


def test_several_files_add_up_and_weights_are_rounded_once(base: dict[str, Tensor], tmp_path: Path) -> None:
    names, strengths = ("one", "two"), (0.75, -2.0)
    half = {name: tensor.bfloat16() for name, tensor in base.items()}
    wanted = {name: tensor.double() for name, tensor in half.items()}
    loras = []
    for name, strength in zip(names, strengths, strict=True):
        factors = factors_of(SOME if name == "one" else SOME[:1])
        write("DiffSynth", tmp_path / f"{name}.safetensors", factors)
        wanted = merged(wanted, factors, lambda layer, strength=strength: strength)
        shapes = {key: tensor.shape for key, tensor in base.items()}
        loras.append((read_lora(tmp_path / f"{name}.safetensors", shapes), strength))
    found = read_weights(with_loras({key: Weight.of(tensor) for key, tensor in half.items()}, loras))
    for key, tensor in wanted.items():
        assert found[key].dtype is torch.bfloat16
        torch.testing.assert_close(found[key], tensor.to(torch.bfloat16), rtol=2**-8, atol=0)


def test_foreign_keys_are_listed(base: dict[str, Tensor], tmp_path: Path) -> None:
    write("ComfyUI", tmp_path / "a.safetensors", factors_of(SOME))
    from safetensors.torch import load_file

    image = "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight"
    save_file({**load_file(tmp_path / "a.safetensors"), image: torch.ones(2, 3)}, tmp_path / "b.safetensors")
    lora = read_lora(tmp_path / "b.safetensors", {name: tensor.shape for name, tensor in base.items()})
    assert lora.unknown == [image]
    assert set(lora.factors) == set(SOME)


Q = "diffusion_model.blocks.0.self_attn.q"
A, B = torch.ones(2, DIM), torch.ones(DIM, 2)
MISTAKES = {
    "of another model": ({"lora_unet_down_blocks_0_attn.lora_A.weight": A}, "down_blocks"),
    "a whole model": ({"blocks.0.self_attn.q.weight": torch.ones(DIM, DIM)}, "no LoRA of this model"),
    "one factor": ({f"{Q}.lora_A.weight": A}, "lacks a factor of blocks.0.self_attn.q"),
    "other size": ({f"{Q}.lora_A.weight": torch.ones(2, 9), f"{Q}.lora_B.weight": B}, "a model of this size"),
    "ranks differ": (
        {f"{Q}.lora_A.weight": torch.ones(3, DIM), f"{Q}.lora_B.weight": B},
        "blocks.0.self_attn.q",
    ),
    "bias of another size": ({f"{Q}.diff_b": torch.ones(3)}, "blocks.0.self_attn.q.bias"),
    "DoRA": (
        {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.dora_scale": torch.ones(DIM, 1)},
        "DoRA",
    ),
    "LoKr": ({f"{Q}.lokr_w1": A}, "LoKr"),
    "LoHa": ({f"{Q}.hada_w1_a": A}, "LoHa"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_what_cannot_be_read_is_named(what: str, base: dict[str, Tensor], tmp_path: Path) -> None:
    tensors, named = MISTAKES[what]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors") as error:
        read(tmp_path / "a.safetensors", base)
    assert named in str(error.value)


@pytest.mark.parametrize(
    "text, path, scale",
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        ("folder:2/a.safetensors", "folder:2/a.safetensors", 1.0),
        ("C:/a.safetensors:0.5", "C:/a.safetensors", 0.5),
    ],
)
def test_a_scale_follows_the_file(text: str, path: str, scale: float) -> None:
    assert parse_lora(text) == (Path(path), scale)


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_a_scale_has_to_be_finite(scale: str) -> None:
    with pytest.raises(ValueError, match=scale):
        parse_lora(f"a.safetensors:{scale}")


def test_a_file_may_end_like_a_scale(tmp_path: Path) -> None:
    (tmp_path / "a:2").touch()
    assert parse_lora(str(tmp_path / "a:2")) == (tmp_path / "a:2", 1.0)
