"""Saving and finding training checkpoints, which every rank writes a part of and any number of ranks reads.

A checkpoint is a folder `step-00001000`: the tensors as torch.distributed.checkpoint writes them (`__*.distcp` and
`.metadata`), the DiT's `config.json` and `trainer.json`. It is written to `step-00001000.part` and renamed, so what has
its final name is whole. Only tensors are stored, never pickled objects.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from refalign_ext.atomic_io import sync, write_text
from refalign_ext.checkpoint.stored_tensors import METADATA_FILE, damaged
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.errors import one_line

STATE_FILE = "trainer.json"
CONFIG_FILE = "config.json"
_NAME = re.compile(r"step-(\d+)")
_SHARED_FOLDER_SECONDS = 15.0  # how long a network file system may take to show what other machines wrote


def is_checkpoint(path: Path) -> bool:
    """True for a folder that holds a whole training checkpoint, whatever its name (but not one being written)."""
    return not path.name.endswith(".part") and not _lacking(path)


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if is_checkpoint(path)), key=_step_of)


def abandon_checkpoints_after(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints beyond `step`, from which the run goes on, to `abandoned-step-*`; returns the new names.

    Otherwise `--resume auto` would later jump to them, and they would count as the newest to keep. For one rank only.
    """
    moved = []
    for path in checkpoints_in(folder):
        if _step_of(path) > step:
            target = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(path.rename(target))
    return moved


def resolve_resume(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` names: `auto` (the newest or none), `off`, or a folder; ValueError if it is none."""
    if resume == "off":
        return None
    if resume == "auto":
        found = checkpoints_in(folder)
        return found[-1] if found else None
    path = Path(resume)
    if not is_checkpoint(path):
        lacking = " and ".join(_lacking(path))
        reason = f"it lacks {lacking}" if lacking else "it is not finished"
        raise ValueError(f"--resume {path}: no complete checkpoint there ({reason}); name a step-* folder")
    return path


def read_meta(path: Path) -> dict[str, Any]:
    """What `trainer.json` says: `step`, `samples_seen` and the run's `settings`; ValueError if it is damaged."""
    meta = _read_json(path, STATE_FILE)
    for name, kind in (("step", int), ("samples_seen", int), ("settings", dict)):
        if not isinstance(meta.get(name), kind):
            raise damaged(path, ValueError(f"{STATE_FILE} lacks {name}"))
    return meta


def read_model_config(path: Path) -> dict[str, Any]:
    """The DiT's constructor arguments and `_class_name`; ValueError if they are damaged."""
    return _read_json(path, CONFIG_FILE)


class Checkpointer:
    """Writes the checkpoints of a run while it goes on. All ranks construct it and call it at the same points.

    A save copies the state to the CPU and returns. A thread on each rank then writes that rank's shards; the ranks talk
    over a gloo group of their own, because the training's collectives would interleave with theirs.

    That all ranks have written before the folder gets its name rests on two things. Rank 0 writes `.metadata` only after
    it has gathered the results of every rank's (synced) writes, or else every rank gets the error. And before renaming
    it looks for every file that `.metadata` names, at its full length: machines that do not share the folder fail here.

    Args:
        keep_last: how many checkpoints remain.
        timeout_seconds: how long ranks wait for each other's writing.
    """

    def __init__(
        self, folder: Path, parallel: Parallel, keep_last: int, timeout_seconds: float = 1800.0
    ) -> None:
        self.folder, self.keep_last = folder, keep_last
        self._is_main = parallel.is_main
        timeout = timedelta(seconds=timeout_seconds)
        self._group = None if parallel.is_alone else dist.new_group(backend="gloo", timeout=timeout)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[Path] | None = None

    def save(
        self,
        step: int,
        state: Mapping[str, Mapping[str, Tensor]],
        meta: Mapping[str, Any],
        model_config: Mapping[str, Any],
    ) -> None:
        """Begin to write the checkpoint of `step`; when this returns, the tensors may change.

        Args:
            state: what `state.build_state` returns.
            meta: `samples_seen` and `settings`.
            model_config: the DiT's constructor arguments and `_class_name`.

        Raises:
            OSError: on all ranks, if the previous checkpoint could not be written.
        """
        self.finish()
        # A copy even where the state lies on the CPU: the next step changes it in place.
        staged = {
            part: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for part, tensors in state.items()
        }
        texts = {
            CONFIG_FILE: json.dumps(dict(model_config), indent=2) + "\n",
            STATE_FILE: json.dumps({"step": step, **meta}, indent=2) + "\n",
        }
        self._running = self._thread.submit(self._write, f"step-{step:08d}", staged, texts)

    def finish(self) -> Path | None:
        """Wait for the last save; returns its folder (None: none since the last call) or raises its OSError."""
        running, self._running = self._running, None
        return None if running is None else running.result()

    def _write(self, name: str, staged: dict[str, Any], texts: Mapping[str, str]) -> Path:
        final = self.folder / name
        unfinished = final.with_name(f"{name}.part")
        try:
            self._on_main_rank(lambda: self._prepare(unfinished))
            writer = dcp.FileSystemWriter(unfinished)
            metadata = dcp.save(staged, storage_writer=writer, process_group=self._group)
            self._on_main_rank(lambda: self._complete(unfinished, final, metadata, texts))
        except (CheckpointException, OSError, RuntimeError) as error:
            reason = one_line(error, 200)
            if isinstance(error, CheckpointException):
                rank, (cause, _) = next(iter(error.failures.items()))
                reason = (
                    one_line(cause, 200) if self._group is None else f"rank {rank}: {one_line(cause, 200)}"
                )
            nearest = next(folder for folder in final.absolute().parents if folder.is_dir())
            free = shutil.disk_usage(nearest).free / 2**30
            raise OSError(
                f"checkpoint {final} could not be written ({reason}): {free:.1f} GiB are free there, make room or choose "
                "another --out"
            ) from error
        return final

    def _on_main_rank(self, work: Callable[[], None]) -> None:
        """Do something on rank 0; its OSError is raised on all ranks."""
        failure: list[str | None] = [None]
        if self._is_main:
            try:
                work()
            except OSError as error:
                failure = [one_line(error, 200)]
        if self._group is not None:
            dist.broadcast_object_list(failure, src=0, group=self._group)
        if failure[0] is not None:
            raise OSError(failure[0])

    def _prepare(self, unfinished: Path) -> None:
        for leftover in self.folder.glob("*.part"):
            _delete(leftover)
        unfinished.mkdir(parents=True)

    def _complete(
        self, unfinished: Path, final: Path, metadata: dcp.Metadata, texts: Mapping[str, str]
    ) -> None:
        _require_written(unfinished, metadata)
        for name, text in texts.items():
            write_text(unfinished / name, text)
        if final.exists():
            _remove_whole(final)
        unfinished.rename(final)
        sync(self.folder)
        for old in checkpoints_in(self.folder)[: -self.keep_last]:
            if old != final:
                _remove_whole(old)


def _lacking(path: Path) -> list[str]:
    return [name for name in (STATE_FILE, METADATA_FILE) if not (path / name).is_file()]


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    if not isinstance(content, dict):
        raise damaged(path, ValueError(f"{name} is no JSON object"))
    return content


def _require_written(unfinished: Path, metadata: dcp.Metadata) -> None:
    """Every file that the metadata names is here at its full length; waits for slow network file systems."""
    lengths: dict[str, int] = {}
    for piece in metadata.storage_data.values():
        end = piece.offset + piece.length
        lengths[piece.relative_path] = max(end, lengths.get(piece.relative_path, 0))
    deadline = time.monotonic() + _SHARED_FOLDER_SECONDS
    for name, length in lengths.items():
        path = unfinished / name
        while not path.is_file() or path.stat().st_size < length:
            if time.monotonic() > deadline:
                raise OSError(f"rank 0 does not see all of {name}: all machines need the same --out folder")
            time.sleep(0.2)


def _remove_whole(path: Path) -> None:
    """Remove a checkpoint so that an interruption leaves nothing that looks like one."""
    doomed = path.with_name(f"removed-{path.name}.part")
    _delete(doomed)
    path.rename(doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """Remove a file or folder as far as possible; what stays is tried again at the next save."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
