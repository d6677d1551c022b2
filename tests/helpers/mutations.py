"""Damage of the kinds that downloads, disks and strangers do to files, drawn from a seed."""

from __future__ import annotations

import copy
import json
import os
import random
import re
from typing import Any

CASES_FACTOR = int(os.environ.get("REFALIGN_FUZZ", "1"))
"""How many times the usual number of cases to try: REFALIGN_FUZZ=10 takes ten times as long."""

# Values that parsers trip over: wrong types, extremes, text that leads elsewhere.
STRANGE = (
    None,
    True,
    0,
    -1,
    10**30,
    10**400,  # larger than any float
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\0",
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\x",
    "\ud800",
    "a" * 5000,
    [],
    [[]],
    {},
    {"": None},
    [1, 2],
    [1, 2, 3, "4"],
    "0.5",
    "[1, 2",
    "<700 lists>",  # see json_text
    "<100000 lists>",
)
STRANGE_KEYS = ("", " ", "\ud800", "\0", "../x", "a" * 5000, "1", "subjects")


def cases(count: int) -> range:
    """As many cases as a test tries: `count`, or a multiple of it."""
    return range(count * CASES_FACTOR)


def json_text(value: Any) -> str:
    """JSON in which "<700 lists>" has become lists within lists, which `distort` could not handle itself."""
    text = json.dumps(value)
    return re.sub(r'"<(\d+) lists>"', lambda match: "[" * int(match[1]) + "]" * int(match[1]), text)


def damage(data: bytes, rng: random.Random) -> bytes:
    """One to four of: bits turned, a part cut off, taken out, repeated, zeroed, or noise put in."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(damaged) + 1)
        length = rng.choice((1, 4, 64, max(1, len(damaged) // 4)))
        kind = rng.randrange(6)
        if kind == 0:
            for _ in range(rng.choice((1, 8, 64))):
                if damaged:
                    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del damaged[start:]
        elif kind == 2:
            del damaged[start : start + length]
        elif kind == 3:
            damaged[start:start] = damaged[start : start + length]
        elif kind == 4:
            damaged[start : start + length] = bytes(len(damaged[start : start + length]))
        else:
            damaged[start:start] = rng.randbytes(length)
    return bytes(damaged)


def distort(value: Any, rng: random.Random) -> Any:
    """A copy of decoded JSON in which one to three places hold something else, are missing, or stand twice.

    It may hold what `json_text` alone can write.
    """
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return rng.choice(STRANGE)
        holder, key = rng.choice(places)
        kind = rng.randrange(4)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 1:
            holder[rng.choice((f"{key}_", *STRANGE_KEYS))] = holder.pop(key)
        elif kind == 2 and type(holder[key]) in (int, float) and abs(holder[key]) < 1e300:
            holder[key] = rng.choice((-holder[key], holder[key] * 1000, holder[key] + 0.5, str(holder[key])))
        else:
            holder[key] = copy.deepcopy(rng.choice(STRANGE))
    return value


def _places(value: Any) -> Any:
    """(holder, key) of every value inside, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)
