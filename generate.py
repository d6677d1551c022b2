"""Generates a video or an image from a prompt, and from reference images with the r2v tasks.

python generate.py --task r2v-tiny --ref a.png b.png --prompt "..."
torchrun --nproc_per_node=8 generate.py --task r2v-14B --dit_fsdp --t5_fsdp ...
"""

from __future__ import annotations

import argparse
import difflib
import logging
import math
import os
import re
import sys
import time
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
# Flags whose feature is not here yet: accepted with their defaults, refused otherwise.
LATER_FLAGS: dict[str, tuple[Any, str]] = {
    "use_prompt_extend": (False, "prompt extension is not available yet: write the full prompt yourself"),
    "src_video": (None, "the vace tasks are not available yet: leave it out"),
    "src_mask": (None, "the vace tasks are not available yet: leave it out"),
    "src_ref_images": (None, "the vace tasks are not available yet: use an r2v task with --ref"),
    "image": (None, "the i2v task is not available yet: use an r2v task with --ref"),
    "first_frame": (None, "the flf2v task is not available yet: leave it out"),
    "last_frame": (None, "the flf2v task is not available yet: leave it out"),
}

logger = logging.getLogger("generate")

_ranks_have_met = False


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def fail(message: str) -> NoReturn:
    """Ends the program with exit code 2 and one line on standard error, of rank 0 before the ranks have met."""
    if _environment("RANK", 0) == 0 or _ranks_have_met:
        print(f"generate.py: error: {' '.join(message.split())}", file=sys.stderr)
    leave(2)


def leave(code: int) -> NoReturn:
    """Ends the program; of several ranks at once, because communication that others left could hold up a tidy exit."""
    if _ranks_have_met:
        sys.stdout.flush()
        sys.stderr.flush()
        if _environment("RANK", 0) == 0:
            time.sleep(1)  # it may hold the store that tells the others that someone has spoken
        os._exit(code)
    raise SystemExit(code)


def _environment(name: str, default: int) -> int:
    """A number that torchrun sets."""
    return int(os.environ.get(name) or default)


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


def check_task(task: str) -> None:
    """Refuses a task that is none, or that the tree of WAN_ROOT has but references do not go with.

    Raises:
        ValueError: with the reason.
    """
    if task in TASKS:
        return
    if os.environ.get("WAN_ROOT"):
        from refalign_ext.backbone import REFUSED_TASKS

        if task in REFUSED_TASKS:
            raise ValueError(f"--task {task}: {REFUSED_TASKS[task]}")
    if task in LATER_TASKS:
        raise ValueError(f"--task {task} is not available yet, choose one of {', '.join(TASKS)}")
    close = difflib.get_close_matches(task, TASKS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"--task {task}: unknown, {hint}choose one of {', '.join(TASKS)}")


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
    add("--task", default="r2v-tiny", metavar="TASK", help=f"one of {', '.join(TASKS)}")
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
    add(
        "--wan_root",
        metavar="DIR",
        help="official Wan checkout whose model to use; default: WAN_ROOT, else ours",
    )
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

    several = parser.add_argument_group(
        "several devices (torchrun --nproc_per_node=N generate.py ...); cfg x Ulysses x ring = N"
    )
    add = several.add_argument
    add(
        "--cfg_size",
        type=int,
        default=1,
        metavar="1..3",
        help="groups of ranks that the branches of the guidance are dealt to (r2v has 3, or 2 with equal scales; t2v 2)",
    )
    add(
        "--ulysses_size",
        type=int,
        default=0,
        metavar="N",
        help="ranks that divide the attention heads; default: as many as the heads allow",
    )
    add(
        "--ring_size",
        type=int,
        default=0,
        metavar="N",
        help="ranks that gather keys and values; default: the remaining ones",
    )
    add("--dit_fsdp", action="store_true", help="shard the DiT's weights over all ranks")
    add("--t5_fsdp", action="store_true", help="shard the text encoder's weights over all ranks")
    add(
        "--sp_backend",
        choices=("auto", "torch", "xfuser"),
        default="auto",
        help="what exchanges tokens: auto is torch; xfuser is tried first and gives way to torch with a warning",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print who would hold what, and stop; needs no weights and no GPU",
    )
    add("--world_size", type=int, metavar="N", help="devices to plan for, with --dry-run")

    later = parser.add_argument_group("upstream's flags for what is not available yet")
    add = later.add_argument
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
    check_task(args.task)
    for name, (default, remedy) in LATER_FLAGS.items():
        if getattr(args, name) != default:
            raise ValueError(f"--{name}: {remedy}")
    _check_parallel_arguments(args)
    takes_references = args.task.startswith("r2v")
    if takes_references:
        if args.ref or not args.dry_run:
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
    if not args.dry_run and (not args.prompt or not args.prompt.strip()):
        raise ValueError(f"task {args.task} needs a prompt: pass --prompt 'what happens'")
    for name, least in (("sample_steps", 1), ("magnify", 1), ("frame_num", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}: give {least} or more")
    if args.sample_shift is not None and args.sample_shift <= 0:
        raise ValueError(f"--sample_shift is {args.sample_shift}: give a number above 0 (5.0 is usual)")
    if args.base_seed >= 2**63:
        raise ValueError(f"--base_seed is {args.base_seed}: give a number below 2**63")
    if not args.dry_run:
        _check_checkpoint_arguments(args)


def _check_checkpoint_arguments(args: argparse.Namespace) -> None:
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


def _check_parallel_arguments(args: argparse.Namespace) -> None:
    if args.world_size is not None and (args.world_size < 1 or not args.dry_run):
        raise ValueError(
            f"--world_size {args.world_size}: a number of devices, with --dry-run (torchrun sets it otherwise)"
        )
    for name, least in (("cfg_size", 1), ("ulysses_size", 0), ("ring_size", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}: give {least} or more")
    if args.offload_model and (args.dit_fsdp or args.t5_fsdp):
        raise ValueError(
            "--offload_model True does not go with --dit_fsdp or --t5_fsdp, whose weights stay where they are divided: "
            "leave one out"
        )
    if args.t5_cpu and args.t5_fsdp:
        raise ValueError("--t5_cpu and --t5_fsdp keep the text encoder in different places: leave one out")
    if (args.world_size or _environment("WORLD_SIZE", 1)) > 1:
        return
    for name in ("cfg_size", "ulysses_size", "ring_size", "dit_fsdp", "t5_fsdp"):
        if getattr(args, name) > 1 or getattr(args, name) is True:
            raise ValueError(
                f"--{name} needs several processes: run torchrun --nproc_per_node=N generate.py ..."
            )
    args.ulysses_size = args.ring_size = 1


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
        parallel = f"{args.ulysses_size}_{args.ring_size}"  # of several ranks as they were divided
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
    if args.wan_root is not None:
        os.environ["WAN_ROOT"] = args.wan_root
    rank = _environment("RANK", 0)
    # The log goes to standard output, as upstream's; standard error carries the progress bar and the one error line.
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR,
        format="[%(asctime)s] %(levelname)s: %(message)s",
        stream=sys.stdout,
        force=True,
    )
    try:
        if _environment("WORLD_SIZE", 1) > 1 and not args.dry_run:
            _run_with_others(args, rank)
        else:
            _run_alone(args)
    except KeyboardInterrupt:
        if rank == 0:
            print("generate.py: interrupted, nothing written", file=sys.stderr)
        if _ranks_have_met:
            leave(130)
        return 130
    return 0


def _run_alone(args: argparse.Namespace) -> None:
    try:
        check_arguments(args)
        paths = None if args.dry_run else output_paths(args)
        # Importing this takes seconds, which the mistakes found above are spared.
        from refalign_ext.serving.generation import describe_plan, explain, generate

        if args.dry_run:
            if _environment("RANK", 0) == 0:
                print(describe_plan(args))
            return
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


def _run_with_others(args: argparse.Namespace, rank: int) -> None:
    """Meets the other ranks first: then, whatever fails on whichever rank, exactly one of them says so."""
    global _ranks_have_met
    from refalign_ext.distributed.process_group import is_first_to_fail, is_lost_contact
    from refalign_ext.serving.generation import (
        explain,
        generate,
        init_distributed,
        resolve_parallel_sizes,
        shutdown_distributed,
    )

    try:
        init_distributed(args)
        _ranks_have_met = True
        check_arguments(args)
        resolve_parallel_sizes(args)
        generate(args, output_paths(args) if rank == 0 else None)
        shutdown_distributed()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if (rank and is_lost_contact(error)) or not is_first_to_fail():
            leave(2)
        message = explain(error, args)
        if message is None:
            traceback.print_exc()
            leave(1)
        fail(message)
    _ranks_have_met = False


if __name__ == "__main__":
    sys.exit(main())
