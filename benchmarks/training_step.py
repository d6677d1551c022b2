"""One training step of a real model, prepared as training does, and its speed at full size on one device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from refalign_ext.backbone import WAN_CONFIGS, ReferenceBackbone, WanModel, dit_arguments
from refalign_ext.config import AlignmentConfig, TrainConfig
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import parallelize
from refalign_ext.losses import alignment_by_block
from refalign_ext.planning.flops import AlignmentShape, ModelShape, peak_flops, step_flops
from refalign_ext.planning.training_plan import make_training_plan
from refalign_ext.projectors import ReferenceProjectors
from refalign_ext.training.optimizers import build_optimizers

TRAINED, FORWARD, GRID, TEACHER_DIM = "r2v-1.3B", "r2v-14B", (21, 60, 104), 1024  # 832x480, 81 frames
PER_FRAME = GRID[1] * GRID[2] // 4
VIDEO = GRID[0] * PER_FRAME


def training_step(
    model: WanModel,
    grid: tuple[int, int, int],
    references: int,
    config: TrainConfig,
    parallel: Parallel,
    teacher_dim: int,
) -> Callable[[], float]:
    """A step of a real training: prepared modules, fixed inputs; each call returns the loss.

    Args:
        grid: (frames, rows, columns) of the latents.
    """
    device, alignment = parallel.device, config.alignment
    projectors = None
    if alignment.weight:
        projectors = ReferenceProjectors(model.dim, teacher_dim, alignment.depth).to(device)
    backbone = ReferenceBackbone(model.train())
    trained = parallelize(backbone, projectors, parallel, config)
    optimizers = build_optimizers(trained, config)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    latents, target = random(model.in_dim, *grid), random(model.out_dim, *grid)
    images, text = random(model.in_dim, references, *grid[1:]), random(model.text_len, model.text_dim)
    teacher = random(1, references, grid[1] * grid[2] // 4, teacher_dim)
    timestep = torch.tensor([500.0], device=device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            depth = alignment.depth if projectors else 0
            output = backbone([latents], timestep, [text], [images], tap_depth=depth)
            students = trained.projectors(output.reference_tokens) if projectors else []
        loss = (output.prediction[0].float() - target).square().mean()
        if projectors:
            # A rank has only its part of the alignment terms; the average over ranks makes it whole.
            terms = alignment_by_block(students, teacher, spans=output.reference_spans)
            loss = loss + alignment.weight * parallel.sizes.sequence * sum(terms).mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure_device(device: torch.device, *, checkpointing: str, compiled: bool, repeats: int) -> list[str]:
    """Markdown tables of a training step and of a forward at full size on one device, with random weights."""
    lines = [
        f"Setting: {TRAINED} shape, random weights, {VIDEO} video tokens, batch 1, bf16, AdamW, activation checkpointing "
        f"{checkpointing}, {'compiled, ' if compiled else ''}median of {repeats} steps after two.",
        "",
        "| references | alignment | s/step | MFU | peak memory | estimate of the plan |",
        "|---|---|---|---|---|---|",
    ]
    for references, weight in ((1, 1.0), (1, 0.0), (3, 1.0), (3, 0.0)):
        config = TrainConfig(
            task=TRAINED,
            activation_checkpointing=checkpointing,
            compile=compiled,
            alignment=AlignmentConfig(weight=weight),
        )
        # GiB that the plan expects, without the frozen encoders, which this does not load.
        plan = make_training_plan(config, WAN_CONFIGS[TRAINED], 1, references=references)
        frozen = ("text encoder", "video autoencoder", f"teacher {config.alignment.teacher}")
        planned = sum(count for name, count in plan.device.items() if name not in frozen) / 2**30
        step, flops = _full_size_step(device, references, config)
        seconds, memory = timed(step, device, repeats)
        lines.append(
            f"| {references} | {'on' if weight else 'off'} | {seconds:.3f} | {_mfu(flops, seconds, device)} | {memory} | "
            f"{planned:.1f} GiB |"
        )
        del step
        if device.type == "cuda":
            torch.cuda.empty_cache()
    forward = _full_size_forward(device)
    seconds, memory = timed(forward, device, repeats)
    used = _mfu(
        step_flops(ModelShape.of(WAN_CONFIGS[FORWARD]), VIDEO, 3 * PER_FRAME).forward, seconds, device
    )
    last = f"One forward of the {FORWARD} shape, 3 references: {seconds:.3f} s, MFU {used}, peak memory {memory}."
    return [*lines, "", last]


def _full_size_step(
    device: torch.device, references: int, config: TrainConfig
) -> tuple[Callable[[], float], int]:
    """A training step and its model FLOPs."""
    torch.manual_seed(0)
    with torch.device(device):
        model = WanModel(**dit_arguments(WAN_CONFIGS[TRAINED]))
    aligned = AlignmentShape(config.alignment.depth, TEACHER_DIM) if config.alignment.weight else None
    shape = ModelShape.of(WAN_CONFIGS[TRAINED])
    flops = step_flops(shape, VIDEO, references * PER_FRAME, references=references, alignment=aligned).model
    return training_step(model, GRID, references, config, Parallel.single(device), TEACHER_DIM), flops


def _full_size_forward(device: torch.device) -> Callable[[], float]:
    task = WAN_CONFIGS[FORWARD]
    torch.manual_seed(0)
    with torch.device("meta"):
        model = WanModel(**dit_arguments(task))
    for name, parameter in model.named_parameters():
        if set(WanModel.float32_modules).isdisjoint(name.split(".")):
            parameter.data = parameter.data.bfloat16()
    model.to_empty(device=device).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    backbone = ReferenceBackbone(model)
    inputs = (
        [torch.randn(task.in_dim, *GRID, device=device)],
        torch.tensor([500.0], device=device),
        [torch.randn(task.text_len, task.text_dim, device=device)],
        [torch.randn(task.in_dim, 3, *GRID[1:], device=device)],
    )

    def forward() -> float:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return backbone(*inputs).prediction[0].float().mean().item()

    return forward


def _mfu(flops: int, seconds: float, device: torch.device) -> str:
    peak = peak_flops(device)
    return "unknown" if peak is None else f"{flops / (seconds * peak):.1%}"


def timed(function: Callable[[], float], device: torch.device, repeats: int) -> tuple[float, str]:
    """(median seconds after two calls, peak memory in words); the calls end with a synchronisation."""
    function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    peak = (
        f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else "unknown"
    )
    return statistics.median(seconds), peak
