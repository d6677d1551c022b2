"""Reference-alignment loss against a dense formulation: time and extra peak memory of forward + backward, in one run.

    python benchmarks/ra_loss.py                 # one CPU core, M = 4, N = 1560, D = 1024, float32
    python benchmarks/ra_loss.py --device cuda --write

The dense formulation is the loss as one would first write it: normalise, the full (M N) x (M N) similarity matrix, a boolean
gather of the pairs of different references, the hinge, the mean; autograd does the backward pass.

Time: both variants alternate in one process on the same tensors; CPU time on a CPU, where other programs disturb it least.
Memory on a CPU: each variant runs once in a fresh process that has already made the inputs; the result is how far its peak
resident size (VmHWM) rises, so it counts every temporary buffer, what is kept for the backward pass, and the gradient. On
CUDA it is the allocator's peak above the inputs.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import interleaved_medians, processor, section_head, show_section
from refalign_ext.losses import reference_alignment_loss

TIME_LIMIT, MEMORY_LIMIT = 0.55, 0.35


def dense_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 8 to 10 for one sample, written straightforwardly; student and teacher are [1, M, N, D]."""
    references, tokens = student.shape[1:3]
    unit_student = F.normalize(student.flatten(0, 2), dim=-1)
    unit_teacher = F.normalize(teacher.flatten(0, 2), dim=-1)
    positive = (1.0 - (unit_student * unit_teacher).sum(-1)).mean()
    similarity = unit_student @ unit_teacher.T
    owner = torch.arange(references, device=student.device).repeat_interleave(tokens)
    return positive + F.relu(similarity[owner[:, None] != owner[None, :]]).mean()


def blocked_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return reference_alignment_loss(student, teacher).total


VARIANTS = {"dense": dense_loss, "blocked": blocked_loss}


def make_inputs(shape: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, *shape, generator=generator).to(device) for _ in range(2))
    return student.requires_grad_(True), teacher


def step(variant: str, student: Tensor, teacher: Tensor) -> float:
    """The loss of one forward + backward; the gradient is left in student.grad."""
    student.grad = None
    loss = VARIANTS[variant](student, teacher)
    loss.backward()
    return loss.item()


def extra_peak_bytes(variant: str, shape: tuple[int, int, int], device: str, threads: int) -> int:
    """Run in the fresh process that is measured."""
    torch.set_num_threads(threads)
    inputs = make_inputs(shape, device)
    step(variant, *make_inputs((2, 64, 64), device))

    def peak() -> int:
        if device != "cpu":
            return torch.cuda.max_memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    before = peak()
    step(variant, *inputs)
    return peak() - before


@click.command(context_settings={"show_default": True})
@click.option("--references", default=4, help="M")
@click.option("--tokens", default=1560, help="N, tokens of one reference.")
@click.option("--dim", default=1024, help="D")
@click.option("--repeats", default=5)
@click.option("--threads", default=1, help="CPU threads.")
@click.option("--device", default="cpu")
@click.option("--write", is_flag=True, help="Append the result to benchmarks/RESULTS.md.")
def main(
    references: int, tokens: int, dim: int, repeats: int, threads: int, device: str, write: bool
) -> None:
    """Measure and print, as a section of RESULTS.md; exit code 1 if a limit is not kept."""
    torch.set_num_threads(threads)
    shape, memory = (references, tokens, dim), {}
    for variant in VARIANTS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            memory[variant] = fresh.submit(extra_peak_bytes, variant, shape, device, threads).result()
    student, teacher = make_inputs(shape, device)
    losses, gradients = {}, {}
    for variant in VARIANTS:
        losses[variant] = step(variant, student, teacher)
        gradients[variant] = student.grad.clone()
    clock = time.process_time if device == "cpu" else time.perf_counter
    steps = [partial(step, variant, student, teacher) for variant in VARIANTS]
    seconds = dict(zip(VARIANTS, interleaved_medians(steps, repeats, clock), strict=True))
    ratios = [found["blocked"] / found["dense"] for found in (seconds, memory)]
    difference = (gradients["blocked"] - gradients["dense"]).norm() / gradients["dense"].norm()
    name = processor() if device == "cpu" else torch.cuda.get_device_name()
    rows = [f"| {v} | {1e3 * seconds[v]:.1f} ms | {memory[v] / 2**20:.0f} MiB |" for v in VARIANTS]
    lines = [
        *section_head(f"Reference-alignment loss, {device}", f"{name}, {threads} thread(s)"),
        f"- Setting: M = {references}, N = {tokens}, D = {dim}, float32, forward + backward, median of {repeats} runs in turns",
        "",
        f"| variant | {'CPU' if device == 'cpu' else 'wall'} time | extra peak memory |",
        "|---|---|---|",
        *rows,
        f"| ratio | {ratios[0]:.2f} | {ratios[1]:.2f} |",
        f"| limit | {TIME_LIMIT} | {MEMORY_LIMIT} |",
        "",
        f"Loss {losses['blocked']:.7f} against {losses['dense']:.7f}; gradients differ by {difference.item():.1e} of their norm.",
    ]
    show_section(lines, write=write)
    sys.exit(int(ratios[0] > TIME_LIMIT or ratios[1] > MEMORY_LIMIT))


if __name__ == "__main__":
    main()
