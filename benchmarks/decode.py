"""read_clip against decoding the whole file, for the last frames of a longer clip, on one core.

Both sides give the same frames (checked), scaled by the same function; the full decode, too, turns only these into pixels.
Decoders get one thread, and time is the processor's.

    python benchmarks/decode.py                      # 600 frames of 1280x720 at 30 fps, the last 81 at 832x480
    python benchmarks/decode.py --frames 1800 --repeats 7
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
from collections import deque
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import processor
from refalign_ext.data.decoding import read_clip, resize_and_crop
from refalign_ext.data.video_file import probe

TITLE = "Decoding the last frames of a clip"


def pictures(count: int, size: tuple[int, int]) -> Callable[[int], np.ndarray]:
    """Frames [H, W, 3] uint8 of a textured background that pans, with film grain."""
    rng = np.random.default_rng(0)
    width, height = size
    coarse = rng.integers(256, size=(height // 16 + 1, (width + 2 * count) // 16 + 1, 3)).astype(np.float32)
    wide = torch.from_numpy(coarse).permute(2, 0, 1)[None]
    wide = torch.nn.functional.interpolate(wide, size=(height, width + 2 * count), mode="bicubic")[0]
    background = wide.permute(1, 2, 0).numpy()
    grain = rng.normal(0, 3, size=(8, height, width, 1)).astype(np.float32)

    def picture(index: int) -> np.ndarray:
        part = background[:, 2 * index : 2 * index + width] + grain[index % 8]
        return part.clip(0, 255).astype(np.uint8)

    return picture


def render(path: Path, frames: int, size: tuple[int, int], rate: int, key_interval: int) -> None:
    """Writes an H.264 clip with B-frames and a key frame every `key_interval` frames."""
    picture = pictures(frames, size)
    options = {"g": str(key_interval), "bf": "3", "preset": "veryfast", "crf": "23"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(index), format="rgb24")))
        container.mux(stream.encode())


def decode_all(path: Path, frame_num: int, size: tuple[int, int]) -> Tensor:
    """The last frames of a file after decoding all of it on one thread: [3, T, H, W] in [-1, 1]."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        last = deque(container.decode(stream), maxlen=frame_num)
    return torch.stack([resize_and_crop(frame.to_ndarray(format="rgb24"), size) for frame in last], 1)


def compare(sides: list[Callable[[], Tensor]], repeats: int) -> list[float]:
    """Median processor seconds of each, which other load does not change, measured alternately after one run each to warm up."""
    times: list[list[float]] = [[] for _ in sides]
    for repeat in range(repeats + 1):
        for side, function in enumerate(sides):
            start = time.process_time()
            function()
            if repeat:
                times[side].append(time.process_time() - start)
    return [statistics.median(side) for side in times]


def measure(arguments: argparse.Namespace) -> list[tuple[str, float, float]]:
    """Rows of (what, clips per second of read_clip, of the full decode)."""
    table = []
    source, size, count = tuple(arguments.source), tuple(arguments.size), arguments.frame_num
    with tempfile.TemporaryDirectory() as folder:
        for key_interval in arguments.key_intervals:
            path = Path(folder) / f"{key_interval}.mp4"
            render(path, arguments.frames, source, arguments.fps, key_interval)
            assert probe(path).frames == arguments.frames
            for name, target in (("", size), (", not scaled", source)):

                def ours(path: Path = path, target: tuple[int, int] = target) -> Tensor:
                    return read_clip(path, count, target, 1.0)

                def theirs(path: Path = path, target: tuple[int, int] = target) -> Tensor:
                    return decode_all(path, count, target)

                assert torch.equal(ours(), theirs()), "the two sides give different frames"
                seconds = compare([ours, theirs], arguments.repeats)
                row = f"a key frame every {key_interval} frames{name}"
                table.append((row, 1 / seconds[0], 1 / seconds[1]))
    return table


def report(arguments: argparse.Namespace, table: list[tuple[str, float, float]]) -> str:
    """The results as a Markdown section."""
    source, size = (" x ".join(map(str, pair)) for pair in (arguments.source, arguments.size))
    note = f"; {arguments.note}" if arguments.note else ""
    lines = [
        f"## {TITLE}",
        "",
        f"- Date: {datetime.date.today().isoformat()}",
        f"- Machine: {processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread used{note}",
        f"- Versions: Python {platform.python_version()}, torch {torch.__version__}, PyAV {av.__version__}, "
        f"libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}",
        f"- Setting: H.264 with B-frames in mp4, {arguments.frames} frames of {source} at {arguments.fps} fps, "
        f"the last {arguments.frame_num} scaled to {size}, median of {arguments.repeats} interleaved repeats",
        "",
        "| clips per second of one core | read_clip | full decode | ratio |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {ours:.3g} | {theirs:.3g} | {ours / theirs:.2f} |" for name, ours, theirs in table]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=600, help="length of the clip")
    parser.add_argument("--frame-num", type=int, default=81, help="frames to take from its end")
    parser.add_argument("--fps", type=int, default=30)
    parser.add_argument("--source", type=int, nargs=2, default=(1280, 720), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--size", type=int, nargs=2, default=(832, 480), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--key-intervals", type=int, nargs="+", default=(48, 250), metavar="FRAMES")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--note", default="", help="a remark on the machine for the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(report(arguments, measure(arguments)))


if __name__ == "__main__":
    main()
