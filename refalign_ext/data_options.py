"""Options that several `data` commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from refalign_ext.data.convert.report import Report
    from refalign_ext.data.length import Length
    from refalign_ext.data.work import Share

EXISTING = click.Path(path_type=Path, exists=True)
PATH = click.Path(path_type=Path)
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
    from refalign_ext.data.work import Share

    return Share.from_environment() if text is None else Share.parse(text)


def workers_option(default: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--workers",
        type=click.IntRange(0),
        default=default,
        help="Processes; 0 does all of it in this one.",
    )


def length_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--stride", type=click.IntRange(1), help="Training takes every n-th frame."),
        click.option("--fps", type=float, help="Training takes this many frames per second."),
        click.option("--frames", type=click.IntRange(1), help="Frames of a training clip."),
    ):
        command = option(command)
    return command


def given_length(frames: int | None, fps: float | None, stride: int | None) -> Length | None:
    """The length that the options name; None if they name none.

    Raises:
        ValueError: for a rate without a number of frames, and for what cannot be.
    """
    from refalign_ext.data.length import Length

    if frames is None:
        if fps is not None or stride is not None:
            raise ValueError("--fps and --stride say how --frames are taken: give --frames too")
        return None
    return Length(frames, fps, stride or 1)


def tell(report: Report, out: Path) -> None:
    """Shows what was kept and dropped, and where the result lies."""
    click.echo(report.table())
    if report.next_step is None:
        click.echo(f"wrote {out}")
