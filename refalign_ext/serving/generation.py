"""One generation from the command line: request, run, files, and what to say when it fails.

`args` is everywhere the command line of generate.py, parsed and checked as far as that goes without torch.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from refalign_ext.backbone import (
    SUPPORTED_SIZES,
    WAN_CONFIGS,
    OutputPaths,
    check_frame_num,
    check_size,
    checkpoint_files,
    choose_seed,
    describe_versions,
    file_sha256,
    require_files,
    required_files,
    resolve_device,
    write_outputs,
)
from refalign_ext.checkpoint.checkpointer import is_checkpoint
from refalign_ext.checkpoint.reading import read_any_dit
from refalign_ext.data.sheets.result import make_sheet
from refalign_ext.distributed.inference import VideoRanks
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.process_group import (
    environment_world_size,
    is_lost_contact,
    rank_device,
    start_process_group,
    stop_process_group,
)
from refalign_ext.distributed.sizes import ParallelSizes, generation_sizes
from refalign_ext.errors import describe_error
from refalign_ext.guidance import required_branches
from refalign_ext.pipeline import R2VPipeline, SingleProcess, prepare_references
from refalign_ext.planning.generation_plan import make_generation_plan
from refalign_ext.planning.plan import Plan
from refalign_ext.planning.table import describe
from refalign_ext.references import check_matte_available, load_image

if TYPE_CHECKING:
    from easydict import EasyDict
    from PIL import Image

logger = logging.getLogger(__name__)

# Rank 0 decodes and writes while the others wait for it.
_TIMEOUT_SECONDS = 2 * 3600.0
_ASSUMED_REFERENCES = 3


def init_distributed(args: argparse.Namespace) -> None:
    """Joins the ranks that torchrun started, before anything is checked; fills in this rank's device.

    Raises:
        ValueError: for a device that ranks cannot share a video on, or if they do not find each other.
    """
    if args.device.startswith("cuda:"):
        raise ValueError(
            f"--device {args.device} is one GPU for all ranks: use --device cuda, a GPU for each"
        )
    device = resolve_device(rank_device(args.device))
    if device.type == "mps":
        raise ValueError("ranks cannot share a video on mps: use --device cpu")
    args.device = str(device)
    start_process_group(device, _TIMEOUT_SECONDS)


def resolve_parallel_sizes(args: argparse.Namespace) -> ParallelSizes:
    """How the ranks (those of --world_size in a dry run) divide the work; fills in the sizes left to be chosen.

    Raises:
        ValueError: listing the combinations that are possible.
    """
    sizes = generation_sizes(
        args.world_size or environment_world_size(),
        WAN_CONFIGS[args.task].num_heads,
        cfg=args.cfg_size,
        ulysses=args.ulysses_size,
        ring=args.ring_size,
    )
    args.cfg_size, args.ulysses_size, args.ring_size = sizes.data, sizes.ulysses, sizes.ring
    return sizes


def shutdown_distributed() -> None:
    """Waits until rank 0 has written the files."""
    stop_process_group(together=True)


def describe_plan(args: argparse.Namespace) -> str:
    """Who would hold what, for a dry run: needs no weights, no references and no GPU.

    Raises:
        ValueError: for sizes that do not fit the ranks, the model or the task.
    """
    _check_request(args, WAN_CONFIGS[args.task], SUPPORTED_SIZES[args.task])
    return describe(_plan(args, resolve_parallel_sizes(args), None))


def generate(args: argparse.Namespace, paths: OutputPaths | None) -> Path | None:
    """Checks a request, runs it and writes its files; nothing is written when a check or the run fails.

    Args:
        args: the flags; defaults that depend on the task, the seed and the machine are filled in.
        paths: where the files go; None on all but the first of several ranks, which write nothing.

    Returns:
        The video or image written, None where there is nothing to write.

    Raises:
        ValueError: for every mistake of the user, in one line with the remedy.
    """
    images = _load_references(args)
    config = WAN_CONFIGS[args.task]
    _check_request(args, config, SUPPORTED_SIZES[args.task])
    require_files(args.ckpt_dir, required_files(args.ckpt_dir, config, dit=args.dit_ckpt is None))
    device = resolve_device(args.device)
    ranks = _join(args, device)
    args.base_seed = ranks.same_seed(choose_seed(args.base_seed))
    if args.offload_model is None:
        args.offload_model = device.type == "cuda" and ranks.is_alone
    if args.task in ("r2v-1.3B", "r2v-14B") and args.dit_ckpt is None:
        logger.warning("no --dit_ckpt: the DiT in %s must be one trained with references", args.ckpt_dir)

    logger.info("task %s on %s, seed %d", args.task, device, args.base_seed)
    with _hashed_aside([] if paths is None else _weight_files(args, config)) as digests:
        result = _run(args, config, images, ranks)
        if paths is None:
            return None
        _write_result(args, config, paths, result, digests())
    for path in paths.files(len(result["references"])):
        logger.info("wrote %s", path)
    return paths.result


def explain(error: BaseException, args: argparse.Namespace) -> str | None:
    """One line for the user, or None for an error that is not the user's to mend; see `describe_error`."""
    line = describe_error(error, _out_of_memory_advice(args))
    if line is None and is_lost_contact(error):
        return "another rank ended without a word (killed, or out of the host's memory?): see the log of the system"
    return line


def _join(args: argparse.Namespace, device: torch.device) -> SingleProcess:
    """This rank among those that make the video together; the plan is shown before anything is loaded."""
    if environment_world_size() == 1:
        return SingleProcess()
    sizes = resolve_parallel_sizes(args)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    plan = _plan(args, sizes, memory)
    logger.info("%s", describe(plan))
    if memory is not None and not plan.fits and not args.offload_model:
        logger.warning("this may run out of memory: try %s", ", ".join(plan.suggestions))
    needed = _branches(args)
    if sizes.data > needed:
        logger.warning(
            "--cfg_size %d: these scales need %d branches, the other ranks repeat one", sizes.data, needed
        )
    return VideoRanks(
        Parallel.create(sizes, device),
        dit_fsdp=args.dit_fsdp,
        t5_fsdp=args.t5_fsdp,
        sequence_backend=args.sp_backend,
    )


def _plan(args: argparse.Namespace, sizes: ParallelSizes, device_memory: int | None) -> Plan:
    config = WAN_CONFIGS[args.task]
    takes_references = args.task.startswith("r2v")
    half = args.dtype == "bf16" or (args.dtype == "auto" and config.param_dtype == torch.bfloat16)
    return make_generation_plan(
        args.task,
        sizes,
        branches=_branches(args),
        dit_fsdp=args.dit_fsdp,
        t5_fsdp=args.t5_fsdp,
        t5_cpu=args.t5_cpu,
        size=args.size,
        frame_num=args.frame_num,
        references=len(args.ref or ()) or (_ASSUMED_REFERENCES if takes_references else 0),
        precision="bf16" if half else "fp32",
        device_memory=device_memory,
    )


def _branches(args: argparse.Namespace) -> int:
    """How many branches of the guidance these scales need."""
    if args.task.startswith("r2v"):
        return len(required_branches(args.ref_guide_scale, args.text_guide_scale))
    return len(required_branches(args.sample_guide_scale, args.sample_guide_scale))


def _check_request(args: argparse.Namespace, config: EasyDict, supported: tuple[str, ...]) -> None:
    """Fills in the task's defaults and refuses sizes and frame numbers that do not fit it.

    Raises:
        ValueError: naming the nearest valid value.
    """
    is_image = args.task.startswith("t2i")
    takes_references = args.task.startswith("r2v")
    if args.size is None:
        args.size = tuple(config.size) if takes_references else _parse_size(_default_size(supported))
    if args.frame_num is None:
        args.frame_num = config.frame_num if takes_references else (1 if is_image else 81)
    if is_image and args.frame_num != 1:
        raise ValueError(
            f"--frame_num is {args.frame_num}: task {args.task} makes one image, leave it out or give 1"
        )
    check_frame_num(args.frame_num, config)
    check_size(args.size, config)
    if not takes_references and f"{args.size[0]}*{args.size[1]}" not in supported:
        nearest = min(
            supported,
            key=lambda name: sum(abs(a - b) for a, b in zip(_parse_size(name), args.size, strict=True)),
        )
        raise ValueError(
            f"size {args.size[0]}*{args.size[1]} is not one that task {args.task} makes: "
            f"the nearest is {nearest} (of {', '.join(supported)})"
        )
    defaults = config if takes_references else {}
    for name, fallback in (("sample_steps", 50), ("sample_shift", 5.0), ("sample_solver", "unipc")):
        if getattr(args, name) is None:
            setattr(args, name, defaults.get(name, fallback))
    for name in ("ref_guide_scale", "text_guide_scale"):
        if takes_references and getattr(args, name) is None:
            setattr(args, name, config[name])
    if args.magnify is None:
        args.magnify = config.get("magnify", 1)


def _default_size(supported: tuple[str, ...]) -> str:
    """Upstream's default where the task makes it, else the landscape size it makes."""
    return "1280*720" if "1280*720" in supported else "832*480"


def _parse_size(name: str) -> tuple[int, int]:
    """(width, height) for a name in SUPPORTED_SIZES."""
    width, height = name.split("*")
    return int(width), int(height)


def _load_references(args: argparse.Namespace) -> list[Image.Image]:
    """Reads every reference image, so that a bad one is found before any weights are loaded."""
    if args.matte == "auto" and any(role != "background" for role in args.ref_role or ()):
        check_matte_available()
    return [load_image(path) for path in args.ref or ()]


def _weight_files(args: argparse.Namespace, config: EasyDict) -> list[Path]:
    """The files that hold the weights of a run."""
    source = Path(args.dit_ckpt or args.ckpt_dir)
    dit_files = sorted(source.glob("*.distcp")) if is_checkpoint(source) else checkpoint_files(source)
    return [*dit_files, args.ckpt_dir / config.t5_checkpoint, args.ckpt_dir / config.vae_checkpoint]


def _run(
    args: argparse.Namespace, config: EasyDict, images: list[Image.Image], ranks: SingleProcess
) -> dict[str, Any]:
    """Runs a task; gives video (None where another rank decodes), references, settings, timings and peak memory.

    Text-to-video and text-to-image are videos without references, for which eq. 5 is ordinary guidance.
    """
    takes_references = args.task.startswith("r2v")
    prepared = prepare_references(images, args.size, roles=args.ref_role, matte=args.matte)
    start = time.perf_counter()
    pipeline = R2VPipeline.load(
        config,
        args.ckpt_dir,
        device=args.device,
        dtype=args.dtype,
        dit_ckpt=args.dit_ckpt,
        t5_cpu=args.t5_cpu,
        offload_model=args.offload_model,
        ranks=ranks,
        read_dit=read_any_dit,
    )
    loading = round(time.perf_counter() - start, 3)
    text_scale = args.text_guide_scale if takes_references else args.sample_guide_scale
    result = pipeline.generate(
        args.prompt,
        prepared,
        size=args.size,
        frame_num=args.frame_num,
        sample_solver=args.sample_solver,
        sample_steps=args.sample_steps,
        sample_shift=args.sample_shift,
        ref_guide_scale=args.ref_guide_scale if takes_references else text_scale,
        text_guide_scale=text_scale,
        seed=args.base_seed,
    )
    settings = dict(result.settings)
    if not takes_references:
        del settings["ref_guide_scale"]
        settings["sample_guide_scale"] = settings.pop("text_guide_scale")
    if isinstance(ranks, VideoRanks):
        settings["ranks"] = str(ranks)
    return {
        "video": result.video,
        "references": result.references,
        "settings": settings,
        "timings": {"load": loading, **result.timings},
        "peak_memory": result.peak_memory,
    }


@contextmanager
def _hashed_aside(paths: list[Path]) -> Iterator[Callable[[], dict[str, str]]]:
    """Hashes weight files in a thread while the block runs; the function given waits for the digests by path."""
    pool = ThreadPoolExecutor(max_workers=1)
    pending = {str(path): pool.submit(file_sha256, path) for path in paths}
    try:
        yield lambda: {name: digest.result() for name, digest in pending.items()}
    finally:
        pool.shutdown(cancel_futures=True)


def _write_result(
    args: argparse.Namespace,
    config: EasyDict,
    paths: OutputPaths,
    result: dict[str, Any],
    weights: dict[str, str],
) -> None:
    """Writes the video or image, the sheet, the settings and the references."""
    settings = result["settings"]
    scales = [
        f"{label} {settings[name]}"
        for name, label in (
            ("ref_guide_scale", "reference scale"),
            ("text_guide_scale", "prompt scale"),
            ("sample_guide_scale", "guidance scale"),
        )
        if name in settings
    ]
    footer = [
        f"seed {settings['seed']}",
        f"{settings['size'][0]} x {settings['size'][1]}",
        f"{settings['sample_solver']}, {settings['sample_steps']} steps, shift {settings['sample_shift']}",
        ", ".join(scales),
    ]
    sheet = make_sheet(
        result["references"],
        args.prompt,
        result["video"],
        fps=config.sample_fps,
        title=f"{'RefAlign' if args.task.startswith('r2v') else 'Wan2.1'} {args.task}",
        footer="   |   ".join(footer),
    )
    record = {
        "task": args.task,
        **settings,
        "flags": {name: value for name, value in vars(args).items() if value is not None},
        "weights": weights,
        "versions": describe_versions(),
        "seconds": result["timings"],
        "peak_memory_bytes": result["peak_memory"],
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    write_outputs(
        paths,
        result["video"],
        sheet=sheet,
        settings=record,
        references=result["references"],
        fps=config.sample_fps,
        magnify=args.magnify,
    )


def _out_of_memory_advice(args: argparse.Namespace) -> str:
    """One line that names the flags which are still left to save memory."""
    flags = []
    if environment_world_size() > 1:
        flags += [f"--{name}" for name in ("dit_fsdp", "t5_fsdp") if not getattr(args, name)]
        flags.append("more ranks with a larger --ulysses_size or --ring_size")
    if not (args.offload_model or args.dit_fsdp or args.t5_fsdp):
        flags.append("--offload_model True")
    if not (args.t5_cpu or args.t5_fsdp):
        flags.append("--t5_cpu")
    if args.dtype != "bf16":
        flags.append("--dtype bf16")
    flags += ["a smaller --size", "fewer frames (--frame_num)"]
    return f"out of memory on {args.device}: try {', '.join(flags)}"
