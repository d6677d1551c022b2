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
# The standard library's, since the files are Python's dumps: it knows NaN, which other parsers of streams refuse.
_DECODER = json.JSONDecoder(strict=False)


class IncompleteFile(Exception):
    """The rest of a file cannot be read; the message says why."""


def read_entries(
    path: Path, on_read: Callable[[int], object] = lambda count: None
) -> Iterator[tuple[str, Any]]:
    """The (key, value) pairs of a file that holds one object, or (position from 1, item) of one that holds a list.

    Bytes that are not UTF-8 arrive as U+FFFD.

    Args:
        on_read: is told how many bytes were read.

    Raises:
        IncompleteFile: after the last entry that could be read.
    """
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        reader = _ValueReader(file, on_read)
        closing = {"{": "}", "[": "]"}[reader.expect("{[")]
        number, is_last = 0, reader.next_character() == closing
        if is_last:
            reader.expect(closing)
        while not is_last:
            number += 1
            key = str(number)
            if closing == "}":
                key = reader.value()
                reader.expect(":")
            yield key, reader.value()
            is_last = reader.expect("," + closing) == closing
        if reader.next_character():
            raise IncompleteFile("the JSON is damaged (more follows its end)")


class _ValueReader:
    """Decodes from a text that is read on whenever a value does not end in it."""

    def __init__(self, file: TextIO, on_read: Callable[[int], object]) -> None:
        self.file, self.on_read = file, on_read
        self.text, self.position = "", 0

    def next_character(self) -> str:
        """The next character that is not a space, which is left where it is; "" at the end of the file."""
        while True:
            self.position = _SPACES.match(self.text, self.position).end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._read_on():
                return ""

    def expect(self, characters: str) -> str:
        """The next character, which has to be one of these."""
        character = self.next_character()
        if not character:
            raise IncompleteFile("the file is cut off")
        if character not in characters:
            raise IncompleteFile(f"the JSON is damaged ({character!r} where {characters!r} should follow)")
        self.position += 1
        return character

    def value(self) -> Any:
        self.next_character()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                if error.pos < len(self.text) - _LONGEST_TOKEN and "Unterminated" not in error.msg:
                    raise IncompleteFile(f"the JSON is damaged ({error.msg})") from None
                if not self._read_on():
                    raise IncompleteFile("the file is cut off") from None
            except (ValueError, RecursionError) as error:  # thousands of digits, or of lists in lists
                raise IncompleteFile(f"the JSON is damaged ({error})") from None
            else:
                # What ends with the text may be a number that goes on behind it.
                if end < len(self.text) or not self._read_on():
                    self.position = min(end, len(self.text))
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
