"""Train reference-to-video with reference alignment. Without arguments: r2v-tiny on the sprite world, on the CPU."""

from __future__ import annotations

import argparse
import ast
import sys
import textwrap
from pathlib import Path
from typing import Any

CONFIG_SOURCE = Path(__file__).resolve().parent / "refalign_ext" / "config.py"
DESCRIPTION = """Train reference-to-video with reference alignment (RefAlign).

Without arguments it trains the embedded r2v-tiny model on the sprite world: no downloads, no GPU, and a stopped run
goes on where it was. Real weights: --recipe paper --task r2v-1.3B --ckpt_dir Wan2.1-T2V-1.3B --data manifest.jsonl"""


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


def parse_value(text: str, annotation: str) -> Any:
    """A command-line word as the type that an annotation names.

    Raises:
        ValueError: if it is none.
    """
    if annotation == "bool":
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise ValueError("expected true or false")
    if annotation.startswith("tuple"):
        return tuple(float(part) for part in text.split(","))
    kinds = {"int": int, "float": float}
    return kinds.get(annotation, str)(text)


def build_parser() -> argparse.ArgumentParser:
    """Every field of TrainConfig is a flag; nested ones are written --alignment.depth."""
    parser = argparse.ArgumentParser(
        prog="train_refalign.py",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default=None, help="tiny (default), paper or release")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default)")
    parser.add_argument(
        "--resume", default="auto", help="auto (default: newest checkpoint in --out), off, or a folder"
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all)")
    for prefix, class_name in (("", "TrainConfig"), ("alignment.", "AlignmentConfig")):
        for name, annotation, text in fields_of(class_name):
            if f"{prefix}{name}" in ("recipe", "alignment"):
                continue
            help_text = textwrap.shorten(text.replace("`", ""), 300).replace("%", "%%")
            extra = {"nargs": "?", "const": "true"} if annotation == "bool" else {}
            parser.add_argument(
                f"--{prefix}{name}", default=None, metavar=annotation.upper(), help=help_text, **extra
            )
    return parser


def read_overrides(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line names, converted to their types."""
    overrides = {}
    for prefix, class_name in (("", "TrainConfig"), ("alignment.", "AlignmentConfig")):
        for name, annotation, _ in fields_of(class_name):
            text = getattr(options, f"{prefix}{name}", None)
            if text is None or name in ("recipe", "alignment"):
                continue
            try:
                overrides[f"{prefix}{name}"] = parse_value(text, annotation)
            except ValueError as error:
                parser.error(f"--{prefix}{name} {text}: {error}")
    return overrides


def main() -> int:
    parser = build_parser()
    options = parser.parse_args()
    overrides = read_overrides(parser, options)
    from refalign_ext.launch import explain, train

    try:
        train(
            options.recipe, overrides, device=options.device, resume=options.resume, threads=options.threads
        )
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"train_refalign.py: error: {explain(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
