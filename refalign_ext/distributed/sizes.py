"""Parallel sizes: how many ranks share what. Needs no process group and no torch.distributed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from refalign_ext.guidance import BRANCHES


@dataclass(frozen=True)
class ParallelSizes:
    """How many ranks share what; their product is the world size.

    Attributes:
        data: groups of ranks with different samples; in generation, with different branches of the guidance.
        ring: ranks among which the keys and values of a sample are gathered.
        ulysses: ranks among which a sample's attention heads are divided.
    """

    data: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def sequence(self) -> int:
        """Ranks that share one sample."""
        return self.ring * self.ulysses

    @property
    def world(self) -> int:
        """All ranks."""
        return self.data * self.sequence

    def __str__(self) -> str:
        return (
            f"data parallel {self.data} x sequence parallel {self.sequence} "
            f"(Ulysses {self.ulysses} x ring {self.ring})"
        )


def split_sequence(sequence: int, num_heads: int) -> tuple[int, int]:
    """(ring, ulysses) for `sequence` ranks: as much Ulysses as the heads allow, which moves the fewest bytes.

    12 heads on 8 ranks give Ulysses 4 and a ring of 2: balanced, where 8-way Ulysses would leave ranks idle.
    """
    ulysses = math.gcd(sequence, num_heads)
    return sequence // ulysses, ulysses


def possible_sizes(world_size: int, num_heads: int) -> list[ParallelSizes]:
    """All divisions of a world of this size for a model with these heads, by Ulysses size and then ring size."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    return [
        ParallelSizes(world_size // (ulysses * ring), ring, ulysses)
        for ulysses in divisors
        for ring in divisors
        if num_heads % ulysses == 0 and world_size % (ulysses * ring) == 0
    ]


def training_sizes(world_size: int, num_heads: int, *, ulysses: int = 0, ring: int = 0) -> ParallelSizes:
    """The sizes that `--ulysses_size` and `--ring_size` name (0: 1), the other ranks being data parallel."""
    ulysses, ring = ulysses or 1, ring or 1
    possible = possible_sizes(world_size, num_heads)
    for sizes in possible:
        if (sizes.ulysses, sizes.ring) == (ulysses, ring):
            return sizes
    listed = ", ".join(f"{sizes.ulysses} x {sizes.ring}" for sizes in possible)
    raise ValueError(
        f"--ulysses_size {ulysses} x --ring_size {ring} is not possible with {world_size} ranks and {num_heads} "
        f"heads (Ulysses divides the heads, the product divides the ranks): choose Ulysses x ring from {listed}"
    )


def generation_sizes(
    world_size: int, num_heads: int, *, cfg: int = 1, ulysses: int = 0, ring: int = 0
) -> ParallelSizes:
    """How the ranks divide one video; `data` of the result are the groups that the guidance's branches are dealt to.

    All ranks work: a size that is 0 follows from the others, with as much Ulysses as the heads allow.
    """
    possible = [sizes for sizes in possible_sizes(world_size, num_heads) if sizes.data <= len(BRANCHES)]
    chosen = [
        sizes
        for sizes in possible
        if sizes.data == cfg and ulysses in (0, sizes.ulysses) and ring in (0, sizes.ring)
    ]
    if chosen:
        return max(chosen, key=lambda sizes: sizes.ulysses)
    by_groups = sorted(possible, key=lambda sizes: sizes.data)
    choices = ", ".join(f"{sizes.data} x {sizes.ulysses} x {sizes.ring}" for sizes in by_groups)
    raise ValueError(
        f"--cfg_size {cfg}, --ulysses_size {ulysses or 'auto'}, --ring_size {ring or 'auto'} do not divide {world_size} "
        f"ranks and {num_heads} heads: choose cfg x Ulysses x ring from {choices}"
    )
