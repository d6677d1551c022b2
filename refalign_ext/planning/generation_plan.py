"""The plan of one generation, in which all ranks make one video."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from refalign_ext.backbone import WAN_CONFIGS, latent_shape
from refalign_ext.distributed.sizes import ParallelSizes
from refalign_ext.planning.flops import ModelShape, step_flops
from refalign_ext.planning.memory import (
    FULL,
    HALF,
    Load,
    forward_bytes,
    gather_traffic,
    gathered_bytes,
    sequence_traffic,
    t5_parameters,
    vae_parameters,
)
from refalign_ext.planning.plan import (
    Plan,
    count_of,
    memory_to_plan_with,
    model_facts,
    token_counts,
)

if TYPE_CHECKING:
    from easydict import EasyDict


def make_generation_plan(
    task_name: str,
    sizes: ParallelSizes,
    *,
    size: tuple[int, int],
    frame_num: int,
    references: int,
    branches: int = 3,
    dit_fsdp: bool = False,
    t5_fsdp: bool = False,
    t5_cpu: bool = False,
    precision: str = "bf16",
    device_memory: int | None = None,
) -> Plan:
    """The plan of one generation; nothing is loaded or built.

    Args:
        task_name: key of WAN_CONFIGS.
        sizes: how the ranks are divided; `data` are the groups for the branches of the guidance.
        size, frame_num: (width, height) in pixels and frames.
        branches: of the guidance that are evaluated.
        dit_fsdp, t5_fsdp: shard the weights of transformer and text encoder over all ranks.
        device_memory: bytes of one device, see `memory_to_plan_with`.
    """
    config, world = WAN_CONFIGS[task_name], sizes.world
    shape = ModelShape.of(config)
    tokens = token_counts(config, size, frame_num, references)
    load = Load.of(sizes, *tokens, batch=1, precision=precision)
    memory, notes = memory_to_plan_with(task_name, device_memory)

    device = {"transformer": load.width * shape.parameters // (world if dit_fsdp else 1)}
    traffic = sequence_traffic(shape, load, sizes, passes=1, joins=1)
    if dit_fsdp and world > 1:
        device["gathered weights (FSDP)"] = gathered_bytes(shape, load.width, trained=False)
        traffic["gathering weights"] = gather_traffic(shape, world, load.width, backward=False)
    passes = -(-branches // sizes.data)
    traffic = {name: passes * count for name, count in traffic.items()}
    if sizes.data > 1:
        prediction = math.prod(latent_shape(size, frame_num, config))
        traffic["branches of the guidance"] = (sizes.data - 1) * FULL * prediction
    text = {"text encoder": HALF * t5_parameters(config) // (world if t5_fsdp else 1)}
    device |= {} if t5_cpu else text
    device["video autoencoder"] = FULL * vae_parameters(config)
    device["activations, or decoding if that is more"] = max(
        forward_bytes(shape, load, sizes), _decoding_bytes(config, size)
    )
    plan = Plan(
        title=f"generation with {task_name} on {count_of(world, 'rank')}: guidance {sizes.data} x sequence parallel "
        f"{sizes.sequence} (Ulysses {sizes.ulysses} x ring {sizes.ring})",
        task=task_name,
        facts=model_facts(shape, size, frame_num, references, tokens, load.held),
        sizes=sizes,
        tokens_per_rank=load.held,
        samples_per_step=1,
        trained_parameters=0,
        device=device,
        host=text if t5_cpu else {},
        traffic=traffic,
        flops=step_flops(shape, *tokens),
        device_memory=memory,
        notes=notes,
    )
    remedies = {
        "--t5_cpu": not t5_cpu,
        "--dit_fsdp": world > 1 and not dit_fsdp,
        "--t5_fsdp": world > 1 and not t5_fsdp,
        "more devices, with --dit_fsdp": True,
    }
    suggestions = [] if plan.fits else [text for text, is_left in remedies.items() if is_left]
    return dataclasses.replace(plan, suggestions=tuple(suggestions))


def _decoding_bytes(config: EasyDict, size: tuple[int, int]) -> int:
    """Working space of the autoencoder at full resolution: it decodes one latent frame (4 frames) at a time.

    About six float32 maps of its narrowest width live at once: input, cached frames and output of a convolution, its
    padded copy and the residual.
    """
    return 6 * FULL * config.vae.dim * config.vae_stride[0] * size[0] * size[1]
