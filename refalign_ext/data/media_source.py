"""Where a picture or video comes from: a file of its own, or one that is stored inside an archive."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class MediaBytes:
    """A file held in memory.

    Attributes:
        name: what errors call it, such as "shards/00000.tar: 000000003.mp4".
        data: its bytes.
    """

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


Media = Path | MediaBytes
