"""What all converters share: rows of a data set become lines of a manifest, or are counted under a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from refalign_ext.atomic_io import atomic_open
from refalign_ext.data.conversion_report import ConversionReport, Unusable
from refalign_ext.data.manifest_file import ManifestReader, checked_line, index_path
from refalign_ext.data.schema import Clip

Row = TypeVar("Row")

# A name that sqlite, JSON and a report can hold: no control characters, no half of a surrogate pair.
Text = Annotated[str, msgspec.Meta(pattern=r"\A[^\x00-\x1f\ud800-\udfff]+\Z")]
Number = Annotated[float, msgspec.Meta(gt=-1e9, lt=1e9)]  # more is damage; not NaN either


def converted(value: object, kind: Any, reason: str) -> Any:
    """A decoded value as that type, numbers also from text.

    Raises:
        Unusable: under `reason`, if it is not of that type.
    """
    try:
        return msgspec.convert(value, kind, strict=False)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # half of a surrogate pair
        raise Unusable(reason, error) from None


def clip_lines(
    rows: Iterable[tuple[str, Row]], make: Callable[[Row], Clip], report: ConversionReport
) -> Iterator[bytes]:
    """The manifest's lines of the clips that `make` makes of rows; what is kept and what is `Unusable` is counted.

    Args:
        rows: (name in the report, row).
    """
    for name, row in rows:
        try:
            clip = make(row)
        except Unusable as problem:
            report.drop("clips", problem.reason, f"{name}: {problem}".removesuffix(": "))
            continue
        try:
            line = checked_line(clip, clip.id)
        except ValueError as error:
            report.drop("clips", "not_valid", f"{name}: {error}")
            continue
        report.keep("clips")
        report.keep("references", sum(len(subject.refs) for subject in clip.subjects))
        yield line


def write_lines(out: Path, lines: Iterable[bytes]) -> int:
    """Writes checked lines as a manifest, whole or not at all, with its index; returns how many there are."""
    with atomic_open(out) as file:
        file.writelines(lines)
    index_path(out).unlink(missing_ok=True)
    with ManifestReader(out) as rows:  # builds the index
        return len(rows)


def manifest_root(out: Path) -> Path:
    """The folder of the manifest `out`, resolved: paths in it are relative to this.

    Raises:
        ValueError: if there is no such folder, or `out` is one itself.
    """
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: its folder does not exist")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file, such as {out / 'manifest.jsonl'}")
    return out.parent.resolve()


def folder_inside(folder: Path, root: Path, flag: str) -> Path:
    """The folder that `flag` names, resolved.

    Raises:
        ValueError: if there is no such folder, or a manifest in `root` may not name files of it.
    """
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder}: no such folder")
    resolved = folder.resolve()
    if not resolved.is_relative_to(root):
        raise ValueError(
            f"{flag} {folder}: not inside {root}, the folder of --out, and paths in a manifest may not leave it: "
            f"give an --out such as {resolved / 'manifest.jsonl'}, or above"
        )
    return resolved
