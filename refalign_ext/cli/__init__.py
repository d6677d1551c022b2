"""`python -m refalign_ext ...`: everything around training and generation that is not a script of its own."""

from __future__ import annotations

from importlib import import_module

import click

from refalign_ext.cli.program import Program

# Loaded when they are called: each brings its own libraries, and --help should not wait for those of the others.
COMMANDS = {
    "ablate": ("refalign_ext.cli.ablate", "The paper's tables in miniature, on the sprite world."),
    "data": ("refalign_ext.cli.data", "Convert, check, cut, cache and describe training data."),
    "doctor": ("refalign_ext.cli.upstream", "What fits in a Wan tree, and what this machine can do."),
    "export": ("refalign_ext.cli.export", "Write a training checkpoint or adapter as safetensors."),
    "patch": (
        "refalign_ext.cli.upstream",
        "What an official Wan checkout needs for CPU, several GPUs, training.",
    ),
    "plot-features": (
        "refalign_ext.cli.plot_features",
        "How well reference tokens are told apart, per block.",
    ),
    "sprites": ("refalign_ext.cli.sprites", "The sprite world and the embedded model."),
}


class Commands(Program, click.Group):
    """A group of commands that are imported when they are called."""

    memory_advice = "out of memory: lower what the command does at once (--batch_size, --workers), or use another --device"

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return getattr(import_module(COMMANDS[name][0]), name.replace("-", "_"))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group("refalign_ext", cls=Commands)
def main() -> None:
    """RefAlign on Wan2.1."""
