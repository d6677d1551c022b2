"""Where a run's trained parts come from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from easydict import EasyDict

from refalign_ext.assemble import _trained_parts
from refalign_ext.backbone import WAN_CONFIGS, WanModel, dit_arguments
from refalign_ext.checkpoint import save_checkpoint
from refalign_ext.config import recipe
from refalign_ext.projectors import ReferenceProjectors


@pytest.fixture
def checkpoint(tmp_path):
    task = EasyDict(WAN_CONFIGS["r2v-tiny"], dim=24, ffn_dim=32, num_heads=2, num_layers=3, freq_dim=16)
    model, projectors = WanModel(**dit_arguments(task)), ReferenceProjectors(24, 10, 2)
    path = save_checkpoint(
        tmp_path,
        7,
        dit=model.state_dict(),
        dit_config={},
        average=None,
        projectors=projectors.state_dict(),
        optimizers=[],
        settings={},
        keep_last=1,
    )
    return task, path, projectors


def parts(task, path, **alignment):
    config = replace(recipe("tiny"), from_scratch=False, dit_ckpt=str(path))
    config = replace(config, alignment=replace(config.alignment, depth=2, **alignment))
    teacher = EasyDict(dim=10)
    return _trained_parts(config, task, path.parent, teacher, torch.device("cpu"))[1]


def test_a_training_checkpoint_brings_its_projectors(checkpoint):
    task, path, projectors = checkpoint
    continued = parts(task, path).state_dict()
    assert all(torch.equal(continued[key], value) for key, value in projectors.state_dict().items())
    fresh = parts(task, path, new_projectors=True).state_dict()
    assert not any(torch.equal(fresh[key], value) for key, value in projectors.state_dict().items())


def test_projectors_of_another_depth_are_refused_with_the_way_out(checkpoint):
    task, path, _ = checkpoint
    config = replace(recipe("tiny"), from_scratch=False, dit_ckpt=str(path))
    config = replace(config, alignment=replace(config.alignment, depth=1))
    with pytest.raises(ValueError, match="--alignment.new_projectors"):
        _trained_parts(config, task, path.parent, EasyDict(dim=10), torch.device("cpu"))
