"""Adapters outside a checkpoint: the base that settings name, and what is refused. Real ones: test_export_adapter.py."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refalign_ext.checkpoint.adapters import (
    Adapter,
    adapter_scale_of,
    base_named_by,
    files_sha256,
    write_diffusers_adapter,
    write_peft_adapter,
)
from refalign_ext.tasks import TASKS


def test_the_base_that_settings_name() -> None:
    bundled = TASKS["r2v-tiny"].bundled
    assert base_named_by({"task": "r2v-tiny", "dit_ckpt": None, "ckpt_dir": None}) == bundled
    assert (bundled / "diffusion_pytorch_model.safetensors").is_file()
    assert base_named_by({"task": "r2v-1.3B", "dit_ckpt": None, "ckpt_dir": "a"}) == Path("a")
    assert base_named_by({"task": "r2v-tiny", "dit_ckpt": "b", "ckpt_dir": "a"}) == Path("b")
    assert base_named_by({"task": "r2v-1.3B"}) is None
    assert base_named_by({"task": "r2v-tiny", "from_scratch": True}) is None


def test_the_scale_that_settings_name() -> None:
    assert adapter_scale_of({"lora_rank": 3, "lora_alpha": 6.0}, Path("a")) == (3, 6.0)
    assert adapter_scale_of({"lora_rank": 3, "lora_alpha": 0}, Path("a")) == (3, 3.0)
    with pytest.raises(ValueError, match="checkpoint a holds an adapter, and its settings have no lora_rank"):
        adapter_scale_of({"lora_rank": 0}, Path("a"))


def test_sha256_of_several_files_is_that_of_their_digests(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).write_bytes(b"x" * number)
    digests = [hashlib.sha256(b"x" * number).hexdigest() for number in (1, 2)]
    assert files_sha256([tmp_path / "1"]) == digests[0]
    both = hashlib.sha256("".join(digests).encode()).hexdigest()
    assert files_sha256([tmp_path / "2", tmp_path / "1"]) == both


def test_diffusers_names(tmp_path: Path) -> None:
    text = {f"text_embedding.0.lora_{factor}.weight": torch.ones(1, 1) for factor in "AB"}
    found = load_file(write_diffusers_adapter(tmp_path, Adapter(text, 1, 3.0)))
    layer = "transformer.condition_embedder.text_embedder.linear_1"
    assert {name: float(value) for name, value in found.items()} == {
        f"{layer}.lora_A.weight": 1.0,
        f"{layer}.lora_B.weight": 3.0,  # the scale is worked into B
    }
    unknown = {f"other.lora_{factor}.weight": torch.ones(1, 1) for factor in "AB"}
    with pytest.raises(ValueError, match="no counterpart of the adapter's layer other"):
        write_diffusers_adapter(tmp_path, Adapter(unknown, 1, 1.0))


@pytest.mark.parametrize(
    ("tensors", "message"), [({"x.weight": torch.ones(1, 1)}, "is no LoRA tensor"), ({}, "is empty")]
)
def test_what_is_no_adapter_is_not_written(tmp_path: Path, tensors: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_peft_adapter(tmp_path / "b", Adapter(tensors, 1, 1.0))
    assert not (tmp_path / "b").exists()
