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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from refalign_ext.atomic_io import atomic_open, locked
from refalign_ext.data.conversion_report import ConversionReport, no_clips_message, report_path
from refalign_ext.data.convert.parquet import find_columns, first_rows_of_repeated, open_parquet, read_rows
from refalign_ext.data.convert.paths import folder_inside, manifest_root
from refalign_ext.data.convert.phantom_clips import ClipBuilder, RowRules
from refalign_ext.data.convert.phantom_lookup import ClipLookup, stage_lookup
from refalign_ext.data.convert.selection import PHANTOM_SELECTION, Selection
from refalign_ext.data.convert.staging import fingerprint, open_staged
from refalign_ext.data.length import Length
from refalign_ext.data.manifest_file import ManifestReader, checked_line, index_path
from refalign_ext.data.work import Share, run_each

PIECES = 32  # at most: each reads past the rows before its own
PIECE_ROWS = 4096  # at least, but for the last
PHANTOM_LENGTH = Length(81, 16.0)
_ALONE = Share()


@dataclass(frozen=True)
class _Conversion:
    """What a worker needs for any piece: the input, what was staged of it, and where pieces go."""

    pairs: Path
    columns: tuple[str, ...]  # the clip's name, caption and cross pairs
    lookup: Path
    folder: Path
    mark: str
    rows: int
    pieces: range
    first_rows: dict[str, int]
    rules: RowRules

    def piece(self, number: int) -> Path:
        return self.folder / f"{self.mark[:12]}-{number:05d}-of-{len(self.pieces):05d}.jsonl"

    def is_done(self, number: int) -> bool:
        return report_path(self.piece(number)).exists()

    def row_range(self, number: int) -> range:
        count = len(self.pieces)
        return range(self.rows * number // count, self.rows * (number + 1) // count)

    def report(self, numbers: Sequence[int]) -> ConversionReport:
        """The sum of the reports of finished pieces."""
        report = ConversionReport()
        for number in numbers:
            report.merge(_read_report(self.piece(number)))
        return report


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
) -> ConversionReport:
    """Writes the manifest `out` and `<out>.report.json`; references are frames of videos with boxes, not yet cut.

    Args:
        pairs: the filtered parquet with `video_id` or `vid`, `video_caption` and `cross_pair`.
        info: the parquet of the meta info with `vid` or `video_id`, `width`, `height`, `fps` or `num_frames`, and scores.
        out: the manifest; `video_root`, the folder of the videos, has to lie in its folder.
        video_name: of a clip's video there: "{vid}.mp4", or with {uuid}, {start}, {end} in any folders.
        regular: boxes in the clip itself become regular references too.
        both_ways: where a reference lies in a clip that has a row itself, the pair is seen from there as well.
        only_existing: drop clips and references whose video is not there.
        length: how long clips must be; None: `PHANTOM_LENGTH`.
        selection: as its attributes say, similarity being the entry's `scores`.
        share: this machine's share of the pieces; workers: processes, 0 for this one.

    Returns:
        The report of all, or, if other shares are not done yet, of this share with `next_step` set.

    Raises:
        ValueError: if a file or an option cannot be used, or no clip is left.
    """
    root = manifest_root(out)
    videos = folder_inside(video_root, root, "--video_root")
    _check_video_name(video_name)
    if selection.overflow != "drop":
        raise ValueError(
            f"--overflow {selection.overflow}: boxes of Phantom-Data that overflow are wrong as a whole; only drop is possible"
        )
    relative = "" if videos == root else videos.relative_to(root).as_posix()
    rules = RowRules(root, relative, video_name, regular, only_existing, length or PHANTOM_LENGTH, selection)
    columns = find_columns(pairs, ("video_id", "vid"), ("video_caption",), ("cross_pair",))
    with open_parquet(pairs) as file:
        rows = file.metadata.num_rows
    folder = out.with_name(out.name + ".parts")
    lookup = stage_lookup(pairs, [columns[0], columns[2]], info, folder, both_ways)
    settings = asdict(rules) | {"root": str(root), "both_ways": both_ways, "format": 2}
    conversion = _Conversion(
        pairs=pairs,
        columns=columns,
        lookup=lookup,
        folder=folder,
        mark=fingerprint(settings, [pairs, info]),
        rows=rows,
        pieces=range(min(PIECES, max(1, rows // PIECE_ROWS))),
        first_rows=first_rows_of_repeated(pairs, columns[0]),
        rules=rules,
    )
    own = share.take(conversion.pieces)
    with locked(folder / f"share-{share.index}-of-{share.count}"):
        for _ in run_each(
            partial(_convert_piece, conversion),
            [number for number in own if not conversion.is_done(number)],
            workers=workers,
            description="converting",
            weight=lambda number: len(conversion.row_range(number)),
        ):
            pass
    try:
        left = [number for number in conversion.pieces if not conversion.is_done(number)]
        if not left:
            return _join(conversion, out)
        report = conversion.report(own)
    except FileNotFoundError:
        # Another share found all pieces at the same time, has joined them and is removing them.
        if not report_path(out).exists():
            raise
        return _read_report(out)
    total = len(conversion.pieces)
    report.next_step = (
        f"{len(left)} of {total} pieces are left to other shares: whoever ends last writes {out}"
    )
    return report


def _check_video_name(pattern: str) -> None:
    known = {"vid", "uuid", "start", "end"}
    try:
        fields = {name for _, name, *_ in string.Formatter().parse(pattern) if name is not None}
    except ValueError:
        fields = {"?"}
    if not fields <= known or not ("vid" in fields or {"uuid", "start", "end"} <= fields):
        raise ValueError(
            f"--video_name {pattern!r}: give the name of a clip's video with {{vid}}, or {{uuid}}, {{start}} and {{end}}, "
            "such as {uuid}/{vid}.mp4"
        )


def _convert_piece(conversion: _Conversion, number: int) -> None:
    """Writes one piece and, when it is complete, its report; runs in a worker."""
    report, path = ConversionReport(), conversion.piece(number)
    with atomic_open(path) as file:
        file.writelines(_lines(conversion, conversion.row_range(number), report))
    report.write(report_path(path))


def _lines(conversion: _Conversion, rows: range, report: ConversionReport) -> Iterator[bytes]:
    """The manifest's lines of some rows, checked as they will be when they are read."""
    with open_staged(conversion.lookup) as staged:
        builder = ClipBuilder(conversion.rules, ClipLookup(staged), report)
        for row, (vid, caption, cell) in read_rows(conversion.pairs, conversion.columns, rows):
            if conversion.first_rows.get(vid, row) != row:
                report.drop("clips", "id_used_twice", vid)
                continue
            clip = builder.clip(vid, caption, cell)
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


def _join(conversion: _Conversion, out: Path) -> ConversionReport:
    """Writes the pieces, which are all there, one after the other to the manifest, and removes them."""
    report = conversion.report(conversion.pieces)
    if not report.kept["clips"]:
        shutil.rmtree(conversion.folder, ignore_errors=True)
        raise ValueError(no_clips_message(conversion.pairs, report))
    with atomic_open(out) as joined:
        for number in conversion.pieces:
            with conversion.piece(number).open("rb") as file:
                shutil.copyfileobj(file, joined, 1 << 20)
    index_path(out).unlink(missing_ok=True)
    with ManifestReader(out):  # builds the index
        pass
    report.write(report_path(out))
    shutil.rmtree(conversion.folder, ignore_errors=True)
    return report


def _read_report(manifest: Path) -> ConversionReport:
    return ConversionReport.from_dict(json.loads(report_path(manifest).read_text(encoding="utf-8")))
