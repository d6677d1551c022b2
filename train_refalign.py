"""Train reference-to-video with reference alignment. Without arguments: r2v-tiny on the sprite world, on the CPU."""

from __future__ import annotations

import argparse
import ast
import os
import sys
import textwrap
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

CONFIG_SOURCE = Path(__file__).resolve().parent / "refalign_ext" / "config.py"
DESCRIPTION = """Train reference-to-video with reference alignment (RefAlign).

Without arguments it trains the embedded r2v-tiny model on the sprite world: no downloads, no GPU, and a stopped run
goes on where it was. Real weights: --task r2v-1.3B --ckpt_dir Wan2.1-T2V-1.3B --data manifest.jsonl
On many devices: torchrun --nproc_per_node=8 train_refalign.py ...; --dry-run shows how it would be divided."""

OUT_OF_MEMORY = "out of memory: lower --batch_size (--global_batch_size accumulates), or use --activation_checkpointing full"

# Classes of settings by what their flags begin with, and the settings that have a flag of their own or none.
CLASSES = (("", "TrainConfig"), ("alignment.", "AlignmentConfig"), ("sampling.", "SamplingConfig"))
NOT_FLAGS = ("recipe", "alignment", "sampling")


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def fail(message: str) -> NoReturn:
    """Ends the program with exit code 2 and one line on standard error."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)  # rank 0 fails alike and tells, and then torchrun ends this one
    say(f"train_refalign.py: error: {' '.join(message.split())}")
    raise SystemExit(2)


def say(line: str) -> None:
    """Writes a line to standard error, where rank 0 may have left a progress bar."""
    is_other_rank = os.environ.get("RANK", "0") != "0"
    print(f"\n{line}" if is_other_rank else line, file=sys.stderr, flush=True)


def fields_of(class_name: str) -> list[tuple[str, str, str]]:
    """(name, annotation, documentation) of a configuration class, read from the source so that --help imports nothing."""
    tree = ast.parse(CONFIG_SOURCE.read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    found = []
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            text = following.value.value if is_text else ""
            found.append((node.target.id, ast.unparse(node.annotation), " ".join(str(text).split())))
    return found


def placeholder(annotation: str) -> str:
    """What the help shows for a value of that type."""
    if annotation.startswith("tuple"):
        letter = "N" if "int" in annotation else "X"
        return (
            f"{letter},..."
            if annotation.endswith("...]")
            else ",".join([letter] * (annotation.count(",") + 1))
        )
    return {"int": "N", "float": "X", "bool": "BOOL"}.get(annotation, "TEXT")


def build_parser() -> argparse.ArgumentParser:
    """Every field of TrainConfig is a flag; nested ones are written --alignment.depth."""
    parser = Parser(
        prog="train_refalign.py",
        usage="train_refalign.py [--SETTING VALUE ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe", default=None, help="tiny (default), paper_stage1, paper_stage2 or release"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default)")
    parser.add_argument(
        "--resume", default="auto", help="auto (default: newest checkpoint in --out), off, or a folder"
    )
    parser.add_argument(
        "--wan_root",
        metavar="DIR",
        help="official Wan checkout whose model to train (default: WAN_ROOT, else ours)",
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan (who holds what, memory) and stop"
    )
    parser.add_argument(
        "--world_size", type=int, default=None, metavar="N", help="devices to plan for, with --dry-run"
    )
    for prefix, class_name in CLASSES:
        for name, annotation, text in fields_of(class_name):
            if f"{prefix}{name}" in NOT_FLAGS:
                continue
            help_text = textwrap.shorten(text.replace("`", ""), 300).replace("%", "%%")
            extra = {"nargs": "?", "const": "true"} if annotation == "bool" else {}
            parser.add_argument(
                f"--{prefix}{name}", default=None, metavar=placeholder(annotation), help=help_text, **extra
            )
    return parser


def read_overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line names, converted to their types; ends the program if a value is none."""
    from refalign_ext.config import parse_value, setting_types

    overrides = {}
    for name, annotation in setting_types().items():
        text = getattr(options, name, None)
        if text is None or name in NOT_FLAGS:
            continue
        try:
            overrides[name] = parse_value(text, annotation)
        except ValueError as error:
            fail(f"--{name} {text}: {error}")
    return overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code (2 with one line on standard error for mistakes, 130 for Ctrl-C)."""
    options = build_parser().parse_args(arguments)
    if options.wan_root is not None:
        os.environ["WAN_ROOT"] = options.wan_root
    if options.threads is not None and options.threads < 1:
        fail(f"--threads {options.threads}: it must be at least 1")
    if options.world_size is not None and (options.world_size < 1 or not options.dry_run):
        fail(
            f"--world_size {options.world_size}: a number of devices, with --dry-run (torchrun sets it otherwise)"
        )
    try:
        from refalign_ext.distributed.process_group import report_error_once
        from refalign_ext.errors import EXPECTED_ERRORS, describe_error
        from refalign_ext.training.run import run_training

        overrides = read_overrides(options)
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        fail(str(error))
    try:
        run_training(
            options.recipe,
            overrides,
            device=options.device,
            resume=options.resume,
            threads=options.threads,
            dry_run=options.dry_run,
            world_size=options.world_size,
        )
    except EXPECTED_ERRORS as error:
        line = describe_error(error, OUT_OF_MEMORY)
        text = traceback.format_exc() if line is None else f"train_refalign.py: error: {line}"
        report_error_once(lambda: say(text))
        return 1 if line is None else 2
    except KeyboardInterrupt as stop:
        with suppress(KeyboardInterrupt):
            report_error_once(lambda: say("stopped; the same command goes on from the last checkpoint"))
        return stop.args[0] if stop.args else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
