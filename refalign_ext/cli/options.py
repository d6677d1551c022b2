"""What the programs' command lines share: options of several words, and types of values."""

from __future__ import annotations

import math
import re
from typing import Any

import click


class WordsCommand(click.Command):
    """A command whose repeatable options also take several words: `--ref a b` means `--ref a --ref b`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        several = {
            name
            for option in self.params
            if isinstance(option, click.Option) and option.multiple
            for name in option.opts
        }
        spread: list[str] = []
        open_option, has_word = None, False
        for word in args:
            if word.startswith("--"):
                name, equals, _ = word.partition("=")
                open_option, has_word = (name if name in several else None), bool(equals)
            elif open_option is not None and has_word:
                spread.append(open_option)
            else:
                has_word = True
            spread.append(word)
        return super().parse_args(ctx, spread)


class FiniteFloat(click.ParamType):
    """A number that is neither infinite nor "nan"."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


class Size(click.ParamType):
    """ "width*height" or "widthxheight" in pixels, as (width, height)."""

    name = "W*H"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,5})[*xX](\d{1,5})", value)
        if not match:
            self.fail(f"{value!r} is not width*height, such as 832*480", param, ctx)
        return int(match[1]), int(match[2])


class Device(click.ParamType):
    """The name of a device, which need not be on this machine."""

    name = "auto|cpu|cuda|cuda:N|mps"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
            self.fail(f"{value!r} is not one of auto, cpu, cuda, cuda:N, mps", param, ctx)
        return value
