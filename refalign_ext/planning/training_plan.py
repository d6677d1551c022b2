"""The plan of a training run: how its ranks are divided, what it needs, and what would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from refalign_ext.config import TrainConfig
from refalign_ext.distributed.sizes import ParallelSizes, split_sequence, training_sizes
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
    model_fact,
    parameter_count,
    sample_fact,
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
        config: every setting.
        task: the task's entry of WAN_CONFIGS.
        world_size: number of ranks.
        references: references of a sample to plan with.
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


@dataclass(frozen=True)
class _TrainingRun:
    """A run with given sizes, and what follows from them."""

    config: TrainConfig
    task: EasyDict
    sizes: ParallelSizes
    references: int
    accumulation: int = 1

    @cached_property
    def shape(self) -> ModelShape:
        return ModelShape.of(self.task)

    @cached_property
    def tokens(self) -> tuple[int, int]:
        """Video and reference tokens of a sample."""
        return token_counts(self.task, self.task.size, self.task.frame_num, self.references)

    @cached_property
    def load(self) -> Load:
        config = self.config
        return Load.of(self.sizes, *self.tokens, batch=config.batch_size, precision=config.precision)

    @cached_property
    def alignment(self) -> AlignmentShape | None:
        alignment = self.config.alignment
        if not alignment.weight:
            return None
        return AlignmentShape(alignment.depth, teacher_entry(alignment.teacher).dim)

    @cached_property
    def projectors(self) -> int:
        """Parameters of the projectors."""
        return 0 if self.alignment is None else self.alignment.parameters(self.shape.dim)

    @property
    def targets(self) -> str:
        return self.config.lora_targets or TARGETS

    @cached_property
    def adapters(self) -> int:
        """Parameters of the adapters; 0 without LoRA."""
        rank = self.config.lora_rank
        return lora_parameters(self.shape, rank, self.targets) if rank else 0

    @property
    def trained(self) -> int:
        """All parameters that get gradients."""
        return self.projectors + (self.adapters or self.shape.parameters)

    @property
    def muon_matrices(self) -> int:
        """Parameters that Muon trains: the matrices of the blocks, or all adapters."""
        if self.config.optimizer != "muon":
            return 0
        return self.adapters or self.shape.num_layers * self.shape.block_matrix_parameters

    @property
    def offloads(self) -> bool:
        return self.config.cpu_offload and self.sizes.world > 1

    def plan(self, device_memory: int | None) -> Plan:
        """The plan, without suggestions."""
        config, sizes = self.config, self.sizes
        device, host = self._memory()
        flops = self._flops()
        samples = config.batch_size * self.accumulation * sizes.data
        return Plan(
            title=f"training of {config.task} on {count_of(sizes.world, 'rank')}: {sizes}",
            task=config.task,
            facts=self._facts(samples, flops),
            sizes=sizes,
            video_tokens=self.tokens[0],
            reference_tokens=self.tokens[1],
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
        config, shape, world = self.config, self.shape, self.sizes.world
        states = {name: count // world for name, count in self._states().items()}
        device, host = ({}, states) if self.offloads else (states, {})
        passing = self._pass_memory()
        device |= passing
        if not self.offloads:
            optimizing = optimizer_working_bytes(shape, config.optimizer, self.trained, world)
            beyond = optimizing - sum(passing.values())
            if beyond > 0:
                device["optimizer's working space beyond the above"] = beyond
        (host if config.t5_cpu else device)["text encoder"] = HALF * t5_parameters(self.task)
        device["video autoencoder"] = FULL * vae_parameters(self.task)
        if config.needs_teacher:
            teacher = config.alignment.teacher
            device[f"teacher {teacher}"] = FULL * teacher_entry(teacher).parameters
        return device, host

    def _states(self) -> dict[str, int]:
        """Weights, gradients and optimizer state of all ranks together.

        Trained parameters are float32: 4 bytes each, and as much for their gradients. AdamW keeps two moments (8 bytes),
        Muon one (4 bytes, for the matrices of the blocks; AdamW has the rest). A frozen model is bf16 on one device in a
        bf16 run and float32 where it is sharded.
        """
        config, shape, trained = self.config, self.shape, self.trained
        items = {}
        if self.adapters and self.sizes.world == 1 and config.precision == "bf16":
            items["frozen weights (bf16)"] = HALF * shape.parameters
        elif self.adapters:
            items["frozen weights (float32)"] = FULL * shape.parameters
        items["weights (float32)"] = FULL * trained
        items["gradients (float32)"] = FULL * trained
        moments = 2 * trained - self.muon_matrices
        items[f"optimizer state ({config.optimizer})"] = FULL * moments
        if config.ema_decay:
            items["moving average (float32)"] = FULL * shape.parameters
        return items

    def _pass_memory(self) -> dict[str, int]:
        """What a forward and backward need and an optimizer step does not."""
        config, shape, load, sizes = self.config, self.shape, self.load, self.sizes
        checkpointing = config.activation_checkpointing
        items: dict[str, int] = {}
        if sizes.world > 1:
            items["gathered weights and gradients (FSDP)"] = gathered_bytes(
                shape, load.width, trained=not self.adapters
            )
        elif load.width == HALF and not self.adapters:
            items["bf16 copies of the weights (autocast)"] = HALF * shape.parameters
        items |= activation_bytes(shape, load, sizes, checkpointing)
        if self.adapters:
            inputs = adapter_activations(lora_layers(shape, self.targets), load, shape.text_len)
            items["inputs of the adapters"] = (
                inputs if checkpointing == "none" else inputs // shape.num_layers
            )
        if self.alignment is not None:
            items["alignment: taps, projectors, loss"] = alignment_bytes(
                shape, self.alignment, load, sizes, self.tokens[1]
            )
        return items

    def _traffic(self) -> dict[str, int]:
        """Bytes that one rank receives in an optimizer step, by item."""
        config, shape, load, world = self.config, self.shape, self.load, self.sizes.world
        passes = 2 if config.activation_checkpointing == "none" else 3
        traffic = sequence_traffic(shape, load, self.sizes, passes=passes, joins=2)
        if world > 1:
            traffic["gathering weights (FSDP)"] = gather_traffic(shape, world, load.width, backward=True) + (
                FULL * self.projectors * (world - 1) // world
            )
            traffic["reducing gradients (FSDP)"] = FULL * self.trained * (world - 1) // world
        traffic = {name: self.accumulation * count for name, count in traffic.items()}
        if world > 1 and self.muon_matrices:
            traffic["whole updates (Muon)"] = FULL * self.muon_matrices * (world - 1) // world
        return traffic

    def _flops(self) -> StepFlops:
        return step_flops(
            self.shape,
            *self.tokens,
            references=self.references,
            alignment=self.alignment,
            checkpointing=self.config.activation_checkpointing,
            lora_rank=self.config.lora_rank,
            lora_targets=self.targets,
        )

    def _facts(self, samples: int, flops: StepFlops) -> tuple[tuple[str, str], ...]:
        config, task = self.config, self.task
        what = f"LoRA of rank {config.lora_rank}" if config.lora_rank else "all weights"
        aligned = "no alignment"
        if self.projectors:
            aligned = f"{config.alignment.depth} projectors to {config.alignment.teacher}"
        return (
            model_fact(self.shape),
            ("trains", f"{what}, {aligned}: {parameter_count(self.trained)} parameters"),
            sample_fact(task.size, task.frame_num, self.references, *self.tokens, self.load.held),
            (
                "step",
                f"{count_of(samples, 'sample')} = {self.sizes.data} data parallel x batch {config.batch_size} x "
                f"{self.accumulation} accumulated; {_operations(samples * flops.model)}",
            ),
            (
                "settings",
                f"{config.precision}, {config.optimizer}, activation checkpointing {config.activation_checkpointing}"
                + (", CPU offload" if self.offloads else ""),
            ),
        )


def _suggestions(
    config: TrainConfig, task: EasyDict, world_size: int, references: int, memory: int | None
) -> Iterator[str]:
    """Changes that make the run fit, each on its own where one is enough, else together; then more devices."""
    automatic = {"ulysses_size": 0, "ring_size": 0}
    settings: dict[str, dict[str, Any]] = {}
    if (config.ulysses_size or config.ring_size) and world_size > 1:
        settings["--ulysses_size 0 --ring_size 0 (automatic)"] = automatic
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
        sizes = _choose_sizes(changed, task, world, references, memory)
        return _TrainingRun(changed, task, sizes, references).plan(memory).fits

    found = [text for text, changes in (settings | lora).items() if fits(changes)]
    if not found:
        for chosen in (settings, settings | lora):
            merged = {name: value for changes in chosen.values() for name, value in changes.items()}
            if len(chosen) > 1 and fits(merged):
                found = [" with ".join(chosen)]
                break
    yield from found
    ways = {"": automatic}
    if config.activation_checkpointing != "full":
        ways[" with --activation_checkpointing full"] = automatic | {"activation_checkpointing": "full"}
    for text, changes in ways.items():
        world = 1 << world_size.bit_length()
        while world <= MOST_DEVICES and not fits(changes, world):
            world *= 2
        if world <= MOST_DEVICES:
            yield f"{world} devices{text}"


def _operations(count: int) -> str:
    unit = next((unit for unit in ((1e15, "P"), (1e12, "T")) if count >= unit[0]), (1e9, "G"))
    return f"{count / unit[0]:,.1f} {unit[1]}FLOP"
