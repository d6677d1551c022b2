"""What a cache holds under which names, what it was made from, and why it does not fit a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from refalign_ext.data.schema import Clip, to_dict

if TYPE_CHECKING:
    from refalign_ext.data.sampling.sample_spec import Bucket, ReferenceSpec, Sampling

FORMAT = 1
"""Raised whenever files are laid out differently or the same settings would give other pixels."""

AGAIN = "run `data cache` again"
LATENT_TYPES = ("float32", "bfloat16")


def video_name(clip_id: str, bucket: Bucket, cut: int) -> str:
    """Name of the latents of one cut of a clip."""
    return _name("video", clip_id, bucket.width, bucket.height, bucket.frames, cut)


def reference_name(clip_id: str, bucket: Bucket, choice: ReferenceSpec) -> str:
    """Name of a reference's latents; a reference is one frame, so buckets of the same size share it."""
    place = (choice.subject, choice.reference, choice.augmentation)
    return _name("reference", clip_id, bucket.width, bucket.height, *place)


def features_name(reference: str) -> str:
    """Name of the teacher features that belong to the reference latents called `reference`."""
    return reference.replace("reference-", "features-", 1)


def text_name(prompt: str) -> str:
    """Name of a prompt's text features."""
    return _name("text", prompt)


def row_name(clip_id: str) -> str:
    """Name of a row, which tables know it by."""
    return _name("row", clip_id)


def short_hash(name: str) -> int:
    """The first 64 bits of a name, for tables."""
    return int(name.rpartition("-")[2][:16], 16)


def _name(kind: str, *parts: object) -> str:
    # 128 bits: names are looked up without a second check of what they stand for.
    return f"{kind}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}"


def row_digest(clip: Clip, sizes: Sequence[int]) -> str:
    """Digest of a row's content and of its files' sizes in bytes; 16 hexadecimal digits."""
    content = json.dumps([to_dict(clip), list(sizes)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def cache_fingerprint(
    sampling: Sampling,
    files: Mapping[str, str],
    *,
    teacher: str | None,
    token_stride: Sequence[int],
    text_length: int,
    dtype: str | None = None,
) -> dict[str, Any]:
    """All that decides what a cache holds, apart from the rows.

    Args:
        sampling: of it, what changes contents; not what only chooses among them.
        files: digests of weights and tokenizer by what they are ("VAE", "text encoder", "tokenizer", "teacher").
        teacher: its name; None: no features are needed.
        token_stride: rows and columns of pixels per token, which is the grid of the teacher's features.
        text_length: tokens at which a prompt is cut.
        dtype: of latents and features, one of LATENT_TYPES; None: a run that reads takes either.
    """
    settings = {
        "buckets": sorted([b.width, b.height, b.frames] for b in sampling.buckets),
        "fps": sampling.fps,
        "stride": sampling.stride,
        "clip_variants": sampling.clip_variants,
        "reference_variants": sampling.reference_variants,
        "prompt_alternatives": sampling.prompt_alternatives,
        "augment": sampling.augment,
        "seed": sampling.seed,
        "token_stride": list(token_stride),
        "text_length": text_length,
    }
    if teacher is not None:
        settings["teacher"] = teacher
    if dtype is not None:
        settings["dtype"] = dtype
    chosen = {name: digest for name, digest in files.items() if name != "teacher" or teacher is not None}
    # Through JSON, so that what was read from a file compares equal.
    return json.loads(json.dumps({"format": FORMAT, "files": chosen, "settings": settings}))


def differences(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Why a cache with fingerprint `stored` does not serve a run that expects `expected`; empty: it does.

    What `expected` does not name is not compared: a run without a teacher reads a cache that has its features.
    """
    if stored.get("format") != expected.get("format"):
        return [
            f"made by another version (format {stored.get('format')!r}, this one reads {expected.get('format')!r})"
        ]
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
            found.append(f"{name} {_plain(old)}, this run asks for {_plain(value)}")
    # A damaged header may hold half of a surrogate pair, which no log takes.
    return [reason.encode("utf-8", "backslashreplace").decode("utf-8") for reason in found]


def _plain(value: object) -> str:
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        return ", ".join("x".join(map(str, item)) for item in value)
    return str(value)
