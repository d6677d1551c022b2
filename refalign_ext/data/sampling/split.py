"""Which clips train and which validate: decided by a clip's group, so that no source ends up on both sides.

Groups and ids are handled as 64-bit hashes, which makes millions of them an array.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refalign_ext.data.hashing import hash64
from refalign_ext.data.schema import Clip, Reference


@dataclass(frozen=True)
class Split:
    """One side of a division of clips by their groups.

    Attributes:
        share: of the groups that validate, from 0 (divides nothing) to below 1.
        seed: what decides, with the group's name.
        subset: "train", "validation", or "all" for both.
    """

    share: float = 0.0
    seed: int = 0
    subset: str = "all"

    @property
    def divides(self) -> bool:
        """Whether anything is left out."""
        return self.subset != "all" and (self.share > 0 or self.subset == "validation")

    def contains(self, groups: np.ndarray) -> np.ndarray:
        """Which groups [n], uint64 hashes, are on this side: [n] booleans."""
        if not self.divides:
            return np.ones(len(groups), bool)
        mixed = _splitmix64(groups ^ np.uint64(hash64(f"split {self.seed}")))
        # Compared as floats of 53 bits: 2**64 * share does not fit into 64 bits for every share.
        validates = (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53 < self.share
        return validates if self.subset == "validation" else ~validates


class AllowedReferences:
    """Which references of clips may be used on one side of a split.

    References that name no source belong to the clip. A source is known by its group, or by its id.

    Args:
        ids, groups: hashes [n], uint64, of the clips whose groups have to be looked up by their ids, in any order.
    """

    def __init__(self, split: Split, ids: np.ndarray, groups: np.ndarray) -> None:
        order = np.argsort(ids, kind="stable")
        self.split, self._ids, self._groups = split, ids[order], groups[order]

    def groups_of(self, ids: np.ndarray) -> np.ndarray:
        """The groups [m] of ids [m]; an unknown clip is taken to be a group of its own, named like it."""
        if not len(self._ids):
            return ids
        places = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return np.where(self._ids[places] == ids, self._groups[places], ids)

    def allows(self, clip: Clip, reference: Reference) -> bool:
        """Whether what the reference shows is on this side."""
        known, is_group = source_hash(clip, reference)
        if known is None:
            return True
        source = np.array([known], np.uint64)
        return bool(self.split.contains(source if is_group else self.groups_of(source))[0])


def source_hash(clip: Clip, reference: Reference) -> tuple[int | None, bool]:
    """Where a reference comes from: (64 bits, whether of a group or of a clip's id); None: from the clip's own group."""
    if reference.source_group is not None:
        return (None if reference.source_group == clip.group else hash64(reference.source_group)), True
    if reference.source_id is not None and reference.source_id != clip.id:
        return hash64(reference.source_id), False
    return None, True


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014) over uint64 values."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
