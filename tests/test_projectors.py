"""Projectors: the release's names and sizes, saving, loading and what does not fit."""

import pytest
import torch
import torch.nn.functional as F

from refalign_ext.projectors import (
    ReferenceProjectors,
    projectors_from_tensors,
)


@pytest.fixture
def projectors():
    torch.manual_seed(0)
    return ReferenceProjectors(8, 6, 3)


def test_names_and_shapes_are_the_release_s():
    with torch.device("meta"):
        release = ReferenceProjectors(1536, 1024, 9)
    shapes = {key: tuple(value.shape) for key, value in release.state_dict().items()}
    expected = {}
    for index in range(9):
        expected[f"blocks.{index}.input_mlp.proj.0.weight"] = (768, 1536)
        expected[f"blocks.{index}.input_mlp.proj.2.weight"] = (1024, 768)
    assert shapes == expected
    assert len(shapes) == 18


def test_forward_is_two_linear_layers_with_silu(projectors):
    tokens = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    outputs = projectors(tokens)
    state = projectors.state_dict()
    for index, (value, output) in enumerate(zip(tokens, outputs, strict=True)):
        first, second = (state[f"blocks.{index}.input_mlp.proj.{layer}.weight"] for layer in (0, 2))
        torch.testing.assert_close(output, F.silu(value @ first.T) @ second.T)
        assert output.shape == (2, 3, 5, 6)


def test_empty_tokens_give_zero_gradients(projectors):
    sum(output.sum() for output in projectors([torch.zeros(1, 0, 5, 8)] * 3)).backward()
    for parameter in projectors.parameters():
        assert (parameter.grad == 0).all()


def test_depth_must_match(projectors):
    with pytest.raises(ValueError, match="tap_depth=3"):
        projectors([torch.zeros(1, 1, 5, 8)] * 2)


def read(tensors, **wanted):
    sizes = {"student_dim": 8, "teacher_dim": 6, "depth": 3, **wanted}
    return projectors_from_tensors(tensors, **sizes, source="file.safetensors")


def test_round_trip(projectors):
    loaded = read(projectors.state_dict())
    tokens = [torch.randn(1, 2, 3, 8) for _ in range(3)]
    torch.testing.assert_close(loaded(tokens), projectors(tokens), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_tensors_of_a_release_are_copied(projectors):
    tensors = projectors.state_dict()
    loaded = read(tensors)
    before = {key: value.clone() for key, value in tensors.items()}
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    for key, value in before.items():
        torch.testing.assert_close(tensors[key], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"student_dim": 16}, "task"),
        ({"teacher_dim": 7}, "teacher_dim 6.*needs 7.*teacher"),
        ({"depth": 9}, "depth"),
    ],
)
def test_other_sizes_than_needed(projectors, wanted, message):
    with pytest.raises(ValueError, match=message) as error:
        read(projectors.state_dict(), **wanted)
    assert str(error.value).startswith("file.safetensors")
    assert "\n" not in str(error.value)


def test_incomplete_or_foreign_tensors(projectors):
    state = projectors.state_dict()
    with pytest.raises(ValueError, match="no projector tensors"):
        read({})
    with pytest.raises(ValueError, match=r"blocks\.1\.input_mlp.* is missing"):
        read({key: value for key, value in state.items() if key != "blocks.1.input_mlp.proj.0.weight"})
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn"):
        read({**state, "blocks.0.ffn.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="expected"):
        read({**state, "blocks.2.input_mlp.proj.2.weight": torch.zeros(5, 4)})
