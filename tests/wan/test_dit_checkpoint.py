"""Reading and loading the diffusion transformer from every published layout."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from easydict import EasyDict
from safetensors.torch import save_file

from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel
from wan.utils.dit_checkpoint import (
    checkpoint_files,
    dit_arguments,
    dit_state_dict_from_diffusers,
    load_dit,
    read_dit_checkpoint,
)

NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def cfg() -> EasyDict:
    config = copy.deepcopy(WAN_CONFIGS["t2v-1.3B"])
    config.update(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=20, text_len=8, freq_dim=32)
    return config


@pytest.fixture
def weights(cfg: EasyDict) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        key: torch.randn_like(value) for key, value in WanModel(**dit_arguments(cfg)).state_dict().items()
    }


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


@pytest.mark.parametrize("as_folder", [True, False])
def test_single_file(tmp_path: Path, weights: dict[str, torch.Tensor], as_folder: bool) -> None:
    save_file(weights, tmp_path / NAME)
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"another file of a checkpoint folder")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 48, "num_heads": 2}))
    checkpoint = read_dit_checkpoint(tmp_path if as_folder else tmp_path / NAME)
    assert_same(checkpoint.state_dict, weights)
    assert checkpoint.projectors == {}
    assert checkpoint.config == {"dim": 48, "num_heads": 2}
    assert checkpoint.files == [tmp_path / NAME]


@pytest.mark.parametrize("as_folder", [True, False])
def test_sharded_index(tmp_path: Path, weights: dict[str, torch.Tensor], as_folder: bool) -> None:
    names = [f"diffusion_pytorch_model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    shard_of = {key: names[i % 3] for i, key in enumerate(weights)}
    for name in names:
        save_file({key: weights[key] for key in weights if shard_of[key] == name}, tmp_path / name)
    index = tmp_path / f"{NAME}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    checkpoint = read_dit_checkpoint(tmp_path if as_folder else index)
    assert_same(checkpoint.state_dict, weights)
    assert checkpoint.config is None
    assert checkpoint.files == [tmp_path / name for name in names]


@pytest.mark.parametrize("prefix", ["pipe.dit.", "dit.", "model.", "module.", "module.model.", "_orig_mod."])
def test_refalign_release(tmp_path: Path, weights: dict[str, torch.Tensor], prefix: str) -> None:
    projectors = {
        f"blocks.{block}.input_mlp.proj.{layer}.weight": torch.randn(3, 4)
        for block in (0, 1)
        for layer in (0, 2)
    }
    save_file(
        {prefix + key: tensor for key, tensor in (weights | projectors).items()},
        tmp_path / "release.safetensors",
    )
    checkpoint = read_dit_checkpoint(tmp_path / "release.safetensors")
    assert_same(checkpoint.state_dict, weights)
    assert_same(checkpoint.projectors, projectors)


@pytest.mark.parametrize("as_pipeline", [True, False])
def test_diffusers_folder(tmp_path: Path, weights: dict[str, torch.Tensor], as_pipeline: bool) -> None:
    oracle = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, text_dim=20, freq_dim=32, ffn_dim=64, num_layers=2
    )
    oracle.load_state_dict(convert_wan_transformer_to_diffusers(dict(weights)), strict=True)
    oracle.save_pretrained(tmp_path / "transformer")
    checkpoint = read_dit_checkpoint(tmp_path if as_pipeline else tmp_path / "transformer")
    assert_same(checkpoint.state_dict, weights)
    assert checkpoint.config["dim"] == 48 and checkpoint.config["num_heads"] == 2
    assert checkpoint.config["in_dim"] == 16 and checkpoint.config["model_type"] == "t2v"


def test_the_key_map_inverts_diffusers(weights: dict[str, torch.Tensor]) -> None:
    assert_same(dit_state_dict_from_diffusers(convert_wan_transformer_to_diffusers(dict(weights))), weights)
    assert list(dit_state_dict_from_diffusers({"blocks.0.foreign.weight": torch.zeros(1)})) == [
        "blocks.0.foreign.weight"
    ]


def test_loading(tmp_path: Path, cfg: EasyDict, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, tmp_path / NAME)
    model = load_dit(tmp_path, cfg)
    assert_same(dict(model.state_dict()), weights)
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert model.num_heads == 2 and model.text_len == 8


def test_loading_in_half_precision_keeps_the_float32_parts(
    tmp_path: Path, cfg: EasyDict, weights: dict[str, torch.Tensor]
) -> None:
    save_file(weights, tmp_path / NAME)
    model = load_dit(tmp_path, cfg, device="cpu", dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    in_float32 = {
        name.split(".")[0] if not name.startswith("blocks.") else name.split(".")[2]
        for name, dtype in dtypes.items()
        if dtype == torch.float32
    }
    assert in_float32 == {"time_embedding", "time_projection", "head", "modulation", "norm3"}
    assert dtypes["blocks.0.self_attn.q.weight"] == torch.bfloat16
    latents, context = [torch.randn(16, 1, 4, 4)], [torch.randn(3, 20)]
    with torch.no_grad():
        (out,) = model(latents, torch.tensor([500.0]), context, 4)
    assert out.dtype == torch.float32 and torch.isfinite(out).all()


def test_wrong_architecture_says_which_task_fits(
    tmp_path: Path, cfg: EasyDict, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(weights, tmp_path / NAME)
    monkeypatch.setitem(WAN_CONFIGS, "toy", cfg)
    monkeypatch.setitem(WAN_CONFIGS, "toy-again", copy.deepcopy(cfg))
    with pytest.raises(ValueError, match="these weights fit toy, toy-again, not t2v-1.3B"):
        load_dit(tmp_path, WAN_CONFIGS["t2v-1.3B"])


def test_weights_that_do_not_fit_are_described(
    tmp_path: Path, cfg: EasyDict, weights: dict[str, torch.Tensor]
) -> None:
    save_file(weights, tmp_path / NAME)
    with pytest.raises(ValueError, match="no known task .*t2v-14B.*dim 48 instead of 5120"):
        load_dit(tmp_path, WAN_CONFIGS["t2v-14B"])
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 4}))
    with pytest.raises(ValueError, match="4 attention heads"):
        load_dit(tmp_path, cfg)
    for content in ("[1]", "{"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            load_dit(tmp_path, cfg)


def test_missing_and_unexpected_keys_are_listed(
    tmp_path: Path, cfg: EasyDict, weights: dict[str, torch.Tensor]
) -> None:
    tensor = weights.pop("blocks.1.self_attn.q.weight")
    save_file(weights | {"blocks.1.stranger.weight": tensor}, tmp_path / NAME)
    with pytest.raises(ValueError, match=r"blocks\.1\.self_attn\.q\.weight.*blocks\.1\.stranger\.weight"):
        load_dit(tmp_path, cfg)


@pytest.mark.parametrize("name", ["img_emb.proj.0.weight", "condition_embedder.image_embedder.norm1.weight"])
def test_image_to_video_weights_are_refused(
    tmp_path: Path, cfg: EasyDict, weights: dict[str, torch.Tensor], name: str
) -> None:
    save_file(weights | {name: torch.zeros(2)}, tmp_path / NAME)
    with pytest.raises(ValueError, match="image-to-video"):
        load_dit(tmp_path, cfg)


def test_foreign_weights_are_refused(tmp_path: Path, cfg: EasyDict) -> None:
    with pytest.raises(ValueError, match=r"absent\.safetensors"):
        load_dit(tmp_path / "absent.safetensors", cfg)
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / NAME)
    with pytest.raises(ValueError, match="not the weights of a Wan transformer"):
        load_dit(tmp_path, cfg)


def test_prefixes_must_not_make_names_collide(tmp_path: Path) -> None:
    save_file({"dit.a": torch.zeros(1), "model.a": torch.zeros(1)}, tmp_path / NAME)
    with pytest.raises(ValueError, match="several tensors are named a"):
        read_dit_checkpoint(tmp_path)


def test_folders_without_a_clear_choice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no transformer"):
        read_dit_checkpoint(tmp_path)
    for stem in ("other_", "diffusion_pytorch_model_"):
        for letter in "ab":
            save_file({"a": torch.zeros(1)}, tmp_path / f"{stem}{letter}.safetensors")
        with pytest.raises(ValueError, match=rf"{stem}a.safetensors, {stem}b.safetensors\); name the one"):
            read_dit_checkpoint(tmp_path)


def test_shards_need_no_index_but_all_of_them(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    names = [f"diffusion_pytorch_model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    for number, name in enumerate(names):
        save_file({key: weights[key] for key in list(weights)[number::3]}, tmp_path / name)
    found = read_dit_checkpoint(tmp_path)
    assert_same({key: found.state_dict[key] for key in weights}, weights)
    assert found.files == checkpoint_files(tmp_path) == [tmp_path / name for name in names]
    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match="shard 00002 of 00003 is missing"):
        read_dit_checkpoint(tmp_path)
    assert checkpoint_files(tmp_path) == []


@pytest.mark.parametrize("name", ["model.pth", "model.ckpt", "model.bin", "model"])
def test_safetensors_under_another_name(tmp_path: Path, weights: dict[str, torch.Tensor], name: str) -> None:
    save_file(weights, tmp_path / name)
    assert_same(read_dit_checkpoint(tmp_path / name).state_dict, weights)


@pytest.mark.parametrize("name", ["model.gguf", "renamed.safetensors"])
def test_gguf_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
    with pytest.raises(ValueError, match=rf"{name}: a GGUF file.*safetensors"):
        read_dit_checkpoint(tmp_path / name)


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
def test_scaled_weights_of_eight_bits_are_multiplied_out(
    tmp_path: Path, weights: dict[str, torch.Tensor], cfg: EasyDict, suffix: str
) -> None:
    stored, expected = dict(weights), dict(weights)
    for key in ("blocks.0.self_attn.q.weight", "blocks.1.ffn.2.weight"):
        scale = weights[key].abs().max() / 448
        eight_bits = (weights[key] / scale).to(torch.float8_e4m3fn)
        layer = key.removesuffix(".weight")
        stored |= {key: eight_bits, f"{layer}.{suffix}": scale, f"{layer}.scale_input": torch.ones(())}
        expected[key] = (eight_bits.float() * scale).to(torch.bfloat16)
    stored["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    save_file({f"model.diffusion_model.{key}": value for key, value in stored.items()}, tmp_path / NAME)
    assert_same(read_dit_checkpoint(tmp_path).state_dict, expected)
    load_dit(tmp_path, cfg, dtype=torch.float32)
