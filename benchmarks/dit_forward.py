"""WanModel against diffusers' WanTransformer3DModel at the width of Wan2.1-T2V-1.3B, in one run.

Measures a forward and a training step (forward, backward, AdamW) of a model with the same weights on both
sides, with interleaved repeats.

    python benchmarks/dit_forward.py                    # CPU, or CUDA if there is one
    python benchmarks/dit_forward.py --dtype bfloat16 --write
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import RESULTS, processor, section_head, show_section
from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel
from wan.utils.dit_checkpoint import dit_arguments


def build(layers: int) -> tuple[WanModel, WanTransformer3DModel]:
    """Both models with the same random weights, float32, on the CPU."""
    torch.manual_seed(0)
    ours = WanModel(**dit_arguments(WAN_CONFIGS["t2v-1.3B"]) | {"num_layers": layers})
    nn.init.xavier_uniform_(ours.head.head.weight)
    theirs = WanTransformer3DModel(
        num_attention_heads=ours.num_heads,
        attention_head_dim=ours.dim // ours.num_heads,
        ffn_dim=ours.ffn_dim,
        num_layers=layers,
    )
    theirs.load_state_dict(convert_wan_transformer_to_diffusers(dict(ours.state_dict())), strict=True)
    return ours, theirs


def halve(model: nn.Module, keep: tuple[str, ...]) -> None:
    """Cast to bfloat16 all parameters but those that the model's authors keep in float32."""
    for name, parameter in model.named_parameters():
        if set(keep).isdisjoint(name.split(".")):
            parameter.data = parameter.data.bfloat16()


def compare(functions: list[Callable[[], Any]], repeats: int, device: torch.device) -> list[float]:
    """Median seconds of each, measured alternately after one run each to warm up."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for seconds, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[1:]) for seconds in times]


@click.command(help=__doc__.splitlines()[0])
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", help="trains under autocast"
)
@click.option("--layers", default=1)
@click.option("--batch", default=1)
@click.option("--grid", type=int, nargs=3, default=(3, 10, 20), metavar="FRAMES ROWS COLUMNS")
@click.option("--repeats", default=5)
@click.option("--forward-only", is_flag=True, help="do not time training")
@click.option("--write", is_flag=True, help=f"append the result to {RESULTS.name}")
@click.option("--note", default="", help="a remark on the machine for the record")
def main(
    device: str,
    dtype: str,
    layers: int,
    batch: int,
    grid: tuple[int, int, int],
    repeats: int,
    forward_only: bool,
    write: bool,
    note: str,
) -> None:
    place, half = torch.device(device), dtype == "bfloat16"
    frames, rows, columns = grid
    tokens = frames * rows * columns
    ours, theirs = (model.to(place) for model in build(layers))
    latents = torch.randn(batch, 16, frames, rows * 2, columns * 2, device=place)
    context = torch.randn(batch, 512, 4096, device=place)
    timesteps = torch.linspace(900.0, 100.0, batch, device=place)

    def our_forward() -> torch.Tensor:
        return torch.stack(ours(list(latents), timesteps, list(context), tokens))

    def their_forward() -> torch.Tensor:
        width = theirs.patch_embedding.weight.dtype
        return theirs(latents.to(width), timesteps, context.to(width), return_dict=False)[0]

    def training_step(model: nn.Module, forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

        def step() -> None:
            with torch.autocast(place.type, torch.bfloat16, enabled=half):
                prediction = forward()
            prediction.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    table = {}
    if not forward_only:
        steps = [training_step(ours, our_forward), training_step(theirs, their_forward)]
        table["training step"] = compare(steps, max(repeats // 2, 1), place)
    if half:
        halve(ours, WanModel.float32_modules)
        halve(theirs, tuple(theirs._keep_in_fp32_modules))
    with torch.no_grad():
        difference = (our_forward() - their_forward()).abs().max().item()
        assert difference < (0.2 if half else 1e-3), f"the predictions differ by {difference}"
        table["forward"] = compare([our_forward, their_forward], repeats, place)

    machine = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    machine = f"{torch.cuda.get_device_name()}; {machine}" if place.type == "cuda" else machine
    lines = [
        *section_head(
            f"DiT forward and training step, {dtype}, {device}",
            f"{machine}; {note}" if note else machine,
            f"diffusers {version('diffusers')}",
        ),
        f"- Setting: width of Wan2.1-T2V-1.3B, {layers} block(s), batch {batch}, {frames} x {rows} x {columns} tokens, "
        f"512 text tokens, median of {repeats} interleaved repeats (half as many for training)",
        "",
        "| | WanModel | diffusers | ratio |",
        "|---|---|---|---|",
    ]
    for name, (mine, other) in table.items():
        lines.append(f"| {name} | {mine:.3g} s | {other:.3g} s | {mine / other:.2f} |")
    show_section(lines, write=write)


if __name__ == "__main__":
    main()
