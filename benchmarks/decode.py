"""read_clip against decoding the whole file, for the last frames of a longer clip, on one core.

Both sides give the same frames (checked), scaled by the same function; the full decode, too, turns only these into pixels.
Decoders get one thread, and time is the processor's.

    python benchmarks/decode.py                      # 600 frames of 1280x720 at 30 fps, the last 81 at 832x480
    python benchmarks/decode.py --frames 1800 --repeats 7
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import interleaved_medians, processor, section_head, show_section
from refalign_ext.data.decoding import read_clip, resize_and_crop

KEY_INTERVALS = (48, 250)  # frames


def pictures(count: int, size: tuple[int, int]) -> Callable[[int], np.ndarray]:
    """Frames [H, W, 3] uint8 of a textured background that pans, with film grain."""
    rng = np.random.default_rng(0)
    width, height = size
    coarse = rng.integers(256, size=(3, height // 16 + 1, (width + 2 * count) // 16 + 1)).astype(np.float32)
    wide = torch.nn.functional.interpolate(
        torch.from_numpy(coarse)[None], size=(height, width + 2 * count), mode="bicubic"
    )
    background = wide[0].permute(1, 2, 0).numpy()
    grain = rng.normal(0, 3, size=(8, height, width, 1)).astype(np.float32)

    def picture(index: int) -> np.ndarray:
        part = background[:, 2 * index : 2 * index + width] + grain[index % 8]
        return part.clip(0, 255).astype(np.uint8)

    return picture


def render(path: Path, frames: int, size: tuple[int, int], key_interval: int) -> None:
    """Writes an H.264 clip of 30 fps with B-frames and a key frame every `key_interval` frames."""
    picture = pictures(frames, size)
    options = {"g": str(key_interval), "bf": "3", "preset": "veryfast", "crf": "23"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=600, help="length of the clip")
    parser.add_argument("--frame-num", type=int, default=81, help="frames to take from its end")
    parser.add_argument("--source", type=int, nargs=2, default=(1280, 720), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--size", type=int, nargs=2, default=(832, 480), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source, size, count = tuple(arguments.source), tuple(arguments.size), arguments.frame_num
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    machine = f"{processor()}, {os.cpu_count()} cores, 1 thread used"
    lines = [
        *section_head("Decoding the last frames of a clip", machine, f"PyAV {av.__version__}", codec),
        f"- Setting: `benchmarks/decode.py`: H.264 with B-frames in mp4, {arguments.frames} frames of {source} at 30 "
        f"fps, the last {count} scaled to {size}, median of {arguments.repeats} interleaved repeats",
        "",
        "| clips per second of one core | read_clip | full decode | ratio |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for key_interval in KEY_INTERVALS:
            path = Path(folder) / f"{key_interval}.mp4"
            render(path, arguments.frames, source, key_interval)
            for name, target in (("", size), (", not scaled", source)):
                sides = [
                    partial(read_clip, path, count, target, 1.0),
                    partial(decode_all, path, count, target),
                ]
                assert torch.equal(*(side() for side in sides)), "the two sides give different frames"
                ours, theirs = interleaved_medians(sides, arguments.repeats, time.process_time)
                what = f"a key frame every {key_interval} frames{name}"
                lines.append(f"| {what} | {1 / ours:.3g} | {1 / theirs:.3g} | {theirs / ours:.2f} |")
    show_section(lines, write=False)


if __name__ == "__main__":
    main()
