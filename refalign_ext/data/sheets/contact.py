"""A contact sheet: random samples of a data set on one page, as training would see them, to be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

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
    heading,
    paragraph,
    scaled,
    stacked,
    text_line,
)

MARGIN = 24
FRAMES = 5  # evenly spaced ones per sample; frames of targets come in addition
MAX_TARGETS = 3  # frames of targets shown per sample
MAX_REFERENCES = 8  # pictures of references shown per sample
_FRAME_HEIGHT = 300  # at most
_PROMPT_LINES = 3
_SUBJECTS = ((230, 60, 50), (30, 120, 230), (20, 160, 80), (240, 150, 0), (150, 70, 200), (0, 165, 180))
_CROP = (250, 220, 60)


def contact_sheet(
    clips: ClipSet | Path, *, samples: int = 12, seed: int = 0, width: int = 1800
) -> Image.Image:
    """Draws random samples, one below the other: frames with target boxes and masks, prompt, references.

    Frames are whole ones; a crop is outlined in yellow, the box and mask of a subject in the colour that marks its
    references too. References are cut as for training, with pair, class and box space under them. What cannot be
    read is shown by its error.

    Args:
        clips: the data set or its path.
        samples: how many; all if there are fewer.
        seed: the same choice for the same number of rows.
        width: of the page in pixels.

    Raises:
        ValueError: if the data set cannot be opened or is empty, or an argument is out of range.
    """
    if samples < 1:
        raise ValueError(f"--samples {samples}: a contact sheet has at least one")
    if not 600 <= width <= 8000:
        raise ValueError(f"--width {width}: a contact sheet is 600 to 8000 pixels wide")
    clip_set = open_clip_set(clips) if isinstance(clips, (str, Path)) else clips
    if not len(clip_set):
        raise ValueError(f"{clip_set.path} has no rows to show")
    rows = choose_rows(len(clip_set), samples, seed)
    title = text_line(
        f"{clip_set.path.name}: {len(rows)} of {len(clip_set):,} rows, seed {seed}",
        26,
        INK,
        width - 2 * MARGIN,
    )
    samples_drawn = [_sample(clip_set, row, width - 2 * MARGIN) for row in rows]
    return stacked([title, *samples_drawn], width, margin=MARGIN, gap=2 * MARGIN)


def choose_rows(count: int, samples: int, seed: int) -> list[int]:
    """Ascending distinct rows, from 0."""
    return sorted(
        np.random.default_rng([seed, 61]).choice(count, min(samples, count), replace=False).tolist()
    )


def _sample(clip_set: ClipSet, row: int, width: int) -> Image.Image:
    """Everything about one row."""
    try:
        clip = clip_set[row]
    except (ValueError, OSError) as error:
        message = error_text(_without_place(clip_set, row, error), width)
        return stacked([heading(f"row {row + 1}", "", width), message], width)
    span = clip.video
    details = " \u00b7 ".join(filter(None, [clip.source, span.path, _span_text(clip)]))
    parts = [heading(f"row {row + 1}: {clip.id}", details, width)]
    parts.append(paragraph(clip.prompt, 18, INK, width, _PROMPT_LINES))
    try:
        parts.append(flow(_frame_tiles(clip_set, row, clip, width), width))
    except Exception as error:  # noqa: BLE001, a sheet of what can be shown is better than none
        parts.append(error_text(_without_place(clip_set, row, error), width))
    parts.append(flow(_reference_tiles(clip_set, row, clip), width))
    return stacked(parts, width)


def _span_text(clip: Clip) -> str:
    span = clip.video
    if span.start_s is not None or span.end_s is not None:
        end = "end" if span.end_s is None else f"{span.end_s:g}"
        return f"{span.start_s or 0:g} to {end} s"
    if span.start_frame is not None or span.end_frame is not None:
        return f"frames {span.start_frame or 0} to {'end' if span.end_frame is None else span.end_frame}"
    return ""


def _frame_tiles(clip_set: ClipSet, row: int, clip: Clip, width: int) -> list[Image.Image]:
    """Evenly spaced frames, then those of targets with what is marked in them."""
    from refalign_ext.data.decoding import read_frame

    media, crop = clip_set.media(row, clip.video.path), clip.video.crop_xyxy
    targets: dict[tuple[int | None, float | None], list[tuple[int, Subject]]] = {}
    for number, subject in enumerate(clip.subjects):
        if subject.target is not None:
            key = (subject.target.frame, subject.target.frame_frac)
            targets.setdefault(key, []).append((number, subject))
    marked = list(targets.items())[:MAX_TARGETS]
    columns = FRAMES + len(marked)
    side = (width - (columns - 1) * GAP) // columns - 2
    tiles = []
    for share in np.linspace(0, 1 - 2**-40, FRAMES).tolist():
        picture = Image.fromarray(read_frame(media, frame_share=share, span=clip.video))
        _outline(picture, crop, _CROP)
        tiles.append(captioned(scaled(picture, side, _FRAME_HEIGHT), f"{share:.0%} of the clip", FAINT))
    for (frame, share), subjects in marked:
        when = f"frame {frame}" if share is None else f"{share:.0%}"
        names = ", ".join(_name(subject) for _, subject in subjects)
        spaces = ", ".join(dict.fromkeys(subject.target.box_space for _, subject in subjects))
        try:
            pixels = read_frame(media, frame=frame, frame_share=share, span=clip.video)
            picture = Image.fromarray(_with_targets(pixels, subjects, clip.video))
        except ValueError as error:
            tiles.append(error_text(f"target at {when}: {_without_place(clip_set, row, error)}", side))
            continue
        colour = _SUBJECTS[subjects[0][0] % len(_SUBJECTS)]
        tiles.append(
            captioned(scaled(picture, side, _FRAME_HEIGHT), f"target, {when}: {names} ({spaces})", colour)
        )
    return tiles


def _with_targets(
    pixels: np.ndarray, subjects: Sequence[tuple[int, Subject]], video: VideoSpan
) -> np.ndarray:
    """A frame [H, W, 3] with the boxes and outlined masks of targets.

    Raises:
        ValueError: if one of them does not fit into the frame.
    """
    height, width = pixels.shape[:2]
    pixels, crop = pixels.copy(), video.crop_xyxy
    for number, subject in subjects:
        if subject.target.mask_rle is not None:
            inside = mask_in_frame(subject.target, (width, height), crop)
            colour = np.array(_SUBJECTS[number % len(_SUBJECTS)])
            pixels[inside] = (0.65 * pixels[inside] + 0.35 * colour).astype(np.uint8)
            pixels[_edge(inside, max(1, width // 400))] = colour
    picture = Image.fromarray(pixels)
    _outline(picture, crop, _CROP)
    for number, subject in subjects:
        target = subject.target
        if target.bbox_xyxy is not None:
            box = box_in_frame(target.bbox_xyxy, target.box_space, (width, height), crop, video.size)
            if isinstance(box, BoxProblem):
                raise ValueError(f"box {list(target.bbox_xyxy)} ({target.box_space}): {box.value}")
            _outline(picture, box, _SUBJECTS[number % len(_SUBJECTS)])
    return np.asarray(picture)


def _edge(inside: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels [H, W] of a mask that are at most `thickness` from its outside."""
    inner = inside
    for _ in range(thickness):
        padded = np.pad(inner, 1)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~inner


def _outline(picture: Image.Image, box: Sequence[float] | None, colour: Colour) -> None:
    if box is not None:
        # As thick as three pixels of the page, whatever the size of the frame.
        thickness = max(1, round(max(picture.size) / 120))
        x0, y0, x1, y1 = (round(edge) for edge in box)
        corners = (x0, y0, max(x1 - 1, x0), max(y1 - 1, y0))
        ImageDraw.Draw(picture).rectangle(corners, outline=colour, width=thickness)


def _reference_tiles(clip_set: ClipSet, row: int, clip: Clip) -> list[Image.Image]:
    listed = [
        (number, subject, item) for number, subject in enumerate(clip.subjects) for item in subject.refs
    ]
    frames = FrameMemory()
    tiles = [_reference_tile(clip_set, row, *item, frames) for item in listed[:MAX_REFERENCES]]
    if len(listed) > MAX_REFERENCES:
        tiles.append(paragraph(f"and {len(listed) - MAX_REFERENCES} more", 16, FAINT, 120, 2))
    return tiles


def _reference_tile(
    clip_set: ClipSet,
    row: int,
    number: int,
    subject: Subject,
    reference: Reference,
    frames: FrameMemory,
    side: int = 190,
) -> Image.Image:
    colour = _SUBJECTS[number % len(_SUBJECTS)]
    try:
        picture = scaled(read_reference(clip_set, row, reference, frames), side, side)
    except Exception as error:  # noqa: BLE001, as for frames
        picture = error_text(_without_place(clip_set, row, error), side)
    details = [reference.pair, subject.kind, reference.box_space or "whole"]
    tile = captioned(picture, _name(subject), colour, side)
    return captioned(tile, " \u00b7 ".join(details), FAINT, side, frame=False)


def _name(subject: Subject) -> str:
    return subject.cls or subject.phrase or f"subject {subject.subject_id}"


def _without_place(clip_set: ClipSet, row: int, error: Exception) -> str:
    """What an error says beyond the row, which stands above it."""
    return str(error).removeprefix(f"{clip_set.place(row)}: ") or type(error).__name__
