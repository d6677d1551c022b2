"""Training data from manifests and packed folders of clips, with or without a cache of what the encoders give."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refalign_ext.config import TrainConfig
from refalign_ext.data.batch import Source
from refalign_ext.data.cache.files import HEADER, default_folder, read_header
from refalign_ext.data.cache.names import cache_fingerprint
from refalign_ext.data.cache.reader import CachedText, LatentCache
from refalign_ext.data.clip_set import open_clip_set
from refalign_ext.data.loading.source import ClipSource
from refalign_ext.data.sampling.buckets import make_buckets
from refalign_ext.data.sampling.sample_spec import Sampling
from refalign_ext.data.sampling.split import Split
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.encoders import Encoders, token_stride
from refalign_ext.training.data_source import Preview, TrainingData
from refalign_ext.training.previews import video_preview
from refalign_ext.training.run_log import RunLog
from refalign_ext.training.trainer import Trainer

if TYPE_CHECKING:
    from easydict import EasyDict

logger = logging.getLogger(__name__)


class ClipData:
    """The clips of `--data`: the row of the table of data sources."""

    def accepts(self, config: TrainConfig) -> bool:
        return config.data is not None

    def complete(self, config: TrainConfig) -> TrainConfig:
        """With the numbers of variants that the cache has, where the configuration leaves them open."""
        require_clip_sets(config)
        folders, sampling = cache_folders(config), config.sampling
        if folders:
            stored = read_header(folders[0]).fingerprint.get("settings", {})
            for name in ("clip_variants", "reference_variants"):
                sampling = replace(sampling, **{name: getattr(sampling, name) or stored.get(name, 0)})
        return replace(config, sampling=sampling)

    def open(self, config: TrainConfig, encoders: Encoders, parallel: Parallel) -> TrainingData:
        sampling = sampling_of(config, encoders.task)
        caches = open_caches(config, sampling, encoders, parallel)
        training, validation = _clip_sources(config, sampling, encoders, caches, parallel)
        # With a cache, the text encoder is loaded only if a prompt is not in it.
        cached = CachedText(caches, encoders.device, lambda: encoders.encode_text) if caches else None
        return TrainingData(training, validation, cached or encoders.encode_text)

    def make_preview(self, trainer: Trainer, encoders: Encoders, log: RunLog) -> Preview | None:
        return None if trainer.validation is None else video_preview(trainer, encoders, log)


CLIP_DATA = ClipData()


def sampling_of(config: TrainConfig, task: EasyDict) -> Sampling:
    """What samples take of clips, with the task's own size, length and rate where nothing else is set, or a ValueError."""
    settings = dict(vars(config.sampling))
    frames, ratios = settings.pop("bucket_frames"), settings.pop("bucket_ratios")
    stride = (task.vae_stride[0], *token_stride(task))
    buckets = make_buckets(task.size, frames or (task.frame_num,), stride, ratios)
    settings["fps"] = None if settings["stride"] > 1 else settings["fps"] or float(task.sample_fps)
    return Sampling(buckets=buckets, seed=config.seed, **settings)


def cache_folders(config: TrainConfig) -> list[Path]:
    """The caches of `data`, named or where `data cache` puts them; ValueError unless there is one for each set or none."""
    if config.data is None or config.cache == "off":
        return []
    data = config.data.split(",")
    if config.cache is not None:
        folders = [Path(folder) for folder in config.cache.split(",")]
        if len(data) != len(folders):
            raise ValueError(
                f"--cache names {len(folders)} folders and --data {len(data)} sets: give one for each"
            )
        return folders
    folders = [default_folder(Path(path)) for path in data]
    found = [folder for folder in folders if (folder / HEADER).is_file()]
    if 0 < len(found) < len(folders):
        missing = next(folder for folder in folders if folder not in found)
        raise ValueError(
            f"{found[0]} is a cache, but {missing} is not there: make it with `data cache`, or use --cache off"
        )
    return found


def require_clip_sets(config: TrainConfig) -> None:
    """ValueError if `data` or `validation_data` cannot be opened: asked before anything large is loaded."""
    for flag, paths in (("--data", config.data), ("--validation_data", config.validation_data)):
        for path in [] if paths is None else paths.split(","):
            try:
                open_clip_set(path)
            except ValueError as error:
                raise ValueError(f"{flag}: {error}") from None


def open_caches(
    config: TrainConfig, sampling: Sampling, encoders: Encoders, parallel: Parallel
) -> list[LatentCache]:
    """The caches of `data`, if there are some; ValueError unless they are of its rows, models and settings."""
    folders = cache_folders(config)
    if not folders:
        return []

    def open_all() -> list[LatentCache]:
        expected = cache_fingerprint(sampling, **encoders.fingerprint())
        caches = [LatentCache(folder, expected) for folder in folders]
        for cache, path in zip(caches, config.data.split(","), strict=True):
            cache.check_rows(open_clip_set(path))
            logger.info("using the cache %s: %d clips, %d failures", cache.folder, len(cache), cache.failures)
        return caches

    # Digests of all weights, the headers of all files and a look at every row take a while: one rank does it.
    return parallel.broadcast_from_rank0(open_all)


def _clip_sources(
    config: TrainConfig,
    sampling: Sampling,
    encoders: Encoders,
    caches: list[LatentCache],
    parallel: Parallel,
) -> tuple[Source, Source | None]:
    """Samples of `data`, and of `validation_data` or the share of `data` that is kept for validation."""
    assert config.data is not None
    size, share = parallel.sizes.data, config.validation_share

    def source(paths: str, split: Split, workers: int, **options: Any) -> Source:
        return ClipSource(
            [open_clip_set(path) for path in paths.split(",")],
            sampling,
            encode=encoders.vae.encode,
            features=encoders.features,
            device=parallel.device,
            split=split,
            data_rank=parallel.data_rank,
            data_size=size,
            workers=workers,
            max_bad_share=config.max_bad_share,
            fallback_dir=Path(config.out) / "clip_indexes",
            tries_bad_again=parallel.is_main,
            **options,
        )

    training = source(
        config.data,
        Split(share, config.seed, "train") if share else Split(),
        config.data_workers,
        caches=caches,
        mix=config.data_mix or None,
        schedule=config.data_schedule,
        total=config.steps * config.batch_size * size * config.accumulation(size),
        batch_size=config.batch_size,
    )
    # Validation takes a few clips now and then, without workers.
    if config.validate_every and config.validation_data is not None:
        return training, source(config.validation_data, Split(), 0)
    if config.validate_every and share:
        return training, source(config.data, Split(share, config.seed, "validation"), 0, caches=caches)
    return training, None
