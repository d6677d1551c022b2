from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from refalign_ext.media import encode_video, save_video, video_to_frames


def make_video(frames: int = 5, height: int = 48, width: int = 64) -> torch.Tensor:
    video = torch.full((3, frames, height, width), -1.0)
    video[0, :, : height // 2] = 1.0
    video[2, :, :, width // 2 :] = 0.5
    video[1, frames // 2 :, height // 2 :] = 0.2
    return video


def to_rgb(planes: np.ndarray) -> np.ndarray:
    """yuv420p planes, as PyAV stacks them, through the BT.709 matrix in limited range to [H, W, 3]."""
    height, width = planes.shape[0] * 2 // 3, planes.shape[1]
    luma = (planes[:height].astype(float) - 16) / 219
    chroma = (planes[height:].reshape(2, height // 2, width // 2).astype(float) - 128) / 224
    blue, red = chroma.repeat(2, axis=1).repeat(2, axis=2)
    green = luma - 0.1873 * blue - 0.4681 * red
    return np.stack([luma + 1.5748 * red, green, luma + 1.8556 * blue], axis=-1).clip(0, 1) * 255


def read_video(path: Path) -> tuple[np.ndarray, tuple[str, str, Fraction]]:
    """The frames of a file, and its codec, pixel format and rate."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([to_rgb(frame.to_ndarray()) for frame in container.decode(stream)])
        return frames, (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate)


def test_video_round_trip(tmp_path: Path) -> None:
    video = make_video()
    path = save_video(video, tmp_path / "new" / "clip.mp4", 16)
    frames, kind = read_video(path)
    expected = video_to_frames(video)
    assert frames.shape == expected.shape == (5, 48, 64, 3)
    assert np.abs(frames - expected).mean() < 3
    assert kind == ("h264", "yuv420p", 16)
    content = path.read_bytes()
    assert content.find(b"moov") < content.find(b"mdat")
    assert [entry.name for entry in path.parent.iterdir()] == ["clip.mp4"]


def test_colours_survive_and_values_out_of_range_are_clamped(tmp_path: Path) -> None:
    video = torch.tensor([0.9, -0.2, -0.8]).view(3, 1, 1, 1).expand(3, 5, 64, 64)
    frames, _ = read_video(save_video(video, tmp_path / "clip.mp4", 8))
    assert np.abs(frames - video_to_frames(video)).max() <= 3
    frames, _ = read_video(save_video(torch.full((3, 1, 16, 16), 7.0), tmp_path / "one.mp4", 16))
    assert frames.shape == (1, 16, 16, 3) and frames.min() > 252


def test_magnify_repeats_pixels(tmp_path: Path) -> None:
    video = make_video()
    enlarged, plain = video_to_frames(video, magnify=4), video_to_frames(video)
    assert np.array_equal(enlarged, plain.repeat(4, 1).repeat(4, 2))
    encode_video(video, tmp_path / "clip.mp4", 8, magnify=4)
    assert read_video(tmp_path / "clip.mp4")[0].shape == enlarged.shape


def test_odd_sizes_are_padded(tmp_path: Path) -> None:
    frames, (*_, rate) = read_video(save_video(make_video(5, 33, 47), tmp_path / "clip.mp4", 7.5))
    assert frames.shape == (5, 34, 48, 3) and rate == Fraction(15, 2)


@pytest.mark.parametrize(
    ("video", "name", "fps", "message"),
    [
        (torch.zeros(1, 5, 8, 8), "a.mp4", 16, "shape"),
        (torch.zeros(3, 0, 8, 8), "a.mp4", 16, "shape"),
        (torch.full((3, 1, 8, 8), float("nan")), "a.mp4", 16, "not numbers"),
        (torch.zeros(3, 1, 8, 8), "a.avi", 16, "ends in .mp4"),
        (torch.zeros(3, 1, 8, 8), "a.mp4", 0, "frame rate"),
    ],
)
def test_unusable_videos_are_refused(
    tmp_path: Path, video: torch.Tensor, name: str, fps: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save_video(video, tmp_path / name, fps)
    assert not list(tmp_path.iterdir())
