"""Checkpoint files: what is read, what is refused and with which words."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wan.utils.weights import check_values, file_sha256, load_strict, read_state_dict


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(3, 4, generator=generator),
        "bias": torch.randn(3, generator=generator).to(torch.bfloat16),
    }


def assert_same(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def write_shards(folder: Path) -> Path:
    expected = tensors()
    names = {"weight": "model-00001-of-00002.safetensors", "bias": "model-00002-of-00002.safetensors"}
    for key, file in names.items():
        save_file({key: expected[key]}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 54}, "weight_map": names}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_reads_each_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors(), path)
    assert_same(read_state_dict(str(path)), tensors())


def test_reads_old_files_and_wrapped_state_dicts(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": tensors(), "epoch": 3}, tmp_path / "wrapped.pth")
    for name in ("old.pth", "wrapped.pth"):
        assert_same(read_state_dict(tmp_path / name), tensors())


def test_shards(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    assert_same(read_state_dict(index), tensors())
    content = json.loads(index.read_text())
    content["weight_map"]["scale"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lack 1 tensors: scale"):
        read_state_dict(index)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 shards missing: model-00002-of-00002\.safetensors"):
        read_state_dict(index)
    index.write_text(json.dumps({"weight_map": {"weight": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="outside its own folder"):
        read_state_dict(index)


@pytest.mark.parametrize("kept", [4, 40, 140])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_file_is_named_with_the_remedy(tmp_path: Path, suffix: str, kept: int) -> None:
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors(), path)
    content = path.read_bytes()
    assert kept < len(content)
    path.write_bytes(content[:kept])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: truncated or not a .*; download it again"):
        read_state_dict(path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!doctype html><html>sign in</html>" * 20, "truncated or not a"),
        (bytes(range(256)) * 8, "truncated or not a"),
    ],
)
def test_foreign_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_state_dict(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


class RunsCode:
    """Pickles as a call of ``os.mkdir``."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_never_runs_code(tmp_path: Path) -> None:
    torch.save({"weight": RunsCode(str(tmp_path / "ran"))}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="objects besides tensors"):
        read_state_dict(tmp_path / "model.pth")
    assert not (tmp_path / "ran").exists()


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.pth: no such checkpoint file"):
        read_state_dict(tmp_path / "absent.pth")
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match="unknown checkpoint format"):
        read_state_dict(tmp_path / "model.onnx")
    torch.save({"step": 3}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="not a state dict"):
        read_state_dict(tmp_path / "c.pth")


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_load_strict(dtype: torch.dtype | None) -> None:
    state_dict = {name: tensor.float() for name, tensor in tensors().items()}
    module = load_strict(nn.Linear(4, 3, device="meta"), state_dict, "here", dtype=dtype)
    assert module.weight.dtype == (dtype or torch.float32)
    assert module.weight.requires_grad
    assert torch.equal(module.weight, state_dict["weight"].to(module.weight.dtype))
    assert torch.equal(module.bias, state_dict["bias"].to(module.weight.dtype))


def test_load_strict_lists_what_does_not_fit() -> None:
    module = nn.Sequential(*(nn.Linear(4, 4, device="meta") for _ in range(6)))
    state_dict = {f"layers.{index}": torch.zeros(1) for index in range(3)} | {"0.weight": torch.zeros(4, 5)}
    with pytest.raises(ValueError) as caught:
        load_strict(module, state_dict, "some.pth")
    message = str(caught.value)
    assert message.startswith("some.pth: these weights do not fit Sequential (11 missing: 0.bias, 1.weight, ")
    assert "and 3 more" in message and "\n" not in message
    assert "3 unexpected: layers.0, layers.1, layers.2" in message
    assert "1 of another shape: 0.weight is [4, 5] instead of [4, 4]" in message


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_training_loaded_weights_leaves_the_file_alone(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    state_dict = {name: tensor.float() for name, tensor in tensors().items()}
    (save_file if suffix == ".safetensors" else torch.save)(state_dict, path)
    before = path.read_bytes()
    module = load_strict(nn.Linear(4, 3, device="meta"), read_state_dict(path), str(path))
    with torch.no_grad():
        module.weight.fill_(7)
    assert path.read_bytes() == before


def test_file_sha256_follows_the_content_and_reads_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.bin"
    for content in (b"one", b"another"):
        path.write_bytes(content)
        assert file_sha256(path) == hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match=r"absent: cannot be read"):
        file_sha256(tmp_path / "absent")
    monkeypatch.setattr(Path, "open", None)
    assert file_sha256(path) == hashlib.sha256(b"another").hexdigest()


def damaged(dtype: torch.dtype, value: float) -> torch.Tensor:
    tensor = torch.ones(5, 7).to(dtype)
    tensor.view(-1)[-1] = value
    return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, value: float) -> None:
    if dtype is torch.float8_e4m3fn:
        value = float("nan")  # it has no infinity
    with pytest.raises(ValueError, match="a.safetensors: layer.weight has values that are not finite"):
        check_values({"good": torch.ones(2), "layer.weight": damaged(dtype, value)}, "a.safetensors")


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 1, 2, 2)])
def test_a_matrix_of_zeros_is_damage_where_no_model_starts_with_it(shape: tuple[int, ...]) -> None:
    weights = {"good": torch.zeros(4), "empty": torch.zeros(0, 3), "layer.weight": torch.zeros(*shape)}
    with pytest.raises(ValueError, match="layer.weight is all zeros"):
        check_values(weights, "a.safetensors")
    check_values(weights, "a.safetensors", may_be_zero=("layer.weight",))


def test_integers_are_no_weights() -> None:
    with pytest.raises(ValueError, match="layer.weight is int64"):
        check_values({"layer.weight": torch.ones(2, 2, dtype=torch.int64)}, "a.pth")
    with pytest.raises(ValueError, match="a.pth: weight is int32"):
        load_strict(
            nn.Linear(2, 2), {"weight": torch.ones(2, 2, dtype=torch.int32), "bias": torch.ones(2)}, "a.pth"
        )
