"""`python -m refalign_ext data convert ...`: data sets in their own formats to a manifest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from refalign_ext.cli.data_options import (
    EXISTING,
    PATH,
    SHOW_DEFAULTS,
    is_helper,
    length_options,
    share_option,
    tell,
    workers_option,
)
from refalign_ext.data.convert.selection import (
    FOLDER_SELECTION,
    OPENS2V_SELECTION,
    OVERFLOW,
    PHANTOM_SELECTION,
    Selection,
)


@click.group()
def convert() -> None:
    """Write the manifest of a data set, and a report of what was dropped and why."""


_RULES = {
    "min_aesthetic": (float, "Keep a reference that reaches this aesthetic score or --min_gme."),
    "min_gme": (float, "Keep a reference that reaches this text match or --min_aesthetic."),
    "min_area_ratio": (float, "Least share of the frame that a reference takes."),
    "max_references": (int, "Subjects of a clip."),
    "max_cross": (int, "Cross references of a subject."),
    "max_mask_iou": (float, "Masks that overlap more are one thing under two names."),
    "min_text_similarity": (float, "Of cross pairs."),
    "min_image_similarity": (float, "Of cross pairs; they have to be above it."),
    "min_frames": (int, "Least frames of a clip in its file."),
    "min_clip_aesthetic": (float, "Least aesthetic score of a clip."),
    "min_clip_motion": (float, "Least motion score of a clip."),
    "min_clip_tech": (float, "Least technical score of a clip."),
    "overflow": (click.Choice(OVERFLOW), "Boxes that leave the frame."),
}


class _Limit(click.ParamType):
    """A number, or "off", which is None."""

    def __init__(self, kind: type) -> None:
        self.kind, self.name = kind, "number|off"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return None if value == "off" else self.kind(value)
        except ValueError:
            self.fail(f"{value!r}: give a number, or off", param, ctx)


def _selection_options(usual: Selection, *names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options for the rules that a data set has what it takes for; the command gets all as `selection`.

    Rules without an option are switched off.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_selection(**options: Any) -> Any:
            off = {name: None for name in _RULES if name != "overflow"}
            return command(
                selection=Selection(**off | {name: options.pop(name) for name in names}), **options
            )

        for name in reversed(names):
            kind, text = _RULES[name]
            kind = kind if isinstance(kind, click.ParamType) else _Limit(kind)
            default = "off" if getattr(usual, name) is None else getattr(usual, name)
            with_selection = click.option(f"--{name}", type=kind, default=default, help=text)(with_selection)
        return with_selection

    return add


def _column_names(_: click.Context, __: click.Parameter, columns: tuple[str, ...]) -> dict[str, str]:
    for column in columns:
        if "=" not in column:
            raise click.BadParameter(f"{column}: write WHAT=NAME, such as --column video=movie")
    return dict(column.split("=", 1) for column in columns)


@convert.command(context_settings=SHOW_DEFAULTS)
@click.argument("source", type=EXISTING)
@click.option("--out", type=PATH, help="Manifest; without it manifest.jsonl in the folder of the clips.")
@click.option("--prompt_suffix", default=".txt", help="Of the files that hold prompts.")
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="WHAT=NAME",
    callback=_column_names,
    help="Column of a table that holds WHAT, such as video=movie.",
)
@click.option("--media_root", type=EXISTING, help="What names in a table are relative to, if not its folder.")
@click.option(
    "--group", type=click.Choice(["none", "folder"]), default="none", help="What validation must not share."
)
@click.option(
    "--pair",
    type=click.Choice(["cross", "regular"]),
    default="cross",
    help="regular: cut out of the clip itself.",
)
@length_options
@_selection_options(FOLDER_SELECTION, "min_frames", "max_references", "max_cross")
@workers_option(2)
def folder(source: Path, out: Path | None, **options: Any) -> None:
    """SOURCE is a folder with clip.mp4, clip.txt, clip.ref1.png ..., or a table (.csv, .tsv, .jsonl) that lists clips."""
    from refalign_ext.data.convert.folder import convert_folder

    if not is_helper():
        out = out or (source if source.is_dir() else source.parent) / "manifest.jsonl"
        tell(convert_folder(source, out, **options), out)


@convert.command(context_settings=SHOW_DEFAULTS)
@click.argument("parts", type=EXISTING, nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, help="Manifest to write, in a folder that holds the videos.")
@click.option("--video_root", type=EXISTING, required=True, help="Has PART/PATH of every video.")
@click.option("--cross_pairs", type=EXISTING, help="Folder with cluster_videos.json and the clusters' pairs.")
@click.option("--backgrounds", type=EXISTING, help="Has PART/KEY.png: they become background references.")
@click.option("--check_videos/--no_check_videos", default=True, help="Drop clips whose video is not there.")
@click.option("--keep_staging/--no_keep_staging", default=True, help="Keep what was read, for other rules.")
@_selection_options(OPENS2V_SELECTION, *_RULES)
@workers_option(2)
@share_option
def opens2v(parts: tuple[Path, ...], out: Path, **options: Any) -> None:
    """PARTS are OpenS2V-5M's total_part*.json with masks and boxes; they are read as streams."""
    from refalign_ext.data.convert.opens2v import convert_opens2v

    tell(convert_opens2v(parts, out, **options), out)


@convert.command(context_settings=SHOW_DEFAULTS)
@click.argument("pairs", type=EXISTING)
@click.argument("info", type=EXISTING)
@click.option("--out", type=PATH, required=True, help="Manifest to write, in a folder that holds the videos.")
@click.option("--video_root", type=EXISTING, required=True, help="Folder of the videos.")
@click.option("--video_name", default="{vid}.mp4", help="Of a video there; also with {uuid}, {start}, {end}.")
@click.option("--regular/--no_regular", default=True, help="Boxes in the clip itself are regular references.")
@click.option("--both_ways", is_flag=True, help="Pairs are seen from the referenced clip too.")
@click.option("--only_existing", is_flag=True, help="Drop clips and references whose video is not there.")
@length_options
@_selection_options(
    PHANTOM_SELECTION, "min_area_ratio", "max_references", "max_cross", "min_image_similarity", "min_frames"
)
@workers_option(2)
@share_option
def phantom(pairs: Path, info: Path, out: Path, **options: Any) -> None:
    """PAIRS is Phantom-Data's filtered parquet with cross pairs, INFO the parquet with the meta info of all clips."""
    from refalign_ext.data.convert.phantom import convert_phantom

    tell(convert_phantom(pairs, info, out, **options), out)
