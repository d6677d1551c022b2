"""What the videos of a folder are: probed once each, in several processes, and remembered in a file beside the manifest."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from refalign_ext.atomic_io import FileLocked
from refalign_ext.data.work import run_each

_COLUMNS = "width, height, fps, frames, duration_s"
_BATCH = 1 << 16  # videos that are handed out at once; each takes some memory until all of them are done
_KEPT_AFTER = 64  # results that a kill loses at most


@dataclass(frozen=True)
class Probed:
    """The properties of a video that a manifest tells; see `VideoInfo`."""

    width: int
    height: int
    fps: float
    frames: int
    duration_s: float


class ProbedVideos:
    """A file of what videos are, by name, size and time of change: what is in it is not probed again.

    Args:
        path: the file, made if it does not exist; one that is damaged is made anew.
        root: the folder that names are relative to.

    Raises:
        FileLocked: (a ValueError) if another process uses the file.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self.root = root
        try:
            self._store = _open(path)
        except sqlite3.OperationalError as error:
            raise FileLocked(f"{path}: cannot be written, another process may be at it ({error})") from None
        except sqlite3.DatabaseError:
            path.unlink(missing_ok=True)
            self._store = _open(path)

    def add(self, names: Iterable[str], workers: int) -> None:
        """Probes those videos that are not known yet, with a progress bar; results are kept as they come.

        Those that could not be probed before are tried again: what kept them from it may be gone.
        """
        rest = iter(names)
        while batch := dict.fromkeys(islice(rest, _BATCH)):
            new: list[tuple[str, str, int, int]] = []
            for name in batch:
                state = self._state(name)
                if state is not None and self._find("problem", name, state) != (None,):
                    new.append((str(self.root / name), name, *state))
            self._probe_all(new, workers)

    def _probe_all(self, new: Sequence[tuple[str, str, int, int]], workers: int) -> None:
        results = run_each(_probe, new, workers=workers, description="probing", unit="video")
        try:
            for number, ((_, name, size, changed), (values, problem)) in enumerate(results, 1):
                row = (name, size, changed, *(values or (None,) * 5), problem)
                self._store.execute("insert or replace into videos values (?,?,?,?,?,?,?,?,?)", row)
                if number % _KEPT_AFTER == 0:
                    self._store.commit()
        finally:
            self._store.commit()

    def get(self, name: str) -> Probed | str:
        """What a video is, or why it cannot be used."""
        state = self._state(name)
        row = None if state is None else self._find(f"{_COLUMNS}, problem", name, state)
        if row is None:
            return "the file is missing, not a plain file, or was changed while it was in use"
        return Probed(*row[:5]) if row[5] is None else row[5]

    def close(self) -> None:
        """Closes the file."""
        self._store.close()

    def _state(self, name: str) -> tuple[int, int] | None:
        try:
            status = (self.root / name).stat()
        except OSError:
            return None
        # Opening a pipe would wait for ever.
        return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None

    def _find(self, columns: str, name: str, state: tuple[int, int]) -> tuple | None:
        query = f"select {columns} from videos where name = ? and size = ? and changed = ?"
        return self._store.execute(query, (name, *state)).fetchone()


def _open(path: Path) -> sqlite3.Connection:
    store = sqlite3.connect(path, timeout=0)
    try:
        store.execute("pragma locking_mode = exclusive")  # until it is closed
        store.execute("begin exclusive")
        store.execute(
            "create table if not exists videos (name text primary key, size integer, changed integer, width integer, "
            "height integer, fps real, frames integer, duration_s real, problem text) without rowid"
        )
        store.execute(f"select {_COLUMNS}, size, changed, problem from videos limit 1").fetchone()
        store.commit()
    except sqlite3.DatabaseError:
        store.close()
        raise
    return store


def _probe(item: tuple[str, str, int, int]) -> tuple[tuple[int, int, float, int, float] | None, str | None]:
    """(width, height, fps, frames, duration in seconds), or what is wrong; runs in a worker."""
    from refalign_ext.data.decoding import probe

    try:
        info = probe(Path(item[0]))
    except (ValueError, OSError) as error:
        return None, str(error).removeprefix(f"{item[0]}: ")
    if not (info.fps > 0 and info.frames > 0):
        return None, "it tells no frame rate"
    return (info.width, info.height, info.fps, info.frames, info.duration_s), None
