"""Estimates of memory, held against the tensors that real models keep."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refalign_ext.backbone import WAN_CONFIGS, ReferenceBackbone, WanModel, dit_arguments
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import recompute_activations
from refalign_ext.distributed.sequence_parallel import attach_sequence_parallel
from refalign_ext.distributed.sizes import ParallelSizes
from refalign_ext.losses import alignment_by_block
from refalign_ext.planning.flops import AlignmentShape, ModelShape
from refalign_ext.planning.memory import (
    Load,
    activation_bytes,
    alignment_bytes,
    block_activations,
    optimizer_working_bytes,
    t5_parameters,
    vae_parameters,
)
from refalign_ext.projectors import ReferenceProjectors
from tests.helpers.ranks import run_ranks
from wan.modules import attention
from wan.modules.t5 import build_t5
from wan.modules.vae import build_vae


def test_sizes_of_the_frozen_parts() -> None:
    for name in ("r2v-tiny", "r2v-14B"):
        task = copy.deepcopy(WAN_CONFIGS[name])
        task.t5.num_layers = 1
        with torch.device("meta"):
            text = build_t5(task.t5)
        assert t5_parameters(task) == sum(p.numel() for p in text.parameters())
    with torch.device("meta"):
        video = build_vae({**WAN_CONFIGS["r2v-14B"].vae})
    assert vae_parameters(WAN_CONFIGS["r2v-14B"]) == sum(p.numel() for p in video.parameters())


def test_float32_parts_of_the_model() -> None:
    task = WAN_CONFIGS["r2v-1.3B"]
    with torch.device("meta"):
        model = WanModel(**dit_arguments(task))
    parts = (model.time_embedding, model.time_projection, model.head)
    assert ModelShape.of(task).full_precision_parameters == sum(
        p.numel() for m in parts for p in m.parameters()
    )


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that were made while this was active and still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[StorageWeakRef, int, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.made.append((StorageWeakRef(storage), storage._cdata, storage.nbytes()))
        return out

    def bytes(self, *, but: torch.nn.Module) -> int:
        """Without those of a module's parameters, nor tensors as large as a weight (autocast's copies)."""
        own = {parameter.untyped_storage()._cdata for parameter in but.parameters()}
        copies = {parameter.numel() * 2 for parameter in but.parameters() if parameter.ndim == 2}
        alive = {key: size for weak, key, size in self.made if not weak.expired() and key not in own}
        return sum(size for size in alive.values() if size not in copies)


SIZES = dict(
    dim=64, ffn_dim=160, num_layers=3, num_heads=4, text_len=12, text_dim=20, in_dim=6, out_dim=6, freq_dim=16
)
# 6 frames of 10 x 14 tokens and 2 references: enough that fixed tables do not count.
GRID, VIDEO, REFERENCE = (6, 20, 28), 840, 280


def small_backbone(checkpointing: str = "none", **changes: Any) -> ReferenceBackbone:
    torch.manual_seed(0)
    model = WanModel(**SIZES | changes)
    recompute_activations(model, checkpointing)
    return ReferenceBackbone(model)


def run(backbone: ReferenceBackbone, batch: int, tap_depth: int = 0) -> Any:
    return backbone(
        [torch.randn(6, *GRID) for _ in range(batch)],
        torch.full((batch,), 500.0),
        [torch.randn(7, 20) for _ in range(batch)],
        [torch.randn(6, 2, *GRID[1:]) for _ in range(batch)],
        tap_depth=tap_depth,
    )


def kept(items: dict[str, int]) -> int:
    return sum(
        count for name, count in items.items() if "at work" not in name and "working space" not in name
    )


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_activations_are_those_of_a_real_model(checkpointing: str, batch: int) -> None:
    backbone = small_backbone(checkpointing)
    with LiveBytes() as live:
        output = run(backbone, batch)
    load = Load.of(ParallelSizes(), VIDEO, REFERENCE, batch=batch, precision="fp32")
    estimate = activation_bytes(ModelShape.of(backbone.model), load, ParallelSizes(), checkpointing)
    assert kept(estimate) == pytest.approx(live.bytes(but=backbone.model), rel=0.1)
    assert output.prediction[0].requires_grad


def test_activations_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU small scores are spelled out in half precision; GPUs never do that.
    monkeypatch.setattr(attention, "_matmul_is_faster", lambda *arguments: False)
    totals = []
    for layers in (1, 4):
        backbone = small_backbone(num_layers=layers)
        with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16):
            output = run(backbone, 1)
        totals.append(live.bytes(but=backbone.model))
        del output
    load = Load.of(ParallelSizes(), VIDEO, REFERENCE, batch=1, precision="bf16")
    per_block = block_activations(ModelShape.of(backbone.model), load)
    assert 3 * per_block == pytest.approx(totals[1] - totals[0], rel=0.1)


def test_memory_of_alignment() -> None:
    totals = []
    for aligned in (False, True):
        backbone, projectors = small_backbone(), ReferenceProjectors(64, 40, 2)
        teacher = torch.randn(1, 2, 140, 40)
        with LiveBytes() as live:
            output = run(backbone, 1, tap_depth=2 if aligned else 0)
            loss = output.prediction[0].sum()
            if aligned:
                students = projectors(output.reference_tokens)
                loss = loss + sum(alignment_by_block(students, teacher)).mean()
                del students
        del output
        totals.append(live.bytes(but=backbone.model))
        del loss
    load = Load.of(ParallelSizes(), VIDEO, REFERENCE, batch=1, precision="fp32")
    estimate = alignment_bytes(
        ModelShape.of(backbone.model), AlignmentShape(2, 40), load, ParallelSizes(), REFERENCE
    )
    assert estimate == pytest.approx(totals[1] - totals[0], rel=0.1)


def _live_on_rank(rank: int, ring: int, ulysses: int) -> int:
    parallel = Parallel.create(ParallelSizes(1, ring, ulysses), torch.device("cpu"))
    backbone = small_backbone()
    attach_sequence_parallel(backbone, parallel)
    with LiveBytes() as live:
        output = run(backbone, 1)
    alive = live.bytes(but=backbone.model)
    del output
    return alive


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (2, 1)])
def test_activations_under_sequence_parallelism(ring: int, ulysses: int) -> None:
    sizes = ParallelSizes(1, ring, ulysses)
    measured = run_ranks(_live_on_rank, sizes.world, ring, ulysses)
    load = Load.of(sizes, VIDEO, REFERENCE, batch=1, precision="fp32")
    estimate = activation_bytes(ModelShape(**SIZES), load, sizes, "none")
    assert kept(estimate) == pytest.approx(max(measured), rel=0.12)


def test_working_space_of_optimizers() -> None:
    shape = ModelShape(**SIZES)
    assert optimizer_working_bytes(shape, "adamw", 1000, 4) == 1000
    square, wide = 3 * 8 * 64 * 64, 3 * 64 * 160
    assert optimizer_working_bytes(shape, "muon", 1000, 4) == 4 * (square + 2 * wide) + 10 * square
