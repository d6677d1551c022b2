"""One video made by many ranks: branches of the guidance on groups of ranks, tokens divided within a group, weights sharded
over all of them. `VideoRanks` is what `R2VPipeline` asks; the pipeline and the models stay single-device code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from refalign_ext.backbone import ReferenceBackbone
from refalign_ext.distributed.mesh import DATA, Parallel
from refalign_ext.distributed.parallelize import require_sharding
from refalign_ext.distributed.sequence_parallel import attach_sequence_parallel
from refalign_ext.distributed.xfuser_backend import attach_xfuser
from refalign_ext.parallelism import SingleProcess


class VideoRanks(SingleProcess):
    """The ranks of `parallel` making one video; every method is called on all of them together.

    Args:
        parallel: sizes as `generation_sizes` gives them, and the groups.
        dit_fsdp, t5_fsdp: shard the weights of the transformer, of the text encoder.
        sequence_backend: what exchanges tokens around self-attention: "auto" (torch), "torch", or "xfuser", which is tried
            first and gives way to torch with a warning.
    """

    is_alone = False

    def __init__(
        self,
        parallel: Parallel,
        *,
        dit_fsdp: bool = False,
        t5_fsdp: bool = False,
        sequence_backend: str = "auto",
    ) -> None:
        if dit_fsdp or t5_fsdp:
            require_sharding(parallel.device, "leave out --dit_fsdp and --t5_fsdp")
        self.parallel = parallel
        self.shards_model, self.shards_text_encoder = dit_fsdp, t5_fsdp
        self.sequence_backend = sequence_backend
        self.is_main = parallel.is_main

    def divide_model(self, backbone: ReferenceBackbone, dtype: torch.dtype) -> None:
        attach_sequence_parallel(backbone, self.parallel)
        if self.sequence_backend == "xfuser":
            attach_xfuser(backbone, self.parallel, dtype)
        if self.shards_model:
            shard_frozen_dit(backbone.model, self.parallel, dtype)

    def divide_text_encoder(self, model: nn.Module, *, sync_module_states: bool = False) -> nn.Module:
        return shard_text_encoder(model, self.parallel)

    def same_seed(self, seed: int) -> int:
        return self.parallel.broadcast_from_rank0(lambda: seed)

    def same(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        tensors = [tensor.contiguous() for tensor in tensors]
        for tensor in tensors:
            dist.broadcast(tensor.view(-1).view(torch.uint8), src=0)  # bytes: not every gloo knows bfloat16
        return tensors

    def share(self, branches: Sequence[str]) -> list[str]:
        """Round robin. All groups get equally many, so that all ranks gather the same weights the same number of times:
        a group that would get fewer repeats one in the time that it would wait.
        """
        groups, group = self.parallel.sizes.data, self.parallel.data_rank
        rounds = -(-len(branches) // groups)
        return [branches[(group + turn * groups) % len(branches)] for turn in range(rounds)]

    def exchange(self, branches: Sequence[str], own: Sequence[Tensor]) -> dict[str, Tensor]:
        groups = self.parallel.sizes.data
        mine = torch.stack(list(own))  # [rounds, C, F, H, W]
        everyone = [mine]
        if groups > 1:
            everyone = [torch.empty_like(mine) for _ in range(groups)]
            dist.all_gather(everyone, mine, group=self.parallel.group(DATA))
        return {branch: everyone[index % groups][index // groups] for index, branch in enumerate(branches)}

    def __str__(self) -> str:
        sizes = self.parallel.sizes
        return f"{sizes.world}: guidance {sizes.data} x Ulysses {sizes.ulysses} x ring {sizes.ring}"


def shard_frozen_dit(model: nn.Module, parallel: Parallel, dtype: torch.dtype) -> None:
    """FSDP2 for a transformer that is only evaluated: no master weights, every weight in the dtype of a single device.

    Parameters may lie in files (memory-mapped) in another dtype: one block at a time is read and cast. All weights of one
    unit share a dtype, which torch 2.6 requires; hence what stays in float32 in a half model (`WanModel.float32_modules`)
    is the root's, and the blocks' matrices are units of their own.
    """
    units = [[model.patch_embedding], [model.text_embedding]]
    units += [[block.self_attn, block.cross_attn, block.ffn] for block in model.blocks]
    for parts in units:
        for part in parts:
            part.to(dtype)
        fully_shard(parts, mesh=parallel.shards, reshard_after_forward=True)
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    fully_shard(model, mesh=parallel.shards)


def shard_text_encoder(model: nn.Module, parallel: Parallel) -> nn.Module:
    """FSDP2 for the UMT5 encoder: every block a unit, the embedding and the last norm the root's; returns `model`."""
    for block in model.encoder.block:
        fully_shard(block, mesh=parallel.shards)
    fully_shard(model, mesh=parallel.shards, reshard_after_forward=True)  # 2 GB that denoising has a use for
    return model
