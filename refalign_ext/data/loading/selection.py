"""Which rows of a clip set training uses: usable, long enough, and on the wanted side of the split."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refalign_ext.data.clip_index import MAX_SOURCES, USABLE, delete_clip_index
from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.loading.bad_clips import are_too_many
from refalign_ext.data.sampling.buckets import assign
from refalign_ext.data.sampling.sample_spec import Sampling
from refalign_ext.data.sampling.split import AllowedReferences, GroupTable, Split

logger = logging.getLogger(__name__)


def reference_rules(indexes: Sequence[np.ndarray], split: Split) -> list[AllowedReferences] | None:
    """Which references samples of each set may show, given the sets' clip indexes; None: all."""
    if not split.divides:
        return None
    rules = []
    for records in indexes:
        by_id = (1 << records["source_count"].astype(np.int64)) - 1 > records["source_is_group"]
        ids, groups = np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        if by_id.any():  # 16 bytes for each clip, but only where ids have to be looked up
            ids, groups = np.array(records["id"]), np.array(records["group"])
        rules.append(AllowedReferences(split, GroupTable.of(ids, groups)))
    return rules


def assign_rows(
    clip_set: ClipSet,
    records: np.ndarray,
    sampling: Sampling,
    rule: AllowedReferences | None,
    *,
    max_bad_share: float,
    fallback_dir: Path | None,
) -> np.ndarray:
    """The bucket of every row of a set, [rows] int64, -1 for those that are not used; the log says how many and why.

    Args:
        records: the set's clip index; its file in `fallback_dir`, if it is there, is deleted if too many rows are bad.
        rule: which references may be used; None: all.

    Raises:
        ValueError: if more than `max_bad_share` of the rows are bad, or none is left.
    """
    path, is_usable = clip_set.path, records["state"] == USABLE
    broken = int((~is_usable).sum())
    if are_too_many(broken, len(records), max_bad_share):
        delete_clip_index(clip_set, fallback_dir)
        raise ValueError(
            f"{path}: {broken} of {len(records)} clips cannot be used, more than max_bad_share "
            f"{max_bad_share:g}: `data check` lists them"
        )
    buckets = assign(records["width"], records["height"], records["frames"], records["fps"], sampling)
    fits = is_usable & (buckets >= 0)
    here = fits if rule is None else fits & rule.split.contains(np.array(records["group"]))
    supplied = here if rule is None else here & _has_source(records, rule)
    counts = {
        "cannot be used": broken,
        f"are shorter than {min(bucket.frames for bucket in sampling.buckets)} frames": (
            is_usable & ~fits
        ).sum(),
        "belong to the other side of the split": (fits & ~here).sum(),
        "have all their references on the other side": (here & ~supplied).sum(),
    }
    reasons = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    if not supplied.any():
        if broken:
            delete_clip_index(clip_set, fallback_dir)
        where = "" if rule is None else f" for {rule.split.subset}"
        raise ValueError(
            f"{path}: no clip can be used{where}: of {len(records)} clips {reasons} (`data check` says why)"
        )
    logger.info(
        "%s: %d of %d clips%s", path, supplied.sum(), len(records), f" ({reasons})" if reasons else ""
    )
    return np.where(supplied, buckets, -1)


def _has_source(records: np.ndarray, rule: AllowedReferences) -> np.ndarray:
    """Which clips [n] have a reference on this side of the split."""
    usable = records["is_free"] > 0
    for number in range(MAX_SOURCES):
        sources = np.array(records["sources"][:, number])
        is_group = (records["source_is_group"] >> number) & 1 > 0
        groups = np.where(is_group, sources, rule.table.groups_of(sources))
        usable = usable | ((records["source_count"] > number) & rule.split.contains(groups))
    return usable
