"""Sequence parallelism at fixed work, and what training at full size should cost.

    python benchmarks/scaling.py                 # measured on CPU ranks (gloo), then the cost model
    python benchmarks/scaling.py --model-only --peak 312e12 --memory 80e9
    python benchmarks/scaling.py --cuda          # one GPU: a 1.3B-shaped training step and a 14B-shaped forward
    python benchmarks/scaling.py --write         # append the result to benchmarks/RESULTS.md

Measured: one training step (forward, backward with reference alignment, AdamW) of a small real WanModel on 1, 2 and 4
ranks that share every sample. Bytes are counted, not estimated: every collective that runs is seen by a dispatch mode,
those of FSDP included. All ranks share one or two cores, so wall time says nothing about speed-up; what is honest is the
CPU time of all ranks together against that of one, the overhead of dividing the work.

Modelled: seconds of an optimizer step for the paper's global batch. Operations and bytes come from the same formulas as
the plan that training prints; the first are checked against torch's counter, the second against the counted bytes here.
Compute takes hardware FLOPs / (peak * utilization). Exchanges of the sequence ranks are not overlapped with compute;
FSDP's are, so that the longer of the two counts. A group of ranks within one machine of eight uses NVLink, others the
network. Loading of data, the frozen encoders and stragglers are not modelled.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import RESULTS, processor, section_head, show_section
from benchmarks.training_step import measure_device, training_step
from refalign_ext.backbone import WAN_CONFIGS, WanModel
from refalign_ext.config import AlignmentConfig, TrainConfig, recipe
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.sizes import ParallelSizes
from refalign_ext.planning.flops import (
    AlignmentShape,
    ModelShape,
)
from refalign_ext.planning.memory import FULL, Load, gather_traffic, sequence_traffic
from refalign_ext.planning.plan import Plan
from refalign_ext.planning.training_plan import make_training_plan
from tests.helpers.ranks import run_ranks

GPUS_PER_MACHINE = 8

SMALL = {
    **{"dim": 192, "ffn_dim": 768, "num_layers": 4, "num_heads": 4, "text_len": 64, "text_dim": 64},
    **{"in_dim": 16, "out_dim": 16, "freq_dim": 64},
}
SMALL_GRID, SMALL_REFERENCES, DEPTH, TEACHER_DIM = (8, 32, 32), 3, 2, 64
RANKS = {"1": (1, 1), "2, Ulysses": (1, 2), "2, ring": (2, 1), "4, Ulysses": (1, 4), "4, 2 x 2": (2, 2)}


class CollectiveBytes(TorchDispatchMode):
    """Bytes that this rank receives in collectives, by operation, as a ring moves them."""

    def __init__(self) -> None:
        super().__init__()
        self.received: dict[str, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            self.received[name] = self.received.get(name, 0) + _received(name, args)
        return function(*args, **(kwargs or {}))


def _received(name: str, args: tuple[Any, ...]) -> int:
    """Bytes that a rank receives in a collective with these arguments."""
    sizes = [_bytes(argument) for argument in args[:2]]
    if name in ("alltoall_base_", "alltoall_"):
        group = _group_size(args)
        return sizes[0] * (group - 1) // group
    if name in ("allgather_", "_allgather_base_", "allgather_into_tensor_coalesced_"):
        return sizes[0] - sizes[1]
    if name in ("reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_"):
        return sizes[1] - sizes[0]
    if name == "allreduce_":
        group = _group_size(args)
        return 2 * sizes[0] * (group - 1) // group
    if name in ("barrier", "broadcast_"):
        return 0
    raise NotImplementedError(f"collective {name} is not counted: say here what a rank receives in it")


def _group_size(args: tuple[Any, ...]) -> int:
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            with suppress(RuntimeError):  # another kind of object
                return torch.distributed.ProcessGroup.unbox(argument).size()
    raise NotImplementedError("a collective without a process group is not counted")


def _bytes(value: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


class Measured(NamedTuple):
    """One rank's part."""

    loss: float
    cpu_seconds: list[float]
    wall_seconds: list[float]
    received: dict[str, int]


def _measure_rank(rank: int, ring: int, ulysses: int, repeats: int) -> Measured:
    sizes = ParallelSizes(1, ring, ulysses)
    parallel = Parallel.create(sizes, torch.device("cpu"))
    torch.manual_seed(0)
    model = WanModel(**SMALL)
    torch.nn.init.xavier_uniform_(model.head.head.weight)
    config = TrainConfig(
        precision="fp32", learning_rate=1e-5, alignment=AlignmentConfig(depth=DEPTH, teacher="dinov3-tiny")
    )
    step = training_step(model, SMALL_GRID, SMALL_REFERENCES, config, parallel, TEACHER_DIM)
    step()  # FSDP and the optimizer set themselves up
    with CollectiveBytes() as counter:
        loss = step()
    cpu, wall = [], []
    for _ in range(repeats):
        parallel.barrier()
        starts = time.process_time(), time.perf_counter()
        step()
        cpu.append(time.process_time() - starts[0])
        wall.append(time.perf_counter() - starts[1])
    return Measured(parallel.mean(torch.tensor(loss)).item(), cpu, wall, counter.received)


def measure_ranks(repeats: int) -> list[str]:
    """Markdown table of the measured steps on CPU ranks."""
    shape = ModelShape(**SMALL)
    per_frame = SMALL_GRID[1] * SMALL_GRID[2] // 4
    video, reference = SMALL_GRID[0] * per_frame, SMALL_REFERENCES * per_frame
    lines = [
        f"Setting: WanModel of {shape.parameters / 1e6:.2f} M parameters ({shape.num_layers} blocks of width {shape.dim}), "
        f"float32, {video} video and {reference} reference tokens, alignment over {DEPTH} blocks, no checkpointing; "
        f"median of {repeats} steps. More than one rank also shards with FSDP, which one rank does not.",
        "",
        "| sequence ranks | tokens per rank | exchanged by sequence ranks (formula) | FSDP (formula) | CPU time of all ranks "
        "| ratio to 1 | wall time | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    alone = 0.0
    for name, (ring, ulysses) in RANKS.items():
        sizes = ParallelSizes(1, ring, ulysses)
        results = run_ranks(_measure_rank, sizes.world, ring, ulysses, repeats, timeout=600.0)
        load = Load.of(sizes, video, reference, batch=1, precision="fp32")
        expected = sum(sequence_traffic(shape, load, sizes, passes=2, joins=2).values())
        projectors = AlignmentShape(DEPTH, TEACHER_DIM).parameters(shape.dim)
        world = sizes.world
        fsdp = gather_traffic(shape, world, FULL, backward=True)
        fsdp += FULL * (shape.parameters + 2 * projectors) * (world - 1) // world
        received = results[0].received
        sharded = sum(
            count for op, count in received.items() if op in ("_allgather_base_", "_reduce_scatter_base_")
        )
        exchanged = sum(received.values()) - sharded
        cpu = statistics.median(map(sum, zip(*(result.cpu_seconds for result in results), strict=True)))
        wall = statistics.median(results[0].wall_seconds)
        alone = alone or cpu
        pairs = ((exchanged, expected), (sharded, fsdp))
        moved = (f"{counted / 1e6:.2f} MB ({formula / 1e6:.2f})" for counted, formula in pairs)
        lines.append(
            f"| {name} | {load.held} | {' | '.join(moved)} | {cpu:.2f} s | {cpu / alone:.2f} | {wall:.2f} s | "
            f"{results[0].loss:.6f} |"
        )
    return lines


class Estimate(NamedTuple):
    """Seconds of one optimizer step by the cost model."""

    compute: float
    sequence: float
    sharding: float
    total: float
    mfu: float


def estimate(plan: Plan, peak: float, utilization: float, nvlink: float, network: float) -> Estimate:
    """The cost model of the module's docstring; bandwidths in bytes per second and direction for one GPU."""
    world, sequence = plan.sizes.world, plan.sizes.sequence
    samples = plan.samples_per_step
    compute = samples * plan.flops.hardware / (world * peak * utilization)
    sharding = sum(count for name, count in plan.traffic.items() if "FSDP" in name)
    exchanged = sum(plan.traffic.values()) - sharding
    exchange = exchanged / (nvlink if sequence <= GPUS_PER_MACHINE else network)
    shard = sharding / (nvlink if world <= GPUS_PER_MACHINE else network)
    total = max(compute + exchange, shard)
    mfu = samples * plan.flops.model / (total * world * peak)
    return Estimate(compute, exchange, shard, total, mfu)


def cost_model(arguments: argparse.Namespace) -> list[str]:
    """Markdown table of modelled steps for 1.3B and 14B."""
    lines = [
        f"Assumed: {arguments.peak / 1e12:.0f} TFLOP/s peak (bf16, dense), {arguments.utilization:.0%} of it reached while "
        f"computing, {arguments.nvlink / 1e9:.0f} GB/s NVLink and {arguments.network / 1e9:.0f} GB/s network per GPU and "
        f"direction, {arguments.memory / 1e9:.0f} GB per GPU; 832x480, 81 frames, 3 references, global batch 128, AdamW.",
        "",
        "| task | GPUs | checkpointing | data x Ulysses x ring | memory | TFLOP per sample | alignment | compute | exchange "
        "| FSDP | step | MFU |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task in ("r2v-1.3B", "r2v-14B"):
        for world in (8, 16, 32, 64):
            for checkpointing in ("full", "selective", "none"):
                config = dataclasses.replace(
                    recipe("paper_stage1"), task=task, activation_checkpointing=checkpointing, t5_cpu=True
                )
                plan = make_training_plan(
                    config, WAN_CONFIGS[task], world, device_memory=int(arguments.memory)
                )
                if not plan.fits:
                    lines.append(f"| {task} | {world} | {checkpointing} | does not fit |||||||||")
                    continue
                cost = estimate(
                    plan, arguments.peak, arguments.utilization, arguments.nvlink, arguments.network
                )
                sizes, flops = plan.sizes, plan.flops
                cells = (
                    task,
                    world,
                    checkpointing,
                    f"{sizes.data} x {sizes.ulysses} x {sizes.ring}",
                    f"{plan.device_total / 2**30:.0f} GiB",
                    f"{flops.model / 1e12:,.0f}",
                    f"{flops.alignment / flops.model:.1%}",
                    *(f"{seconds:.1f} s" for seconds in cost[:4]),
                    f"{cost.mfu:.0%}",
                )
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", action="store_true", help="measure at full size on one GPU")
    parser.add_argument("--model-only", action="store_true", help="only the cost model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s of a GPU (default: H100 SXM)")
    parser.add_argument("--utilization", type=float, default=0.6, help="share of the peak reached computing")
    parser.add_argument("--nvlink", type=float, default=300e9, help="bytes/s within a machine")
    parser.add_argument("--network", type=float, default=40e9, help="bytes/s between machines, for one GPU")
    parser.add_argument("--memory", type=float, default=80e9, help="bytes of a GPU")
    parser.add_argument(
        "--checkpointing", default="full", choices=("none", "full", "selective"), help="with --cuda"
    )
    parser.add_argument("--compile", action="store_true", help="with --cuda: compile the blocks")
    parser.add_argument("--write", action="store_true", help=f"append the result to {RESULTS.name}")
    parser.add_argument("--note", default="", help="a remark on the machine for the record")
    arguments = parser.parse_args()

    machine = f"{processor()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
    if arguments.cuda:
        machine = f"{torch.cuda.get_device_name()}; {machine}"
    if arguments.note:
        machine += f"; {arguments.note}"
    lines = [*section_head(f"Scaling, {'cuda' if arguments.cuda else 'cpu'}", machine), ""]
    if arguments.cuda:
        lines += measure_device(
            torch.device("cuda"),
            checkpointing=arguments.checkpointing,
            compiled=arguments.compile,
            repeats=arguments.repeats,
        )
    else:
        if not arguments.model_only:
            lines += ["### Measured: sequence ranks at fixed work", "", *measure_ranks(arguments.repeats), ""]
        lines += ["### Modelled: one optimizer step at full size", "", *cost_model(arguments)]
    show_section(lines, write=arguments.write)


if __name__ == "__main__":
    main()
