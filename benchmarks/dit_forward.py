"""WanModel against diffusers' WanTransformer3DModel at the width of Wan2.1-T2V-1.3B, in one run.

Measures a forward and a training step (forward, backward, AdamW) of a model with the same weights on both
sides, with interleaved repeats, and the bytes that the operations of one block move besides its matmuls and
attention.

    python benchmarks/dit_forward.py                    # CPU, or CUDA if there is one
    python benchmarks/dit_forward.py --dtype bfloat16 --write
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import RESULTS, processor, section_head, show_section
from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel, rope_multipliers
from wan.utils.dit_checkpoint import dit_arguments

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# matmuls and attention; its softmax too, where attention is spelled out
_NOT_COUNTED = {
    *("mm", "addmm", "bmm", "baddbmm", "mv", "linear", "convolution"),
    *("_softmax", "_softmax_backward_data"),
}
_NO_TRAFFIC = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view", "promote_types"}
_OVERWRITING = {"copy_", "fill_", "zero_"}


class TrafficCounter(TorchDispatchMode):
    """Bytes that operations read and write, except matmuls, attention, views and allocations.

    An operation is charged its tensor arguments plus its results, dimensions of stride zero once. What a
    kernel does inside, such as a temporary copy, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        aliases = [result.alias_info for result in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not (is_view or name in _NO_TRAFFIC or name in _NOT_COUNTED or "_attention" in name):
            read = args[1:] if name in _OVERWRITING else args
            leaves = tree_leaves((read, kwargs or {}, out))
            self.bytes += sum(_bytes(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))
        return out


def _bytes(tensor: torch.Tensor) -> int:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


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


def timed(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(
    ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int, device: torch.device
) -> list[float]:
    """Median seconds of each, measured alternately after one run each to warm up."""
    times: list[list[float]] = [[], []]
    for repeat in range(repeats + 1):
        for side, function in enumerate((ours, theirs)):
            seconds = timed(function, device)
            if repeat:
                times[side].append(seconds)
    return [statistics.median(side) for side in times]


def traffic(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, train: bool) -> int:
    """Bytes moved by one call, or by one call and its backward."""
    x = x.clone().requires_grad_(train)
    with torch.set_grad_enabled(train), TrafficCounter() as counter:
        out = function(x)
        if train:
            out.backward(torch.empty_like(out))
    return counter.bytes


def measure(arguments: argparse.Namespace) -> list[tuple[str, float, float, str]]:
    """Rows of (what, ours, diffusers', unit)."""
    device, half = torch.device(arguments.device), arguments.dtype == "bfloat16"
    frames, rows, columns = arguments.grid
    tokens, batch = frames * rows * columns, arguments.batch
    ours, theirs = (model.to(device) for model in build(arguments.layers))
    latents = torch.randn(batch, 16, frames, rows * 2, columns * 2, device=device)
    context = torch.randn(batch, 512, 4096, device=device)
    timesteps = torch.linspace(900.0, 100.0, batch, device=device)

    def training_step(model: nn.Module, forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                prediction = forward()
            prediction.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def our_forward() -> torch.Tensor:
        return torch.stack(ours(list(latents), timesteps, list(context), tokens))

    def their_forward() -> torch.Tensor:
        dtype = theirs.patch_embedding.weight.dtype
        return theirs(latents.to(dtype), timesteps, context.to(dtype), return_dict=False)[0]

    table = []
    if not arguments.forward_only:
        steps = [training_step(ours, our_forward), training_step(theirs, their_forward)]
        table.append(("training step", *compare(*steps, max(arguments.repeats // 2, 1), device), "s"))
    if half:
        halve(ours, WanModel.float32_modules)
        halve(theirs, tuple(theirs._keep_in_fp32_modules))
    with torch.no_grad():
        difference = (our_forward() - their_forward()).abs().max().item()
        assert difference < (0.2 if half else 1e-3), f"the predictions differ by {difference}"
        table.insert(0, ("forward", *compare(our_forward, their_forward, arguments.repeats, device), "s"))

    dtype, width = DTYPES[arguments.dtype], ours.dim
    embedded = torch.randn(batch, 512, width, device=device, dtype=dtype)
    e = torch.randn(batch, 6, width, device=device)
    turns = rope_multipliers(ours.freqs, [(frames, rows, columns)] * batch, tokens, torch.float32, device)
    tables = theirs.rope(latents)
    x = torch.randn(batch, tokens, width, device=device)
    for name, train in (
        ("traffic per block, forward", False),
        ("traffic per block, forward and backward", True),
    ):
        moved = (
            traffic(lambda x: ours.blocks[0](x, e, None, None, turns, embedded, None), x, train) / 1e6,
            traffic(lambda x: theirs.blocks[0](x, embedded, e, tables), x.to(dtype), train) / 1e6,
        )
        table.append((name, *moved, "MB"))
    return table


def report(arguments: argparse.Namespace, table: list[tuple[str, float, float, str]]) -> list[str]:
    """The lines of a section of RESULTS.md."""
    machine = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    if arguments.device == "cuda":
        machine = f"{torch.cuda.get_device_name()}; {machine}"
    frames, rows, columns = arguments.grid
    if arguments.note:
        machine += f"; {arguments.note}"
    title = f"DiT forward and training step, {arguments.dtype}, {arguments.device}"
    lines = [
        *section_head(title, machine, f"diffusers {version('diffusers')}"),
        f"- Setting: width of Wan2.1-T2V-1.3B, {arguments.layers} block(s), batch {arguments.batch}, "
        f"{frames} x {rows} x {columns} = {frames * rows * columns} tokens, 512 text tokens, "
        f"median of {arguments.repeats} interleaved repeats (half as many for training)",
        "",
        "| | WanModel | diffusers | ratio |",
        "|---|---|---|---|",
    ]
    for name, ours, theirs, unit in table:
        lines.append(f"| {name} | {ours:.3g} {unit} | {theirs:.3g} {unit} | {ours / theirs:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="bfloat16 trains under autocast"
    )
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--grid", type=int, nargs=3, default=(3, 10, 20), metavar=("FRAMES", "ROWS", "COLUMNS")
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--forward-only", action="store_true", help="do not time training")
    parser.add_argument("--write", action="store_true", help=f"append the result to {RESULTS.name}")
    parser.add_argument("--note", default="", help="a remark on the machine for the record")
    arguments = parser.parse_args()
    show_section(report(arguments, measure(arguments)), write=arguments.write)


if __name__ == "__main__":
    main()
