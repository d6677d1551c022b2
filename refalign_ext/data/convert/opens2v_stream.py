"""OpenS2V's JSON files of tens of gigabytes as a stream of entries, in spite of what is damaged in them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MAX_ENTRY_BYTES = 32 << 20  # real ones have about 0.1 MB
MAX_DEPTH = 256  # of lists and objects within each other: the parser takes memory by its square

_CHUNK = 1 << 18
_LOOK_BACK = 256
_LONGEST_TOKEN = 16
_WORDS = (b"NaN", b"-Infinity", b"Infinity")
_STEPS = np.array([(chr(code) in "[{") - (chr(code) in "]}") for code in range(256)], np.int8)
# A number as a value of an object, or in a list of numbers that is one: an unescaped quote ends the key before it.
_BEFORE_NUMBER = re.compile(rb'[^\\:,\[{\s]"\s*:\s*(?:\[[\s\d.,eE+\-\[\]NaInfity]*)?\Z')


class Incomplete(Exception):
    """The rest of a file cannot be read; the message says why."""


def entries(path: Path, advance: Callable[[int], object] = lambda count: None) -> Iterator[tuple[str, Any]]:
    """The (key, value) pairs of a file with one JSON object, or (its position, item) of one with a list.

    Memory is that of one entry. NaN and infinities, which JSON does not have, arrive as the texts "NaN" and "Infinity";
    bytes that are not UTF-8 as U+FFFD.

    Args:
        advance: is told how many bytes were read.

    Raises:
        Incomplete: after the last entry that could be read.
    """
    import ijson

    with path.open("rb") as file:
        stream = _Mended(file, advance)
        opening = stream.peek()
        try:
            if opening == b"{":
                pairs = ijson.kvitems(stream, "", use_float=True, buf_size=_CHUNK)
            elif opening == b"[":
                pairs = enumerate(ijson.items(stream, "item", use_float=True, buf_size=_CHUNK), 1)
            else:
                raise Incomplete("no JSON object or list" if opening else "the file is empty")
            for key, value in pairs:
                stream.unclaimed = 0
                yield str(key), value
        except ijson.IncompleteJSONError as error:
            # The parser's words come with a piece of the file; the first line says what it is.
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "damaged"
            ends = stream.ended and "premature EOF" in reason
            raise Incomplete("the file is cut off" if ends else f"the JSON is damaged ({reason})") from None
        except ijson.JSONError as error:
            raise Incomplete(f"the JSON is damaged ({str(error)[:100]})") from None


class _Mended:
    """A file for a JSON parser: without a byte order mark, with NaN as text and as valid UTF-8."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], object]) -> None:
        self.file, self.advance = file, advance
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.rest = b""  # read but not handed out: a token may go on behind it
        self.past = b""  # the end of what was handed out
        self.first = b""
        self.ended = False
        self.unclaimed = 0
        self.depth = _Depth()
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)

    def peek(self) -> bytes:
        """The first character that is not a space; nothing may have been read yet."""
        self.first = self.read(_CHUNK).lstrip()
        while not self.first and not self.ended:
            self.first = self.read(_CHUNK).lstrip()
        return self.first[:1]

    def read(self, size: int) -> bytes:
        """About `size` bytes; none at the end."""
        if not size:
            return b""
        if self.first:
            data, self.first = self.first, b""
            return data
        while not self.ended:
            raw = self.file.read(size)
            self.advance(len(raw))
            self.unclaimed += len(raw)
            if self.unclaimed > MAX_ENTRY_BYTES:
                raise Incomplete(f"an entry has more than {MAX_ENTRY_BYTES >> 20} MiB")
            if self.depth.most(raw) > MAX_DEPTH:
                raise Incomplete(f"more than {MAX_DEPTH} lists and objects lie within each other")
            self.ended = not raw
            if not raw.isascii() or self.decoder.getstate()[0] or self.ended:
                raw = self.decoder.decode(raw, self.ended).encode()
            data = self._named(self.rest + raw)
            if data:
                return data
        return b""

    def _named(self, data: bytes) -> bytes:
        """Hands out data with its bare tokens as texts, all but an end that might be within one."""
        if not self.ended and len(data) <= _LONGEST_TOKEN:
            self.rest = data
            return b""
        safe = len(data) if self.ended else len(data) - _LONGEST_TOKEN
        pieces, start = [], 0
        for begin, end in _words(data):
            if begin >= safe:
                break
            safe = max(safe, end)
            before = data[max(begin - _LOOK_BACK, 0) : begin]
            if begin < _LOOK_BACK:
                before = self.past[begin - _LOOK_BACK :] + before
            if begin >= start and _BEFORE_NUMBER.search(before):
                pieces += [data[start:begin], b'"', data[begin:end], b'"']
                start = end
        pieces.append(data[start:safe])
        self.past = (self.past + data[max(safe - _LOOK_BACK, 0) : safe])[-_LOOK_BACK:]
        self.rest = data[safe:]
        return b"".join(pieces)


class _Depth:
    """How many lists and objects lie within each other in JSON that comes in pieces."""

    def __init__(self) -> None:
        self.now, self.in_text, self.rest = 0, False, b""

    def most(self, data: bytes) -> int:
        """The most of them within this piece; or fewer, if that is not more than `MAX_DEPTH`."""
        data = self.rest + data
        cut = (len(data) - len(data.rstrip(b"\\"))) % 2  # half of an escape, whose end comes next
        self.rest = data[len(data) - cut :]
        data = data[: len(data) - cut].replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = data.split(b'"')
        outside = b"".join(pieces[self.in_text :: 2])
        self.in_text ^= len(pieces) % 2 == 0
        opened, start = outside.count(b"[") + outside.count(b"{"), self.now
        self.now += opened - outside.count(b"]") - outside.count(b"}")
        if start + opened <= MAX_DEPTH:
            return self.now
        return start + int(np.cumsum(_STEPS[np.frombuffer(outside, np.uint8)], dtype=np.int64).max())


def _words(data: bytes) -> list[tuple[int, int]]:
    """Where the words begin and end, in order; a regular expression takes five times as long."""
    found = []
    for word in _WORDS:
        position = data.find(word)
        while position >= 0:
            found.append((position, position + len(word)))
            position = data.find(word, position + len(word))
    return sorted(found)
