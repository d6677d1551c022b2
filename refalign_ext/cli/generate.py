"""The command line of generate.py. Torch is imported after everything that can be checked without it."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from refalign_ext.cli.options import Device, FiniteFloat, Size, WordsCommand
from refalign_ext.cli.program import Program, launched_ranks, stops_on_request
from refalign_ext.paths import require_file, require_file_or_folder
from refalign_ext.request import (
    DTYPES,
    MATTE_MODES,
    MAX_REFERENCES,
    SEQUENCE_BACKENDS,
    SOLVERS,
    GenerationRequest,
    Role,
    RuntimeOptions,
    environment_number,
)
from refalign_ext.tasks import DEFAULT_TASK, TASKS, find_task

_PATH = click.Path(path_type=Path)
_ROLES = tuple(role.value for role in Role)
# Inputs of upstream's tasks; a task that takes one names it in `Task.needs` or `Task.takes`.
_INPUTS = ("image", "first_frame", "last_frame", "src_video", "src_mask", "src_ref_images")
_SCALES = ("ref_guide_scale", "text_guide_scale", "sample_guide_scale")
_RUNTIME_OPTIONS = (
    *("dit_ckpt", "lora", "device", "dtype", "offload_model", "t5_cpu", "dit_fsdp", "t5_fsdp"),
    *("cfg_size", "ulysses_size", "ring_size", "sp_backend"),
)


def _option(flag: str, text: str | None = None, **settings: Any) -> click.Option:
    return click.Option([flag], help=text, **settings)


def _setting(flag: str, kind: Any, text: str = "") -> click.Option:
    """A setting whose default is the task's own: the help names the usual one, then the tasks that have another."""
    name = flag.removeprefix("--")
    defaults = {task.name: getattr(task, name) for task in TASKS.values() if hasattr(task, name)}
    shown = {
        task: "*".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for task, value in defaults.items()
    }
    usual = Counter(shown.values()).most_common(1)[0][0]
    others = [f"{task} {value}" for task, value in shown.items() if value != usual]
    default = f"default: {', '.join([usual, *others])}"
    return _option(flag, f"{text}; {default}" if text else default, type=kind)


def _input(name: str) -> click.Option:
    takers = [task.name for task in TASKS.values() if name in (*task.needs, *task.takes)]
    return _option(
        f"--{name}", f"for {', '.join(takers)}" if takers else "of tasks that are not available yet"
    )


_NUMBER = FiniteFloat()
_OPTIONS = (
    _option("--task", f"one of {', '.join(TASKS)}", default=DEFAULT_TASK, metavar="TASK"),
    _setting("--size", Size(), "width*height in pixels"),
    _setting("--frame_num", int, "number of frames, 4n+1"),
    _option("--ckpt_dir", "checkpoint folder; r2v-tiny comes with one", type=_PATH),
    _option("--prompt", "what to show; the t2v and t2i tasks have an example"),
    _option("--base_seed", "the same on every device; negative: a random one", type=int, default=-1),
    _option(
        "--save_file", "file to write (.mp4, for t2i an image); default: named after the task", type=_PATH
    ),
    # references
    _option(
        "--ref", f"1 to {MAX_REFERENCES} reference images", type=_PATH, multiple=True, metavar="IMAGE..."
    ),
    _option(
        "--ref_role",
        f"{'|'.join(_ROLES)}, one per reference or one",
        type=click.Choice(_ROLES),
        multiple=True,
        metavar="ROLE...",
    ),
    _option(
        "--matte",
        "auto cuts subjects and faces out (needs rembg)",
        type=click.Choice(MATTE_MODES),
        default="off",
    ),
    _setting("--ref_guide_scale", _NUMBER, "pull of the references"),
    _setting("--text_guide_scale", _NUMBER, "pull of the prompt"),
    _option(
        "--dit_ckpt", "DiT weights to use instead of those in --ckpt_dir: file, index or folder", type=_PATH
    ),
    _option(
        "--lora",
        "LoRAs of any tool to merge into the DiT, each with a scale if not 1",
        multiple=True,
        metavar="FILE[:SCALE]...",
    ),
    _option(
        "--save_references",
        "also save the prepared references",
        is_flag=False,
        flag_value="",
        metavar="[DIR]",
    ),
    # sampling
    _setting("--sample_solver", click.Choice(SOLVERS)),
    _setting("--sample_steps", int),
    _setting("--sample_shift", _NUMBER, "shift of the noise grid"),
    _setting("--sample_guide_scale", _NUMBER, "guidance of tasks without references"),
    # machine
    _option(
        "--wan_root", "official Wan checkout whose model to use; default: WAN_ROOT, else ours", metavar="DIR"
    ),
    _option("--device", "where to sample", type=Device(), default="auto"),
    _option("--dtype", "format of the DiT; auto: bf16 on CUDA", type=click.Choice(DTYPES), default="auto"),
    _option("--offload_model", "keep idle parts on the CPU; default: on one GPU", type=bool, metavar="BOOL"),
    _option("--t5_cpu", "keep the text encoder on the CPU", is_flag=True),
    # result
    _option(
        "--save_sheet", "sheet to write; default: NAME.sheet.png beside the result", type=_PATH, metavar="PNG"
    ),
    _setting("--magnify", int, "enlarge every pixel this many times in the file"),
    # several devices
    _option(
        "--cfg_size",
        "groups of ranks that share the guidance's branches (r2v has 3, or 2 with equal scales; t2v 2)",
        type=int,
        default=1,
        metavar="1..3",
    ),
    _option("--ulysses_size", "ranks that divide the heads; default: as many as fit", type=int, default=0),
    _option("--ring_size", "ranks that gather keys and values; default: the rest", type=int, default=0),
    _option("--dit_fsdp", "shard the DiT's weights over all ranks", is_flag=True),
    _option("--t5_fsdp", "shard the text encoder's weights over all ranks", is_flag=True),
    _option(
        "--sp_backend",
        "what exchanges tokens: auto is torch; xfuser is tried first and gives way to torch with a warning",
        type=click.Choice(SEQUENCE_BACKENDS),
        default="auto",
    ),
    _option("--dry-run", "print who would hold what, and stop; needs no weights and no GPU", is_flag=True),
    _option("--world_size", "devices to plan for, with --dry-run", type=int, metavar="N"),
    # upstream's flags for what is not available yet
    _option("--use_prompt_extend", "not available yet", is_flag=True),
    _option("--prompt_extend_method", type=click.Choice(["dashscope", "local_qwen"])),
    _option("--prompt_extend_model"),
    _option("--prompt_extend_target_lang", type=click.Choice(["zh", "en"])),
    *map(_input, _INPUTS),
)


class Generation(WordsCommand, Program):
    """The program; `options` are those of this run, once they are known."""

    options: RuntimeOptions | None = None

    @property
    def memory_advice(self) -> str:
        return "out of memory" if self.options is None else self.options.memory_advice()


def read_flags(flags: dict[str, Any]) -> tuple[GenerationRequest, RuntimeOptions]:
    """What to generate and where to run it, from the flags and torchrun's environment.

    Raises:
        ValueError: naming the flag and the remedy.
    """
    if flags["use_prompt_extend"]:
        raise ValueError("--use_prompt_extend: not available yet: write the full prompt yourself")
    refused, is_dry_run, world_size = None, flags["dry_run"], flags["world_size"]
    if flags["task"] not in TASKS and os.environ.get("WAN_ROOT"):
        from refalign_ext.backbone import REFUSED_TASKS as refused
    task = find_task(flags["task"], refused=refused)
    request = task.request(
        flags["prompt"] or task.example_prompt or "",
        flags["ref"],
        roles=flags["ref_role"],
        seed=flags["base_seed"],
        inputs=tuple((name, flags[name]) for name in _INPUTS if flags[name] is not None),
        **{name: flags[name] for name in (*task.SETTINGS, *_SCALES, "matte")},
    )
    if world_size is not None and (world_size < 1 or not is_dry_run):
        raise ValueError(
            f"--world_size {world_size}: a number of devices, with --dry-run (torchrun sets it otherwise)"
        )
    options = RuntimeOptions(
        Path() if is_dry_run else task.checkpoint_folder(flags["ckpt_dir"]),
        world_size=world_size or environment_number("WORLD_SIZE", 1),
        **{name: flags[name] for name in _RUNTIME_OPTIONS},
    )
    if not is_dry_run:
        task.require_inputs(request)
    for path in flags["ref"]:
        require_file(path, f"--ref {path}")
    for flag, path in (
        ("--dit_ckpt", options.dit_ckpt),
        *(("--lora", file) for file in options.lora_paths()),
    ):
        if path is not None:
            require_file_or_folder(path, f"{flag} {path}")
    return request, options


def generate(**flags: Any) -> None:
    """Generates a video or an image from a prompt; the r2v tasks also take reference images.

    On several devices: torchrun --nproc_per_node=N generate.py ...; cfg x Ulysses x ring = N.
    """
    if flags["wan_root"] is not None:
        os.environ["WAN_ROOT"] = flags["wan_root"]
    rank = environment_number("RANK", 0)
    # The log goes to standard output, as upstream's; standard error carries the progress bar and the one error line.
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR,
        format="[%(asctime)s] %(levelname)s: %(message)s",
        stream=sys.stdout,
        force=True,
    )
    with stops_on_request("generate.py: interrupted, nothing written"):
        if environment_number("WORLD_SIZE", 1) == 1 or flags["dry_run"]:
            _generate(flags, rank)
            return
        from refalign_ext.serving.generation import distributed

        # First of all, so that exactly one rank reports whatever fails on whichever.
        with distributed(flags["device"]) as device:
            _generate({**flags, "device": device}, rank)


def _generate(flags: dict[str, Any], rank: int) -> None:
    request, options = read_flags(flags)
    command.options = options
    if options.world_size > 1 and not flags["dry_run"]:
        from refalign_ext.serving.generation import resolve_parallel_sizes

        options = resolve_parallel_sizes(request, options)
    paths = None
    if rank == 0 and not flags["dry_run"]:
        from refalign_ext.serving.outputs import OutputPaths

        paths = OutputPaths.choose(
            request,
            options,
            flags["save_file"],
            sheet=flags["save_sheet"],
            references=flags["save_references"],
            inputs=[*flags["ref"], *options.lora_paths(), *filter(None, [options.dit_ckpt])],
        )
    # Importing this takes seconds, which the mistakes found above are spared.
    from refalign_ext.serving.generation import describe_plan, run_request

    if not flags["dry_run"]:
        run_request(request, options, paths, flags)
    elif rank == 0:
        click.echo(describe_plan(request, options))


command = Generation(
    "generate.py",
    callback=generate,
    params=list(_OPTIONS),
    help=generate.__doc__,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code (2 with one line on standard error for mistakes, 130 for Ctrl-C)."""
    command.options = None
    code = command.run(arguments)
    if code and launched_ranks() > 1:
        # At once, because communication that others left could hold up a tidy exit.
        sys.stdout.flush()
        sys.stderr.flush()
        if os.environ.get("RANK", "0") == "0":
            time.sleep(1)  # it may hold the store that tells the others that someone has reported
        os._exit(code)
    return code
