"""Training settings as flags: one option for each field of the settings' classes, read alike by every command."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Any

import click

from refalign_ext.config import GROUPS, TrainConfig, setting_fields


class Numbers(click.ParamType):
    """Numbers with commas between them, such as 1,3,5: a tuple; an empty text is one only where it may be."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float] = float, *, may_be_empty: bool = False) -> None:
        self.kind, self.may_be_empty = kind, may_be_empty

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if not value and self.may_be_empty:
            return ()
        try:
            return tuple(self.kind(part) for part in value.split(","))
        except ValueError:
            whole = "whole " if self.kind is int else ""
            self.fail(f"{value!r}: give {whole}numbers with commas between them, such as 1,3,5", param, ctx)


def setting_options() -> list[click.Parameter]:
    """An option for each setting: `--steps 9`, `--compile`, `--compile true`, `--betas 0.9,0.95`, `--alignment.depth 9`."""
    hints = {group: typing.get_type_hints(owner) for group, owner in {"": TrainConfig, **GROUPS}.items()}
    options = []
    for name, field in setting_fields().items():
        group, _, attribute = name.rpartition(".")
        options.append(_setting_option(name, hints[group][attribute], field.metadata["text"]))
    return options


def _setting_option(name: str, hint: Any, text: str) -> click.Option:
    words = [f"--{name}", name.replace(".", "__")]  # click wants an identifier as well
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        numbers = Numbers(kinds[0], may_be_empty=True)
        return click.Option(words, type=numbers, metavar="N,...", help=text)
    kind = kinds[0] if kinds else hint  # of `str | None`
    if kind is bool:
        return click.Option(words, type=bool, is_flag=False, flag_value="true", metavar="[BOOL]", help=text)
    return click.Option(words, type=kind, metavar={int: "N", float: "X"}.get(kind), help=text)


def given_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a command line named, by their names in `refalign_ext.config`."""
    return {name.replace("__", "."): value for name, value in values.items() if value is not None}


def read_settings(words: Sequence[str]) -> dict[str, Any]:
    """Settings written as for train_refalign.py, from the rest of another command's line (or a click.UsageError)."""
    command = click.Command("settings", params=setting_options(), add_help_option=False)
    return given_settings(command.make_context("settings", list(words)).params)
