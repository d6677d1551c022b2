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
    device = parallel.device
    alignment = config.alignment if config.alignment.weight else None
    projectors = None
    if alignment is not None:
        projectors = ReferenceProjectors(model.dim, teacher_dim, alignment.depth).to(device)
    backbone = ReferenceBackbone(model.train())
    trained = parallelize(backbone, projectors, parallel, config)
    optimizers = build_optimizers(trained, config)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    latents, target = random(model.in_dim, *grid), random(model.out_dim, *grid)
    images = random(model.in_dim, references, *grid[1:])
    text = random(model.text_len, model.text_dim)
    per_reference = grid[1] * grid[2] // 4
    teacher = random(1, references, per_reference, teacher_dim)
    timestep = torch.tensor([500.0], device=device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            depth = alignment.depth if alignment is not None else 0
            output = backbone([latents], timestep, [text], [images], tap_depth=depth)
            students = trained.projectors(output.reference_tokens) if alignment is not None else []
        loss = (output.prediction[0].float() - target).square().mean()
        if alignment is not None:
            # A rank has only its part of the alignment terms; the average over ranks makes it whole.
            terms = alignment_by_block(students, teacher, spans=output.reference_spans)
            loss = loss + alignment.weight * parallel.sizes.sequence * sum(terms).mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure_device(
    device: torch.device,
    *,
    train: str = "r2v-1.3B",
    forward: str = "r2v-14B",
    grid: tuple[int, int, int] = (21, 60, 104),
    checkpointing: str = "full",
    compiled: bool = False,
    repeats: int = 5,
) -> list[str]:
    """Markdown tables of a training step and of a forward at full size on one device, with random weights.

    Args:
        train, forward: tasks whose shapes are trained and run forward.
        grid: (frames, rows, columns) of the latents; the default is 832x480 and 81 frames.
    """
    per_frame = grid[1] * grid[2] // 4
    video = grid[0] * per_frame
    lines = [
        f"Setting: {train} shape, random weights, {video} video tokens, batch 1, bf16, AdamW, activation checkpointing "
        f"{checkpointing}, {'compiled, ' if compiled else ''}median of {repeats} steps after two.",
        "",
        "| references | alignment | s/step | MFU | peak memory | estimate of the plan |",
        "|---|---|---|---|---|---|",
    ]
    task, parallel = WAN_CONFIGS[train], Parallel.single(device)
    for references in (1, 3):
        for weight in (1.0, 0.0):
            depth = min(9, task.num_layers)
            config = TrainConfig(
                task=train,
                activation_checkpointing=checkpointing,
                compile=compiled,
                alignment=AlignmentConfig(weight=weight, depth=depth),
            )
            torch.manual_seed(0)
            with torch.device(device):
                model = WanModel(**dit_arguments(task))
            step = training_step(model, grid, references, config, parallel, 1024)
            seconds, memory = timed(step, device, repeats)
            aligned = AlignmentShape(depth, 1024) if weight else None
            flops = step_flops(
                ModelShape.of(task), video, references * per_frame, references=references, alignment=aligned
            )
            lines.append(
                f"| {references} | {'on' if weight else 'off'} | {seconds:.3f} | {_mfu(flops.model, seconds, device)} | "
                f"{memory} | {_planned(config, references):.1f} GiB |"
            )
            del model, step
            if device.type == "cuda":
                torch.cuda.empty_cache()
    task = WAN_CONFIGS[forward]
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
        [torch.randn(task.in_dim, *grid, device=device)],
        torch.tensor([500.0], device=device),
        [torch.randn(task.text_len, task.text_dim, device=device)],
        [torch.randn(task.in_dim, 3, *grid[1:], device=device)],
    )

    def run() -> float:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return backbone(*inputs).prediction[0].float().mean().item()

    seconds, memory = timed(run, device, repeats)
    used = _mfu(step_flops(ModelShape.of(task), video, 3 * per_frame).forward, seconds, device)
    return [
        *lines,
        "",
        f"One forward of the {forward} shape, 3 references: {seconds:.3f} s, MFU {used}, peak memory {memory}.",
    ]


def _mfu(flops: int, seconds: float, device: torch.device) -> str:
    peak = peak_flops(device)
    return "unknown" if peak is None else f"{flops / (seconds * peak):.1%}"


def _planned(config: TrainConfig, references: int) -> float:
    """GiB that the plan expects at the task's own size, without the frozen encoders, which this does not load."""
    plan = make_training_plan(config, WAN_CONFIGS[config.task], 1, references=references)
    frozen = ("text encoder", "video autoencoder", f"teacher {config.alignment.teacher}")
    return sum(count for name, count in plan.device.items() if name not in frozen) / 2**30


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
    if device.type != "cuda":
        return statistics.median(seconds), "unknown"
    return statistics.median(seconds), f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
