"""Patches for an official Wan checkout: what `patch status|apply|revert|diff` do.

A unit is a file of `patches/`: its docstring says what for, `NAME` what it is called, and `edit(tree)` finds its places
by the names in the syntax trees and puts our text there. `edit` answers False where the tree has no use for it, and
raises `PlaceNotFound` where a place has changed. Units are applied one after another in the order of their files, in
memory; a tree is written only when all of them have found their places, and then file by file, each atomically.

What the files held before lies in `.refalign_patches/` of the tree, which git ignores, so that `revert` restores it
byte for byte. What is about to be written is noted there first: after a kill at any moment, `apply` goes on and `revert`
goes back.
"""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from refalign_ext.atomic_io import atomic_path
from refalign_ext.upstream.checkout import changed_files, head_commit
from refalign_ext.upstream.record import RECORD, Record, digest, read_record
from refalign_ext.upstream.source import PlaceNotFound, SourceTree

FOLDER = Path(__file__).resolve().parents[2] / "patches"


@dataclass(frozen=True)
class Unit:
    """One patch: its name, what for, and what puts it into a tree in memory (False: the tree has no use for it)."""

    name: str
    summary: str
    edit: Callable[[SourceTree], bool]


@dataclass(frozen=True)
class Outcome:
    """How one unit stands on a tree."""

    unit: Unit
    state: str  # "applied", "not applied", "not needed", "changed" or "unfinished" (writing was interrupted)
    detail: str = ""  # for "changed", the place that is gone


class _Tree(NamedTuple):
    """A tree as it is, what has been applied to it, and every file as it was before that."""

    root: Path
    present: dict[str, str]
    record: Record
    originals: dict[str, str]

    @property
    def is_finished(self) -> bool:
        return all(digest(self.present[name]) == known[-1] for name, known in self.record.files.items())


def load_units(folder: Path = FOLDER) -> list[Unit]:
    """The units of a folder, in the order of their file names."""
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}: run this from a checkout of the repository, which has patches/"
        )
    units = []
    for path in sorted(folder.glob("*.py")):
        spec = spec_from_file_location(f"refalign_patches.{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        units.append(Unit(module.NAME, module.__doc__.strip().splitlines()[0], module.edit))
    return units


def choose_units(units: Sequence[Unit], names: Sequence[str]) -> list[Unit]:
    """The units of these names, all where none are given."""
    known = [unit.name for unit in units]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no patch {unknown[0]}: choose from {', '.join(known)}")
    return [unit for unit in units if not names or unit.name in names]


def status(root: Path, units: Sequence[Unit]) -> list[Outcome]:
    """How each unit stands, found out in memory from the files as they were before any unit."""
    tree = _read(root)
    _, found = _edit(tree, units)
    outcomes = []
    for unit in units:
        state = "applied" if unit.name in tree.record.units else "not applied"
        state = state if tree.is_finished else "unfinished"
        needed = found[unit.name]
        if isinstance(needed, str):
            outcomes.append(Outcome(unit, "changed", needed))
        else:
            outcomes.append(Outcome(unit, state if needed else "not needed"))
    return outcomes


def apply(root: Path, units: Sequence[Unit], *, names: Sequence[str] = (), force: bool = False) -> str:
    """Brings the chosen units into a tree, beside those that it has; gives the unified diff of what was written.

    Args:
        units: all there are.
        names: the chosen ones; none: all.
        force: also for a tree that has edits of its own or is no git checkout.
    """
    tree = _read(root)
    chosen = {unit.name for unit in choose_units(units, names)} | set(tree.record.units)
    new, used = _patched(tree, [unit for unit in units if unit.name in chosen])
    return _write(tree, new, used, force=force)


def revert(root: Path, units: Sequence[Unit], *, names: Sequence[str] = ()) -> str:
    """Takes the chosen units (none named: all) out again; gives the unified diff of what was written."""
    tree = _read(root)
    dropped = {unit.name for unit in choose_units(units, names)}
    kept = [unit for unit in units if unit.name in tree.record.units and unit.name not in dropped]
    new, used = _patched(tree, kept)
    return _write(tree, new, used, force=True)


def diff(root: Path, units: Sequence[Unit], *, names: Sequence[str] = ()) -> str:
    """The unified diff from the unpatched files to all chosen units, whether they are applied or not."""
    tree = _read(root)
    new, _ = _patched(tree, choose_units(units, names))
    return unified_diff(tree.originals, new)


def unified_diff(before: dict[str, str], after: dict[str, str]) -> str:
    """All changed files as one patch in git's form."""
    parts = []
    for name in sorted(after):
        old, new = (StringIO(texts[name], newline="\n").readlines() for texts in (before, after))
        parts += difflib.unified_diff(old, new, f"a/{name}", f"b/{name}")
    return "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in parts
    )


def _read(root: Path) -> _Tree:
    present = SourceTree(root).texts
    record, originals = read_record(root), dict(present)
    if all(name in present and digest(present[name]) == known[0] for name, known in record.files.items()):
        record = Record()  # as after `git checkout`
    for name, known in record.files.items():
        if name not in present or digest(present[name]) not in known:
            raise ValueError(
                f"{root / name} was edited after it was patched: undo that edit, or restore the file with git and "
                f"delete {root / RECORD}"
            )
        if digest(present[name]) != known[0]:
            kept = root / RECORD / "before" / name
            originals[name] = kept.read_bytes().decode()
            if digest(originals[name]) != known[0]:
                raise ValueError(f"{kept} is damaged: restore the tree with git")
    return _Tree(root, present, record, originals)


def _edit(tree: _Tree, units: Sequence[Unit]) -> tuple[dict[str, str], dict[str, bool | str]]:
    """The original texts with these units; by unit whether it was needed, or the place that is gone."""
    edited, found = SourceTree(tree.root, dict(tree.originals)), {}
    for unit in units:
        before = dict(edited.texts)
        try:
            found[unit.name] = unit.edit(edited)
            edited.commit()
        except PlaceNotFound as error:
            found[unit.name] = str(error)
            edited = SourceTree(tree.root, before)
    return edited.texts, found


def _patched(tree: _Tree, units: Sequence[Unit]) -> tuple[dict[str, str], list[str]]:
    """The texts with these units, and the names of those that were needed."""
    texts, found = _edit(tree, units)
    if gone := [f"{name}: {reason}" for name, reason in found.items() if isinstance(reason, str)]:
        raise ValueError(
            f"{tree.root}: the tree has changed where a patch belongs, nothing was written: {'; '.join(gone)}"
        )
    return texts, [name for name, needed in found.items() if needed]


def _write(tree: _Tree, new: dict[str, str], used: list[str], *, force: bool) -> str:
    """Makes the tree's files those of `new`, all or none."""
    root, present, folder = tree.root, tree.present, tree.root / RECORD
    written = {name: text for name, text in new.items() if text != present[name]}
    if written or not tree.is_finished:
        if not force:
            _require_clean(tree)
        note = folder / "applied.json"
        noted = note.read_text(encoding="utf-8") if note.is_file() else None
        touched = sorted({*written, *tree.record.files})
        files = {name: [digest(texts[name]) for texts in (tree.originals, present, new)] for name in touched}
        try:
            _write_text(folder / ".gitignore", "*\n", folder)
            for name in files:
                _write_text(folder / "before" / name, tree.originals[name], folder)
            _write_text(note, json.dumps({"units": used, "files": files}, indent=2) + "\n", folder)
            for name, text in written.items():
                _write_text(root / name, text, folder)
        except BaseException:
            for name in written:
                if (root / name).read_bytes() != present[name].encode():
                    _write_text(root / name, present[name], folder)
            if noted is None:
                _forget(folder)
            else:
                _write_text(note, noted, folder)
            raise
    if new == tree.originals:
        _forget(folder)
    return unified_diff({name: present[name] for name in written}, written)


def _require_clean(tree: _Tree) -> None:
    """Refuses a tree whose state is not that of a release."""
    if head_commit(tree.root) is None:
        raise ValueError(
            f"{tree.root} is no git checkout, so edits cannot be told from the release: use --force to patch it anyway"
        )
    if edited := [name for name in changed_files(tree.root) if name not in tree.record.files]:
        raise ValueError(
            f"{tree.root} has edits of its own in {', '.join(edited[:3])}: commit or undo them, or use --force"
        )


def _write_text(path: Path, text: str, folder: Path) -> None:
    """Write a file atomically by way of `folder`, through a link and with the mode that it had."""
    target = path.resolve()
    with atomic_path(target, folder) as temporary:
        temporary.write_bytes(text.encode())
        if target.exists():
            shutil.copymode(target, temporary)


def _forget(folder: Path) -> None:
    (folder / "applied.json").unlink(missing_ok=True)  # first: the rest means nothing without it
    shutil.rmtree(folder, ignore_errors=True)
