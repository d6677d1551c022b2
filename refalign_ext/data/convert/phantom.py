"""Phantom-Data's two parquet files as a manifest.

The rows are converted in at most `PIECES` pieces, which go on where they stopped after they were killed; whoever finds all
of them finished joins them. A row takes about 0.4 ms on one core: five minutes for the published 651,031 rows.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from refalign_ext.data.conversion_report import ConversionReport, no_clips_message, report_path
from refalign_ext.data.convert.parquet import find_columns, read_rows, repeated_rows
from refalign_ext.data.convert.phantom_clips import ClipBuilder, RowRules
from refalign_ext.data.convert.phantom_lookup import ClipLookup, stage_lookup
from refalign_ext.data.convert.rows import clip_lines, folder_inside, manifest_root, write_lines
from refalign_ext.data.convert.selection import PHANTOM_SELECTION, Selection
from refalign_ext.data.convert.staging import fingerprint, open_staged
from refalign_ext.data.length import Length
from refalign_ext.data.pieces import PieceJob, Share

PIECES = 32  # at most: each reads past the rows before its own
PIECE_ROWS = 4096  # at least, but for the last
PHANTOM_LENGTH = Length(81, 16.0)
_ALONE = Share()


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
        video_root: the folder of the videos, inside the folder of `out`.
        video_name: of a clip's video there: "{vid}.mp4", or with {uuid}, {start}, {end} in any folders.
        regular: boxes in the clip itself become regular references too.
        both_ways: where a reference lies in a clip that has a row itself, the pair is seen from there as well.
        length: how long clips must be; None: `PHANTOM_LENGTH`.

    Returns:
        The report of all, or, if other shares are not done yet, of this share with `next_step` set.

    Raises:
        ValueError: if a file or an option cannot be used, or no clip is left.
    """
    root = manifest_root(out)
    videos = folder_inside(video_root, root, "--video_root")
    fields, times = set(re.findall(r"\{(.*?)\}", video_name)), {"uuid", "start", "end"}
    if not ("vid" in fields or times <= fields) or not fields <= times | {"vid"}:
        raise ValueError(f"--video_name {video_name!r}: give {{vid}}, or {{uuid}}, {{start}} and {{end}}")
    relative = "" if videos == root else videos.relative_to(root).as_posix()
    rules = RowRules(root, relative, video_name, regular, only_existing, length or PHANTOM_LENGTH, selection)
    columns, _, rows = find_columns(pairs, ("video_id", "vid"), ("video_caption",), ("cross_pair",))
    folder = out.with_name(out.name + ".parts")
    settings = asdict(rules) | {"root": str(root), "both_ways": both_ways, "format": 4}
    job = _PhantomJob(
        folder=folder,
        rows=rows,
        piece_rows=max(PIECE_ROWS, -(-rows // PIECES)),
        pairs=pairs,
        columns=columns,
        lookup=stage_lookup(pairs, [columns[0], columns[2]], info, folder, both_ways),
        repeated=repeated_rows(pairs, columns[0]),
        rules=rules,
        mark=fingerprint(settings, [pairs, info]),
    )
    report = ConversionReport()
    for _, header in job.run(share, workers, "converting"):
        report.merge(ConversionReport.from_dict(header["report"]))
    left = sum(job.finished(piece) is None for piece in job.pieces())
    if left and folder.exists():
        report.next_step = (
            f"{left} of {len(job.pieces())} pieces are left to other shares: whoever ends last writes {out}"
        )
        return report
    try:
        return _join(job, out)
    except FileNotFoundError:
        # Another share found all pieces at the same time, has joined them and is removing them.
        if not report_path(out).exists():
            raise
        return ConversionReport.from_dict(json.loads(report_path(out).read_text(encoding="utf-8")))


@dataclass(frozen=True)
class _PhantomJob(PieceJob):
    """The rows of the file `pairs` as lines of the manifest; a piece's header holds its report."""

    pairs: Path
    columns: list[str]  # the clip's name, caption and cross pairs
    lookup: Path
    repeated: frozenset[int]  # rows whose clip has an earlier row
    rules: RowRules
    mark: str

    def key(self, rows: range) -> str:
        return self.mark

    def make(self, rows: range) -> tuple[dict[str, Any], Iterable[bytes]]:
        report = ConversionReport()
        with open_staged(self.lookup) as staged:
            builder = ClipBuilder(self.rules, ClipLookup(staged), report)
            lines = list(clip_lines(self._distinct(rows, report), builder.clip, report))
        return {"report": report.to_dict()}, lines

    def _distinct(self, rows: range, report: ConversionReport) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """(the clip's name, row) of the first row of each clip."""
        for row, values in read_rows(self.pairs, self.columns, rows):
            if row in self.repeated and values[0] is not None:
                report.drop("clips", "id_used_twice", str(values[0]))
            else:
                yield str(values[0]), values


def _join(job: _PhantomJob, out: Path) -> ConversionReport:
    """Writes the pieces, which are all there, one after the other to the manifest, and removes them."""
    report = ConversionReport()
    for piece in job.pieces():
        report.merge(ConversionReport.from_dict(job.read_header(piece)["report"]))
    if report.kept["clips"]:
        write_lines(out, chain.from_iterable(map(job.lines, job.pieces())))
        report.write(report_path(out))
    shutil.rmtree(job.folder, ignore_errors=True)
    if not report.kept["clips"]:
        raise ValueError(no_clips_message(job.pairs, report))
    return report
