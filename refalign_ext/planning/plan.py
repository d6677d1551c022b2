"""What a run will look like on its ranks: who holds what, tokens and memory per rank, bytes per step.

Everything follows from sizes, so a plan for 64 devices is made in milliseconds on a machine without any. Memory is an
estimate (`refalign_ext.planning.memory` says of what); a run is refused only if the estimate leaves less than a tenth
of the device free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from refalign_ext.backbone import WAN_CONFIGS, latent_shape
from refalign_ext.config import TrainConfig
from refalign_ext.distributed.sizes import ParallelSizes, generation_sizes, split_sequence, training_sizes
from refalign_ext.lora import TARGETS
from refalign_ext.planning.flops import (
    AlignmentShape,
    ModelShape,
    StepFlops,
    lora_layers,
    lora_parameters,
    step_flops,
)
from refalign_ext.planning.memory import (
    FULL,
    HALF,
    TEACHER_SIZES,
    Load,
    activation_bytes,
    adapter_activations,
    alignment_bytes,
    forward_bytes,
    gather_traffic,
    gathered_bytes,
    optimizer_working_bytes,
    sequence_traffic,
    t5_parameters,
    vae_parameters,
)
from refalign_ext.tasks import TASKS

if TYPE_CHECKING:
    from easydict import EasyDict

ASSUMED_MEMORY = 80 * 10**9
"""Bytes of device memory that a plan for real weights assumes where no GPU is at hand."""
USABLE = 0.9
"""Share of the device's memory that an estimate may fill: fragmentation and communication buffers take the rest."""
MOST_DEVICES = 1024  # beyond this a plan suggests no larger world
_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """One run on all its ranks. Sizes are bytes, tokens are those of one sample.

    Attributes:
        title: what runs, for the table's first line.
        facts: further lines of the table, (label, text).
        task: name in WAN_CONFIGS.
        shape: sizes of the transformer.
        sizes: how the ranks are divided; in generation `data` are the branches of the guidance.
        video_tokens, reference_tokens: of one sample.
        tokens_per_rank: of one sample, on each rank, padding included.
        batch_size: samples in one pass of a data group.
        accumulation: passes in one optimizer step.
        parameters: of the transformer.
        trained_parameters: of those that get gradients, projectors included (0 in generation).
        device, host: memory of one rank by item.
        traffic: what one rank receives in an optimizer step (a denoising step in generation) by item.
        flops: of one sample.
        device_memory: of one device; None: unknown and not checked.
        notes: what the reader should know, one sentence each.
        suggestions: settings that would make it fit, most convenient first; empty if it fits.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    task: str
    shape: ModelShape
    sizes: ParallelSizes
    video_tokens: int
    reference_tokens: int
    tokens_per_rank: int
    batch_size: int
    accumulation: int
    parameters: int
    trained_parameters: int
    device: Mapping[str, int]
    host: Mapping[str, int]
    traffic: Mapping[str, int]
    flops: StepFlops
    device_memory: int | None
    notes: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()

    @property
    def samples_per_step(self) -> int:
        """Samples in one optimizer step over all ranks."""
        return self.batch_size * self.accumulation * self.sizes.data

    @property
    def device_total(self) -> int:
        """Estimated memory of one device."""
        return sum(self.device.values())

    @property
    def fits(self) -> bool:
        """True unless the estimate exceeds the usable part of a known device memory."""
        return self.device_memory is None or self.device_total <= USABLE * self.device_memory

    def require_fit(self) -> None:
        """Refuse to start what would run out of memory.

        Raises:
            ValueError: with the reason and what would help; `plan_table.describe` shows the table.
        """
        if self.fits:
            return
        remedy = f"; use {', or '.join(self.suggestions)}" if self.suggestions else ""
        raise ValueError(
            f"{self.task} does not fit on {_count(self.sizes.world, 'device')}: it needs about "
            f"{self.device_total / _GIB:.0f} GiB on each, and {USABLE * self.device_memory / _GIB:.0f} GiB "
            f"({USABLE:.0%} of {self.device_memory / _GIB:.0f}) are usable{remedy}"
        )


def make_training_plan(
    config: TrainConfig,
    task: EasyDict,
    world_size: int,
    *,
    references: int = 3,
    device_memory: int | None = None,
) -> Plan:
    """The plan of a training run; nothing is loaded or built.

    Args:
        config: every setting.
        task: the task's entry of WAN_CONFIGS.
        world_size: number of ranks.
        references: references of a sample to reckon with.
        device_memory: bytes of one device; None where there is no GPU: then 80 GB are assumed for real tasks, and the
            embedded tiny one is not checked.

    Raises:
        ValueError: if --ulysses_size, --ring_size, --teacher_input or the global batch are not possible with these
            ranks. A plan that does not fit is returned all the same, to be shown: `Plan.require_fit` refuses it.
    """
    if config.teacher_input and world_size > 1:
        raise ValueError(
            f"--teacher_input trains in one process, not in {world_size}: start it without torchrun"
        )
    memory, notes = _memory_to_reckon_with(config.task, device_memory)
    sizes = choose_sizes(config, task, world_size, references=references, device_memory=device_memory)
    plan = _training_plan(config, task, sizes, config.accumulation(sizes.data), references, memory)
    if config.cpu_offload and world_size == 1:
        notes.append("--cpu_offload has no effect on one device: it belongs to sharding")
    suggestions = () if plan.fits else tuple(_suggestions(config, task, world_size, references, memory))
    return dataclasses.replace(plan, notes=tuple(notes), suggestions=suggestions)


def choose_sizes(
    config: TrainConfig,
    task: EasyDict,
    world_size: int,
    *,
    references: int = 3,
    device_memory: int | None = None,
) -> ParallelSizes:
    """How to divide the ranks: as `--ulysses_size` and `--ring_size` say, else as few ranks per sample as memory allows.

    More data parallelism means less communication, so sequence sizes are tried from 1 upwards among the divisors of the
    world size that fit the global batch. If none fits the memory, the one that needs the least is returned.

    Raises:
        ValueError: if the given sizes are not possible (listing those that are), or no division of the ranks fits the
            global batch (naming the nearest global batches that do).
    """
    if config.ulysses_size or config.ring_size:
        return training_sizes(world_size, task.num_heads, ulysses=config.ulysses_size, ring=config.ring_size)
    memory, _ = _memory_to_reckon_with(config.task, device_memory)
    candidates = list(_possible_sizes(config, task, world_size))
    if not candidates:
        config.accumulation(world_size)  # names the nearest global batches
    return _smallest_fitting(config, task, candidates, references, memory)


def make_generation_plan(
    task_name: str,
    world_size: int,
    *,
    cfg_size: int = 1,
    ulysses: int = 0,
    ring: int = 0,
    dit_fsdp: bool = False,
    t5_fsdp: bool = False,
    t5_cpu: bool = False,
    size: tuple[int, int] | None = None,
    frame_num: int | None = None,
    references: int = 3,
    precision: str = "bf16",
    device_memory: int | None = None,
    sizes: ParallelSizes | None = None,
    branches: int = 3,
) -> Plan:
    """The plan of one generation. Branches of the guidance take `cfg_size` groups of ranks, the rest share the tokens.

    Args:
        task_name: key of WAN_CONFIGS.
        cfg_size: groups of ranks that the 3 branches of eq. 5 are dealt to.
        ulysses, ring: 0 follows from the others, see `generation_sizes`.
        dit_fsdp, t5_fsdp: shard the weights of transformer and text encoder over all ranks.
        t5_cpu: the text encoder stays on the host.
        size, frame_num: (width, height) in pixels and frames; None: the task's.
        precision: `bf16` or `fp32`.
        device_memory: as in `make_training_plan`.
        sizes: how the ranks are divided, where that is decided already (`data`: the groups for the branches).
        branches: of the guidance that are evaluated.

    Raises:
        ValueError: for sizes that do not divide the ranks, the heads or the video.
    """
    task = WAN_CONFIGS[task_name]
    shape = ModelShape.of(task)
    if sizes is None:
        sizes = generation_sizes(world_size, shape.num_heads, cfg=cfg_size, ulysses=ulysses, ring=ring)
    cfg_size = sizes.data
    size, frame_num = size or TASKS[task_name].size, frame_num or TASKS[task_name].frame_num
    video_tokens, reference_tokens = _tokens(task, size, frame_num, references)
    load = Load.of(sizes, video_tokens, reference_tokens, batch=1, precision=precision)
    memory, notes = _memory_to_reckon_with(task_name, device_memory)

    device = {"transformer": load.width * shape.parameters // (world_size if dit_fsdp else 1)}
    traffic = sequence_traffic(shape, load, sizes, passes=1, joins=1)
    if dit_fsdp and world_size > 1:
        device["gathered weights (FSDP)"] = gathered_bytes(shape, load.width, trained=False)
        traffic["gathering weights"] = gather_traffic(shape, world_size, load.width, backward=False)
    passes = -(-branches // cfg_size)
    traffic = {name: passes * count for name, count in traffic.items()}
    if cfg_size > 1:
        channels, *cells = latent_shape(size, frame_num, task)
        traffic["branches of the guidance"] = (cfg_size - 1) * FULL * channels * _product(cells)
    host = {}
    text = HALF * t5_parameters(task) // (world_size if t5_fsdp else 1)
    (host if t5_cpu else device)["text encoder"] = text
    device["video autoencoder"] = FULL * vae_parameters(task)
    device["activations, or decoding if that is more"] = max(
        forward_bytes(shape, load, sizes), _decoding_bytes(task, size)
    )
    facts = (
        _model_fact(shape),
        _video_fact(size, frame_num, references, video_tokens, reference_tokens, load.held),
    )
    plan = Plan(
        f"generation with {task_name} on {_count(world_size, 'rank')}: guidance {cfg_size} x sequence parallel "
        f"{sizes.sequence} (Ulysses {sizes.ulysses} x ring {sizes.ring})",
        facts,
        task_name,
        shape,
        sizes,
        video_tokens,
        reference_tokens,
        load.held,
        batch_size=1,
        accumulation=1,
        parameters=shape.parameters,
        trained_parameters=0,
        device=device,
        host=host,
        traffic=traffic,
        flops=step_flops(shape, video_tokens, reference_tokens),
        device_memory=memory,
        notes=tuple(notes),
    )
    remedies = () if plan.fits else ("--t5_cpu", "--dit_fsdp", "--t5_fsdp", "more devices, with --dit_fsdp")
    taken = {
        "--t5_cpu": t5_cpu,
        "--dit_fsdp": dit_fsdp or world_size == 1,
        "--t5_fsdp": t5_fsdp or world_size == 1,
    }
    return dataclasses.replace(plan, suggestions=tuple(text for text in remedies if not taken.get(text)))


def _memory_to_reckon_with(task: str, device_memory: int | None) -> tuple[int | None, list[str]]:
    if device_memory is not None:
        return device_memory, []
    if TASKS[task].bundled is not None:
        return None, []
    return ASSUMED_MEMORY, [f"no GPU seen: {ASSUMED_MEMORY // 10**9} GB of memory on each device are assumed"]


def _possible_sizes(config: TrainConfig, task: EasyDict, world_size: int) -> Iterator[ParallelSizes]:
    """Divisions of the ranks that suit the global batch, fewest ranks per sample first."""
    for sequence in range(1, world_size + 1):
        at_once = config.batch_size * world_size // sequence
        if world_size % sequence == 0 and config.global_batch_size % at_once == 0:
            yield ParallelSizes(world_size // sequence, *split_sequence(sequence, task.num_heads))


def _smallest_fitting(
    config: TrainConfig,
    task: EasyDict,
    candidates: list[ParallelSizes],
    references: int,
    memory: int | None,
) -> ParallelSizes:
    plans = []
    for sizes in candidates:
        plan = _training_plan(config, task, sizes, 1, references, memory)
        if plan.fits:
            return sizes
        plans.append(plan)
    return min(plans, key=lambda plan: plan.device_total).sizes


def _training_plan(
    config: TrainConfig,
    task: EasyDict,
    sizes: ParallelSizes,
    accumulation: int,
    references: int,
    memory: int | None,
) -> Plan:
    shape, world = ModelShape.of(task), sizes.world
    alignment = _alignment_shape(config, task)
    video_tokens, reference_tokens = _tokens(task, task.size, task.frame_num, references)
    load = Load.of(sizes, video_tokens, reference_tokens, batch=config.batch_size, precision=config.precision)
    projectors = 0 if alignment is None else alignment.parameters(shape.dim)
    targets = config.lora_targets or TARGETS
    adapters = lora_parameters(shape, config.lora_rank, targets) if config.lora_rank else 0
    trained = projectors + (adapters or shape.parameters)

    states = _state_bytes(config, shape, projectors, adapters, sizes.world)
    states = {name: count // world for name, count in states.items()}
    offloaded = config.cpu_offload and world > 1
    device: dict[str, int] = {} if offloaded else dict(states)
    host: dict[str, int] = dict(states) if offloaded else {}
    checkpointing = config.activation_checkpointing
    passing: dict[str, int] = {}  # what a forward and backward need and an optimizer step does not
    if world > 1:
        passing["gathered weights and gradients (FSDP)"] = gathered_bytes(
            shape, load.width, trained=not config.lora_rank
        )
    elif load.width == HALF and not config.lora_rank:
        passing["bf16 copies of the weights (autocast)"] = HALF * shape.parameters
    passing |= activation_bytes(shape, load, sizes, checkpointing)
    if config.lora_rank:
        inputs = adapter_activations(lora_layers(shape, targets), load, shape.text_len)
        passing["inputs of the adapters"] = inputs if checkpointing == "none" else inputs // shape.num_layers
    if alignment is not None:
        passing["alignment: taps, projectors, loss"] = alignment_bytes(
            shape, alignment, load, sizes, reference_tokens
        )
    device |= passing
    if not offloaded:
        optimizing = optimizer_working_bytes(shape, config.optimizer, trained, world)
        beyond = optimizing - sum(passing.values())
        if beyond > 0:
            device["optimizer's working space beyond the above"] = beyond
    (host if config.t5_cpu else device)["text encoder"] = HALF * t5_parameters(task)
    device["video autoencoder"] = FULL * vae_parameters(task)
    if config.needs_teacher:
        device[f"teacher {config.alignment.teacher}"] = FULL * _teacher(config)[0]

    traffic = sequence_traffic(shape, load, sizes, passes=2 if checkpointing == "none" else 3, joins=2)
    if world > 1:
        traffic["gathering weights (FSDP)"] = gather_traffic(shape, world, load.width, backward=True) + (
            FULL * projectors * (world - 1) // world
        )
        traffic["reducing gradients (FSDP)"] = FULL * trained * (world - 1) // world
    traffic = {name: accumulation * count for name, count in traffic.items()}
    if world > 1 and config.optimizer == "muon":
        matrices = adapters or shape.num_layers * shape.block_matrix_parameters
        traffic["whole updates (Muon)"] = FULL * matrices * (world - 1) // world

    flops = step_flops(
        shape,
        video_tokens,
        reference_tokens,
        references=references,
        alignment=alignment,
        checkpointing=checkpointing,
        lora_rank=config.lora_rank,
        lora_targets=targets,
    )
    samples = config.batch_size * accumulation * sizes.data
    what = f"LoRA of rank {config.lora_rank}" if config.lora_rank else "all weights"
    facts = (
        _model_fact(shape),
        ("trains", f"{what}{_aligned_with(config, projectors)}: {_millions(trained)} parameters"),
        _video_fact(task.size, task.frame_num, references, video_tokens, reference_tokens, load.held),
        (
            "step",
            f"{_count(samples, 'sample')} = {sizes.data} data parallel x batch {config.batch_size} x {accumulation} "
            f"accumulated; {_operations(samples * flops.model)}",
        ),
        (
            "settings",
            f"{config.precision}, {config.optimizer}, activation checkpointing {checkpointing}"
            + (", CPU offload" if offloaded else ""),
        ),
    )
    return Plan(
        f"training of {config.task} on {_count(world, 'rank')}: {sizes}",
        facts,
        config.task,
        shape,
        sizes,
        video_tokens,
        reference_tokens,
        load.held,
        batch_size=config.batch_size,
        accumulation=accumulation,
        parameters=shape.parameters,
        trained_parameters=trained,
        device=device,
        host=host,
        traffic=traffic,
        flops=flops,
        device_memory=memory,
    )


def _state_bytes(
    config: TrainConfig, shape: ModelShape, projectors: int, adapters: int, world: int
) -> dict[str, int]:
    """Weights, gradients and optimizer state of all ranks together.

    Trained parameters are float32: 4 bytes each, and as much for their gradients. AdamW keeps two moments (8 bytes), Muon
    one (4 bytes, for the matrices of the blocks; AdamW has the rest). A frozen model is bf16 on one device in a bf16 run
    and float32 where it is sharded.
    """
    trained = projectors + (adapters or shape.parameters)
    matrices = 0
    if config.optimizer == "muon":
        matrices = adapters or shape.num_layers * shape.block_matrix_parameters
    items = {}
    if adapters and world == 1 and config.precision == "bf16":
        items["frozen weights (bf16)"] = HALF * shape.parameters
    elif adapters:
        items["frozen weights (float32)"] = FULL * shape.parameters
    items["weights (float32)"] = FULL * trained
    items["gradients (float32)"] = FULL * trained
    items[f"optimizer state ({config.optimizer})"] = 2 * FULL * (trained - matrices) + FULL * matrices
    if config.ema_decay:
        items["moving average (float32)"] = FULL * shape.parameters
    return items


def _suggestions(
    config: TrainConfig, task: EasyDict, world_size: int, references: int, memory: int | None
) -> Iterator[str]:
    """Changes that make the run fit, each on its own where one is enough, else together; then more devices."""
    given = bool(config.ulysses_size or config.ring_size)
    settings: dict[str, dict[str, Any]] = {}
    if given and world_size > 1:
        settings["--ulysses_size 0 --ring_size 0 (automatic)"] = {"ulysses_size": 0, "ring_size": 0}
    if config.activation_checkpointing != "full":
        settings["--activation_checkpointing full"] = {"activation_checkpointing": "full"}
    if not config.t5_cpu:
        settings["--t5_cpu"] = {"t5_cpu": True}
    if not config.cpu_offload and world_size > 1:
        settings["--cpu_offload"] = {"cpu_offload": True}
    if config.batch_size > 1:
        settings["--batch_size 1"] = {"batch_size": 1}
    lora = {} if config.lora_rank else {"--lora_rank 32": {"lora_rank": 32, "ema_decay": 0.0}}

    def fits(changes: dict[str, Any], world: int = world_size) -> bool:
        changed = dataclasses.replace(config, **changes, global_batch_size=0)
        sizes = choose_sizes(changed, task, world, references=references, device_memory=memory)
        return _training_plan(changed, task, sizes, 1, references, memory).fits

    found = [text for text, changes in (settings | lora).items() if fits(changes)]
    if not found:
        for chosen in (settings, settings | lora):
            merged = {name: value for changes in chosen.values() for name, value in changes.items()}
            if len(chosen) > 1 and fits(merged):
                found = [" with ".join(chosen)]
                break
    yield from found
    automatic = {"ulysses_size": 0, "ring_size": 0}
    ways = {"": automatic}
    if config.activation_checkpointing != "full":
        ways[" with --activation_checkpointing full"] = automatic | {"activation_checkpointing": "full"}
    for text, changes in ways.items():
        world = 1 << world_size.bit_length()
        while world <= MOST_DEVICES and not fits(changes, world):
            world *= 2
        if world <= MOST_DEVICES:
            yield f"{world} devices{text}"


def _alignment_shape(config: TrainConfig, task: EasyDict) -> AlignmentShape | None:
    if not config.alignment.weight:
        return None
    return AlignmentShape(config.alignment.depth, _teacher(config)[1])


def _teacher(config: TrainConfig) -> tuple[int, int]:
    """(parameters, feature width) of the teacher; one that is not in the table counts as the paper's."""
    return TEACHER_SIZES.get(config.alignment.teacher, TEACHER_SIZES["dinov3-l"])


def _tokens(task: EasyDict, size: tuple[int, int], frame_num: int, references: int) -> tuple[int, int]:
    _, frames, height, width = latent_shape(size, frame_num, task)
    per_frame = (height // task.patch_size[1]) * (width // task.patch_size[2])
    return frames // task.patch_size[0] * per_frame, references * per_frame


def _decoding_bytes(task: EasyDict, size: tuple[int, int]) -> int:
    """Working space of the autoencoder at full resolution: it decodes one latent frame (4 frames) at a time.

    About six float32 maps of its narrowest width live at once: input, cached frames and output of a convolution, its
    padded copy and the residual.
    """
    return 6 * FULL * task.vae.dim * task.vae_stride[0] * size[0] * size[1]


def _product(values: list[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result


def _model_fact(shape: ModelShape) -> tuple[str, str]:
    return (
        "model",
        f"{_millions(shape.parameters)} parameters, {shape.num_layers} blocks of width {shape.dim}, "
        f"{shape.num_heads} heads",
    )


def _aligned_with(config: TrainConfig, projectors: int) -> str:
    if not projectors:
        return ", no alignment"
    return f", {config.alignment.depth} projectors to {config.alignment.teacher}"


def _video_fact(
    size: tuple[int, int], frame_num: int, references: int, video: int, reference: int, held: int
) -> tuple[str, str]:
    return (
        "sample",
        f"{size[0]}x{size[1]}, {frame_num} frames, {_count(references, 'reference')}: {video:,} + {reference:,} tokens, "
        f"{held:,} on each rank",
    )


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _operations(count: int) -> str:
    unit = next((unit for unit in ((1e15, "P"), (1e12, "T")) if count >= unit[0]), (1e9, "G"))
    return f"{count / unit[0]:,.1f} {unit[1]}FLOP"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
