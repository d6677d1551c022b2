"""Fig. 2b of the paper for any checkpoint: what reference tokens look like block by block, in pictures and numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refalign_ext.atomic_io import write_json
from refalign_ext.backbone import (
    REFUSED_TASKS,
    WAN_CONFIGS,
    ReferenceBackbone,
    build_dit,
    latent_shape,
    resolve_device,
)
from refalign_ext.checkpoint.reading import read_any_dit
from refalign_ext.evaluation.feature_drawing import draw_tokens
from refalign_ext.evaluation.features import MAX_TIMESTEP, Sample, encode_samples, reference_tokens
from refalign_ext.evaluation.separability import (
    Numbers,
    Place,
    SampleTokens,
    compare_tokens,
    summarize_tokens,
)
from refalign_ext.pipeline import R2VPipeline
from refalign_ext.references import prepare_reference
from refalign_ext.tasks import TASKS, find_task

if TYPE_CHECKING:
    from easydict import EasyDict


@dataclass(frozen=True)
class PlotRequest:
    """What to plot; see the options of `plot-features`.

    Attributes:
        checkpoints: one or two DiTs by the name that pictures show; None is that in `ckpt_dir`.
        blocks: counted from 0; None: all.
        frame_num: of the video that goes with `references`; None: the task's.
    """

    task: str
    ckpt_dir: Path
    checkpoints: dict[str, Path | None]
    references: tuple[Path, ...] = ()
    prompt: str = ""
    timesteps: tuple[float, ...] = (750.0,)
    blocks: tuple[int, ...] | None = None
    tap: str = "block"
    clips: int = 16
    subjects: int = 3
    views: int = 4
    frame_num: int | None = None
    most_tokens: int = 400
    seed: int = 1000
    device: str = "auto"
    dtype: str = "auto"


def plot_features(
    request: PlotRequest, out: Path, *, make_samples: Callable[..., list[Sample]]
) -> dict[str, Any]:
    """Draw and measure the reference tokens of one or two checkpoints.

    Args:
        make_samples: (task's settings, clips=, subjects=, views=, seed=) -> samples, for a request without pictures.

    Writes `features.json` and, for each noise level, `features-t<level>.png` to `out`.

    Returns:
        What `features.json` holds: settings, tokens left out, and for each checkpoint the figures of
        `summarize_tokens` by noise level and block; with two checkpoints also their difference, first minus second.

    Raises:
        ValueError: naming the flag that does not fit, missing files or weights that do not fit.
    """
    from tqdm import tqdm

    config = WAN_CONFIGS[find_task(request.task, family="r2v", refused=REFUSED_TASKS).name]
    blocks = tuple(range(config.num_layers)) if request.blocks is None else tuple(sorted(set(request.blocks)))
    if not blocks or not 0 <= blocks[0] <= blocks[-1] < config.num_layers:
        given = ",".join(map(str, request.blocks or ()))
        raise ValueError(f"--blocks {given}: {request.task} has the blocks 0 to {config.num_layers - 1}")
    for timestep in request.timesteps:
        if not 0 < timestep <= MAX_TIMESTEP:
            raise ValueError(f"--timestep {timestep:g}: noise levels lie above 0 and up to 1000 (pure noise)")
    samples = _samples(request, config, make_samples)
    frames = config.frame_num if request.frame_num is None or not request.references else request.frame_num
    shape = latent_shape(tuple(config.size), frames, config)
    pipeline: R2VPipeline | None = None
    tokens: dict[str, dict[Place, list[SampleTokens]]] = {}
    for name, checkpoint in request.checkpoints.items():
        if pipeline is None:
            device = resolve_device(request.device)
            pipeline = R2VPipeline.from_pretrained(
                request.ckpt_dir,
                task=request.task,
                device=device,
                dtype=request.dtype,
                dit_ckpt=checkpoint,
                offload_model=device.type == "cuda",
                read_dit=read_any_dit,
            )
            encoded, count = encode_samples(
                pipeline, samples, most_tokens=request.most_tokens, seed=request.seed
            )
        else:
            del pipeline.backbone  # both models at once may not fit
            source = checkpoint or request.ckpt_dir
            model = build_dit(read_any_dit(source), config, source, device="cpu", dtype=pipeline.dtype)
            pipeline.backbone = ReferenceBackbone(model.eval().requires_grad_(False))
        with tqdm(total=sum(len(sample.views) for sample in samples), desc=name, unit="pass") as bar:
            tokens[name] = reference_tokens(
                pipeline,
                encoded,
                blocks=blocks,
                timesteps=request.timesteps,
                shape=shape,
                tap=request.tap,
                seed=request.seed,
                passed=bar.update,
            )
    numbers = {
        name: {place: summarize_tokens(found) for place, found in places.items()}
        for name, places in tokens.items()
    }
    entry = {
        "settings": json.loads(json.dumps({**asdict(request), "blocks": blocks}, default=str)),
        "tokens": count,
        "checkpoints": {name: _by_timestep(found) for name, found in numbers.items()},
    }
    if len(tokens) == 2:
        first, second = tokens.values()
        entry["difference"] = _by_timestep(
            {place: compare_tokens(first[place], second[place]) for place in first}
        )
    left_out = f"{count['white']} white, {count['thinned']} to thin out"
    footer = f"{count['kept']} of {count['total']} reference tokens; left out: {left_out}"
    for timestep in request.timesteps:
        path = out / f"features-t{timestep:g}.png"
        draw_tokens(path, timestep, samples[0], tokens, numbers, seed=request.seed, footer=footer)
    write_json(out / "features.json", entry)
    return entry


def _samples(
    request: PlotRequest, config: EasyDict, make_samples: Callable[..., list[Sample]]
) -> list[Sample]:
    if len(request.references) == 1:
        raise ValueError("--ref: references are told apart between two pictures or more: give another one")
    if request.references:
        images = [prepare_reference(path, tuple(config.size)) for path in request.references]
        return [Sample(request.prompt, [images])]
    if TASKS[request.task].bundled is None:
        raise ValueError(f"--task {request.task} needs pictures: give --ref PATH --ref PATH")
    return make_samples(
        config, clips=request.clips, subjects=request.subjects, views=request.views, seed=request.seed
    )


def _by_timestep(numbers: dict[Place, Numbers]) -> dict[str, dict[str, Numbers]]:
    """The figures of a checkpoint for JSON: timestep -> block -> figure."""
    entry: dict[str, dict[str, Numbers]] = {}
    for (timestep, block), found in sorted(numbers.items()):
        entry.setdefault(f"{timestep:g}", {})[str(block)] = found
    return entry
