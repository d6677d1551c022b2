"""Phantom-Data's two parquet files in their published form, with the quirks that real ones have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Cell = str | Mapping[str, Any]


def seen(vid: str, share: float | str, box: Sequence[float], cls: str = "person") -> dict[str, Any]:
    """An entry of `obj_from_tgt_video`: its box is flat."""
    return {"vid": vid, "frame_idx": share, "bbox_loc": list(box), "bbox_cls": cls}


def referred(
    vid: str, share: float | str, box: Sequence[float], score: float = 0.9, cls: str = "person"
) -> list[dict[str, Any]]:
    """An entry of `refer_result`: a list of its own, with a box in a list."""
    return [{"vid": vid, "frame_idx": share, "bbox_loc": [list(box)], "bbox_cls": cls, "scores": [score]}]


def pair(targets: Sequence[Any], references: Sequence[Any]) -> dict[str, Any]:
    """What stands under one phrase."""
    return {"obj_from_tgt_video": list(targets), "refer_result": list(references)}


def write_pairs(
    path: Path, rows: Sequence[tuple[str | None, str | None, Any]], key: str = "video_id"
) -> Path:
    """Rows of (vid, caption, cross_pair): one row group, `cross_pair` as a string of JSON unless it is one already."""
    cells = [cell if isinstance(cell, str) or cell is None else json.dumps(cell) for _, _, cell in rows]
    table = pa.table(
        {
            key: pa.array([row[0] for row in rows], pa.string()),
            "video_caption": pa.array([row[1] for row in rows], pa.string()),
            "cross_pair": pa.array(cells, pa.string()),
        }
    )
    pq.write_table(table, path, row_group_size=max(len(rows), 1))
    return path


def info_row(
    vid: str, size: tuple[int, int] = (1280, 720), frames: int = 300, fps: float = 30.0, **other: Any
) -> dict[str, Any]:
    """A row of the meta info."""
    row = {
        "vid": vid,
        "url": "https://example.com/watch",
        "num_frames": frames,
        "fps": fps,
        "width": size[0],
        "height": size[1],
        "duration": frames / fps,
        "aesthetic_score": 5.0,
        "motion_score": 3.5,
        "clarity_score": 0.9,
    }
    return row | other


def write_info(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows of `info_row`, all with the same columns."""
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    return path
