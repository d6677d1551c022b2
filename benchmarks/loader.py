"""Clips per second of the training loader: from files, from tar shards, and with a cache of latents.

Nothing is encoded: a sample is 81 frames of 832x480 and three references as pixels, or with a cache what it has instead of
them. Clips and references are rendered, and read from the system's memory, not from a disk. At the end follows what
training would need, which is calculated. What decoding costs without seeking is in benchmarks/decode.py.

    python benchmarks/loader.py                              # 300 frames of 1280x720 at 30 fps
    python benchmarks/loader.py --clips 4 --samples 2 --repeats 1 --workers 0 --frames 120 --frame-num 17   # a short one
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import PIL
import psutil
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.decode import pictures, render
from benchmarks.machine import processor
from refalign_ext.backbone import WAN_CONFIGS
from refalign_ext.config import AlignmentConfig
from refalign_ext.data.cache.build import fill_cache
from refalign_ext.data.cache.files import CacheHeader
from refalign_ext.data.cache.names import cache_fingerprint
from refalign_ext.data.cache.reader import LatentCache
from refalign_ext.data.cache.rows import RowLoader
from refalign_ext.data.clip_set import ClipSet, open_clip_set
from refalign_ext.data.loading.dataset import ClipDataset
from refalign_ext.data.loading.source import ClipSource, LoaderSettings
from refalign_ext.data.manifest_file import write_manifest
from refalign_ext.data.materialise.run import materialise
from refalign_ext.data.pieces import Share
from refalign_ext.data.sampling.order import OrderEntry
from refalign_ext.data.sampling.sample_spec import Bucket, Sampling
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan
from refalign_ext.planning.flops import AlignmentShape, ModelShape, peak_flops, step_flops

TITLE = "Loading training samples"
TASK = "r2v-1.3B"
MFU = 0.4
TEACHER_DIM = 1024  # of DINOv3-L
GPUS = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA B200")
REFERENCE_SIZE = (720, 680)  # pixels
_IDLE_S = 0.5  # workers that have not used the processor for so long have loaded all that they may load ahead
_POLL_S = 0.02


def write_clips(folder: Path, arguments: argparse.Namespace) -> ClipSet:
    """Clips, with half of their key frames far apart, of three subjects with a picture from the clip and one from elsewhere."""
    for key_interval in arguments.key_intervals:
        path = folder / f"{key_interval}.mp4"
        render(path, arguments.frames, tuple(arguments.source), arguments.fps, key_interval)
    picture = pictures(arguments.references, REFERENCE_SIZE)
    rows = []
    for number in range(arguments.clips):
        # What `data materialise` cuts is PNG, on white; collections of pictures are JPEG.
        subjects = []
        for index in range(arguments.references):
            image = _on_white(picture(index))
            image.save(folder / f"{number}_{index}.png")
            image.save(folder / f"{number}_{index}.jpg", quality=92)
            refs = (
                Reference("regular", image=f"{number}_{index}.png"),
                Reference("cross", image=f"{number}_{index}.jpg"),
            )
            subjects.append(Subject(str(index), refs=refs))
        name = f"{arguments.key_intervals[number % len(arguments.key_intervals)]}.mp4"
        rows.append(Clip(f"clip{number}", "custom", VideoSpan(name), f"about {number}", tuple(subjects)))
    write_manifest(folder / "data.jsonl", rows)
    return open_clip_set(folder / "data.jsonl")


def _on_white(pixels: np.ndarray) -> Image.Image:
    """An ellipse of a picture [H, W, 3], the rest of it white."""
    height, width = pixels.shape[:2]
    y, x = np.mgrid[:height, :width]
    outside = ((x / width - 0.5) ** 2 + (y / height - 0.5) ** 2) > 0.24
    return Image.fromarray(np.where(outside[..., None], np.uint8(255), pixels))


def write_cache(folder: Path, clips: ClipSet, sampling: Sampling) -> LatentCache:
    """A cache of what the real encoders would give for the size: random numbers in the same shapes."""
    task, bucket = WAN_CONFIGS[TASK], sampling.buckets[0]
    rows, columns = (side // stride for side, stride in zip(bucket.size[::-1], task.vae_stride[1:]))
    tokens = rows * columns // (task.patch_size[1] * task.patch_size[2])
    generator = torch.Generator().manual_seed(0)

    def encode(videos: list[Tensor]) -> list[Tensor]:
        counts = [(video.shape[1] - 1) // task.vae_stride[0] + 1 for video in videos]
        return [torch.randn(task.in_dim, count, rows, columns, generator=generator) for count in counts]

    encoders = SimpleNamespace(
        task=task,
        vae=SimpleNamespace(encode=encode),
        features=lambda images: torch.randn(len(images), tokens, TEACHER_DIM, generator=generator),
        encode_text=lambda prompts: [torch.zeros(task.text_len, 4096) for _ in prompts],
    )
    fingerprint = cache_fingerprint(
        sampling, {}, teacher="dinov3-l", token_stride=(16, 16), text_length=task.text_len, dtype="float32"
    )
    header = CacheHeader(fingerprint, len(clips), 32)
    fill_cache(RowLoader(clips, sampling), folder, header, encoders, share=Share())
    return LatentCache(folder)


@dataclass
class Side:
    """One way to load with a number of worker processes; seconds per clip of each window.

    Attributes:
        loading_s: processor time of the workers, or of this process if there are none.
        receiving_s: processor time of this process with workers.
        wall_s: time until all samples of the window are loaded.
    """

    name: str
    workers: int
    source: ClipSource
    position: int = 0
    processes: list[psutil.Process] = field(default_factory=list)
    loading_s: list[float] = field(default_factory=list)
    receiving_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def take(self, count: int) -> None:
        """Takes samples, the next ones of all."""
        for _ in range(count):
            self.source.samples(0, range(self.position, self.position + 1))
            self.position += 1

    def begin(self) -> None:
        """Starts the workers and takes the first sample."""
        before = {process.pid for process in psutil.Process().children()}
        self.take(1)
        self.processes = [process for process in psutil.Process().children() if process.pid not in before]
        self._settled()

    def window(self, count: int) -> None:
        """Measures so many samples; workers have loaded all they may before and after, so exactly as many are loaded."""
        before, _ = self._settled()
        start, own = time.perf_counter(), time.process_time()
        self.take(count)
        own = time.process_time() - own
        after, end = self._settled()
        self.loading_s.append((after - before if self.workers else own) / count)
        self.receiving_s.append((own if self.workers else 0.0) / count)
        self.wall_s.append((end - start) / count)

    def _settled(self) -> tuple[float, float]:
        """(processor seconds of the workers, since when they are idle), once they are."""
        used, since = -1.0, time.perf_counter()
        while time.perf_counter() - since < (_IDLE_S if self.processes else 0):
            times = [process.cpu_times() for process in self.processes]
            now = sum(one.user + one.system for one in times)
            if now != used or any(process.status() == psutil.STATUS_RUNNING for process in self.processes):
                used, since = now, time.perf_counter()
            time.sleep(_POLL_S)
        return used, since


def make_source(
    clips: ClipSet, sampling: Sampling, workers: int, cache: LatentCache | None = None
) -> ClipSource:
    """A source that encodes nothing; it puts pixels nowhere, as what is done with them on a GPU is not the loader's."""
    source = ClipSource(
        [clips],
        sampling,
        encode=lambda videos: videos,
        features=lambda images: images,
        device="meta",
        caches=[] if cache is None else [cache],
        settings=LoaderSettings(workers=workers, prefetch=1),
    )
    source.prepare()
    return source


def stored_bytes(folder: Path, clips: ClipSet, references: int) -> float:
    """Bytes of a sample's files, on average: its video and one picture of each subject."""
    sizes = []
    for row in range(len(clips)):
        clip = clips[row]
        images = [
            clips.file_size(row, ref.image) for subject in clip.subjects for ref in subject.refs if ref.image
        ]
        sizes.append(clips.file_size(row, clip.video.path) + references * statistics.mean(images))
    return statistics.mean(sizes)


def cached_bytes(cache: LatentCache, clips: ClipSet, sampling: Sampling) -> int:
    """Bytes of a sample's tensors in the cache."""
    source = ClipDataset([clips], sampling, caches=[cache])
    sample = source[OrderEntry(0, 0, 0, sampling.buckets[0], ())]
    tensors = [sample.latents, *(part for one in sample.references for part in (one.latents, one.features))]
    return sum(tensor.nbytes for tensor in tensors)


def needs(seconds: dict[str, float], size: tuple[int, int], frames: int, references: int) -> list[str]:
    """What a GPU needs, calculated from processor seconds per clip of each way."""
    task = WAN_CONFIGS[TASK]
    rows, columns = (
        side // stride // patch
        for side, stride, patch in zip(size[::-1], task.vae_stride[1:], task.patch_size[1:])
    )
    tokens = rows * columns
    flops = step_flops(
        ModelShape.of(task),
        ((frames - 1) // task.vae_stride[0] + 1) * tokens,
        references * tokens,
        references=references,
        alignment=AlignmentShape(AlignmentConfig().depth, TEACHER_DIM),
    ).model
    lines = [
        "### Calculated, not measured on a GPU: processor cores that a GPU needs for loading",
        "",
        f"A training step of {TASK} takes {flops / 1e12:,.0f} TFLOP per sample (`refalign_ext/planning/flops.py`, without what "
        f"is computed again). Assumed: {MFU:.0%} of the peak in bf16 is reached, and the VAE, the teacher and the text encoder "
        "take no time, which without a cache they do. Cores are clips per second times the processor time of a clip above.",
        "",
        f"| GPU | peak | clips per second per GPU | {' | '.join(f'cores, {name}' for name in seconds)} |",
        "|" + "---|" * (3 + len(seconds)),
    ]
    for gpu in GPUS:
        peak = peak_flops(gpu)
        assert peak is not None
        rate = peak * MFU / flops
        cores = " | ".join(f"{rate * used:.2g}" for used in seconds.values())
        lines.append(f"| {gpu} | {peak / 1e12:,.0f} TFLOP/s | {rate:.3f} | {cores} |")
    return lines


def report(arguments: argparse.Namespace, sides: Sequence[Side], stored: dict[str, float], load: str) -> str:
    """The results as a Markdown section."""
    source, size = (" x ".join(map(str, pair)) for pair in (arguments.source, arguments.size))
    note = f"; {arguments.note}" if arguments.note else ""
    intervals = " or ".join(map(str, arguments.key_intervals))
    lines = [
        f"## {TITLE}",
        "",
        f"- Date: {datetime.date.today().isoformat()}",
        f"- Machine: {processor()}, {os.cpu_count()} cores, load average {load}{note}",
        f"- Versions: Python {platform.python_version()}, torch {torch.__version__}, "
        f"PyAV {av.__version__}, Pillow {PIL.__version__}",
        f"- Setting: `benchmarks/loader.py`: H.264 with B-frames in mp4, {arguments.frames} frames of {source} at "
        f"{arguments.fps} fps, a key frame every {intervals}; {arguments.frame_num} frames of {size} at "
        f"{arguments.sample_fps:g} fps and {arguments.references} references of {REFERENCE_SIZE[0]} x {REFERENCE_SIZE[1]} "
        f"per sample, half of these augmented; median of {arguments.repeats} interleaved windows of {arguments.samples} "
        "samples; all files in the system's memory",
        "",
        "| | workers | clips per second of CPU time | clips per second of wall time | read per clip |",
        "|---|---|---|---|---|",
    ]
    medians = {
        (side.name, side.workers): (statistics.median(side.loading_s), statistics.median(side.wall_s))
        for side in sides
    }
    for (name, workers), (used, wall) in medians.items():
        lines.append(
            f"| {name} | {workers} | {1 / used:.3g} | {1 / wall:.3g} | {stored[name] / 1e6:.1f} MB |"
        )
    most = max(arguments.workers)
    received = {
        side.name: statistics.median(side.receiving_s) * 1e3 for side in sides if side.workers == most
    }
    told = ", ".join(f"{name} {value:.0f} ms" for name, value in received.items())
    lines += [
        "",
        "CPU time is that of the workers, without workers that of the process itself. "
        f"Of the training process receiving a clip from {most} worker(s) takes: {told}.",
        "",
        *needs(
            {name: medians[name, most][0] for name in received},
            tuple(arguments.size),
            arguments.frame_num,
            arguments.references,
        ),
    ]
    return "\n".join(lines) + "\n"


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    """Renders, measures and reports."""
    bucket = Bucket(*arguments.size, arguments.frame_num)
    sampling = Sampling((bucket,), fps=arguments.sample_fps, clip_variants=1, reference_variants=1)
    (folder / "files").mkdir()
    files = write_clips(folder / "files", arguments)
    materialise(files.path, folder / "packed", pack=True, shard_size=4)
    packed = open_clip_set(folder / "packed")
    cache = write_cache(folder / "cache", files, sampling)
    kinds = {
        "files": {"clips": files},
        "tar shards": {"clips": packed},
        "cache": {"clips": files, "cache": cache},
    }
    size = stored_bytes(folder, files, arguments.references)
    stored = dict.fromkeys(kinds, size) | {"cache": cached_bytes(cache, files, sampling)}
    before = os.getloadavg()[0]
    with ExitStack() as stack:
        sides = []
        for name, options in kinds.items():
            for workers in sorted(set(arguments.workers)):
                source = make_source(sampling=sampling, workers=workers, **options)
                stack.enter_context(closing(source))
                sides.append(Side(name, workers, source))
                sides[-1].begin()
        for repeat in range(arguments.repeats):
            for side in sides:
                side.window(arguments.samples)
                told = (
                    f"{side.loading_s[-1]:.3f} s of CPU time, {side.wall_s[-1]:.3f} s of wall time per clip"
                )
                print(
                    f"{repeat + 1}: {side.name}, {side.workers} workers: {told}", file=sys.stderr, flush=True
                )
    return report(arguments, sides, stored, f"{before:.1f} before and {os.getloadavg()[0]:.1f} after")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=8, help="different samples")
    parser.add_argument("--frames", type=int, default=300, help="length of a clip")
    parser.add_argument("--fps", type=int, default=30)
    parser.add_argument("--source", type=int, nargs=2, default=(1280, 720), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--key-intervals", type=int, nargs="+", default=(48, 250), metavar="FRAMES")
    parser.add_argument("--size", type=int, nargs=2, default=(832, 480), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--frame-num", type=int, default=81, help="frames of a sample")
    parser.add_argument("--sample-fps", type=float, default=16.0)
    parser.add_argument("--references", type=int, default=3, help="of a sample")
    parser.add_argument("--workers", type=int, nargs="+", default=(0, 1, 2), metavar="PROCESSES")
    parser.add_argument("--samples", type=int, default=8, help="of a window")
    parser.add_argument("--repeats", type=int, default=3, help="windows of each way")
    parser.add_argument("--folder", type=Path, help="where to put the files; default: the temporary folder")
    parser.add_argument("--note", default="", help="a remark on the machine for the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(measure(arguments, Path(folder)))


if __name__ == "__main__":
    main()
