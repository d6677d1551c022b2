"""Options that several `data` commands have."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refalign_ext.request import environment_number

if TYPE_CHECKING:
    from refalign_ext.data.conversion_report import ConversionReport
    from refalign_ext.data.pieces import Share

EXISTING = click.Path(path_type=Path, exists=True)
PATH = click.Path(path_type=Path)
_LONGEST_WORK_S = 30 * 24 * 3600.0  # that one rank waits for another
SHOW_DEFAULTS = {"show_default": True}


def share_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--shard",
        "share",
        callback=_to_share,
        metavar="I/N",
        help="Do part I (from 0) of N, as a job of an array; under torchrun ranks share the work by themselves.",
    )(command)


def _to_share(_: click.Context, __: click.Parameter, text: str | None) -> Share:
    from refalign_ext.data.pieces import Share

    return Share.from_environment() if text is None else Share.parse(text)


def workers_option(default: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--workers", type=click.IntRange(0), default=default, help="Processes; 0 does all of it in this one."
    )


def length_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--frames, --fps and --stride, which a command gets as `length`; None if they are not given."""

    @functools.wraps(command)
    def with_length(*, frames: int | None, fps: float | None, stride: int | None, **options: Any) -> Any:
        from refalign_ext.data.length import Length

        if frames is None and (fps is not None or stride is not None):
            raise ValueError("--fps and --stride say how --frames are taken: give --frames too")
        return command(length=None if frames is None else Length(frames, fps, stride or 1), **options)

    for option in (
        click.option("--stride", type=click.IntRange(1), help="Training takes every n-th frame."),
        click.option("--fps", type=float, help="Training takes this many frames per second."),
        click.option("--frames", type=click.IntRange(1), help="Frames of a training clip."),
    ):
        with_length = option(with_length)
    return with_length


def png_path(flag: str, path: Path | None, clips: Path, ending: str) -> Path:
    """Where a picture goes: `path`, or the name of the clips' manifest or folder with `ending` after it.

    Raises:
        ValueError: naming the flag, if `path` is no .png file.
    """
    if path is not None and path.suffix.lower() != ".png":
        raise ValueError(f"{flag} {path}: name a .png file")
    clips = Path(os.path.abspath(clips))  # "." has a name too
    return path or clips.with_name(clips.name + ending)


def is_helper() -> bool:
    """Whether torchrun started this process beside another one that does all of the work."""
    from refalign_ext.data.pieces import Share

    return Share.from_environment().index > 0


def join_ranks() -> Callable[[], None]:
    """Joins the ranks of torchrun, if it started any; what is returned waits for all of them.

    A rank that ends with an exit code other than 0 makes torchrun end all others: none may before they are done.
    """
    if environment_number("WORLD_SIZE", 1) == 1:
        return lambda: None
    import torch

    from refalign_ext.distributed.process_group import start_process_group, stop_process_group

    start_process_group(torch.device("cpu"), _LONGEST_WORK_S)
    return lambda: stop_process_group(together=True)


def tell(report: ConversionReport, out: Path) -> None:
    """Shows what was kept and dropped, and where the result lies; an empty result is an error."""
    click.echo(report.table())
    if report.next_step is None:
        if not report.kept["clips"]:
            raise ValueError(f"{out}: no clip is left, for the reasons above")
        click.echo(f"wrote {out}")
