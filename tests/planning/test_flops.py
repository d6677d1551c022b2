"""Counts of parameters and operations, held against real models and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from refalign_ext.backbone import WAN_CONFIGS, ReferenceBackbone, WanModel, dit_arguments
from refalign_ext.distributed.parallelize import recompute_activations
from refalign_ext.lora import matching_layers
from refalign_ext.planning.flops import (
    AlignmentShape,
    ModelShape,
    lora_layers,
    lora_parameters,
    peak_flops,
    step_flops,
)
from refalign_ext.projectors import ReferenceProjectors

SIZES = dict(
    dim=48, ffn_dim=96, num_layers=3, num_heads=4, text_len=10, text_dim=20, in_dim=6, out_dim=6, freq_dim=16
)
GRID = (3, 8, 12)  # frames, rows and columns of the latents: 72 tokens, 24 of them per frame
REFERENCES = 2


@pytest.mark.parametrize("task", ["r2v-tiny", "r2v-1.3B", "r2v-14B"])
def test_parameter_counts_are_those_of_the_real_model(task: str) -> None:
    with torch.device("meta"):
        model = WanModel(**dit_arguments(WAN_CONFIGS[task]))
    shape = ModelShape.of(WAN_CONFIGS[task])
    assert shape == ModelShape.of(model)
    assert shape.block_parameters == sum(p.numel() for p in model.blocks[0].parameters())
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    matrices = (p for name, p in model.named_parameters() if name.startswith("blocks.0.") and p.ndim == 2)
    assert shape.block_matrix_parameters == sum(p.numel() for p in matrices)
    named = dict(model.blocks[0].named_modules())
    for name, layer in shape.block_linears.items():
        assert named[name].weight.shape == (layer.outputs, layer.inputs)


def test_parameter_counts_without_norms_and_of_projectors() -> None:
    model = WanModel(**SIZES, qk_norm=False, cross_attn_norm=False)
    assert ModelShape.of(model).parameters == sum(p.numel() for p in model.parameters())
    projectors = ReferenceProjectors(48, 30, 5)
    assert AlignmentShape(5, 30).parameters(48) == sum(p.numel() for p in projectors.parameters())


def counted(checkpointing: bool = False, references: int = REFERENCES) -> tuple[int, int, ModelShape]:
    """(forward, forward and backward) that torch counts on a real model with references, and its shape."""
    torch.manual_seed(0)
    model = WanModel(**SIZES)
    if checkpointing:
        model.enable_gradient_checkpointing()
    backbone = ReferenceBackbone(model)
    inputs = (
        [torch.randn(6, *GRID)],
        torch.tensor([500.0]),
        [torch.randn(7, 20)],
        [torch.randn(6, references, *GRID[1:])],
    )
    # Torch counts the matmuls of the spelled-out attention; its fused CPU kernel it does not know.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            backbone(*inputs)
        with FlopCounterMode(display=False) as step:
            backbone(*inputs).prediction[0].square().sum().backward()
    return forward.get_total_flops(), step.get_total_flops(), ModelShape.of(model)


@pytest.mark.parametrize("references", [0, 1, 3])
def test_flops_are_those_that_torch_counts(references: int) -> None:
    forward, step, shape = counted(references=references)
    expected = step_flops(shape, 72, 24 * references)
    assert forward == pytest.approx(expected.forward, rel=2e-3)
    assert step == pytest.approx(expected.model, rel=2e-3)


def test_checkpointing_repeats_the_blocks_and_model_flops_ignore_it() -> None:
    _, plain, shape = counted()
    _, repeated, _ = counted(checkpointing=True)
    none, full, selective = (
        step_flops(shape, 72, 48, checkpointing=kind) for kind in ("none", "full", "selective")
    )
    assert none.model == full.model == selective.model
    assert repeated - plain == pytest.approx(full.hardware - none.hardware, rel=1e-6)
    assert none.hardware < selective.hardware < full.hardware


def test_selective_checkpointing_repeats_every_other_matmul() -> None:
    step = {}
    for kind in ("none", "selective"):
        torch.manual_seed(0)
        model = WanModel(**SIZES)
        recompute_activations(model, kind)
        # Torch does not count its fused CPU attention, so only matmuls remain, and attention is among what is kept.
        with FlopCounterMode(display=False) as counter:
            context, time = [torch.randn(7, 20)], torch.tensor([500.0])
            output = ReferenceBackbone(model)(
                [torch.randn(6, *GRID)], time, context, [torch.randn(6, 2, *GRID[1:])]
            )
            output.prediction[0].sum().backward()
        step[kind] = counter.get_total_flops()
    shape = ModelShape(**SIZES)
    none, selective = (
        step_flops(shape, 72, 48, checkpointing=kind).hardware for kind in ("none", "selective")
    )
    assert step["selective"] - step["none"] == selective - none > 0


def test_references_do_not_ask_the_text() -> None:
    shape = ModelShape(**SIZES)
    with_references, longer_video = (step_flops(shape, *tokens).forward for tokens in ((72, 24), (96, 0)))
    per_token = 2 * 2 * 48 * 48 + 4 * 48 * 10  # query and output, scores and values
    assert longer_video - with_references == 3 * 24 * per_token


def test_alignment_flops_are_those_of_the_projectors_and_the_pairs() -> None:
    shape, alignment = ModelShape(**SIZES), AlignmentShape(2, 30)
    projectors = ReferenceProjectors(48, 30, 2)
    tokens = [torch.randn(48, 48, requires_grad=True) for _ in range(2)]
    with FlopCounterMode(display=False) as counter:
        sum(out.sum() for out in projectors(tokens)).backward()
    one = step_flops(shape, 72, 48, references=1, alignment=alignment)
    assert one.alignment == counter.get_total_flops()
    two = step_flops(shape, 72, 48, references=2, alignment=alignment)
    assert two.alignment - one.alignment == 2 * 2 * 2 * (2 * 24 * 24) * 30
    assert two.model - two.alignment == step_flops(shape, 72, 48).model


def test_lora_trains_less() -> None:
    shape = ModelShape(**SIZES)
    model = WanModel(**SIZES)
    for targets in ("q, ffn.0", "ffn,cross_attn.v", "blocks.1", r"re:blocks\.\d\.self_attn\.[qk]", "0"):
        assert list(lora_layers(shape, targets)) == matching_layers(model, targets)
    assert lora_parameters(shape, 4, "self_attn.q") == 3 * 4 * (48 + 48)
    full, lora = step_flops(shape, 72, 24), step_flops(shape, 72, 24, lora_rank=1, lora_targets="q,k,v,o")
    assert full.forward < lora.forward < 1.1 * full.forward
    assert 0.6 * full.model < lora.model < 0.8 * full.model
    with pytest.raises(ValueError, match=r"'p' matches no linear layer"):
        lora_layers(shape, "q,p")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 NVL", 835e12),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
    assert peak_flops(torch.device("cpu")) is None
