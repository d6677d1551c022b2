"""Everything that turns single-device modules into parallel ones, in the one order that is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from refalign_ext.backbone import ReferenceBackbone
from refalign_ext.config import TrainConfig
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.sequence_parallel import attach_sequence_parallel
from refalign_ext.projectors import ReferenceProjectors

# The residual stream is never changed in place, which is what this warns of for every linear layer at a unit's end.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

# Parts of the DiT that compute in float32 whatever the precision, and are modules of their own.
_FLOAT32_PARTS = ("time_embedding", "time_projection", "head")


class TrainedModules(nn.Module):
    """What a checkpoint holds: the DiT, the projectors (None without alignment) and extra modules by name.

    Only a container, so that all have a name in one state dict; each is a sharding root of its own, because projectors
    and extra modules run outside the DiT's forward. Extra modules come from outside, such as from an ablation, and are
    never sharded.
    """

    def __init__(
        self,
        dit: nn.Module,
        projectors: ReferenceProjectors | None,
        extra: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.dit = dit
        self.projectors = projectors
        for name, module in (extra or {}).items():
            self.add_module(name, module)

    @property
    def extra(self) -> dict[str, nn.Module]:
        """The extra modules by name."""
        return {name: part for name, part in self.named_children() if name not in ("dit", "projectors")}


def parallelize(
    backbone: ReferenceBackbone,
    projectors: ReferenceProjectors | None,
    parallel: Parallel,
    config: TrainConfig,
) -> TrainedModules:
    """Apply, in this order: sequence parallelism, activation checkpointing, compilation, FSDP2.

    Alone (no process group) the first and the last do nothing. Parameters may lie in files (memory-mapped): every rank
    then reads its own shards only. Optimizers are built afterwards, from the sharded parameters.
    """
    if not parallel.is_alone:
        require_sharding(parallel.device, "train in one process")
    attach_sequence_parallel(backbone, parallel)
    recompute_activations(backbone.model, config.activation_checkpointing)
    if config.compile:
        compile_blocks(backbone.model)
    if not parallel.is_alone:
        shard_dit(backbone.model, parallel, precision=config.precision, cpu_offload=config.cpu_offload)
        if projectors is not None:
            shard_projectors(projectors, parallel, cpu_offload=config.cpu_offload)
    return TrainedModules(backbone.model, projectors)


def recompute_activations(model: nn.Module, mode: str) -> None:
    """Non-reentrant activation checkpointing of every block: `none`, `full` or `selective`."""
    if mode == "full":
        model.enable_gradient_checkpointing()
    elif mode == "selective":
        model.enable_gradient_checkpointing(_selective)


def _selective(block: Callable[..., Any], *args: Any) -> Any:
    contexts = lambda: create_selective_checkpoint_contexts(_KeepSome())  # noqa: E731 - a factory per call
    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


_MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
# By namespace, because FlashAttention's operations exist only once it is imported.
_ATTENTION = {
    "aten": (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    "flash_attn": ("_flash_attn_forward", "_flash_attn_varlen_forward"),
    "flash_attn_3": ("fwd",),
}


@cache
def _attention_operations() -> frozenset[Any]:
    return frozenset(
        getattr(getattr(torch.ops, space), name).default
        for space, names in _ATTENTION.items()
        for name in names
        if hasattr(getattr(torch.ops, space), name)
    )


class _KeepSome:
    """Keep attention, which costs the most to repeat, and every second matmul, which halves what the rest costs."""

    def __init__(self) -> None:
        self.matmuls = {False: 0, True: 0}  # counted apart in the forward pass and its repetition

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in _attention_operations():
            return CheckpointPolicy.MUST_SAVE
        if operation in _MATMULS:
            self.matmuls[context.is_recompute] += 1
            if self.matmuls[context.is_recompute] % 2 == 0:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(model: nn.Module) -> None:
    """torch.compile every block in place; checkpoint keys stay as they are."""
    # Every block and every number of references is a shape of its own; the default limit of eight would fall back.
    settings = torch._dynamo.config
    is_renamed = hasattr(settings, "recompile_limit")  # since torch 2.7
    setattr(settings, "recompile_limit" if is_renamed else "cache_size_limit", 8 * len(model.blocks))
    for block in model.blocks:
        block.compile(dynamic=False)


def shard_dit(model: nn.Module, parallel: Parallel, *, precision: str, cpu_offload: bool = False) -> None:
    """FSDP2 over all ranks, data and sequence alike: every block a unit, the model its root.

    Over the data ranks alone, sequence ranks would keep gradients of their own tokens to themselves. In bf16 the blocks'
    weights are gathered and used in bf16; master weights, the residual stream, the time embedding, the head and the
    reduction of gradients stay in float32.
    """
    half = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the residual stream is float32; autocast rounds what goes into matmuls
    )
    options = _sharding_options(parallel, cpu_offload)
    if precision == "bf16":
        for name in _FLOAT32_PARTS:
            fully_shard(getattr(model, name), mp_policy=_FULL_PRECISION, **options)
    for index, block in enumerate(model.blocks):
        # The last block's weights are needed first in the backward pass: freeing them would only mean gathering them again.
        is_last = index == len(model.blocks) - 1
        fully_shard(block, mp_policy=half, reshard_after_forward=not is_last, **options)
    fully_shard(model, mp_policy=half, **options)
    model.float()  # master weights, whatever the file held; FSDP casts from these


def shard_projectors(
    projectors: ReferenceProjectors, parallel: Parallel, *, cpu_offload: bool = False
) -> None:
    """FSDP2 for the projectors, a root of their own; their small matrices stay in float32 under autocast."""
    fully_shard(projectors, mp_policy=_FULL_PRECISION, **_sharding_options(parallel, cpu_offload))


_FULL_PRECISION = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)


def _sharding_options(parallel: Parallel, cpu_offload: bool) -> dict[str, Any]:
    if not cpu_offload:
        return {"mesh": parallel.shards}
    policy = CPUOffloadPolicy(pin_memory=parallel.device.type == "cuda")
    return {"mesh": parallel.shards, "offload_policy": policy}


def can_shard_on_cpu() -> bool:
    """Whether FSDP2 of this torch runs on CPUs; that of 2.6 asks a CPU for a stream it does not have."""
    return hasattr(torch.cpu.Stream, "record_event")


def require_sharding(device: torch.device, remedy: str) -> None:
    """Raises ValueError where FSDP2 of this torch does not run."""
    if device.type == "cpu" and not can_shard_on_cpu():
        raise ValueError(
            f"torch {torch.__version__} shards weights on GPUs only: {remedy}, or install a newer one"
        )


def reshard_all(trained: nn.Module) -> None:
    """Drop whole weights that FSDP keeps after a pass without gradients, so that changed shards are gathered again."""
    for module in trained.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_part(tensor: Tensor) -> Tensor:
    """What this rank stores of a tensor: its shard, or all of an ordinary one. Writing to it changes the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors gathered on every rank; all ranks call it together."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors.items()
    }
