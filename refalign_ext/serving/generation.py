"""One request from start to files: ranks, plan, run, record, and what to say when it fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from refalign_ext.backbone import (
    WAN_CONFIGS,
    choose_seed,
    describe_versions,
    file_sha256,
    latent_shape,
    require_files,
    resolve_device,
)
from refalign_ext.checkpoint.reading import dit_files, lora_files_of, read_any_dit
from refalign_ext.data.sheets.result import make_sheet
from refalign_ext.distributed.inference import VideoRanks
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.process_group import (
    environment_rank,
    is_lost_contact,
    rank_device,
    start_process_group,
    stop_process_group,
)
from refalign_ext.distributed.sizes import ParallelSizes, generation_sizes
from refalign_ext.guidance import required_branches
from refalign_ext.parallelism import SingleProcess
from refalign_ext.pipeline import R2VPipeline, Result
from refalign_ext.planning.generation_plan import make_generation_plan
from refalign_ext.planning.plan import Plan
from refalign_ext.planning.table import plan_table
from refalign_ext.request import GenerationRequest, Reference, RuntimeOptions
from refalign_ext.serving.outputs import OutputPaths, write_outputs
from refalign_ext.tasks import TASKS

logger = logging.getLogger(__name__)

# Rank 0 decodes and writes while the others wait for it.
_TIMEOUT_SECONDS = 2 * 3600.0
_ASSUMED_REFERENCES = 3


@contextmanager
def distributed(device: str) -> Iterator[str]:
    """This rank's device while the ranks that torchrun started work together, until rank 0 has written the files.

    Raises:
        ValueError: for a device that ranks cannot share a video on, or if they do not find each other.
        ConnectionError: on rank 0 if another rank is gone; other ranks leave the report to it.
    """
    if device.startswith("cuda:"):
        raise ValueError(f"--device {device} is one GPU for all ranks: use --device cuda, a GPU for each")
    own = resolve_device(rank_device(device))
    if own.type == "mps":
        raise ValueError("ranks cannot share a video on mps: use --device cpu")
    start_process_group(own, _TIMEOUT_SECONDS)
    try:
        yield str(own)
        stop_process_group(together=True)
    except (OSError, RuntimeError) as error:
        if not is_lost_contact(error):
            raise
        if environment_rank() > 0:
            raise click.exceptions.Exit(2) from error
        raise ConnectionError(
            "another rank ended without a word (killed, or out of the host's memory?): see the log of the system"
        ) from error


def resolve_parallel_sizes(request: GenerationRequest, options: RuntimeOptions) -> RuntimeOptions:
    """The options with the sizes left to be chosen filled in.

    Raises:
        ValueError: listing the combinations that are possible.
    """
    sizes = generation_sizes(
        options.world_size,
        WAN_CONFIGS[request.task].num_heads,
        cfg=options.cfg_size,
        ulysses=options.ulysses_size,
        ring=options.ring_size,
    )
    return replace(options, cfg_size=sizes.data, ulysses_size=sizes.ulysses, ring_size=sizes.ring)


def describe_plan(request: GenerationRequest, options: RuntimeOptions) -> str:
    """Who would hold what, for a dry run: needs no weights, no references and no GPU.

    Raises:
        ValueError: for sizes that do not fit the ranks, the model or the task.
    """
    if "references" in TASKS[request.task].needs and not request.references:
        request = replace(request, references=(Reference("assumed"),) * _ASSUMED_REFERENCES)
    latent_shape(request.size, request.frame_num, WAN_CONFIGS[request.task])
    return plan_table(_plan(request, resolve_parallel_sizes(request, options), None))


def run_request(
    request: GenerationRequest, options: RuntimeOptions, paths: OutputPaths | None, flags: Mapping[str, Any]
) -> Path | None:
    """Runs a request and writes its files; nothing is written when a check or the run fails.

    Args:
        options: with all sizes resolved.
        paths: where the files go; None on all but the first of several ranks, which write nothing.
        flags: what the user gave, for the record.

    Returns:
        The video or image written, None where there is nothing to write.

    Raises:
        ValueError: for every mistake of the user, in one line with the remedy.
    """
    task, config = TASKS[request.task], WAN_CONFIGS[request.task]
    latent_shape(request.size, request.frame_num, config)
    request = task.open(request)
    require_files(options.ckpt_dir, config, dit=options.dit_ckpt is None)
    device = resolve_device(options.device)
    ranks = _join(request, options, device)
    request = replace(request, seed=ranks.same_seed(choose_seed(request.seed)))
    if task.base != task.name and options.dit_ckpt is None:
        logger.warning("no --dit_ckpt: the DiT in %s must be one trained for %s", options.ckpt_dir, task.name)

    logger.info("task %s on %s, seed %d", task.name, device, request.seed)
    with _hashed_in_background([] if paths is None else _weight_files(request, options)) as digests:
        start = time.perf_counter()
        pipeline = R2VPipeline.from_pretrained(
            options.ckpt_dir,
            task=task,
            device=device,
            dtype=options.dtype,
            dit_ckpt=options.dit_ckpt,
            t5_cpu=options.t5_cpu,
            offload_model=options.offloads(device.type),
            ranks=ranks,
            read_dit=partial(read_any_dit, loras=options.lora),
        )
        seconds = {"load": round(time.perf_counter() - start, 3)}
        result = pipeline.run(request)
        if paths is None:
            return None
        record = {
            "task": task.name,
            **result.settings,
            **({"ranks": str(ranks)} if isinstance(ranks, VideoRanks) else {}),
            "flags": {name: value for name, value in flags.items() if value not in (None, ())},
            "weights": digests(),
            "versions": describe_versions(),
            "seconds": seconds | result.timings,
            "peak_memory_bytes": result.peak_memory,
            "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        write_outputs(
            paths,
            result,
            sheet=_sheet(request, result),
            record=record,
            fps=config.sample_fps,
            magnify=request.magnify,
        )
    for path in paths.files(len(result.references)):
        logger.info("wrote %s", path)
    return paths.result


def _join(request: GenerationRequest, options: RuntimeOptions, device: torch.device) -> SingleProcess:
    """This rank among those that make the video together; the plan is shown before anything is loaded."""
    if options.world_size == 1:
        return SingleProcess()
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    plan = _plan(request, options, memory)
    logger.info("%s", plan_table(plan))
    if memory is not None and not plan.fits and not options.offload_model:
        logger.warning("this may run out of memory: try %s", ", ".join(plan.suggestions))
    needed = _branches(request)
    if plan.sizes.data > needed:
        logger.warning(
            "--cfg_size %d: these scales need %d branches, the other ranks repeat one",
            plan.sizes.data,
            needed,
        )
    return VideoRanks(
        Parallel.create(plan.sizes, device),
        dit_fsdp=options.dit_fsdp,
        t5_fsdp=options.t5_fsdp,
        sequence_backend=options.sp_backend,
    )


def _plan(request: GenerationRequest, options: RuntimeOptions, device_memory: int | None) -> Plan:
    is_half = WAN_CONFIGS[request.task].param_dtype == torch.bfloat16
    if options.dtype != "auto":
        is_half = options.dtype == "bf16"
    return make_generation_plan(
        request.task,
        ParallelSizes(options.cfg_size, ring=options.ring_size, ulysses=options.ulysses_size),
        branches=_branches(request),
        dit_fsdp=options.dit_fsdp,
        t5_fsdp=options.t5_fsdp,
        t5_cpu=options.t5_cpu,
        size=request.size,
        frame_num=request.frame_num,
        references=len(request.references),
        precision="bf16" if is_half else "fp32",
        device_memory=device_memory,
    )


def _branches(request: GenerationRequest) -> int:
    """How many branches of the guidance these scales need."""
    return len(required_branches(*TASKS[request.task].guidance(request)))


def _weight_files(request: GenerationRequest, options: RuntimeOptions) -> list[Path]:
    """The files that hold the weights of a run."""
    config, folder = WAN_CONFIGS[request.task], options.ckpt_dir
    dit = dit_files(options.dit_ckpt or folder)
    loras = [file for path in options.lora_paths() for file in lora_files_of(path)]
    return [*dit, *loras, folder / config.t5_checkpoint, folder / config.vae_checkpoint]


@contextmanager
def _hashed_in_background(paths: list[Path]) -> Iterator[Callable[[], dict[str, str]]]:
    """Hashes weight files in a thread while the block runs; the function given waits for the digests by path."""
    pool = ThreadPoolExecutor(max_workers=1)
    pending = {str(path): pool.submit(file_sha256, path) for path in paths}
    try:
        yield lambda: {name: digest.result() for name, digest in pending.items()}
    finally:
        pool.shutdown(cancel_futures=True)


def _sheet(request: GenerationRequest, result: Result) -> Any:
    """The page that shows references, prompt, frames and settings."""
    task, settings = TASKS[request.task], result.settings
    scales = {
        "ref_guide_scale": "reference scale",
        "text_guide_scale": "prompt scale",
        "sample_guide_scale": "guidance scale",
    }
    footer = (
        f"seed {settings['seed']}",
        f"{request.size[0]} x {request.size[1]}",
        f"{request.sample_solver}, {request.sample_steps} steps, shift {request.sample_shift}",
        ", ".join(f"{label} {settings[name]}" for name, label in scales.items() if name in settings),
    )
    return make_sheet(
        result.references,
        request.prompt,
        result.video,
        fps=WAN_CONFIGS[request.task].sample_fps,
        title=f"{task.title} {task.name}",
        footer="   |   ".join(footer),
    )
