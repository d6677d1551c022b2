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

from refalign_ext.backbone import (
    SUPPORTED_SIZES,
    WAN_CONFIGS,
    OutputPaths,
    PeakMemory,
    WanT2V,
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
from refalign_ext.errors import describe_error
from refalign_ext.pipeline import R2VPipeline, prepare_references
from refalign_ext.references import check_matte_available, load_image
from refalign_ext.sheet import make_sheet

if TYPE_CHECKING:
    from easydict import EasyDict
    from PIL import Image

logger = logging.getLogger(__name__)


def generate(args: argparse.Namespace, paths: OutputPaths) -> Path:
    """Checks a request, runs it and writes its files; nothing is written when a check or the run fails.

    Args:
        args: the flags; defaults that depend on the task, the seed and the machine are filled in.
        paths: where the files go.

    Returns:
        The video or image written.

    Raises:
        ValueError: for every mistake of the user, in one line with the remedy.
    """
    images = _load_references(args)
    config = WAN_CONFIGS[args.task]
    _check_request(args, config, SUPPORTED_SIZES[args.task])
    require_files(args.ckpt_dir, required_files(args.ckpt_dir, config, dit=args.dit_ckpt is None))
    device = resolve_device(args.device)
    args.base_seed = choose_seed(args.base_seed)
    if args.offload_model is None:
        args.offload_model = device.type == "cuda"
    if args.task in ("r2v-1.3B", "r2v-14B") and args.dit_ckpt is None:
        logger.warning("no --dit_ckpt: the DiT in %s must be one trained with references", args.ckpt_dir)

    logger.info("task %s on %s, seed %d", args.task, device, args.base_seed)
    with _hashed_aside(_weight_files(args, config)) as digests:
        result = _run_r2v(args, images) if args.task.startswith("r2v") else _run_t2v(args, config)
        _write_result(args, config, paths, result, digests())
    for path in paths.files(len(result["references"])):
        logger.info("wrote %s", path)
    return paths.result


def explain(error: BaseException, args: argparse.Namespace) -> str | None:
    """One line for the user, or None for an error that is not the user's to mend; see `describe_error`."""
    return describe_error(error, _out_of_memory_advice(args))


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
        args.magnify = config.get("display_magnify", 1)


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
    dit_files = checkpoint_files(args.dit_ckpt or args.ckpt_dir)
    return [*dit_files, args.ckpt_dir / config.t5_checkpoint, args.ckpt_dir / config.vae_checkpoint]


def _run_r2v(args: argparse.Namespace, images: list[Image.Image]) -> dict[str, Any]:
    """Runs a reference-to-video task; gives video, references, settings, timings and peak memory."""
    prepared = prepare_references(images, args.size, roles=args.ref_role, matte=args.matte)
    start = time.perf_counter()
    pipeline = R2VPipeline.from_pretrained(
        args.ckpt_dir,
        task=args.task,
        device=args.device,
        dtype=args.dtype,
        dit_ckpt=args.dit_ckpt,
        t5_cpu=args.t5_cpu,
        offload_model=args.offload_model,
    )
    loading = round(time.perf_counter() - start, 3)
    result = pipeline.generate(
        args.prompt,
        prepared,
        size=args.size,
        frame_num=args.frame_num,
        sample_solver=args.sample_solver,
        sample_steps=args.sample_steps,
        sample_shift=args.sample_shift,
        ref_guide_scale=args.ref_guide_scale,
        text_guide_scale=args.text_guide_scale,
        seed=args.base_seed,
    )
    return {
        "video": result.video,
        "references": result.references,
        "settings": result.settings,
        "timings": {"load": loading, **result.timings},
        "peak_memory": result.peak_memory,
    }


def _run_t2v(args: argparse.Namespace, config: EasyDict) -> dict[str, Any]:
    """Runs a text-to-video or text-to-image task; gives what `_run_r2v` gives."""
    start = time.perf_counter()
    pipeline = WanT2V(
        config,
        args.ckpt_dir,
        t5_cpu=args.t5_cpu,
        device=None if args.device == "auto" else args.device,
        dtype=None if args.dtype == "auto" else args.dtype,
        dit_ckpt=args.dit_ckpt,
    )
    loaded = time.perf_counter()
    memory = PeakMemory(pipeline.device)
    video = pipeline.generate(
        args.prompt,
        size=args.size,
        frame_num=args.frame_num,
        shift=args.sample_shift,
        sample_solver=args.sample_solver,
        sampling_steps=args.sample_steps,
        guide_scale=args.sample_guide_scale,
        seed=args.base_seed,
        offload_model=args.offload_model,
    )
    if args.offload_model or args.t5_cpu:
        logger.info(memory.describe())
    settings = {
        "prompt": args.prompt,
        "negative_prompt": config.sample_neg_prompt,
        "size": list(args.size),
        "frame_num": args.frame_num,
        "sample_solver": args.sample_solver,
        "sample_steps": args.sample_steps,
        "sample_shift": args.sample_shift,
        "sample_guide_scale": args.sample_guide_scale,
        "seed": args.base_seed,
        "device": str(pipeline.device),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
    }
    timings = {"load": round(loaded - start, 3), "generate": round(time.perf_counter() - loaded, 3)}
    return {
        "video": video,
        "references": [],
        "settings": settings,
        "timings": timings,
        "peak_memory": memory.bytes(),
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
    if not args.offload_model:
        flags.append("--offload_model True")
    if not args.t5_cpu:
        flags.append("--t5_cpu")
    if args.dtype != "bf16":
        flags.append("--dtype bf16")
    flags += ["a smaller --size", "fewer frames (--frame_num)"]
    return f"out of memory on {args.device}: try {', '.join(flags)}"
