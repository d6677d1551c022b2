"""The files of one result: video or image, sheet, settings as json, and on request the prepared references."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.utils.media import atomic_open, save_image, save_video

if TYPE_CHECKING:
    import torch
    from PIL import Image

_PACKAGES = ("diffusers", "transformers", "safetensors", "tokenizers", "numpy", "pillow", "av")


@dataclass(frozen=True)
class OutputPaths:
    """Where the files of one result go; `references` is a folder, or None when they are not wanted."""

    result: Path
    sheet: Path
    settings: Path
    references: Path | None = None

    @classmethod
    def beside(
        cls, result: Path, *, sheet: Path | None = None, references: Path | str | None = None
    ) -> OutputPaths:
        """Names the files after the result: NAME.sheet.png, NAME.json and, for `references=""`, NAME.references."""
        if references is not None:
            references = Path(references) if str(references) else result.with_suffix(".references")
        return cls(
            result,
            result.with_suffix(".sheet.png") if sheet is None else sheet,
            result.with_suffix(".json"),
            references,
        )

    def files(self, reference_count: int) -> list[Path]:
        """Every file that will be written."""
        return [self.result, self.sheet, self.settings, *self.reference_files(reference_count)]

    def reference_files(self, count: int) -> list[Path]:
        """The files for `count` prepared references; none when they are not wanted."""
        if self.references is None:
            return []
        return [self.references / f"reference_{index}.png" for index in range(1, count + 1)]


def write_outputs(
    paths: OutputPaths,
    video: torch.Tensor,
    *,
    sheet: Image.Image,
    settings: Mapping[str, Any],
    references: Sequence[Image.Image] = (),
    fps: float,
    magnify: int = 1,
) -> None:
    """Writes all files of a result under temporary names and renames them together; an error leaves none behind.

    Args:
        paths: where to; a result that ends in .mp4 is a video, anything else an image of the first frame.
        video: [3, F, H, W] in [-1, 1].
        sheet: the finished page.
        settings: what `settings.json` holds.
        references: prepared references, written when `paths.references` is set.
        fps: frames per second.
        magnify: enlarges the video this many times by repeating pixels.

    Raises:
        ValueError: when something cannot be written.
    """
    text = json.dumps(settings, indent=2, ensure_ascii=False, default=str) + "\n"
    with ExitStack() as stack:
        result = stack.enter_context(atomic_open(paths.result))
        if paths.result.suffix.lower() == ".mp4":
            save_video(video, result, fps, magnify=magnify)
        else:
            save_image(video[:, :1], result, magnify=magnify)
        sheet.save(stack.enter_context(atomic_open(paths.sheet)))
        stack.enter_context(atomic_open(paths.settings)).write_text(text, encoding="utf-8")
        for image, path in zip(references, paths.reference_files(len(references)), strict=False):
            image.save(stack.enter_context(atomic_open(path)))


def describe_versions() -> dict[str, str]:
    """Versions of Python, the system and the packages that results depend on."""
    import torch

    versions = {"python": platform.python_version(), "platform": platform.platform()}
    versions["torch"] = str(torch.__version__)  # names the build, which the package's metadata may leave out
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
