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
from refalign_ext.data.sampling.split import AllowedReferences, Split

logger = logging.getLogger(__name__)


def reference_rules(indexes: Sequence[np.ndarray], split: Split) -> list[AllowedReferences] | None:
    """Which references samples of each set may show, given the sets' clip indexes; None: all."""
    if not split.divides:
        return None
    rules = []
    for records in indexes:
        by_id = (1 << records["source_count"].astype(np.int64)) - 1 > records["source_is_group"]
        # 16 bytes for each clip, but only where ids have to be looked up
        looked_up = records if by_id.any() else records[:0]
        rules.append(AllowedReferences(split, np.array(looked_up["id"]), np.array(looked_up["group"])))
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
        records: the set's clip index; its file, beside the set or in `fallback_dir`, is deleted if rows are bad and
            training cannot start: they may be usable when it is tried again.
        rule: which references may be used; None: all.

    Raises:
        ValueError: if more than `max_bad_share` of the rows are bad, or none is left.
    """
    is_usable = records["state"] == USABLE
    buckets = assign(records["width"], records["height"], records["frames"], records["fps"], sampling)
    fits = is_usable & (buckets >= 0)
    here = fits if rule is None else fits & rule.split.contains(np.array(records["group"]))
    supplied = here if rule is None else here & _has_source(records, rule)
    counts = {
        "cannot be used": (~is_usable).sum(),
        "are too short for every bucket": (is_usable & ~fits).sum(),
        "belong to the other side of the split": (fits & ~here).sum(),
        "have all their references on the other side": (here & ~supplied).sum(),
    }
    reasons = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    problem, bad = "", counts["cannot be used"]
    if are_too_many(bad, len(records), max_bad_share):
        problem = f"more than max_bad_share {max_bad_share:g} cannot be used"
    elif not supplied.any():
        problem = "no clip can be used" + ("" if rule is None else f" for {rule.split.subset}")
    if problem:
        if bad:
            delete_clip_index(clip_set, fallback_dir)
        raise ValueError(
            f"{clip_set.path}: {problem}: of {len(records)} clips {reasons} (`data check` says why)"
        )
    used = f"{supplied.sum()} of {len(records)} clips"
    logger.info("%s: %s%s", clip_set.path, used, f" ({reasons})" if reasons else "")
    return np.where(supplied, buckets, -1)


def _has_source(records: np.ndarray, rule: AllowedReferences) -> np.ndarray:
    """Which clips [n] have a reference on this side of the split."""
    usable = records["is_free"] > 0
    for number in range(MAX_SOURCES):
        sources = np.array(records["sources"][:, number])
        is_group = (records["source_is_group"] >> number) & 1 > 0
        groups = np.where(is_group, sources, rule.groups_of(sources))
        usable = usable | ((records["source_count"] > number) & rule.split.contains(groups))
    return usable
