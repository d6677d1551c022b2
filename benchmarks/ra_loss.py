"""Reference-alignment loss against a dense formulation: time and extra peak memory of forward + backward, in one run.

    python benchmarks/ra_loss.py                 # one CPU core, M = 4, N = 1560, D = 1024, float32
    python benchmarks/ra_loss.py --device cuda
    python benchmarks/ra_loss.py --write         # append the result to benchmarks/RESULTS.md

The dense formulation is the loss as one would first write it: normalise, the full (M N) x (M N) similarity matrix, a boolean
gather of the pairs of different references, the hinge, the mean; autograd does the backward pass.

Time: both variants alternate in one process on the same tensors, and the medians are compared. On a CPU the ratio is that
of the process's CPU time, which other programs on the machine disturb least; the wall time is shown beside it.

Memory on a CPU: each variant runs once in a fresh process that has already made the inputs and warmed up on tiny ones; the
result is how far the process's peak resident size (VmHWM, which unlike ru_maxrss does not inherit the parent's peak) rises,
so it counts every temporary buffer, what is kept for the backward pass, and the gradient itself. On CUDA it is the
allocator's peak above the inputs.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import processor, show_section
from refalign_ext.losses import reference_alignment_loss

TIME_LIMIT, MEMORY_LIMIT = 0.55, 0.35


def dense_loss(student: Tensor, teacher: Tensor, margin: float = 1.0, negative_weight: float = 1.0) -> Tensor:
    """Eq. 8 to 10 for one sample, written straightforwardly; student and teacher are [1, M, N, D]."""
    references, tokens = student.shape[1:3]
    unit_student = F.normalize(student.flatten(0, 2), dim=-1)
    unit_teacher = F.normalize(teacher.flatten(0, 2), dim=-1)
    positive = (1.0 - (unit_student * unit_teacher).sum(-1)).mean()
    similarity = unit_student @ unit_teacher.T
    owner = torch.arange(references, device=student.device).repeat_interleave(tokens)
    others = owner[:, None] != owner[None, :]
    negative = F.relu(similarity[others] + (margin - 1.0)).mean()
    return positive + negative_weight * negative


def blocked_loss(
    student: Tensor, teacher: Tensor, margin: float = 1.0, negative_weight: float = 1.0
) -> Tensor:
    return reference_alignment_loss(student, teacher, margin=margin, negative_weight=negative_weight).total


VARIANTS: dict[str, Callable[..., Tensor]] = {"dense": dense_loss, "blocked": blocked_loss}


def make_inputs(references: int, tokens: int, dim: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(1, references, tokens, dim, generator=generator).to(device) for _ in range(2)
    )
    return student.requires_grad_(True), teacher


def step(variant: str, student: Tensor, teacher: Tensor) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, loss) of one forward + backward; the gradient is left in student.grad."""
    student.grad = None
    if student.is_cuda:
        torch.cuda.synchronize()
    wall, process = time.perf_counter(), time.process_time()
    loss = VARIANTS[variant](student, teacher)
    loss.backward()
    if student.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - process, loss.item()


def peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def extra_peak_bytes(variant: str, options: argparse.Namespace) -> int:
    """Run in the process that is measured."""
    student, teacher = make_inputs(options.references, options.tokens, options.dim, options.device)
    step(variant, *make_inputs(2, 64, 64, options.device))
    if student.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(variant, student, teacher)
        return torch.cuda.max_memory_allocated() - before
    before = peak_resident_bytes()
    step(variant, student, teacher)
    return peak_resident_bytes() - before


def measure_memory(variant: str, options: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--memory_of", variant]
    for name in ("references", "tokens", "dim", "threads", "device"):
        command += [f"--{name}", str(getattr(options, name))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"{processor()}, {os.cpu_count()} cores"


def report(options: argparse.Namespace) -> tuple[list[str], bool]:
    """The lines of a section of RESULTS.md, and whether both limits are kept."""
    memory = {variant: measure_memory(variant, options) for variant in VARIANTS}
    student, teacher = make_inputs(options.references, options.tokens, options.dim, options.device)
    losses, gradients = {}, {}
    for variant in VARIANTS:
        _, _, losses[variant] = step(variant, student, teacher)
        gradients[variant] = student.grad.clone()
    runs: dict[str, list[tuple[float, float, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.repeats):
        for variant in VARIANTS:
            runs[variant].append(step(variant, student, teacher))
    wall, process = (
        {variant: statistics.median(run[clock] for run in runs[variant]) for variant in VARIANTS}
        for clock in (0, 1)
    )
    on_cpu = student.device.type == "cpu"
    wall_ratio, process_ratio = (median["blocked"] / median["dense"] for median in (wall, process))
    time_ratio = process_ratio if on_cpu else wall_ratio
    memory_ratio = memory["blocked"] / memory["dense"]
    difference = (gradients["blocked"] - gradients["dense"]).norm() / gradients["dense"].norm()
    where = f"{options.threads} thread(s)" if on_cpu else options.device
    lines = [
        f"## Reference-alignment loss, {datetime.date.today().isoformat()}",
        "",
        f"`python benchmarks/ra_loss.py --device {options.device}`: {machine(options.device)}; {where}; "
        f"Python {platform.python_version()}, torch {torch.__version__}; M = {options.references}, N = {options.tokens}, "
        f"D = {options.dim}, float32, forward + backward, median of {options.repeats} interleaved runs.",
        "",
        "| variant | CPU time | wall time (range) | extra peak memory |",
        "|---|---|---|---|",
    ]
    for variant in VARIANTS:
        low, high = (edge(run[0] for run in runs[variant]) * 1e3 for edge in (min, max))
        lines.append(
            f"| {variant} | {process[variant] * 1e3:.1f} ms | {wall[variant] * 1e3:.1f} ms ({low:.1f} to {high:.1f}) "
            f"| {memory[variant] / 2**20:.0f} MiB |"
        )
    lines += [
        f"| ratio | {process_ratio:.2f} | {wall_ratio:.2f} | {memory_ratio:.2f} |",
        f"| limit | {TIME_LIMIT if on_cpu else ''} | {'' if on_cpu else TIME_LIMIT} | {MEMORY_LIMIT} |",
        "",
        f"Loss {losses['blocked']:.7f} against {losses['dense']:.7f}; gradients differ by {difference.item():.1e} of their norm.",
    ]
    return lines, time_ratio <= TIME_LIMIT and memory_ratio <= MEMORY_LIMIT


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--references", type=int, default=4, help="M")
    parser.add_argument("--tokens", type=int, default=1560, help="N, tokens of one reference")
    parser.add_argument("--dim", type=int, default=1024, help="D")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="append the result to benchmarks/RESULTS.md")
    parser.add_argument("--memory_of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(extra_peak_bytes(options.memory_of, options))
        return 0
    lines, kept = report(options)
    show_section(lines, write=options.write)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
