"""`python -m refalign_ext doctor` and `... patch status|apply|revert|diff`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from refalign_ext.upstream import patching
from refalign_ext.upstream.own_wan import OURS, is_ours

_TREE = click.option(
    "--wan_root",
    type=click.Path(path_type=Path),
    callback=lambda _context, _option, root: root and root.expanduser(),
    envvar="WAN_ROOT",
    help="Checkout of Wan-Video/Wan2.1, Wan2.2 or a later release; default: WAN_ROOT.",
)
_UNITS = click.option("--unit", "units", multiple=True, help="Only this patch; may be given more than once.")


@click.command()
@_TREE
def doctor(wan_root: Path | None) -> None:
    """What RefAlign finds in a Wan tree and on this machine; exit code 1 if it cannot work so."""
    from refalign_ext.upstream.doctor import doctor as examine

    report = examine(OURS if wan_root is None else wan_root)
    click.echo(report)
    sys.exit(report.exit_code)


@click.group()
def patch() -> None:
    """What an official Wan checkout needs to run without CUDA, to train and to be shared among GPUs."""


def _root(wan_root: Path | None) -> Path:
    if wan_root is None:
        raise ValueError("no tree named: give --wan_root FOLDER or set WAN_ROOT")
    if is_ours(wan_root):
        raise ValueError(
            f"{wan_root} is RefAlign's own tree, which needs no patches: name an official checkout"
        )
    return wan_root


@patch.command(name="status")
@_TREE
def show_status(wan_root: Path | None) -> None:
    """How each patch stands; exit code 1 if a place has changed or writing was interrupted."""
    outcomes = patching.status(_root(wan_root), patching.load_units())
    for outcome in outcomes:
        click.echo(f"{outcome.state:<12} {outcome.unit.name:<24} {outcome.unit.summary}")
        if outcome.detail:
            click.echo(f"{'':<12} {outcome.detail}")
    if any(outcome.state == "unfinished" for outcome in outcomes):
        click.echo("writing was interrupted: patch apply goes on, patch revert goes back")
    sys.exit(any(outcome.state in ("changed", "unfinished") for outcome in outcomes))


@patch.command(name="apply")
@_TREE
@_UNITS
@click.option("--force", is_flag=True, help="Also a tree with edits of its own or without git.")
def apply_patches(wan_root: Path | None, units: tuple[str, ...], force: bool) -> None:
    """Write the patches into the tree and show what changed. All find their places, or nothing is written."""
    shown = patching.apply(_root(wan_root), patching.load_units(), names=units, force=force)
    click.echo(shown or "nothing to do: the patches are applied", nl=not shown)


@patch.command(name="revert")
@_TREE
@_UNITS
def revert_patches(wan_root: Path | None, units: tuple[str, ...]) -> None:
    """Take the patches out again, byte for byte."""
    shown = patching.revert(_root(wan_root), patching.load_units(), names=units)
    click.echo(shown or "nothing to do: no such patch is applied", nl=not shown)


@patch.command(name="diff")
@_TREE
@_UNITS
def show_diff(wan_root: Path | None, units: tuple[str, ...]) -> None:
    """Show what the patches change in the release, applied or not; nothing is written."""
    click.echo(patching.diff(_root(wan_root), patching.load_units(), names=units), nl=False)
