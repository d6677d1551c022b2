"""JSON files that are larger than memory, read one entry at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

MAX_ENTRY_CHARACTERS = 32 << 20  # real ones have about 100,000

_CHUNK = 1 << 20  # characters read at a time
_LONGEST_TOKEN = 16  # an error so close to the end of what was read may be a token that goes on behind it
_SPACES = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(strict=False)


class IncompleteFile(Exception):
    """The rest of a file cannot be read; the message says why."""


def read_entries(
    path: Path, on_read: Callable[[int], object] = lambda count: None
) -> Iterator[tuple[str, Any]]:
    """The (key, value) pairs of a file that holds one object, or (position from 1, item) of one that holds a list.

    The standard library's decoder is used because the files are Python's dumps: it knows NaN and infinities, which
    other parsers of streams refuse. Bytes that are not UTF-8 arrive as U+FFFD.

    Args:
        on_read: is told how many bytes were read.

    Raises:
        IncompleteFile: after the last entry that could be read.
    """
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        yield from _EntryReader(file, on_read).entries()


class _EntryReader:
    """Decodes from a text that is read on whenever a value does not end in it."""

    def __init__(self, file: TextIO, on_read: Callable[[int], object]) -> None:
        self.file, self.on_read = file, on_read
        self.text, self.position = "", 0

    def entries(self) -> Iterator[tuple[str, Any]]:
        opening = self._next_character()
        if opening not in ("{", "["):
            raise IncompleteFile("no JSON object or list" if opening else "the file is empty")
        self.position += 1
        closing = "}" if opening == "{" else "]"
        is_last, number = self._next_character() == closing, 0
        if is_last:
            self.position += 1
        while not is_last:
            number += 1
            key = self._value() if opening == "{" else str(number)
            if opening == "{":
                if not isinstance(key, str):
                    raise IncompleteFile("the JSON is damaged (a key is not a text)")
                self._expect(":")
            yield key, self._value()
            is_last = self._expect("," + closing) == closing
        if self._next_character():
            raise IncompleteFile("the JSON is damaged (more follows its end)")

    def _next_character(self) -> str:
        """The next character that is not a space, which is left where it is; "" at the end of the file."""
        while True:
            self.position = _SPACES.match(self.text, self.position).end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._read_on():
                return ""

    def _expect(self, characters: str) -> str:
        character = self._next_character()
        if not character:
            raise IncompleteFile("the file is cut off")
        if character not in characters:
            raise IncompleteFile(f"the JSON is damaged ({character!r} where {characters!r} should follow)")
        self.position += 1
        return character

    def _value(self) -> Any:
        self._next_character()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                goes_on = error.pos >= len(self.text) - _LONGEST_TOKEN or "Unterminated" in error.msg
                if not goes_on:
                    raise IncompleteFile(f"the JSON is damaged ({error.msg})") from None
                if not self._read_on():
                    raise IncompleteFile("the file is cut off") from None
            except (
                ValueError,
                RecursionError,
            ) as error:  # a number of thousands of digits, thousands of lists
                raise IncompleteFile(f"the JSON is damaged ({error})") from None
            else:
                if end < len(self.text):
                    self.position = end
                    return value
                if not self._read_on():  # else it may be a number that goes on behind what was read
                    self.position = len(self.text)
                    return value

    def _read_on(self) -> bool:
        """Adds at least as much text as the current entry has so far, so that a long one is decoded few times."""
        held = self.text[self.position :]
        if len(held) > MAX_ENTRY_CHARACTERS:
            raise IncompleteFile(f"an entry has more than {MAX_ENTRY_CHARACTERS >> 20} million characters")
        before = self.file.buffer.tell()
        added = self.file.read(max(_CHUNK, len(held)))
        self.on_read(self.file.buffer.tell() - before)
        self.text, self.position = held + added, 0
        return bool(added)
