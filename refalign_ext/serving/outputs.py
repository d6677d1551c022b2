"""The files of one result: video or image, sheet, settings as json, and on request the prepared references."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refalign_ext.atomic_io import atomic_path
from refalign_ext.media import encode_video, image_format, video_to_frames
from refalign_ext.request import IMAGE_SUFFIXES, GenerationRequest, RuntimeOptions
from refalign_ext.tasks import TASKS

if TYPE_CHECKING:
    from PIL import Image

    from refalign_ext.pipeline import Result


@dataclass(frozen=True)
class OutputPaths:
    """Where the files of one result go; `references` is a folder, or None when they are not wanted."""

    result: Path
    sheet: Path
    settings: Path
    references: Path | None = None

    @classmethod
    def choose(
        cls,
        request: GenerationRequest,
        options: RuntimeOptions,
        result: Path | None = None,
        *,
        sheet: Path | None = None,
        references: str | None = None,
        inputs: Sequence[Path] = (),
    ) -> OutputPaths:
        """Names the files and makes sure, without writing any, that they can be written.

        Args:
            result: None: named after task, size, ranks, prompt and time, as upstream's.
            sheet: None: NAME.sheet.png beside the result.
            references: a folder; "": NAME.references beside the result; None: they are not written.
            inputs: files that the run reads.

        Raises:
            ValueError: naming the file or folder that cannot be written, is an input, or is no earlier result.
        """
        suffixes = TASKS[request.task].result_suffixes
        if result is None:
            prompt = re.sub(r"[^\w.,-]+", "_", request.prompt)[:50]
            size, moment = "{}x{}".format(*request.size), f"{datetime.now():%Y%m%d_%H%M%S}"
            ranks = f"{options.ulysses_size or 1}_{options.ring_size or 1}"
            result = Path(f"{request.task}_{size}_{ranks}_{prompt}_{moment}{suffixes[0]}")
        if result.suffix.lower() not in suffixes:
            raise ValueError(
                f"--save_file {result}: task {request.task} writes {' or '.join(suffixes)} files"
            )
        if sheet is not None and sheet.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(f"--save_sheet {sheet}: give a file that ends in {', '.join(IMAGE_SUFFIXES)}")
        folder = None
        if references is not None:
            folder = Path(references) if references else result.with_suffix(".references")
        paths = cls(result, sheet or result.with_suffix(".sheet.png"), result.with_suffix(".json"), folder)
        files = paths.files(len(request.references))
        for path in files:
            check_writable(path)
        places = {os.path.realpath(path) for path in files}
        if len(places) != len(files):
            raise ValueError("--save_file and --save_sheet name the same file: give them different names")
        if folder is not None and os.path.realpath(folder) in places:
            raise ValueError(f"--save_references {folder} is also a file to write: name another folder")
        for path in (path for path in files if path.exists()):
            if any(given.exists() and given.samefile(path) for given in inputs):
                raise ValueError(f"{path} would be written and is an input of this run: choose another name")
            if not _is_earlier_result(path, paths.settings):
                raise ValueError(
                    f"{path} is there and no earlier result of this program: choose another name, or move it away"
                )
        return paths

    def files(self, reference_count: int) -> list[Path]:
        """Every file that will be written; last those of the prepared references, where they are wanted."""
        files = [self.result, self.sheet, self.settings]
        if self.references is not None:
            files += [self.references / f"reference_{index + 1}.png" for index in range(reference_count)]
        return files


def _is_earlier_result(path: Path, record: Path) -> bool:
    """Whether a file is one of the result that `record` is of, and may be replaced with it."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(content, dict) or not {"task", "seed", "versions"} <= content.keys():
        return False
    written = content.get("files")  # records of older versions lack it
    return written is None or os.path.relpath(path, record.parent) in written


def check_writable(path: Path) -> None:
    """Makes sure that a file can be written at `path` without writing anything.

    Raises:
        ValueError: when `path` is a folder, or its folder (or the nearest one that exists) takes no new file.
    """
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; give a file name")
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        if folder.is_symlink():
            raise ValueError(
                f"cannot write {path}: {folder} is a link that leads nowhere; choose another place"
            )
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: {folder} is not a folder; choose another place")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: folder {folder} takes no files ({error.strerror}); choose another"
        ) from None


def write_outputs(
    paths: OutputPaths,
    result: Result,
    *,
    sheet: Image.Image,
    record: Mapping[str, Any],
    fps: float,
    magnify: int = 1,
) -> None:
    """Writes the files of a result, each whole or not at all: the result itself first, then all others together.

    Args:
        paths: where to; a result that ends in .mp4 is a video, anything else an image of the first frame.
        result: with its video.
        sheet: the finished page.
        record: what the json file holds.
        fps: frames per second.
        magnify: enlarges the video this many times by repeating pixels.

    Raises:
        OSError: when something cannot be written; it says whether the result itself is saved.
    """
    from PIL import Image

    assert result.video is not None
    pictures = {paths.sheet: sheet}
    pictures |= dict(zip(paths.files(len(result.references))[3:], result.references, strict=False))
    missing = {folder for path in (*pictures, paths.result) for folder in path.parents if not folder.exists()}
    try:
        with atomic_path(paths.result) as unfinished:
            if paths.result.suffix.lower() == ".mp4":
                encode_video(result.video, unfinished, fps, magnify=magnify)
            else:
                frame = video_to_frames(result.video[:, :1], magnify=magnify)[0]
                Image.fromarray(frame).save(unfinished, format=image_format(paths.result))
        try:
            with ExitStack() as stack:
                files = paths.files(len(result.references))
                written = {"files": [os.path.relpath(path, paths.settings.parent) for path in files]}
                text = json.dumps({**record, **written}, indent=2, ensure_ascii=False, default=str) + "\n"
                # Names of files need not be text; as an escape JSON holds them all the same.
                content = text.encode("utf-8", "backslashreplace")
                stack.enter_context(atomic_path(paths.settings)).write_bytes(content)
                for path, picture in pictures.items():
                    picture.save(stack.enter_context(atomic_path(path)), format=image_format(path))
        except (OSError, ValueError) as error:
            raise OSError(f"{paths.result} is saved, its sheet and record are not: {error}") from error
    except BaseException:
        for folder in sorted(missing, key=lambda folder: len(folder.parts), reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
