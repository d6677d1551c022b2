"""The plan of a parallel run: choice of sizes, arithmetic, refusals, and its memory held against real models."""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refalign_ext.backbone import WAN_CONFIGS, ReferenceBackbone, WanModel, dit_arguments
from refalign_ext.config import TrainConfig, recipe
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import recompute_activations
from refalign_ext.distributed.sequence_parallel import attach_sequence_parallel
from refalign_ext.distributed.sizes import ParallelSizes
from refalign_ext.losses import reference_alignment_over_blocks
from refalign_ext.planning.flops import AlignmentShape, ModelShape
from refalign_ext.planning.memory import (
    TEACHER_SIZES,
    Load,
    activation_bytes,
    alignment_bytes,
    block_activations,
    full_precision_parameters,
    optimizer_working_bytes,
    t5_parameters,
    vae_parameters,
)
from refalign_ext.planning.plan import (
    ASSUMED_MEMORY,
    Plan,
    choose_sizes,
    make_generation_plan,
    make_training_plan,
)
from refalign_ext.planning.table import describe
from refalign_ext.projectors import ReferenceProjectors
from refalign_ext.teachers import TEACHERS
from tests.helpers.ranks import run_ranks
from wan.modules import attention
from wan.modules.t5 import build_t5
from wan.modules.vae import build_vae

GIB = 2**30


def plan_of(task: str, world: int, *, memory: int | None = None, references: int = 3, **changes: Any) -> Plan:
    config = dataclasses.replace(recipe("paper_stage1"), task=task, **changes)
    return make_training_plan(config, WAN_CONFIGS[task], world, references=references, device_memory=memory)


def test_a_plan_for_64_devices_takes_milliseconds_and_adds_up() -> None:
    began = time.perf_counter()
    plan = plan_of("r2v-14B", 64)
    text = describe(plan)
    assert time.perf_counter() - began < 0.5
    assert plan.sizes.world == 64
    assert (plan.video_tokens, plan.reference_tokens) == (21 * 1560, 3 * 1560)
    assert plan.tokens_per_rank * plan.sizes.sequence == 37440
    assert plan.samples_per_step == 128
    assert plan.device_memory == ASSUMED_MEMORY
    assert plan.device_total == sum(plan.device.values())
    assert "80 GB of memory on each device are assumed" in text
    for wanted in (
        "14.29 B parameters",
        "32,760 + 4,680 tokens",
        "gathering weights (FSDP)",
        "ranks",
        "fits",
    ):
        assert wanted in text
    assert max(len(line) for line in text.splitlines()) < 130


def test_states_are_those_of_the_trained_parameters() -> None:
    plan = plan_of("r2v-1.3B", 8, ema_decay=0.99)
    shape = ModelShape.of(WAN_CONFIGS["r2v-1.3B"])
    trained = shape.parameters + 9 * 768 * (1536 + 1024)
    assert plan.trained_parameters == trained
    assert plan.device["weights (float32)"] == 4 * trained // 8
    assert plan.device["gradients (float32)"] == 4 * trained // 8
    assert plan.device["optimizer state (adamw)"] == 8 * trained // 8
    assert plan.device["moving average (float32)"] == 4 * shape.parameters // 8
    assert plan.device["text encoder"] == 2 * 5_680_910_336
    matrices = shape.num_layers * shape.block_matrix_parameters
    muon = plan_of("r2v-1.3B", 8, optimizer="muon")
    assert muon.device["optimizer state (muon)"] == (8 * (trained - matrices) + 4 * matrices) // 8
    without = plan_of(
        "r2v-1.3B", 8, alignment=dataclasses.replace(recipe("paper_stage1").alignment, weight=0.0)
    )
    assert without.trained_parameters == shape.parameters
    assert not any("teacher" in name or "alignment" in name for name in without.device)


def test_what_leaves_the_device_goes_to_the_host() -> None:
    on_device = plan_of("r2v-1.3B", 8)
    moved = plan_of("r2v-1.3B", 8, t5_cpu=True, cpu_offload=True)
    assert set(moved.host) == {
        "weights (float32)",
        "gradients (float32)",
        "optimizer state (adamw)",
        "text encoder",
    }
    assert moved.device_total + sum(moved.host.values()) == on_device.device_total
    alone = plan_of("r2v-1.3B", 1, cpu_offload=True)
    assert not alone.host
    assert "no effect on one device" in describe(alone)


def test_lora_trains_adapters_only() -> None:
    full, lora = plan_of("r2v-1.3B", 8), plan_of("r2v-1.3B", 8, lora_rank=16, lora_targets="q,v")
    shape = ModelShape.of(WAN_CONFIGS["r2v-1.3B"])
    adapters = 30 * 4 * 16 * (1536 + 1536)
    assert lora.trained_parameters == adapters + 9 * 768 * (1536 + 1024)
    assert lora.device["frozen weights (float32)"] == 4 * shape.parameters // 8
    assert lora.traffic["reducing gradients (FSDP)"] < full.traffic["reducing gradients (FSDP)"] / 20
    assert lora.device_total < full.device_total
    with pytest.raises(ValueError, match="matches no linear layer"):
        plan_of("r2v-1.3B", 8, lora_rank=16, lora_targets="banana")


def test_traffic_grows_with_accumulation_and_repetition() -> None:
    once = plan_of("r2v-1.3B", 8, ulysses_size=2, ring_size=2, global_batch_size=2)
    thrice = plan_of("r2v-1.3B", 8, ulysses_size=2, ring_size=2, global_batch_size=6)
    assert {name: 3 * count for name, count in once.traffic.items()} == thrice.traffic
    kept = plan_of(
        "r2v-1.3B", 8, ulysses_size=2, ring_size=2, global_batch_size=2, activation_checkpointing="none"
    )
    for name in ("Ulysses all-to-all", "keys and values of the ring"):
        assert 2 * once.traffic[name] == 3 * kept.traffic[name]
    share = 37440 // 4 * 1536 * 2  # bytes of one of q, k, v or the result on a rank
    assert kept.traffic["Ulysses all-to-all"] == 2 * 30 * 4 * share // 2
    assert kept.traffic["keys and values of the ring"] == 2 * 30 * 2 * share
    assert not plan_of("r2v-1.3B", 1).traffic


def test_sequence_parallelism_only_as_far_as_memory_demands() -> None:
    def sizes(memory: int, **changes: Any) -> tuple[int, int, int]:
        chosen = plan_of("r2v-1.3B", 8, memory=memory * GIB, t5_cpu=True, **changes).sizes
        return chosen.data, chosen.ring, chosen.ulysses

    assert sizes(80) == (8, 1, 1)
    plain = {"activation_checkpointing": "none"}
    assert sizes(141, **plain) == (8, 1, 1)
    assert sizes(80, **plain) == (4, 1, 2)
    assert sizes(48, **plain) == (2, 1, 4)
    assert sizes(24, **plain) == (1, 2, 4)  # 12 heads: eight ranks are Ulysses 4 x ring 2


def test_given_sizes_are_used_or_refused() -> None:
    chosen = plan_of("r2v-1.3B", 8, ulysses_size=4).sizes
    assert (chosen.data, chosen.ring, chosen.ulysses) == (2, 1, 4)
    with pytest.raises(ValueError, match="choose Ulysses x ring from"):
        plan_of("r2v-1.3B", 8, ulysses_size=8)


def test_tiny_model_is_data_parallel_and_never_refused() -> None:
    config = dataclasses.replace(recipe("tiny"))
    plan = make_training_plan(config, WAN_CONFIGS["r2v-tiny"], 4)
    assert plan.sizes == ParallelSizes(4)
    assert plan.device_memory is None and plan.fits
    assert plan.samples_per_step == 32
    plan.require_fit()


def test_global_batch_decides_what_is_possible() -> None:
    # Four samples cannot keep eight data ranks busy: two ranks share each.
    assert plan_of("r2v-1.3B", 8, global_batch_size=4).sizes.data == 4
    with pytest.raises(ValueError, match="such as 24 or 32"):
        plan_of("r2v-1.3B", 4, global_batch_size=30, batch_size=2, ulysses_size=1, ring_size=1)
    config = TrainConfig(task="r2v-1.3B", global_batch_size=3, batch_size=2)
    with pytest.raises(ValueError, match="give a multiple"):
        choose_sizes(config, WAN_CONFIGS["r2v-1.3B"], 4)


def test_unsharded_14b_is_refused_with_a_way_out() -> None:
    plan = plan_of("r2v-14B", 1)
    assert not plan.fits
    assert plan.suggestions == ("8 devices",)
    with pytest.raises(
        ValueError, match=r"r2v-14B does not fit on 1 device: .* GiB on each.*; use 8 devices"
    ) as error:
        plan.require_fit()
    assert "\n" not in str(error.value)
    assert "DOES NOT FIT" in describe(plan) and "would fit: 8 devices" in describe(plan)


@pytest.mark.parametrize(
    ("changes", "memory"),
    [
        ({"activation_checkpointing": "none"}, 80),
        ({"ulysses_size": 1, "activation_checkpointing": "none"}, 48),
        ({"batch_size": 4, "global_batch_size": 0}, 40),
        ({}, 24),
        ({}, 16),
    ],
)
def test_every_suggestion_is_one_that_fits(changes: dict[str, Any], memory: int) -> None:
    task, world = "r2v-1.3B", 2
    plan = plan_of(task, world, memory=memory * GIB, **changes)
    assert not plan.fits and plan.suggestions
    for suggestion in plan.suggestions:
        followed, ranks = dict(changes), world
        for part in suggestion.split(" with "):
            words = part.removesuffix(" (automatic)").split()
            if words[1:] == ["devices"]:
                ranks = int(words[0])
                followed |= {"ulysses_size": 0, "ring_size": 0}
                continue
            while words:
                name = words.pop(0).removeprefix("--")
                value: Any = words.pop(0) if words and not words[0].startswith("--") else True
                followed[name] = int(value) if isinstance(value, str) and value.isdigit() else value
        assert plan_of(task, ranks, memory=memory * GIB, **followed).fits, suggestion


def test_generation_divides_branches_and_tokens() -> None:
    plan = make_generation_plan("r2v-1.3B", 6, cfg_size=3)
    assert plan.sizes == ParallelSizes(3, 1, 2)
    assert plan.tokens_per_rank == 37440 // 2
    assert plan.device["transformer"] == 2 * plan.parameters
    sharded = make_generation_plan("r2v-1.3B", 6, cfg_size=3, dit_fsdp=True, t5_fsdp=True)
    assert sharded.device["transformer"] == 2 * plan.parameters // 6
    assert sharded.device["text encoder"] == plan.device["text encoder"] // 6
    assert make_generation_plan("r2v-1.3B", 8).sizes == ParallelSizes(1, 2, 4)
    assert make_generation_plan("r2v-tiny", 2, references=1).fits
    text = describe(sharded)
    assert "branch group 2" in text and "one denoising step" in text
    for wrong, message in (
        ({"cfg_size": 3}, "do not divide 4 ranks"),
        ({"ulysses": 1, "ring": 2}, "--ulysses_size 1, --ring_size 2 do not divide 4 ranks"),
        ({"ulysses": 5}, "choose cfg x Ulysses x ring from"),
    ):
        with pytest.raises(ValueError, match=message):
            make_generation_plan("r2v-1.3B", 4, **wrong)


def test_generation_that_does_not_fit_says_what_to_try() -> None:
    plan = make_generation_plan("r2v-14B", 2, device_memory=32 * GIB)
    assert plan.suggestions[:2] == ("--t5_cpu", "--dit_fsdp")
    with pytest.raises(ValueError, match="r2v-14B does not fit on 2 devices"):
        plan.require_fit()


def test_sizes_of_the_frozen_parts() -> None:
    for name in ("r2v-tiny", "r2v-14B"):
        task = copy.deepcopy(WAN_CONFIGS[name])
        task.t5.num_layers = 2
        with torch.device("meta"):
            text = build_t5(task.t5)
        assert t5_parameters(task) == sum(p.numel() for p in text.parameters())
    with torch.device("meta"):
        video = build_vae({**WAN_CONFIGS["r2v-14B"].vae})
    assert vae_parameters(WAN_CONFIGS["r2v-14B"]) == sum(p.numel() for p in video.parameters())
    assert set(TEACHER_SIZES) == set(TEACHERS)
    for name, (_, width) in TEACHER_SIZES.items():
        assert TEACHERS[name].dim in (None, width)


def test_float32_parts_of_the_model() -> None:
    task = WAN_CONFIGS["r2v-1.3B"]
    with torch.device("meta"):
        model = WanModel(**dit_arguments(task))
    parts = (model.time_embedding, model.time_projection, model.head)
    assert full_precision_parameters(ModelShape.of(task)) == sum(
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
                loss = loss + reference_alignment_over_blocks(students, teacher).total
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
