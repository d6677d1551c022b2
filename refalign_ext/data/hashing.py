"""Hashes and random generators keyed by names, the same on any machine and in any process."""

from __future__ import annotations

import hashlib

import numpy as np


def hash64(text: str) -> int:
    """The first 64 bits of a name's BLAKE2b hash."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def keyed_generator(seed: int, *keys: int | str) -> np.random.Generator:
    """Random numbers that depend on the seed and the keys alone."""
    text = "/".join(f"{type(key).__name__[0]}{len(str(key))}:{key}" for key in (seed, *keys))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))
