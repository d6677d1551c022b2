"""Tar shards in webdataset's layout: `<key>.json` with the clip, `<key>.mp4` with its video, `<key>.0.png` and so on.

A packed folder holds `shards/00000.tar` onwards and `shards.json` with the samples, size and SHA-256 of each. The key of
a sample is the number of its row in the manifest that was packed, so keys are unique and sort in its order.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import msgspec

from refalign_ext.atomic_io import atomic_open

LISTING = "shards.json"
SHARD_FOLDER = "shards"
MAX_MEMBER_BYTES = 2 << 30
_MAX_LISTING_BYTES = 256 << 20
_MAX_MEMBERS = 1 << 20  # of one shard
_BLOCK = tarfile.BLOCKSIZE
_NAME = re.compile(r"([A-Za-z0-9_-]{1,64})\.([A-Za-z0-9_.-]{1,64})")  # key and extension
_VERSION = 1


@dataclass(frozen=True)
class ShardInfo:
    """One line of `shards.json`: the shard's name relative to the folder, its samples, bytes and SHA-256."""

    name: Annotated[str, msgspec.Meta(pattern=r"^shards/[0-9]{5,9}\.tar\Z")]
    samples: Annotated[int, msgspec.Meta(ge=0, le=_MAX_MEMBERS)]
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class _Listing(msgspec.Struct):
    version: Literal[1]
    samples: int
    shards: list[ShardInfo]


def shard_name(number: int) -> str:
    """The name of shard `number` within its folder."""
    return f"{SHARD_FOLDER}/{number:05d}.tar"


@dataclass
class ShardTable:
    """Where the members of one shard lie.

    Attributes:
        name: of the shard, for errors.
        file: open for reading.
        keys: of the samples, in the order of the shard.
        members: (offset, bytes) of each usable member, or why it is not usable.
        damage: why the shard could not be read to its end, or None.
    """

    name: str
    file: BinaryIO
    keys: list[str] = field(default_factory=list)
    members: dict[str, tuple[int, int] | str] = field(default_factory=dict)
    damage: str | None = None

    def member_range(self, member: str) -> tuple[int, int]:
        """Offset and bytes of a member."""
        found = self.members.get(member)
        if found is None:
            rest = f"; the shard is {self.damage}" if self.damage else ""
            raise ValueError(f"{self.name} has no member {member!r}{rest}")
        if isinstance(found, str):
            raise ValueError(f"{self.name}: member {member!r} {found}")
        return found

    def read(self, member: str, limit: int = MAX_MEMBER_BYTES) -> bytes:
        """The bytes of a member."""
        offset, size = self.member_range(member)
        if size > limit:
            raise ValueError(f"{self.name}: member {member!r} has {size} bytes; {limit} are the most")
        blocks: list[bytes] = []
        while size:  # one call reads 2 GiB at most
            block = os.pread(self.file.fileno(), min(size, 1 << 30), offset)
            if not block:
                raise ValueError(f"{self.name}: member {member!r} is cut off: the shard was changed")
            blocks.append(block)
            offset, size = offset + len(block), size - len(block)
        return b"".join(blocks)


def scan_shard(path: Path) -> ShardTable:
    """Reads the headers of a shard, not its contents; what is wrong with it is noted in the table.

    Only plain files with names `<key>.<extension>` can be used: links, folders, devices and names with a slash are
    noted as unusable.
    """
    try:
        table = ShardTable(str(path), path.open("rb"))
    except OSError as error:
        raise ValueError(f"{path}: the shard cannot be opened ({error.strerror})") from None
    table.damage = _scan_headers(table)
    return table


def _scan_headers(table: ShardTable) -> str | None:
    """Fills the table; why it could not be filled to the end, or None."""
    total, offset, keys = os.fstat(table.file.fileno()).st_size, 0, {}
    for _ in range(_MAX_MEMBERS):
        block = os.pread(table.file.fileno(), _BLOCK, offset)
        if block == bytes(_BLOCK):  # the end mark
            return None
        if len(block) < _BLOCK:
            return f"cut off at byte {total}"
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if header.size < 0:
                raise tarfile.HeaderError("a negative size")
        except tarfile.HeaderError as error:
            return f"damaged at byte {offset} ({error})"
        offset += _BLOCK
        if name := _NAME.fullmatch(header.name):
            if name[1] not in keys:
                keys[name[1]] = None
                table.keys.append(name[1])
            is_known = header.name in table.members
            table.members[header.name] = _checked_range(header, offset, total, is_known)
        offset += -(-header.size // _BLOCK) * _BLOCK
        if offset > total:
            return f"cut off at byte {total}"
    return f"not read beyond its first {_MAX_MEMBERS} members"


def _checked_range(header: tarfile.TarInfo, offset: int, total: int, is_known: bool) -> tuple[int, int] | str:
    if is_known:
        return "occurs twice"
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return "is not a plain file"
    if header.size > MAX_MEMBER_BYTES:
        return f"has {header.size} bytes; {MAX_MEMBER_BYTES} are the most"
    if offset + header.size > total:
        return "is cut off"
    return offset, header.size


class ShardWriter:
    """Writes one shard; its bytes depend on the members and their order alone."""

    def __init__(self, file: BinaryIO) -> None:
        self.samples = 0
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115, see close

    def add(self, row: bytes, key: str, media: Iterable[tuple[str, BinaryIO, int]]) -> None:
        """Adds a sample: its row as JSON and its files as (member name, contents, bytes).

        Raises:
            OSError: if a file is shorter than it should be.
        """
        for name, contents, size in [(f"{key}.json", io.BytesIO(row), len(row)), *media]:
            header = tarfile.TarInfo(name)  # everything else is 0: no time, no owner
            header.size = size
            self._tar.addfile(header, contents)
        self.samples += 1

    def close(self) -> None:
        """Writes the end mark."""
        self._tar.close()


def write_listing(folder: Path, infos: list[ShardInfo]) -> None:
    """Writes `shards.json`, whole or not at all."""
    listing = _Listing(_VERSION, sum(info.samples for info in infos), infos)
    with atomic_open(folder / LISTING) as file:
        file.write(msgspec.json.format(msgspec.json.encode(listing), indent=1) + b"\n")


def read_listing(folder: Path) -> list[ShardInfo]:
    """What `shards.json` of a packed folder says."""
    path = folder / LISTING
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_LISTING_BYTES), type=_Listing).shards
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(
            f"{path}: is not a list of shards of version {_VERSION} ({error}): pack the folder again"
        ) from None


def verify_shard(folder: Path, info: ShardInfo) -> str | None:
    """What is wrong with a shard compared to `shards.json`, or None."""
    path = folder / info.name
    try:
        size = path.stat().st_size
        if size == info.bytes and sha256_of(path) == info.sha256:
            return None
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return f"{path}: {size} bytes with another SHA-256 than the {info.bytes} bytes that were packed: copy or pack it again"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file as hexadecimal digits."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()
