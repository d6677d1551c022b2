"""What has been applied to a tree, as the tree itself keeps it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

RECORD = ".refalign_patches"


@dataclass(frozen=True)
class Record:
    """What has been applied to a tree.

    Attributes:
        units: names of the units.
        files: by name, the digests of what a file may hold: before any unit, then what writing may have left, last
            what it holds once all is written.
    """

    units: tuple[str, ...] = ()
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)


def read_record(root: Path) -> Record:
    """What has been applied to a tree."""
    path = root / RECORD / "applied.json"
    if not path.is_file():
        return Record()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): tuple(map(str, digests)) for name, digests in content["files"].items()}
        return Record(tuple(content["units"]), files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore the tree with git and delete {RECORD}"
        ) from None


def digest(text: str) -> str:
    """The sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
