"""Clips per second of the training loader: from files, from tar shards, and with a cache of latents.

Nothing is encoded: a sample is 81 frames of 832x480 and three references as pixels, or with a cache what it has instead of
them. Clips and references are rendered, and read from the system's memory, not from a disk. At the end follows what
training would need, which is calculated. What decoding costs without seeking is in benchmarks/decode.py.

    python benchmarks/loader.py                              # 300 frames of 1280x720 at 30 fps
    python benchmarks/loader.py --clips 4 --samples 2 --repeats 1 --workers 0 --frames 120 --frame-num 17   # a short one
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import av
import PIL
import psutil
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.decode import KEY_INTERVALS, pictures, render
from benchmarks.machine import processor, section_head, show_section
from refalign_ext.backbone import WAN_CONFIGS
from refalign_ext.config import AlignmentConfig
from refalign_ext.data.cache.build import fill_cache
from refalign_ext.data.cache.files import CacheHeader
from refalign_ext.data.cache.names import cache_fingerprint
from refalign_ext.data.cache.reader import LatentCache
from refalign_ext.data.cache.rows import RowLoader
from refalign_ext.data.clip_set import ClipSet, open_clip_set
from refalign_ext.data.loading.source import ClipSource
from refalign_ext.data.manifest_file import write_manifest
from refalign_ext.data.materialise.run import materialise
from refalign_ext.data.pieces import Share
from refalign_ext.data.sampling.sample_spec import Bucket, Sampling
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan
from refalign_ext.planning.flops import AlignmentShape, ModelShape, peak_flops, step_flops

TASK = "r2v-1.3B"
MFU = 0.4
TEACHER_DIM = 1024  # of DINOv3-L
GPUS = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA B200")
REFERENCES, REFERENCE_SIZE = 3, (720, 680)  # pixels
_IDLE_S = 0.5  # workers that have not used the processor for so long have loaded all that they may load ahead


def write_clips(folder: Path, arguments: argparse.Namespace) -> ClipSet:
    """Clips, with half of their key frames far apart, of three subjects with a picture from the clip and one from elsewhere."""
    for key_interval in KEY_INTERVALS:
        render(folder / f"{key_interval}.mp4", arguments.frames, tuple(arguments.source), key_interval)
    picture, rows = pictures(REFERENCES, REFERENCE_SIZE), []
    for number in range(arguments.clips):
        subjects = []
        for index in range(REFERENCES):
            names = {"regular": f"{number}_{index}.png", "cross": f"{number}_{index}.jpg"}
            for name in names.values():
                Image.fromarray(picture(index)).save(folder / name)
            refs = tuple(Reference(pair, image=name) for pair, name in names.items())
            subjects.append(Subject(str(index), refs=refs))
        video = VideoSpan(f"{KEY_INTERVALS[number % 2]}.mp4")
        rows.append(Clip(f"clip{number}", "custom", video, f"about {number}", tuple(subjects)))
    write_manifest(folder / "data.jsonl", rows)
    return open_clip_set(folder / "data.jsonl")


def write_cache(folder: Path, clips: ClipSet, sampling: Sampling) -> LatentCache:
    """A cache of what the real encoders would give for the size: random numbers in the same shapes."""
    task, bucket = WAN_CONFIGS[TASK], sampling.buckets[0]
    rows, columns = bucket.height // task.vae_stride[1], bucket.width // task.vae_stride[2]
    tokens = rows * columns // (task.patch_size[1] * task.patch_size[2])

    def encode(videos: list[Tensor]) -> list[Tensor]:
        counts = [(video.shape[1] - 1) // task.vae_stride[0] + 1 for video in videos]
        return [torch.randn(task.in_dim, count, rows, columns) for count in counts]

    encoders = SimpleNamespace(
        task=task,
        vae=SimpleNamespace(encode=encode),
        features=lambda images: torch.randn(len(images), tokens, TEACHER_DIM),
        encode_text=lambda prompts: [torch.zeros(task.text_len, 4096) for _ in prompts],
    )
    made_from = {"teacher": "dinov3-l", "token_stride": (16, 16), "text_length": task.text_len}
    fingerprint = cache_fingerprint(sampling, {}, **made_from, dtype="float32")
    header = CacheHeader(fingerprint, len(clips), 32)
    fill_cache(RowLoader(clips, sampling), folder, header, encoders, share=Share())
    return LatentCache(folder)


def windows(source: ClipSource, count: int, repeats: int) -> Iterator[tuple[float, float]]:
    """(processor seconds of loading, wall seconds) per sample of each window of `count` samples.

    Workers have loaded all they may before and after a window, so exactly as many are loaded.
    """
    children = psutil.Process().children
    before = set(children())
    source.samples(0, range(1))
    workers = [process for process in children() if process not in before]

    def settled() -> tuple[float, float]:
        """(processor seconds, since when the workers are idle), once they are."""
        if not workers:
            return time.process_time(), time.perf_counter()
        used, since = -1.0, time.perf_counter()
        while time.perf_counter() - since < _IDLE_S:
            now = sum(sum(process.cpu_times()[:2]) for process in workers)
            if now != used or any(process.status() == psutil.STATUS_RUNNING for process in workers):
                used, since = now, time.perf_counter()
            time.sleep(0.02)
        return used, since

    for repeat in range(repeats):
        used_before, _ = settled()
        start = time.perf_counter()
        for position in range(1 + repeat * count, 1 + (repeat + 1) * count):
            source.samples(0, range(position, position + 1))
        used, end = settled()
        yield (used - used_before) / count, (end - start) / count


def cores_needed(seconds: dict[str, float], size: tuple[int, int], frames: int) -> list[str]:
    """What a GPU needs, calculated from processor seconds per clip of each way."""
    task = WAN_CONFIGS[TASK]
    height, width = (stride * patch for stride, patch in zip(task.vae_stride[1:], task.patch_size[1:]))
    tokens = size[0] // width * (size[1] // height)
    video_tokens = ((frames - 1) // task.vae_stride[0] + 1) * tokens
    alignment = AlignmentShape(AlignmentConfig().depth, TEACHER_DIM)
    shape, counts = ModelShape.of(task), (video_tokens, REFERENCES * tokens)
    flops = step_flops(shape, *counts, references=REFERENCES, alignment=alignment).model
    lines = [
        "### Calculated, not measured on a GPU: processor cores that a GPU needs for loading",
        "",
        f"A training step of {TASK} takes {flops / 1e12:,.0f} TFLOP per sample (`refalign_ext/planning/flops.py`). "
        f"Assumed: {MFU:.0%} of the peak in bf16 is reached, and VAE, teacher and text encoder take no time. Cores are "
        "clips per second times the processor time of a clip above.",
        "",
        f"| GPU | clips per second per GPU | {' | '.join(f'cores, {name}' for name in seconds)} |",
        "|" + "---|" * (2 + len(seconds)),
    ]
    for gpu in GPUS:
        rate = peak_flops(gpu) * MFU / flops
        cores = " | ".join(f"{rate * used:.2g}" for used in seconds.values())
        lines.append(f"| {gpu} | {rate:.3f} | {cores} |")
    return lines


def measure_loading(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """The lines of a section of RESULTS.md."""
    size, frames = tuple(arguments.size), arguments.frame_num
    sampling = Sampling((Bucket(*size, frames),), fps=16.0, clip_variants=1, reference_variants=1)
    (folder / "files").mkdir()
    files = write_clips(folder / "files", arguments)
    materialise(files.path, folder / "packed", pack=True, shard_size=4)
    cache = write_cache(folder / "cache", files, sampling)
    packed = open_clip_set(folder / "packed")
    kinds = {"files": (files, []), "tar shards": (packed, []), "cache": (files, [cache])}
    machine = f"{processor()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}"
    versions = f"PyAV {av.__version__}", f"Pillow {PIL.__version__}"
    lines = [
        *section_head("Loading training samples", machine, *versions),
        f"- Setting: `benchmarks/loader.py`: H.264 with B-frames in mp4, {arguments.frames} frames of "
        f"{arguments.source} at 30 fps, a key frame every {' or '.join(map(str, KEY_INTERVALS))}; {frames} frames of "
        f"{size} at 16 fps and {REFERENCES} references of {REFERENCE_SIZE} per sample, half of these augmented; median "
        f"of {arguments.repeats} windows of {arguments.samples} samples; all files in the system's memory",
        "",
        "| | workers | clips per second of CPU time | clips per second of wall time |",
        "|---|---|---|---|",
    ]
    seconds = {}
    for workers in sorted(set(arguments.workers)):
        for name, (clips, caches) in kinds.items():
            # Pixels are put nowhere: what is done with them on a GPU is not the loader's.
            options = {"device": "meta", "caches": caches, "workers": workers}
            source = ClipSource([clips], sampling, encode=lambda v: v, features=lambda i: i, **options)
            with closing(source):
                found = list(windows(source, arguments.samples, arguments.repeats))
            seconds[name], wall = (statistics.median(side) for side in zip(*found))
            lines.append(f"| {name} | {workers} | {1 / seconds[name]:.3g} | {1 / wall:.3g} |")
    about = "CPU time is that of the workers, without workers that of the process itself."
    return [*lines, "", about, "", *cores_needed(seconds, size, frames)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=8, help="different samples")
    parser.add_argument("--frames", type=int, default=300, help="length of a clip")
    parser.add_argument("--source", type=int, nargs=2, default=(1280, 720), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--size", type=int, nargs=2, default=(832, 480), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--frame-num", type=int, default=81, help="frames of a sample")
    parser.add_argument("--workers", type=int, nargs="+", default=(0, 1, 2), metavar="PROCESSES")
    parser.add_argument("--samples", type=int, default=8, help="of a window")
    parser.add_argument("--repeats", type=int, default=3, help="windows of each way")
    parser.add_argument("--folder", type=Path, help="where to put the files; default: the temporary folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        show_section(measure_loading(arguments, Path(folder)), write=False)


if __name__ == "__main__":
    main()
