"""Phantom-Data's two parquet files as a manifest.

The rows are cut into at most `PIECES` pieces, each written whole or not at all to `<out>.parts/` and not done again. Machines
with a `share` each do their part of them, and whoever finds all pieces done joins them to `out`: so work that was killed
goes on where it stopped, and the manifest is the same however many took part. A row takes about 0.4 ms on one core,
which makes five minutes for the published 651,031 rows.
"""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from refalign_ext.atomic_io import atomic_open, locked
from refalign_ext.data.conversion_report import Report, report_path
from refalign_ext.data.convert.phantom_info import InfoStore, batches, find_columns, open_parquet, stage_info
from refalign_ext.data.convert.phantom_others import OthersStore, stage_others
from refalign_ext.data.convert.phantom_rows import RowConverter, RowRules
from refalign_ext.data.convert.places import inside, manifest_root, nothing_left
from refalign_ext.data.convert.selection import PHANTOM_SELECTION, Selection
from refalign_ext.data.convert.staging import fingerprint
from refalign_ext.data.length import Length
from refalign_ext.data.manifest_file import ManifestReader, checked_line, index_path
from refalign_ext.data.pieces import Share
from refalign_ext.data.worker_pool import run_each

if TYPE_CHECKING:
    import pyarrow.parquet

PIECES = 32  # at most: each reads past the rows before its own
PIECE_ROWS = 4096  # at least, but for the last
PHANTOM_LENGTH = Length(81, 16.0)
PAIR_COLUMNS = {
    "vid": ("video_id", "vid"),
    "caption": ("video_caption", "caption", "prompt"),
    "pairs": ("cross_pair",),
}
_ALONE = Share()


@dataclass(frozen=True)
class _Job:
    """What a worker needs for any piece."""

    pairs: Path
    columns: dict[str, str]
    info: Path
    others: Path | None
    parts: Path
    mark: str
    rows: int
    pieces: range
    first_rows: dict[str, int]
    rules: RowRules

    def part(self, number: int) -> Path:
        return self.parts / f"{self.mark[:12]}-{number:05d}-of-{len(self.pieces):05d}.jsonl"

    def is_done(self, number: int) -> bool:
        return report_path(self.part(number)).exists()

    def span(self, number: int) -> range:
        count = len(self.pieces)
        return range(self.rows * number // count, self.rows * (number + 1) // count)


def convert_phantom(
    pairs: Path,
    info: Path,
    out: Path,
    *,
    video_root: Path,
    video_name: str = "{vid}.mp4",
    regular: bool = True,
    both_ways: bool = False,
    only_existing: bool = False,
    length: Length | None = None,
    selection: Selection = PHANTOM_SELECTION,
    share: Share = _ALONE,
    workers: int = 0,
) -> Report:
    """Writes the manifest `out` and `<out>.report.json`; references are frames of videos with boxes, not yet cut.

    Args:
        pairs: the filtered parquet with `video_id` or `vid`, `video_caption` and `cross_pair`.
        info: the parquet of the meta info, whose columns `phantom_info.COLUMNS` names.
        out: the manifest; `video_root`, the folder of the videos, has to lie in its folder.
        video_name: of a clip's video there: "{vid}.mp4", or with {uuid}, {start}, {end} in any folders.
        regular: boxes in the clip itself become regular references too.
        both_ways: where a reference lies in a clip that has a row itself, the pair is seen from there as well.
        only_existing: drop clips and references whose video is not there.
        length: how long clips must be; None: `PHANTOM_LENGTH`.
        selection: as its attributes say, likeness being the entry's `scores`.
        share: this machine's share of the pieces; workers: processes, 0 for this one.

    Returns:
        The report of all, or, if other shares are not done yet, of this share with `next_step` set.

    Raises:
        ValueError: if a file or an option cannot be used, or no clip is left.
    """
    root = manifest_root(out)
    folder = inside(video_root, root, "--video_root")
    videos = "" if folder == root else folder.relative_to(root).as_posix()
    _check_name(video_name)
    if selection.overflow != "drop":
        raise ValueError(
            f"--overflow {selection.overflow}: boxes of Phantom-Data that overflow are wrong as a whole; only drop is possible"
        )
    rules = RowRules(root, videos, video_name, regular, only_existing, length or PHANTOM_LENGTH, selection)
    parts = out.with_name(out.name + ".parts")
    with open_parquet(pairs) as file:
        names = file.schema_arrow.names
        columns = find_columns(pairs, names, PAIR_COLUMNS, tuple(PAIR_COLUMNS))
        rows = file.metadata.num_rows
        first_rows = _repeated(pairs, file, columns["vid"])
    staged = stage_info(info, parts)
    others = stage_others(pairs, columns, parts) if both_ways else None
    settings = asdict(rules) | {"root": str(root), "both_ways": both_ways, "format": 1}
    mark = fingerprint(settings, [pairs, info])
    pieces = range(min(PIECES, max(1, rows // PIECE_ROWS)))
    job = _Job(pairs, columns, staged, others, parts, mark, rows, pieces, first_rows, rules)
    with locked(parts / f"share-{share.index}-of-{share.count}"):
        done = run_each(
            partial(_convert_piece, job),
            [number for number in share.take(job.pieces) if not job.is_done(number)],
            workers=workers,
            description="converting",
            weight=lambda number: len(job.span(number)),
        )
        for _ in done:
            pass
    try:
        left = [number for number in job.pieces if not job.is_done(number)]
        if not left:
            return _finish(job, out)
        report = _merged(job, share.take(job.pieces))
        report.next_step = f"{len(left)} of {len(job.pieces)} pieces are left to other shares: whoever ends last writes {out}"
        return report
    except FileNotFoundError:
        # Another share found all pieces at the same time, has joined them and is removing them.
        if not report_path(out).exists():
            raise
        return _read_report(report_path(out))


def _finish(job: _Job, out: Path) -> Report:
    """Joins the pieces, which are all there, to the manifest and removes them."""
    report = _merged(job, job.pieces)
    if not report.kept["clips"]:
        shutil.rmtree(job.parts, ignore_errors=True)
        raise ValueError(nothing_left(job.pairs, report))
    _join(out, [job.part(number) for number in job.pieces])
    report.write(report_path(out))
    shutil.rmtree(job.parts, ignore_errors=True)
    return report


def _check_name(pattern: str) -> None:
    known = ("vid", "uuid", "start", "end")
    try:
        fields = [field for _, field, *_ in string.Formatter().parse(pattern) if field is not None]
        pattern.format_map(dict.fromkeys(known, "x"))
    except (ValueError, KeyError, IndexError, AttributeError):
        fields = ["?"]
    if not set(fields) <= set(known) or not (
        {"vid"} <= set(fields) or {"uuid", "start", "end"} <= set(fields)
    ):
        raise ValueError(
            f"--video_name {pattern!r}: give the name of a clip's video with {{vid}}, or {{uuid}}, {{start}} and {{end}}, "
            "such as {uuid}/{vid}.mp4"
        )


def _convert_piece(job: _Job, number: int) -> None:
    """Writes one piece and, when it is complete, its report; runs in a worker."""
    report = Report()
    with atomic_open(job.part(number)) as file:
        file.writelines(_lines(job, number, report))
    report.write(report_path(job.part(number)))


def _lines(job: _Job, number: int, report: Report) -> Iterator[bytes]:
    """The lines of one piece, checked as they will be when they are read."""
    with (
        closing(InfoStore(job.info)) as infos,
        OthersStore(job.others) as others,
        open_parquet(job.pairs) as file,
    ):
        converter = RowConverter(job.rules, infos, report)
        names = [job.columns[key] for key in ("vid", "caption", "pairs")]
        row = job.span(number).start - 1
        for batch in batches(job.pairs, file, names, rows=job.span(number)):
            for vid, caption, cell in zip(*(batch[name] for name in names)):
                row += 1
                if job.first_rows.get(vid, row) != row:
                    report.drop("clips", "id_used_twice", vid)
                    continue
                clip = converter.clip(vid, caption, cell, others.get(vid))
                if clip is None:
                    continue
                try:
                    line = checked_line(clip, clip.id)
                except ValueError as error:
                    report.drop("clips", "not_valid", str(error))
                    continue
                report.keep("clips")
                report.keep("references", sum(len(subject.refs) for subject in clip.subjects))
                yield line


def _repeated(path: Path, file: pyarrow.parquet.ParquetFile, column: str) -> dict[str, int]:
    """The names that come more than once -> the number of the first row that has it."""
    seen: set[int] = set()  # hashes of names: eight bytes each tell as much
    repeated: set[int] = set()
    for batch in batches(path, file, [column]):
        for vid in batch[column]:
            (repeated if hash(vid) in seen else seen).add(hash(vid))
    first: dict[str, int] = {}
    row = 0
    for batch in batches(path, file, [column]) if repeated else ():
        for vid in batch[column]:
            if vid is not None and hash(vid) in repeated:
                first.setdefault(vid, row)
            row += 1
    return first


def _merged(job: _Job, numbers: Sequence[int]) -> Report:
    report = Report()
    for number in numbers:
        report.merge(_read_report(report_path(job.part(number))))
    return report


def _read_report(path: Path) -> Report:
    return Report.from_dict(json.loads(path.read_text(encoding="utf-8")))


def _join(out: Path, parts: Sequence[Path]) -> None:
    """Writes the pieces one after the other, with an index."""
    with atomic_open(out) as joined:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, joined, 1 << 20)
    index_path(out).unlink(missing_ok=True)
    with ManifestReader(out):  # builds the index
        pass
