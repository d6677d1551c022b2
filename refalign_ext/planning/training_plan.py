"""The plan of a training run: how its ranks are divided, what it needs, and what would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from refalign_ext.config import TrainConfig
from refalign_ext.distributed.sizes import ParallelSizes, split_sequence, training_sizes
from refalign_ext.lora import TARGETS
from refalign_ext.planning.flops import (
    AlignmentShape,
    ModelShape,
    lora_layers,
    lora_parameters,
    step_flops,
)
from refalign_ext.planning.memory import (
    FULL,
    HALF,
    Load,
    activation_bytes,
    adapter_activations,
    alignment_bytes,
    gather_traffic,
    gathered_bytes,
    optimizer_working_bytes,
    sequence_traffic,
    t5_parameters,
    vae_parameters,
)
from refalign_ext.planning.plan import (
    Plan,
    count_of,
    memory_to_plan_with,
    model_facts,
    parameter_count,
    token_counts,
)
from refalign_ext.teachers import teacher_entry

if TYPE_CHECKING:
    from easydict import EasyDict

MOST_DEVICES = 1024  # beyond this a plan suggests no larger world


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
        task: the task's entry of WAN_CONFIGS.
        references: of a sample to plan with.
        device_memory: bytes of one device, see `memory_to_plan_with`.

    Raises:
        ValueError: if --ulysses_size, --ring_size or the global batch are not possible with these ranks. A plan that
            does not fit is returned all the same, to be shown: `Plan.require_fit` refuses it.
    """
    memory, notes = memory_to_plan_with(config.task, device_memory)
    sizes = _choose_sizes(config, task, world_size, references, memory)
    accumulation = config.accumulation(sizes.data)
    plan = _TrainingRun(config, task, sizes, references, accumulation).plan(memory)
    if config.cpu_offload and world_size == 1:
        notes += ("--cpu_offload has no effect on one device: it belongs to sharding",)
    suggestions = () if plan.fits else tuple(_suggestions(config, task, world_size, references, memory))
    return dataclasses.replace(plan, notes=notes, suggestions=suggestions)


def _choose_sizes(
    config: TrainConfig, task: EasyDict, world_size: int, references: int, memory: int | None
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
    plans = []
    for sequence in range(1, world_size + 1):
        at_once = config.batch_size * world_size // sequence
        if world_size % sequence or config.global_batch_size % at_once:
            continue
        sizes = ParallelSizes(world_size // sequence, *split_sequence(sequence, task.num_heads))
        plan = _TrainingRun(config, task, sizes, references).plan(memory)
        if plan.fits:
            return sizes
        plans.append(plan)
    if not plans:
        config.accumulation(world_size)  # names the nearest global batches
    return min(plans, key=lambda plan: plan.device_total).sizes


class _TrainingRun:
    """A run with given sizes, and what follows from them."""

    def __init__(
        self,
        config: TrainConfig,
        task: EasyDict,
        sizes: ParallelSizes,
        references: int,
        accumulation: int = 1,
    ) -> None:
        self.config, self.task, self.sizes, self.references = config, task, sizes, references
        self.accumulation, self.shape = accumulation, ModelShape.of(task)
        self.tokens = token_counts(task, task.size, task.frame_num, references)  # video, reference
        self.load = Load.of(sizes, *self.tokens, batch=config.batch_size, precision=config.precision)
        alignment = config.alignment
        self.alignment = None
        if alignment.weight:
            self.alignment = AlignmentShape(alignment.depth, teacher_entry(alignment.teacher).dim)
        self.projectors = self.alignment.parameters(self.shape.dim) if self.alignment else 0
        self.targets = config.lora_targets or TARGETS
        self.adapters = config.lora_rank and lora_parameters(self.shape, config.lora_rank, self.targets)
        self.trained = self.projectors + (self.adapters or self.shape.parameters)
        self.muon_matrices = 0
        if config.optimizer == "muon":
            self.muon_matrices = self.adapters or self.shape.num_layers * self.shape.block_matrix_parameters
        self.offloads = config.cpu_offload and sizes.world > 1

    def plan(self, device_memory: int | None) -> Plan:
        """The plan, without suggestions."""
        config = self.config
        device, host = self._memory()
        flops = step_flops(
            self.shape,
            *self.tokens,
            references=self.references,
            alignment=self.alignment,
            checkpointing=config.activation_checkpointing,
            lora_rank=config.lora_rank,
            lora_targets=self.targets,
        )
        samples = config.batch_size * self.accumulation * self.sizes.data
        return Plan(
            title=f"training of {config.task} on {count_of(self.sizes.world, 'rank')}: {self.sizes}",
            task=config.task,
            facts=self._facts(samples, samples * flops.model),
            sizes=self.sizes,
            tokens_per_rank=self.load.held,
            samples_per_step=samples,
            trained_parameters=self.trained,
            device=device,
            host=host,
            traffic=self._traffic(),
            flops=flops,
            device_memory=device_memory,
        )

    def _memory(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes of one rank by item, on its device and on the host."""
        config, world = self.config, self.sizes.world
        states = {name: count // world for name, count in self._states().items()}
        passing = self._pass_memory()
        device, host = (passing, states) if self.offloads else (states | passing, {})
        working = optimizer_working_bytes(self.shape, config.optimizer, self.trained, world)
        if not self.offloads and working > sum(passing.values()):
            device["optimizer's working space beyond the above"] = working - sum(passing.values())
        (host if config.t5_cpu else device)["text encoder"] = HALF * t5_parameters(self.task)
        device["video autoencoder"] = FULL * vae_parameters(self.task)
        if config.needs_teacher:
            teacher = config.alignment.teacher
            device[f"teacher {teacher}"] = FULL * teacher_entry(teacher).parameters
        return device, host

    def _states(self) -> dict[str, int]:
        """Weights, gradients and optimizer state of all ranks together.

        Trained parameters and their gradients are float32. AdamW keeps two moments, Muon one for its matrices. A frozen
        model is bf16 on one device in a bf16 run and float32 where it is sharded.
        """
        config, trained = self.config, self.trained
        items = {}
        if self.adapters and self.sizes.world == 1 and config.precision == "bf16":
            items["frozen weights (bf16)"] = HALF * self.shape.parameters
        elif self.adapters:
            items["frozen weights (float32)"] = FULL * self.shape.parameters
        items["weights (float32)"] = FULL * trained
        items["gradients (float32)"] = FULL * trained
        items[f"optimizer state ({config.optimizer})"] = FULL * (2 * trained - self.muon_matrices)
        if config.ema_decay:
            items["moving average (float32)"] = FULL * self.shape.parameters
        return items

    def _pass_memory(self) -> dict[str, int]:
        """What a forward and backward need and an optimizer step does not."""
        shape, load, sizes = self.shape, self.load, self.sizes
        checkpointing = self.config.activation_checkpointing
        items: dict[str, int] = {}
        if sizes.world > 1:
            gathered = gathered_bytes(shape, load.width, trained=not self.adapters)
            items["gathered weights and gradients (FSDP)"] = gathered
        elif load.width == HALF and not self.adapters:
            items["bf16 copies of the weights (autocast)"] = HALF * shape.parameters
        items |= activation_bytes(shape, load, sizes, checkpointing)
        if self.adapters:
            inputs = adapter_activations(lora_layers(shape, self.targets), load, shape.text_len)
            blocks = 1 if checkpointing == "none" else shape.num_layers
            items["inputs of the adapters"] = inputs // blocks
        if self.alignment is not None:
            aligned = alignment_bytes(shape, self.alignment, load, sizes, self.tokens[1])
            items["alignment: taps, projectors, loss"] = aligned
        return items

    def _traffic(self) -> dict[str, int]:
        """Bytes that one rank receives in an optimizer step, by item."""
        shape, load, world = self.shape, self.load, self.sizes.world
        passes = 2 if self.config.activation_checkpointing == "none" else 3
        traffic = sequence_traffic(shape, load, self.sizes, passes=passes, joins=2)
        if world > 1:
            projectors = FULL * self.projectors * (world - 1) // world
            gathered = gather_traffic(shape, world, load.width, backward=True)
            traffic["gathering weights (FSDP)"] = gathered + projectors
            traffic["reducing gradients (FSDP)"] = FULL * self.trained * (world - 1) // world
        traffic = {name: self.accumulation * count for name, count in traffic.items()}
        if world > 1 and self.muon_matrices:
            traffic["whole updates (Muon)"] = FULL * self.muon_matrices * (world - 1) // world
        return traffic

    def _facts(self, samples: int, operations: int) -> tuple[tuple[str, str], ...]:
        config, task = self.config, self.task
        what = f"LoRA of rank {config.lora_rank}" if config.lora_rank else "all weights"
        aligned = "no alignment"
        if self.projectors:
            aligned = f"{config.alignment.depth} projectors to {config.alignment.teacher}"
        step = (
            f"{self.sizes.data} data parallel x batch {config.batch_size} x {self.accumulation} accumulated"
        )
        settings = f"{config.precision}, {config.optimizer}, activation checkpointing "
        settings += config.activation_checkpointing + (", CPU offload" if self.offloads else "")
        return (
            *model_facts(self.shape, task.size, task.frame_num, self.references, self.tokens, self.load.held),
            ("trains", f"{what}, {aligned}: {parameter_count(self.trained)} parameters"),
            ("step", f"{count_of(samples, 'sample')} = {step}; {_operations(operations)}"),
            ("settings", settings),
        )


def _suggestions(
    config: TrainConfig, task: EasyDict, world_size: int, references: int, memory: int | None
) -> Iterator[str]:
    """Changes that make the run fit, each on its own where one is enough, else together; then more devices."""
    automatic = {"ulysses_size": 0, "ring_size": 0}
    full = {"activation_checkpointing": "full"}
    is_full, is_shared = config.activation_checkpointing == "full", world_size > 1
    has_sizes = bool(config.ulysses_size or config.ring_size)
    ways: list[tuple[bool, str, dict[str, Any]]] = [
        (has_sizes and is_shared, "--ulysses_size 0 --ring_size 0 (automatic)", automatic),
        (not is_full, "--activation_checkpointing full", full),
        (not config.t5_cpu, "--t5_cpu", {"t5_cpu": True}),
        (is_shared and not config.cpu_offload, "--cpu_offload", {"cpu_offload": True}),
        (config.batch_size > 1, "--batch_size 1", {"batch_size": 1}),
        (not config.lora_rank, "--lora_rank 32", {"lora_rank": 32, "ema_decay": 0.0}),
    ]
    settings = {text: changes for is_left, text, changes in ways if is_left}

    def fits(changes: dict[str, Any], world: int = world_size) -> bool:
        changed = dataclasses.replace(config, **changes, global_batch_size=0)
        sizes = _choose_sizes(changed, task, world, references, memory)
        return _TrainingRun(changed, task, sizes, references).plan(memory).fits

    found = [text for text, changes in settings.items() if fits(changes)]
    yield from found
    without_lora = [text for text in settings if not text.startswith("--lora")]
    for chosen in () if found else (without_lora, list(settings)):
        merged = {name: value for text in chosen for name, value in settings[text].items()}
        if len(chosen) > 1 and fits(merged):
            yield " with ".join(chosen)
            break
    more = {"": automatic}
    if not is_full:
        more[" with --activation_checkpointing full"] = automatic | full
    for text, changes in more.items():
        worlds = (1 << power for power in range(world_size.bit_length(), MOST_DEVICES.bit_length()))
        world = next((world for world in worlds if fits(changes, world)), None)
        if world is not None:
            yield f"{world} devices{text}"


def _operations(count: int) -> str:
    size, unit = next((each for each in ((1e15, "P"), (1e12, "T")) if count >= each[0]), (1e9, "G"))
    return f"{count / size:,.1f} {unit}FLOP"
