"""`data cache`: runs the encoders over every row of a clip set before training and stores what they give."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from refalign_ext.config import TrainConfig
from refalign_ext.data.cache.files import (
    HEADER,
    CacheHeader,
    ChunkRecord,
    chunk_path,
    open_chunk,
    read_header,
    write_chunk,
    write_header,
)
from refalign_ext.data.cache.names import cache_fingerprint, differences, features_name, text_name
from refalign_ext.data.cache.rows import LoadedRow, RowLoader
from refalign_ext.data.clip_set import open_clip_set
from refalign_ext.data.pieces import Share
from refalign_ext.data.pixels import from_uint8
from refalign_ext.data.sampling.sample_spec import Sampling
from refalign_ext.data.worker_pool import run_each
from refalign_ext.encoders import Encoders

logger = logging.getLogger(__name__)

_EXAMPLES = 10


@dataclass
class CacheSummary:
    """Rows and bytes of a share, chunks made and kept, failures of variants and whole rows, and why, of the first few."""

    rows: int = 0
    made: int = 0
    kept: int = 0
    failures: int = 0
    bytes: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, record: ChunkRecord, path: Path) -> None:
        self.rows += len(record.rows)
        self.bytes += path.stat().st_size
        self.failures += len(record.failures)
        self.examples = [*self.examples, *record.failures.values()][:_EXAMPLES]


def build_cache(
    config: TrainConfig,
    data: str | Path,
    folder: Path,
    *,
    sampling: Sampling,
    device: torch.device,
    share: Share | None = None,
    workers: int = 0,
    dtype: str = "float32",
    chunk_rows: int = 32,
    retry_failed: bool = False,
) -> CacheSummary:
    """Makes a cache or goes on with one; nothing is loaded onto the device if this share of it is complete.

    Args:
        config: the run that the cache is for: its task, checkpoint folder and teacher count.
        data: a manifest, or a folder that `data materialise` packed.
        sampling: the run's; its `clip_variants` must be above 0.
        share: the chunks to make; None: as torchrun's environment says, else all.
        dtype: of latents and teacher features; "bfloat16" halves the files and rounds what training sees.
        chunk_rows: rows of a chunk: what a run that is killed loses at most, and holds in memory.
        retry_failed: make chunks again in which something could not be loaded.

    Raises:
        ValueError: for settings and files that do not fit, or if `folder` holds a cache of something else.
        OSError: if `folder` cannot be written.
    """
    loader = RowLoader(open_clip_set(data), sampling)
    encoders = Encoders(config, device, dit=False, cached_prompts=0)
    fingerprint = cache_fingerprint(sampling, **encoders.fingerprint(), dtype=dtype)
    header = CacheHeader(fingerprint, len(loader.clip_set), chunk_rows)
    share = share or Share.from_environment()
    return fill_cache(
        loader, folder, header, encoders, share=share, workers=workers, retry_failed=retry_failed
    )


def fill_cache(
    loader: RowLoader,
    folder: Path,
    header: CacheHeader,
    encoders: Encoders,
    *,
    share: Share,
    workers: int = 0,
    retry_failed: bool = False,
) -> CacheSummary:
    """Makes this share's chunks that are missing, damaged or of rows that have changed; see `build_cache`."""
    folder.mkdir(parents=True, exist_ok=True)
    _require_own_folder(folder, header)
    write_header(folder, header)
    summary, todo = CacheSummary(), []
    mine = share.take(range(header.chunks))
    for number in tqdm(mine, "looking for finished chunks", unit="chunk", disable=None, delay=2):
        record = _finished_chunk(folder, number, header, loader)
        if record is None or (retry_failed and record.failures):
            todo.append(number)
        else:
            summary.kept += 1
            summary.add(record, chunk_path(folder, number))
    dtype = getattr(torch, header.fingerprint["settings"]["dtype"])
    rows = [row for number in todo for row in header.chunk(number)]
    with closing(run_each(loader, rows, workers=workers, description="caching", unit="row")) as stream:
        for number in todo:
            chunk = _ChunkEncoder(encoders, dtype)
            for row in header.chunk(number):
                chunk.add(loader.clip_set.place(row), next(stream)[1])
            record = ChunkRecord(header.fingerprint, chunk.rows, chunk.failures)
            write_chunk(folder, number, chunk.tensors, record)
            summary.made += 1
            summary.add(record, chunk_path(folder, number))
    return summary


class _ChunkEncoder:
    """Encodes the rows of a chunk and collects their tensors on the CPU."""

    def __init__(self, encoders: Encoders, dtype: torch.dtype) -> None:
        self.encoders, self.dtype = encoders, dtype
        self.tensors: dict[str, Tensor] = {}
        self.rows: list[tuple[str, str]] = []
        self.failures: dict[str, str] = {}
        # Every run may ask for these: dropped text, and the negative prompt of previews.
        self._add_prompts(("", encoders.task.sample_neg_prompt))

    @torch.no_grad()
    def add(self, place: str, row: LoadedRow) -> None:
        """Encodes a row; `place` is what errors about it start with."""
        if row.clip_id and any(row.clip_id == other for other, _ in self.rows):
            raise ValueError(f"{place}: id {row.clip_id!r} is used twice: `data check` names all such rows")
        self.rows.append((row.clip_id, row.digest))
        self.failures |= row.failures
        self._add_prompts(row.prompts)
        for name, levels in row.pixels.items():
            pixels = from_uint8(torch.from_numpy(levels))  # [3, T, H, W] or [3, H, W]
            is_image = pixels.ndim == 3
            found = {name: self.encoders.vae.encode([pixels[:, None] if is_image else pixels])[0]}
            if is_image and self.encoders.features is not None:
                found[features_name(name)] = self.encoders.features(pixels[None])[0]
            if all(tensor.isfinite().all() for tensor in found.values()):
                self.tensors |= {name: tensor.to("cpu", self.dtype) for name, tensor in found.items()}
            else:
                self.failures[name] = f"{place} ({row.clip_id}): what the encoders give is not finite"

    @torch.no_grad()
    def _add_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            name = text_name(prompt)
            if name not in self.tensors:
                # The encoder works in this type: nothing is lost.
                features = self.encoders.encode_text([prompt])[0].to(self.encoders.task.t5_dtype)
                self.tensors[name] = features.cpu()


def _require_own_folder(folder: Path, header: CacheHeader) -> None:
    """Raises ValueError if the folder holds a cache that was made from something else."""
    if not (folder / HEADER).exists():
        return
    old = read_header(folder)
    found = differences(old.fingerprint, header.fingerprint)
    found = found or differences(header.fingerprint, old.fingerprint)
    if old.chunk_rows != header.chunk_rows:
        found.append(f"chunk_rows {old.chunk_rows}, this run asks for {header.chunk_rows}")
    if found:
        raise ValueError(
            f"--out {folder} holds another cache: {'; '.join(found)}: give another folder or delete this one"
        )


def _finished_chunk(folder: Path, number: int, header: CacheHeader, loader: RowLoader) -> ChunkRecord | None:
    """The record of a chunk that need not be made again, or None."""
    path = chunk_path(folder, number)
    if not path.exists():
        return None
    try:
        record = open_chunk(path).record
    except ValueError as error:
        logger.warning("making a chunk again: %s", error)
        return None
    rows = [loader.identify(row) for row in header.chunk(number)]
    return record if record.fingerprint == header.fingerprint and record.rows == rows else None
