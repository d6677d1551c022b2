"""Where a run's trained parts come from, and what is missing is named before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from easydict import EasyDict
from safetensors.torch import save_file
from torch import nn

from refalign_ext.backbone import WAN_CONFIGS, T5EncoderModel, WanModel, dit_arguments
from refalign_ext.checkpoint.checkpointer import Checkpointer
from refalign_ext.checkpoint.state import build_state
from refalign_ext.config import TrainConfig, recipe
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import TrainedModules
from refalign_ext.distributed.sizes import ParallelSizes
from refalign_ext.encoders import text_encoder
from refalign_ext.projectors import ReferenceProjectors
from refalign_ext.training.build import build_trained_modules

TASK = EasyDict(WAN_CONFIGS["r2v-tiny"], dim=24, ffn_dim=32, num_heads=2, num_layers=3, freq_dim=16)
ALONE = Parallel.single(torch.device("cpu"))
TEACHER_DIM = 10


@pytest.fixture
def trained() -> TrainedModules:
    return TrainedModules(WanModel(**dit_arguments(TASK)), ReferenceProjectors(24, 10, 2))


@pytest.fixture
def checkpoint(trained: TrainedModules, tmp_path: Path) -> Path:
    return save(trained, tmp_path)


def save(trained: TrainedModules, folder: Path, average: dict | None = None) -> Path:
    writer = Checkpointer(folder, ALONE, keep_last=1)
    config = {"_class_name": "WanModel", **dit_arguments(TASK)}
    writer.save(7, build_state(trained, [], average), {"samples_seen": 3, "settings": {}}, config)
    path = writer.finish()
    assert path is not None
    return path


def settings(path: Path, **alignment: object) -> TrainConfig:
    config = replace(recipe("tiny"), from_scratch=False, dit_ckpt=str(path))
    return replace(config, alignment=replace(config.alignment, **{"depth": 2, **alignment}))


def parts(
    path: Path, parallel: Parallel = ALONE, **alignment: object
) -> tuple[nn.Module, ReferenceProjectors]:
    return build_trained_modules(settings(path, **alignment), TASK, path.parent, TEACHER_DIM, parallel)


def test_a_training_checkpoint_brings_its_weights_and_projectors(
    checkpoint: Path, trained: TrainedModules
) -> None:
    model, projectors = parts(checkpoint)
    for found, expected in ((model, trained.dit), (projectors, trained.projectors)):
        assert found.state_dict().keys() == expected.state_dict().keys()
        assert all(
            torch.equal(found.state_dict()[key], value) for key, value in expected.state_dict().items()
        )
    model, fresh = parts(checkpoint, new_projectors=True)
    assert torch.equal(model.head.head.weight, trained.dit.head.head.weight)
    assert fresh.state_dict().keys() == trained.projectors.state_dict().keys()
    assert not any(
        torch.equal(fresh.state_dict()[key], value) for key, value in trained.projectors.state_dict().items()
    )


def test_the_moving_average_is_what_a_run_starts_from(trained: TrainedModules, tmp_path: Path) -> None:
    average = {key: value + 1 for key, value in trained.dit.state_dict().items()}
    model, _ = parts(save(trained, tmp_path, average))
    assert all(torch.equal(value, average[key]) for key, value in model.state_dict().items())


def test_new_parts_depend_on_the_seed_alone() -> None:
    config = replace(settings(Path("none")), from_scratch=True, dit_ckpt=None)
    state = torch.random.get_rng_state()
    one, other = (build_trained_modules(config, TASK, Path("none"), TEACHER_DIM, ALONE) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for first, second in zip(one, other, strict=True):
        for key, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[key])
    different = build_trained_modules(replace(config, seed=1), TASK, Path("none"), TEACHER_DIM, ALONE)
    assert not torch.equal(different[0].patch_embedding.weight, one[0].patch_embedding.weight)
    assert not torch.equal(next(different[1].parameters()), next(one[1].parameters()))


def test_projectors_of_another_depth_are_refused_with_the_way_out(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="--alignment.new_projectors"):
        parts(checkpoint, depth=1)
    assert len(parts(checkpoint, depth=1, new_projectors=True)[1].blocks) == 1


def test_weights_become_float32_alone_and_stay_in_the_file_for_many_ranks(
    trained: TrainedModules, tmp_path: Path
) -> None:
    path = tmp_path / "half.safetensors"
    save_file({key: value.bfloat16() for key, value in trained.dit.state_dict().items()}, path)
    many = Parallel(ParallelSizes(2), torch.device("cpu"), {"data": None})  # only asked whether it is alone
    assert not many.is_alone
    for parallel, dtype in ((ALONE, torch.float32), (many, torch.bfloat16)):
        model, projectors = parts(path, parallel)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {p.dtype for p in projectors.parameters()} == {torch.float32}
        assert torch.equal(model.head.head.weight.float(), trained.dit.head.head.weight.bfloat16().float())


def test_texts_are_encoded_once_and_in_full_precision(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, task = torch.device("cpu"), WAN_CONFIGS["r2v-tiny"]
    encode = text_encoder(tiny_checkpoint, task, device, device)
    first = encode(["a red square", ""])
    assert all(text.dtype == torch.float32 and text.ndim == 2 for text in first)
    assert not torch.equal(first[0][:1], first[1][:1])
    fresh = text_encoder(tiny_checkpoint, task, device, device)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fresh(["a red square"])[0], first[0])
    monkeypatch.setattr(T5EncoderModel, "__call__", lambda *given: pytest.fail("encoded again"))
    assert torch.equal(encode(["", "a red square"])[1], first[0])
