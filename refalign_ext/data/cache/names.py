"""What a cache holds under which names, what it was made from, and why it does not fit a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from refalign_ext.data.clip_set import ClipSet
from refalign_ext.data.sampling.sample_spec import Bucket, ReferenceSpec, Sampling
from refalign_ext.data.schema import Clip, to_dict

FORMAT = 1
"""Raised whenever files are laid out differently or the same settings would give other pixels."""

AGAIN = "run `data cache` again"


def video_name(clip_id: str, bucket: Bucket, clip_variant: int) -> str:
    return _name("video", clip_id, bucket.width, bucket.height, bucket.frames, clip_variant)


def reference_name(clip_id: str, bucket: Bucket, spec: ReferenceSpec) -> str:
    """Name of a reference's latents; a reference is one frame, so buckets of the same size share it."""
    place = (spec.subject, spec.reference, spec.augmentation)
    return _name("reference", clip_id, bucket.width, bucket.height, *place)


def features_name(reference: str) -> str:
    """Name of the teacher features that belong to the reference latents called `reference`."""
    return reference.replace("reference-", "features-", 1)


def text_name(prompt: str) -> str:
    return _name("text", prompt)


def row_hash(clip_id: str) -> int:
    """64 bits that tables know a row by."""
    return name_hash(_name("row", clip_id))


def name_hash(name: str) -> int:
    """The first 64 bits of a name, for tables."""
    return int(name.rpartition("-")[2][:16], 16)


def _name(kind: str, *parts: object) -> str:
    # 128 bits: names are looked up without a second check of what they stand for.
    return f"{kind}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}"


def row_digest(clip_set: ClipSet, row: int, clip: Clip) -> str:
    """16 hexadecimal digits of a row's content and the sizes of its files; nothing is decoded."""
    references = [reference for subject in clip.subjects for reference in subject.refs]
    sizes = []
    for name in (clip.video.path, *(one.image or one.video.path for one in references)):
        try:
            sizes.append(clip_set.file_size(row, name))
        except (ValueError, OSError):
            sizes.append(-1)
    return hashlib.sha256(json.dumps([to_dict(clip), sizes], sort_keys=True).encode()).hexdigest()[:16]


def cache_fingerprint(
    sampling: Sampling,
    files: Mapping[str, str],
    *,
    teacher: str | None,
    token_stride: Sequence[int],
    text_length: int,
    dtype: str | None = None,
) -> dict[str, Any]:
    """All that decides what a cache holds, apart from the rows: settings that change contents, and what made them.

    Args:
        files: digests of weights and tokenizer by what they are ("VAE", "text encoder", "tokenizer", "teacher").
        teacher: its name; None: no features are needed.
        token_stride: rows and columns of pixels per token, which is the grid of the teacher's features.
        text_length: tokens at which a prompt is cut.
        dtype: of latents and features, "float32" or "bfloat16"; None: a run that reads takes either.
    """
    taken = ("fps", "stride", "clip_variants", "reference_variants", "prompt_alternatives", "augment", "seed")
    settings = {name: getattr(sampling, name) for name in taken}
    settings["buckets"] = sorted([b.width, b.height, b.frames] for b in sampling.buckets)
    settings |= {"token_stride": list(token_stride), "text_length": text_length}
    if teacher is not None:
        settings["teacher"] = teacher
    if dtype is not None:
        settings["dtype"] = dtype
    used = {name: digest for name, digest in files.items() if name != "teacher" or teacher is not None}
    return {"format": FORMAT, "files": used, "settings": settings}


def differences(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Why a cache with fingerprint `stored` does not serve a run that expects `expected`; empty: it does.

    What `expected` does not name is not compared: a run without a teacher reads a cache that has its features.
    """
    if stored["format"] != expected["format"]:
        return [f"its format is {stored['format']}, this version reads {expected['format']}"]
    found = []
    for name, digest in expected["files"].items():
        old = stored["files"].get(name)
        if old is None:
            found.append(f"made without the {name}")
        elif old != digest:
            found.append(f"made with another {name}: {old[:12]} != {digest[:12]}")
    for name, value in expected["settings"].items():
        old = stored["settings"].get(name)
        if old != value:
            found.append(f"{name} {old}, this run asks for {value}")
    return found
