"""A contact sheet: random samples of a data set on one page, as training would see them, to be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from refalign_ext.data.boxes import BoxProblem, box_in_frame
from refalign_ext.data.clip_set import ClipSet, open_clip_set
from refalign_ext.data.crop import FrameMemory, mask_in_frame, read_reference
from refalign_ext.data.schema import Clip, Reference, Subject, VideoSpan
from refalign_ext.data.sheets.layout import (
    FAINT,
    GAP,
    INK,
    Colour,
    captioned,
    error_text,
    flow,
    paragraph,
    scaled,
    stacked,
)

MARGIN = 24
FRAMES = 5  # evenly spaced ones per sample; frames of targets come in addition
MAX_TARGETS = 3  # frames of targets shown per sample
MAX_REFERENCES = 8  # pictures of references shown per sample
_FRAME_HEIGHT = 300  # at most
_REFERENCE_SIDE = 190
_PROMPT_LINES = 3
_SUBJECTS = ((230, 60, 50), (30, 120, 230), (20, 160, 80), (240, 150, 0), (150, 70, 200), (0, 165, 180))
_CROP = (250, 220, 60)


def contact_sheet(
    clips: ClipSet | Path, *, samples: int = 12, seed: int = 0, width: int = 1800
) -> Image.Image:
    """Draws random samples, one below the other: frames with target boxes and masks, prompt, references.

    A crop is outlined in yellow, the box and mask of a subject in the colour that marks its references too, which are
    cut as for training. What cannot be read is shown by its error. `width` of the page is in pixels.

    Raises:
        ValueError: if the data set cannot be opened or is empty.
    """
    clip_set = open_clip_set(clips) if isinstance(clips, (str, Path)) else clips
    if not len(clip_set):
        raise ValueError(f"{clip_set.path} has no rows to show")
    rows = choose_rows(len(clip_set), samples, seed)
    title = f"{clip_set.path.name}: {len(rows)} of {len(clip_set):,} rows, seed {seed}"
    inner = width - 2 * MARGIN
    parts = [paragraph(title, 26, INK, inner, 1)]
    parts += [SampleSheet(clip_set, row, inner).drawn() for row in rows]
    return stacked(parts, width, margin=MARGIN, gap=2 * MARGIN)


def choose_rows(count: int, samples: int, seed: int) -> list[int]:
    """Ascending distinct rows, from 0."""
    chosen = np.random.default_rng([seed, 61]).choice(count, min(samples, count), replace=False)
    return sorted(chosen.tolist())


class SampleSheet:
    """Everything about one row, `width` pixels wide."""

    def __init__(self, clip_set: ClipSet, row: int, width: int) -> None:
        self.clip_set, self.row, self.width = clip_set, row, width

    def drawn(self) -> Image.Image:
        name = f"row {self.row + 1}"
        try:
            clip = self.clip_set[self.row]
        except (ValueError, OSError) as error:
            return stacked(
                [paragraph(name, 20, INK, self.width, 1), self._error(error, self.width)], self.width
            )
        parts = [
            paragraph(f"{name}: {clip.id}", 20, INK, self.width, 1),
            paragraph(f"{clip.source} \u00b7 {clip.video.path}", 15, FAINT, self.width, 1),
            paragraph(clip.prompt, 18, INK, self.width, _PROMPT_LINES),
        ]
        try:
            parts.append(flow(self._frames(clip), self.width))
        except Exception as error:  # noqa: BLE001, a sheet of what can be shown is better than none
            parts.append(self._error(error, self.width))
        parts.append(flow(self._references(clip), self.width))
        return stacked(parts, self.width)

    def _error(self, error: Exception, width: int) -> Image.Image:
        """What an error says beyond the row, which stands above it."""
        place = f"{self.clip_set.place(self.row)}: "
        return error_text(str(error).removeprefix(place) or type(error).__name__, width)

    def _frames(self, clip: Clip) -> list[Image.Image]:
        """Evenly spaced frames, then those of targets with what is marked in them."""
        from refalign_ext.data.decoding import read_frame

        media = self.clip_set.media(self.row, clip.video.path)
        targets: dict[tuple[int | None, float | None], list[tuple[int, Subject]]] = {}
        for number, subject in enumerate(clip.subjects):
            if subject.target is not None:
                key = (subject.target.frame, subject.target.frame_frac)
                targets.setdefault(key, []).append((number, subject))
        shown = [((None, share), []) for share in np.linspace(0, 1 - 2**-40, FRAMES).tolist()]
        shown += list(targets.items())[:MAX_TARGETS]
        side = (self.width - (len(shown) - 1) * GAP) // len(shown) - 2
        tiles = []
        for (frame, share), subjects in shown:
            caption = f"frame {frame}" if share is None else f"{share:.0%} of the clip"
            colour = FAINT
            if subjects:
                names = ", ".join(f"{_name(subject)} ({subject.target.box_space})" for _, subject in subjects)
                caption, colour = f"target, {caption}: {names}", _colour(subjects[0][0])
            try:
                pixels = read_frame(media, frame=frame, frame_share=share, span=clip.video)
                picture = scaled(marked(pixels, subjects, clip.video), side, _FRAME_HEIGHT)
            except ValueError as error:
                if not subjects:
                    raise
                picture = self._error(error, side)
            tiles.append(captioned(picture, (caption, colour)))
        return tiles

    def _references(self, clip: Clip) -> list[Image.Image]:
        frames = FrameMemory()
        listed = [(number, item) for number, subject in enumerate(clip.subjects) for item in subject.refs]
        return [
            self._reference(number, clip.subjects[number], reference, frames)
            for number, reference in listed[:MAX_REFERENCES]
        ]

    def _reference(
        self, number: int, subject: Subject, reference: Reference, frames: FrameMemory
    ) -> Image.Image:
        side = _REFERENCE_SIDE
        try:
            picture = scaled(read_reference(self.clip_set, self.row, reference, frames), side, side)
        except Exception as error:  # noqa: BLE001, as for frames
            picture = self._error(error, side)
        details = " \u00b7 ".join((reference.pair, subject.kind, reference.box_space or "whole"))
        return captioned(picture, (_name(subject), _colour(number)), (details, FAINT), width=side)


def marked(pixels: np.ndarray, subjects: Sequence[tuple[int, Subject]], video: VideoSpan) -> Image.Image:
    """A frame [H, W, 3] uint8 with its crop, and the boxes and outlined masks of targets by subject number.

    Raises:
        ValueError: if one of them does not fit into the frame.
    """
    height, width = pixels.shape[:2]
    pixels, crop = pixels.copy(), video.crop_xyxy
    for number, subject in subjects:
        if subject.target.mask_rle is not None:
            inside = mask_in_frame(subject.target, (width, height), crop)
            colour = np.array(_colour(number))
            pixels[inside] = (0.65 * pixels[inside] + 0.35 * colour).astype(np.uint8)
            thickness = max(1, width // 400)
            inner = Image.fromarray(inside).convert("L").filter(ImageFilter.MinFilter(2 * thickness + 1))
            pixels[inside & (np.asarray(inner) == 0)] = colour
    picture = Image.fromarray(pixels)
    if crop is not None:
        _outline(picture, crop, _CROP)
    for number, subject in subjects:
        target = subject.target
        if target.bbox_xyxy is not None:
            box = box_in_frame(target.bbox_xyxy, target.box_space, (width, height), crop, video.size)
            if isinstance(box, BoxProblem):
                raise ValueError(f"box {list(target.bbox_xyxy)} ({target.box_space}): {box.value}")
            _outline(picture, box, _colour(number))
    return picture


def _outline(picture: Image.Image, box: Sequence[float], colour: Colour) -> None:
    # As thick as three pixels of the page, whatever the size of the frame.
    thickness = max(1, round(max(picture.size) / 120))
    x0, y0, x1, y1 = (round(edge) for edge in box)
    corners = (x0, y0, max(x1 - 1, x0), max(y1 - 1, y0))
    ImageDraw.Draw(picture).rectangle(corners, outline=colour, width=thickness)


def _colour(number: int) -> Colour:
    return _SUBJECTS[number % len(_SUBJECTS)]


def _name(subject: Subject) -> str:
    return subject.cls or subject.phrase or f"subject {subject.subject_id}"
