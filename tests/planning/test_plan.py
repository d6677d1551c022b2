"""The plan of a parallel run: choice of sizes, arithmetic, refusals, suggestions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from refalign_ext.backbone import WAN_CONFIGS
from refalign_ext.config import TrainConfig, recipe
from refalign_ext.distributed.sizes import ParallelSizes
from refalign_ext.planning.flops import ModelShape
from refalign_ext.planning.generation_plan import make_generation_plan
from refalign_ext.planning.plan import ASSUMED_MEMORY, Plan
from refalign_ext.planning.table import plan_table
from refalign_ext.planning.training_plan import make_training_plan
from refalign_ext.tasks import TASKS

GIB = 2**30


def plan_of(task: str, world: int, *, memory: int | None = None, references: int = 3, **changes: Any) -> Plan:
    config = dataclasses.replace(recipe("paper_stage1"), task=task, **changes)
    return make_training_plan(config, WAN_CONFIGS[task], world, references=references, device_memory=memory)


def test_a_plan_for_64_devices_adds_up() -> None:
    plan = plan_of("r2v-14B", 64)
    text = plan_table(plan)
    assert plan.sizes.world == 64
    assert plan.tokens_per_rank * plan.sizes.sequence == 37440
    assert plan.samples_per_step == 128
    assert plan.device_memory == ASSUMED_MEMORY
    assert plan.device_total == sum(plan.device.values())
    assert "80 GB of memory on each device are assumed" in text
    facts = "14.29 B parameters", "32,760 + 4,680 tokens", "gathering weights (FSDP)", "fits"
    assert all(fact in text for fact in facts)
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
    states = {"weights (float32)", "gradients (float32)", "optimizer state (adamw)"}
    assert set(moved.host) == {*states, "text encoder"}
    assert moved.device_total + sum(moved.host.values()) == on_device.device_total
    alone = plan_of("r2v-1.3B", 1, cpu_offload=True)
    assert not alone.host
    assert "no effect on one device" in plan_table(alone)


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
    tiny = make_training_plan(recipe("tiny"), WAN_CONFIGS["r2v-tiny"], 4)
    assert tiny.sizes == ParallelSizes(4)
    assert tiny.device_memory is None and tiny.samples_per_step == 32
    tiny.require_fit()


def test_global_batch_decides_what_is_possible() -> None:
    # Four samples cannot keep eight data ranks busy: two ranks share each.
    assert plan_of("r2v-1.3B", 8, global_batch_size=4).sizes.data == 4
    with pytest.raises(ValueError, match="such as 24 or 32"):
        plan_of("r2v-1.3B", 4, global_batch_size=30, batch_size=2, ulysses_size=1, ring_size=1)
    config = TrainConfig(task="r2v-1.3B", global_batch_size=3, batch_size=2)
    with pytest.raises(ValueError, match="give a multiple"):
        make_training_plan(config, WAN_CONFIGS["r2v-1.3B"], 4)


def test_unsharded_14b_is_refused_with_a_way_out() -> None:
    plan = plan_of("r2v-14B", 1)
    assert not plan.fits
    assert plan.suggestions == ("8 devices",)
    with pytest.raises(
        ValueError, match=r"r2v-14B does not fit on 1 device: .* GiB on each.*; use 8 devices"
    ) as error:
        plan.require_fit()
    assert "\n" not in str(error.value)
    assert "DOES NOT FIT" in plan_table(plan) and "would fit: 8 devices" in plan_table(plan)


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


def generation_plan_of(task: str, sizes: ParallelSizes, references: int = 3, **changes: Any) -> Plan:
    size, frame_num = TASKS[task].size, TASKS[task].frame_num
    return make_generation_plan(task, sizes, size=size, frame_num=frame_num, references=references, **changes)


def test_generation_divides_branches_and_tokens() -> None:
    sizes = ParallelSizes(3, 1, 2)
    plan = generation_plan_of("r2v-1.3B", sizes)
    assert plan.sizes == sizes and plan.tokens_per_rank == 37440 // 2
    parameters = ModelShape.of(WAN_CONFIGS["r2v-1.3B"]).parameters
    assert plan.device["transformer"] == 2 * parameters
    sharded = generation_plan_of("r2v-1.3B", sizes, dit_fsdp=True, t5_fsdp=True)
    assert sharded.device["transformer"] == 2 * parameters // 6
    assert sharded.device["text encoder"] == plan.device["text encoder"] // 6
    assert generation_plan_of("r2v-tiny", ParallelSizes(1, 1, 2), references=1).fits
    text = plan_table(sharded)
    assert "one denoising step" in text
    small = generation_plan_of("r2v-14B", ParallelSizes(1, 1, 2), device_memory=32 * GIB)
    assert small.suggestions[:2] == ("--t5_cpu", "--dit_fsdp")
    with pytest.raises(ValueError, match="r2v-14B does not fit on 2 devices"):
        small.require_fit()


def test_a_teacher_that_is_in_no_table_is_an_error() -> None:
    tiny = recipe("tiny")
    config = dataclasses.replace(tiny, alignment=dataclasses.replace(tiny.alignment, teacher="dinov9"))
    with pytest.raises(ValueError, match="unknown teacher 'dinov9'.*dinov3-l"):
        make_training_plan(config, WAN_CONFIGS["r2v-tiny"], 1)
