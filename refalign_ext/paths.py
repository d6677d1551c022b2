"""Paths that users give: what has to be there, and what was probably meant where it is not."""

from __future__ import annotations

import difflib
import os
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path

_SIMILAR = 0.8  # as difflib counts: one wrong letter in a short name
_MOST_NAMES = 10_000  # of a folder that is searched


def require_file(path: str | os.PathLike[str], what: str) -> Path:
    """The path of a regular file; no pipe and no device, which may have no end.

    Args:
        what: begins the message, such as "--ref a.png".

    Raises:
        ValueError: naming what was probably meant, where something like it is there.
    """
    mode = _mode(Path(path), what)
    if stat.S_ISDIR(mode):
        raise ValueError(f"{what} is a folder: name a file in it")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{what} is no regular file (a pipe or a device): copy its content to a file")
    return Path(path)


def require_file_or_folder(path: str | os.PathLike[str], what: str) -> Path:
    """The same for what may also be a folder."""
    return Path(path) if stat.S_ISDIR(_mode(Path(path), what)) else require_file(path, what)


def _mode(path: Path, what: str) -> int:
    try:
        return path.stat().st_mode
    except ValueError as error:  # a zero byte in the name
        raise ValueError(f"{what}: {error}: correct the path") from None
    except OSError as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            found = near_miss(path)
            raise ValueError(f"{what} does not exist: {found or 'correct the path'}") from None
        raise ValueError(f"{what} cannot be reached ({error.strerror}): correct the path") from None


def near_miss(path: Path) -> str | None:
    """What was probably meant by a path that does not exist, as advice; None if nothing like it is there."""
    text = str(path)
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 1 and all(part and os.path.exists(part) for part in parts):
        return f"give several files with blanks between them: {' '.join(parts)}"
    for candidate in _spellings(text):
        if candidate != text and os.path.exists(candidate):
            return f"did you mean {candidate}?"
    return None


def _spellings(text: str) -> Iterator[str]:
    """Other ways to write a path, then names in its folder that are like its own."""
    yield text.strip().strip("'\"")
    yield text.replace("\\", "/")
    yield os.path.expanduser(text)
    for form in ("NFC", "NFD"):
        yield unicodedata.normalize(form, text)
    folder, name = os.path.split(text)
    try:
        with os.scandir(folder or ".") as entries:
            names = [entry.name for entry, _ in zip(entries, range(_MOST_NAMES))]
    except OSError:
        return
    plain = {_plain(other): other for other in names}
    similar = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=_SIMILAR)
    yield from (os.path.join(folder, plain[other]) for other in similar)


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
