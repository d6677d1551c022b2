"""Sequence parallelism at fixed work, and what training at full size should cost.

    python benchmarks/scaling.py                 # measured on CPU ranks (gloo), then the cost model
    python benchmarks/scaling.py --model-only --peak 312e12 --memory 80e9
    python benchmarks/scaling.py --cuda          # one GPU: a 1.3B-shaped training step and a 14B-shaped forward
    python benchmarks/scaling.py --write         # append the result to benchmarks/RESULTS.md

Measured: one training step of a small real WanModel on 1, 2 and 4 ranks that share every sample. A dispatch mode counts the
bytes of every collective. All ranks share one or two cores, so only the CPU time of all ranks together is compared.

Modelled: seconds of an optimizer step for the paper's global batch, from the operations and bytes of the plan that training
prints. Compute takes hardware FLOPs / (peak * utilization). Exchanges of the sequence ranks are not overlapped with
compute; FSDP's are, so that the longer of the two counts. Ranks within one machine of eight use NVLink, others the network.
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
from typing import Any

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
from refalign_ext.planning.flops import ModelShape
from refalign_ext.planning.memory import Load, sequence_traffic
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
    """Counts the bytes that this rank receives in collectives, as a ring moves them: FSDP's and the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.sharding = self.exchanged = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.namespace == "c10d":
            self._count(function.overloadpacket.__name__, args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        first, second = (_bytes(argument) for argument in args[:2])
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            self.sharding += abs(first - second)
        elif name in ("allgather_", "reduce_scatter_"):
            self.exchanged += abs(first - second)
        elif name in ("alltoall_base_", "allreduce_"):
            size = _group_size(args)
            self.exchanged += (2 if name == "allreduce_" else 1) * first * (size - 1) // size
        else:
            assert name in ("barrier", "broadcast_"), f"collective {name} is not counted"


def _group_size(args: tuple[Any, ...]) -> int:
    for argument in args:
        with suppress(RuntimeError, TypeError):  # another kind of object
            return torch.distributed.ProcessGroup.unbox(argument).size()
    raise AssertionError("a collective without a process group")


def _bytes(value: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _measure_rank(rank: int, sizes: ParallelSizes, repeats: int) -> tuple[float, list[float], int, int]:
    """(loss, CPU seconds of every step, bytes of the sequence ranks, bytes of FSDP)."""
    parallel = Parallel.create(sizes, torch.device("cpu"))
    torch.manual_seed(0)
    model = WanModel(**SMALL)
    torch.nn.init.xavier_uniform_(model.head.head.weight)
    alignment = AlignmentConfig(depth=DEPTH, teacher="dinov3-tiny")
    config = TrainConfig(precision="fp32", learning_rate=1e-5, alignment=alignment)
    step = training_step(model, SMALL_GRID, SMALL_REFERENCES, config, parallel, TEACHER_DIM)
    step()  # FSDP and the optimizer set themselves up
    with CollectiveBytes() as counter:
        loss = step()
    seconds = []
    for _ in range(repeats):
        parallel.barrier()
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return parallel.mean(torch.tensor(loss)).item(), seconds, counter.exchanged, counter.sharding


def measure_ranks(repeats: int) -> list[str]:
    """Markdown table of the measured steps on CPU ranks."""
    shape = ModelShape(**SMALL)
    per_frame = SMALL_GRID[1] * SMALL_GRID[2] // 4
    video, reference = SMALL_GRID[0] * per_frame, SMALL_REFERENCES * per_frame
    lines = [
        f"WanModel of {shape.parameters / 1e6:.2f} M parameters, float32, {video} video and {reference} reference tokens, "
        f"alignment over {DEPTH} blocks, no checkpointing; median of {repeats} steps. More than one rank also shards.",
        "",
        "| sequence ranks | tokens per rank | exchanged (formula) | FSDP | CPU time of all ranks | ratio to 1 | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    alone = 0.0
    for name, (ring, ulysses) in RANKS.items():
        sizes = ParallelSizes(1, ring, ulysses)
        results = run_ranks(_measure_rank, sizes.world, sizes, repeats, timeout=600.0)
        load = Load.of(sizes, video, reference, batch=1, precision="fp32")
        expected = sum(sequence_traffic(shape, load, sizes, passes=2, joins=2).values())
        loss, _, exchanged, sharding = results[0]
        cpu = statistics.median(map(sum, zip(*(seconds for _, seconds, _, _ in results), strict=True)))
        alone = alone or cpu
        lines.append(
            f"| {name} | {load.held} | {exchanged / 1e6:.2f} MB ({expected / 1e6:.2f}) | {sharding / 1e6:.2f} MB | "
            f"{cpu:.2f} s | {cpu / alone:.2f} | {loss:.6f} |"
        )
    return lines


def cost_model(arguments: argparse.Namespace) -> list[str]:
    """Markdown table of modelled steps for 1.3B and 14B."""
    peak, nvlink, network = arguments.peak, arguments.nvlink, arguments.network
    lines = [
        f"Assumed: {peak / 1e12:.0f} TFLOP/s peak (bf16, dense), {arguments.utilization:.0%} of it reached while computing, "
        f"{nvlink / 1e9:.0f} GB/s NVLink and {network / 1e9:.0f} GB/s network per GPU and direction, "
        f"{arguments.memory / 1e9:.0f} GB per GPU; 832x480, 81 frames, 3 references, global batch 128, AdamW.",
        "",
        "| task | GPUs | checkpointing | data x Ulysses x ring | memory | compute | exchange | FSDP | step | MFU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    choices = ((t, w, c) for t in ("r2v-1.3B", "r2v-14B") for w in (8, 16, 32, 64) for c in ("full", "none"))
    for task, world, checkpointing in choices:
        changes = {"task": task, "activation_checkpointing": checkpointing, "t5_cpu": True}
        config = dataclasses.replace(recipe("paper_stage1"), **changes)
        plan = make_training_plan(config, WAN_CONFIGS[task], world, device_memory=int(arguments.memory))
        sizes, samples = plan.sizes, plan.samples_per_step
        if not plan.fits:
            lines.append(f"| {task} | {world} | {checkpointing} | does not fit |||||||")
            continue
        compute = samples * plan.flops.hardware / (world * peak * arguments.utilization)
        sharded = sum(count for name, count in plan.traffic.items() if "FSDP" in name)
        exchange = sum(plan.traffic.values()) - sharded
        exchange /= nvlink if sizes.sequence <= GPUS_PER_MACHINE else network
        sharding = sharded / (nvlink if world <= GPUS_PER_MACHINE else network)
        total = max(compute + exchange, sharding)
        lines.append(
            f"| {task} | {world} | {checkpointing} | {sizes.data} x {sizes.ulysses} x {sizes.ring} | "
            f"{plan.device_total / 2**30:.0f} GiB | {compute:.1f} s | {exchange:.1f} s | {sharding:.1f} s | {total:.1f} s | "
            f"{samples * plan.flops.model / (total * world * peak):.0%} |"
        )
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
    parser.add_argument("--checkpointing", default="full", help="with --cuda: none, full or selective")
    parser.add_argument("--compile", action="store_true", help="with --cuda: compile the blocks")
    parser.add_argument("--write", action="store_true", help=f"append the result to {RESULTS.name}")
    arguments = parser.parse_args()

    machine = f"{processor()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
    if arguments.cuda:
        machine = f"{torch.cuda.get_device_name()}; {machine}"
    lines = [*section_head(f"Scaling, {'cuda' if arguments.cuda else 'cpu'}", machine), ""]
    if arguments.cuda:
        choices = {"checkpointing": arguments.checkpointing, "compiled": arguments.compile}
        lines += measure_device(torch.device("cuda"), repeats=arguments.repeats, **choices)
    else:
        if not arguments.model_only:
            lines += ["### Measured: sequence ranks at fixed work", "", *measure_ranks(arguments.repeats), ""]
        lines += ["### Modelled: one optimizer step at full size", "", *cost_model(arguments)]
    show_section(lines, write=arguments.write)


if __name__ == "__main__":
    main()
