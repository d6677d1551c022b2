"""Generates a video or an image from a prompt, and from reference images with the r2v tasks.

python generate.py --task r2v-tiny --ref a.png b.png --prompt "..."
"""

from __future__ import annotations

import argparse
import difflib
import logging
import math
import os
import re
import sys
import traceback
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from wan.utils.outputs import OutputPaths

# Nothing heavy is imported before the arguments are parsed, so that --help answers at once; a test compares this
# tuple with WAN_CONFIGS.
TASKS = ("r2v-tiny", "r2v-1.3B", "r2v-14B", "t2v-1.3B", "t2v-14B", "t2i-14B")
LATER_TASKS = ("i2v-14B", "flf2v-14B", "vace-1.3B", "vace-14B")
ROOT = Path(__file__).resolve().parent
BUNDLED_CHECKPOINTS = {"r2v-tiny": ROOT / "assets" / "r2v-tiny"}
DOWNLOADS = {
    "r2v-1.3B": "Wan-AI/Wan2.1-T2V-1.3B",
    "r2v-14B": "Wan-AI/Wan2.1-T2V-14B",
    "t2v-1.3B": "Wan-AI/Wan2.1-T2V-1.3B",
    "t2v-14B": "Wan-AI/Wan2.1-T2V-14B",
    "t2i-14B": "Wan-AI/Wan2.1-T2V-14B",
}
EXAMPLE_PROMPTS = {
    "t2v": "A red fox trots through fresh snow at sunrise, its breath steaming, low golden light between the firs.",
    "t2i": "A quiet harbour at dawn, wooden boats on still water, soft mist, watercolour.",
}
ROLES = ("subject", "face", "background")
MAX_REFERENCES = 8
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Flags whose feature needs several processes or another task: accepted with their defaults, refused otherwise.
LATER_FLAGS: dict[str, tuple[Any, str]] = {
    "ulysses_size": (1, "sequence parallelism is not available yet: leave it at 1"),
    "ring_size": (1, "sequence parallelism is not available yet: leave it at 1"),
    "t5_fsdp": (False, "sharding is not available yet: use --t5_cpu or --offload_model True to save memory"),
    "dit_fsdp": (False, "sharding is not available yet: use --offload_model True to save memory"),
    "use_prompt_extend": (False, "prompt extension is not available yet: write the full prompt yourself"),
    "src_video": (None, "the vace tasks are not available yet: leave it out"),
    "src_mask": (None, "the vace tasks are not available yet: leave it out"),
    "src_ref_images": (None, "the vace tasks are not available yet: use an r2v task with --ref"),
    "image": (None, "the i2v task is not available yet: use an r2v task with --ref"),
    "first_frame": (None, "the flf2v task is not available yet: leave it out"),
    "last_frame": (None, "the flf2v task is not available yet: leave it out"),
}

logger = logging.getLogger("generate")


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def fail(message: str) -> NoReturn:
    """Ends the program with exit code 2 and one line on standard error."""
    print(f"generate.py: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def parse_boolean(text: str) -> bool:
    """Reads yes/no, true/false, t/f, y/n or 1/0, as upstream."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def parse_size(text: str) -> tuple[int, int]:
    """Reads "width*height" or "widthxheight" in pixels."""
    match = re.fullmatch(r"(\d{1,5})[*xX](\d{1,5})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not width*height, such as 832*480")
    return int(match[1]), int(match[2])


def parse_device(text: str) -> str:
    """Reads a device name."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, cpu, cuda, cuda:N, mps")
    return text


def parse_task(text: str) -> str:
    """Reads a task name."""
    if text in TASKS:
        return text
    if text in LATER_TASKS:
        raise argparse.ArgumentTypeError(f"{text} is not available yet, choose one of {', '.join(TASKS)}")
    close = difflib.get_close_matches(text, TASKS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise argparse.ArgumentTypeError(f"unknown task {text!r}: {hint}choose one of {', '.join(TASKS)}")


def parse_finite(text: str) -> float:
    """Reads a number that is neither infinite nor "nan"."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The command line: every flag of upstream's generate.py and those of RefAlign."""
    parser = Parser(
        prog="generate.py",
        description="Generates a video or an image from a prompt; the r2v tasks also take reference images.",
    )
    add = parser.add_argument
    add("--task", type=parse_task, default="r2v-tiny", metavar="TASK", help=f"one of {', '.join(TASKS)}")
    add("--size", type=parse_size, metavar="W*H", help="width*height in pixels; default: the task's own")
    add(
        "--frame_num",
        type=int,
        help="number of frames, 4n+1; default: the task's own (81, r2v-tiny 9, t2i 1)",
    )
    add("--ckpt_dir", type=Path, help="checkpoint folder; r2v-tiny comes with one")
    add("--prompt", help="what to show; the t2v and t2i tasks have an example")
    add("--base_seed", type=int, default=-1, help="seed, the same on every device; negative: a random one")
    add(
        "--save_file", type=Path, help="file to write (.mp4, for t2i an image); default: named after the task"
    )

    references = parser.add_argument_group("references (r2v tasks)")
    add = references.add_argument
    add("--ref", type=Path, nargs="+", metavar="IMAGE", help=f"1 to {MAX_REFERENCES} reference images")
    add(
        "--ref_role",
        nargs="+",
        choices=ROLES,
        metavar="ROLE",
        help=f"{'|'.join(ROLES)}, one per reference or one",
    )
    add(
        "--matte",
        choices=("auto", "off"),
        default="off",
        help="auto cuts subjects and faces out (needs rembg)",
    )
    add("--ref_guide_scale", type=parse_finite, help="pull of the references (5.0, r2v-tiny 7.0)")
    add("--text_guide_scale", type=parse_finite, help="pull of the prompt (7.5, r2v-tiny 7.0)")
    add(
        "--dit_ckpt",
        type=Path,
        help="DiT weights to use instead of those in --ckpt_dir: file, index or folder",
    )
    add("--save_references", nargs="?", const="", metavar="DIR", help="also save the prepared references")

    sampling = parser.add_argument_group("sampling")
    add = sampling.add_argument
    add(
        "--sample_solver", choices=("unipc", "dpm++", "euler"), help="default: euler for r2v, unipc otherwise"
    )
    add("--sample_steps", type=int, help="default: 50, r2v-tiny 20")
    add("--sample_shift", type=parse_finite, help="shift of the noise grid; default: 5.0, r2v-tiny 3.0")
    add("--sample_guide_scale", type=parse_finite, help="guidance of the t2v and t2i tasks; default: 5.0")

    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add("--device", type=parse_device, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="format of the DiT; auto: bf16 on CUDA",
    )
    add(
        "--offload_model",
        type=parse_boolean,
        metavar="BOOL",
        help="keep idle parts on the CPU; default: on CUDA",
    )
    add("--t5_cpu", action="store_true", help="keep the text encoder on the CPU")

    extra = parser.add_argument_group("result")
    add = extra.add_argument
    add(
        "--save_sheet",
        type=Path,
        metavar="PNG",
        help="sheet to write; default: NAME.sheet.png beside the result",
    )
    add("--magnify", type=int, help="enlarge every pixel this many times in the file; default: 1, r2v-tiny 8")

    later = parser.add_argument_group("upstream's flags for what is not available yet")
    add = later.add_argument
    add("--ulysses_size", type=int, default=1)
    add("--ring_size", type=int, default=1)
    add("--t5_fsdp", action="store_true")
    add("--dit_fsdp", action="store_true")
    add("--use_prompt_extend", action="store_true")
    add("--prompt_extend_method", choices=("dashscope", "local_qwen"), default="local_qwen")
    add("--prompt_extend_model")
    add("--prompt_extend_target_lang", choices=("zh", "en"), default="zh")
    for name in ("src_video", "src_mask", "src_ref_images", "image", "first_frame", "last_frame"):
        add(f"--{name}")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses what the arguments alone show to be wrong, and fills in defaults that need no configuration.

    Raises:
        ValueError: naming the flag and the remedy.
    """
    for name, (default, remedy) in LATER_FLAGS.items():
        if getattr(args, name) != default:
            raise ValueError(f"--{name}: {remedy}")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ValueError("several processes (torchrun) are not available yet: run python generate.py")
    takes_references = args.task.startswith("r2v")
    if takes_references:
        _check_reference_arguments(args)
    else:
        for name in ("ref", "ref_role", "ref_guide_scale", "text_guide_scale", "save_references"):
            if getattr(args, name) is not None:
                remedy = "use --task r2v-1.3B or r2v-14B" if name.startswith("ref") else "leave it out"
                raise ValueError(f"--{name}: task {args.task} takes no references: {remedy}")
        args.sample_solver = args.sample_solver or "unipc"
        args.sample_guide_scale = 5.0 if args.sample_guide_scale is None else args.sample_guide_scale
        if args.prompt is None:
            args.prompt = EXAMPLE_PROMPTS[args.task[:3]]
    if not args.prompt or not args.prompt.strip():
        raise ValueError(f"task {args.task} needs a prompt: pass --prompt 'what happens'")
    for name, least in (("sample_steps", 1), ("magnify", 1), ("frame_num", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}: give {least} or more")
    if args.sample_shift is not None and args.sample_shift <= 0:
        raise ValueError(f"--sample_shift is {args.sample_shift}: give a number above 0 (5.0 is usual)")
    if args.base_seed >= 2**63:
        raise ValueError(f"--base_seed is {args.base_seed}: give a number below 2**63")
    if args.ckpt_dir is None and args.task not in BUNDLED_CHECKPOINTS:
        source = DOWNLOADS[args.task]
        raise ValueError(
            f"task {args.task} needs --ckpt_dir: get the folder with `hf download {source} --local-dir {source[7:]}`"
        )
    if args.ckpt_dir is None:
        args.ckpt_dir = BUNDLED_CHECKPOINTS[args.task]
    if not args.ckpt_dir.is_dir():
        raise ValueError(
            f"checkpoint folder {args.ckpt_dir} does not exist: download it or correct --ckpt_dir"
        )
    if args.dit_ckpt is not None and not args.dit_ckpt.exists():
        raise ValueError(f"--dit_ckpt {args.dit_ckpt} does not exist: download it or correct the path")


def _check_reference_arguments(args: argparse.Namespace) -> None:
    if not args.ref:
        raise ValueError(f"task {args.task} needs reference images: pass --ref IMAGE [IMAGE ...]")
    if len(args.ref) > MAX_REFERENCES:
        raise ValueError(
            f"--ref: {len(args.ref)} references given, at most {MAX_REFERENCES} are possible: drop some"
        )
    args.ref_role = args.ref_role or ["subject"]
    if len(args.ref_role) == 1:
        args.ref_role = args.ref_role * len(args.ref)
    if len(args.ref_role) != len(args.ref):
        raise ValueError(
            f"--ref_role: {len(args.ref_role)} roles for {len(args.ref)} references: give one per reference, or one"
        )
    if args.sample_guide_scale is not None:
        raise ValueError(
            "--sample_guide_scale: r2v has two scales, use --ref_guide_scale and --text_guide_scale"
        )


def output_paths(args: argparse.Namespace) -> OutputPaths:
    """Chooses where the result goes and makes sure that it can be written.

    Raises:
        ValueError: naming the file or folder.
    """
    from wan.utils.media import check_writable
    from wan.utils.outputs import OutputPaths

    suffixes = IMAGE_SUFFIXES if args.task.startswith("t2i") else (".mp4",)
    if args.save_file is None:
        prompt = re.sub(r"[^\w.,-]+", "_", args.prompt)[:50]
        moment = datetime.now().strftime("%Y%m%d_%H%M%S")
        parallel = f"{args.ulysses_size}_{args.ring_size}"
        size = f"{args.size[0]}x{args.size[1]}_" if args.size else ""
        args.save_file = Path(f"{args.task}_{size}{parallel}_{prompt}_{moment}{suffixes[0]}")
    if args.save_file.suffix.lower() not in suffixes:
        raise ValueError(
            f"--save_file {args.save_file}: task {args.task} writes {' or '.join(suffixes)} files"
        )
    if args.save_sheet is not None and args.save_sheet.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(
            f"--save_sheet {args.save_sheet}: give a file that ends in {', '.join(IMAGE_SUFFIXES)}"
        )
    paths = OutputPaths.beside(args.save_file, sheet=args.save_sheet, references=args.save_references)
    files = paths.files(len(args.ref or ()))
    for path in files:
        check_writable(path)
    if len({path.resolve() for path in files}) != len(files):
        raise ValueError("--save_file and --save_sheet name the same file: give them different names")
    return paths


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; gives its exit code."""
    args = build_parser().parse_args(arguments)
    # The log goes to standard output, as upstream's; standard error carries the progress bar and the one error line.
    logging.basicConfig(
        level=logging.INFO, format="[%(asctime)s] %(levelname)s: %(message)s", stream=sys.stdout, force=True
    )
    try:
        try:
            check_arguments(args)
            paths = output_paths(args)
            # Importing this takes seconds, which the mistakes found above are spared.
            from refalign_ext.generation import explain, generate
        except (ValueError, OSError) as error:
            if os.environ.get("REFALIGN_TRACEBACK") == "1":
                traceback.print_exc()
            fail(str(error))
        try:
            generate(args, paths)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            message = explain(error, args)
            if message is None:
                raise
            fail(message)
    except KeyboardInterrupt:
        print("generate.py: interrupted, nothing written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
