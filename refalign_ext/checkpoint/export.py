"""From a training checkpoint to the files that others load: upstream's layout, or a diffusers folder.

Tensors go from the checkpoint to the output one after another, so the memory needed is that of the largest one (and of
its change in float32, where an adapter is merged), and no device, process group or optimizer state is touched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from huggingface_hub import split_state_dict_into_shards_factory
from tqdm import tqdm

from refalign_ext.atomic_io import atomic_folder
from refalign_ext.backbone import diffusers_config, diffusers_key
from refalign_ext.checkpoint.adapters import (
    base_note,
    files_sha256,
    write_diffusers_adapter,
    write_peft_adapter,
)
from refalign_ext.checkpoint.checkpointer import is_checkpoint
from refalign_ext.checkpoint.reading import open_dit, read_trained_adapter
from refalign_ext.checkpoint.weights import Weight, write_safetensors

Layout = Literal["upstream", "diffusers"]
_STEM = "diffusion_pytorch_model"


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    layout: Layout = "upstream",
    projectors: bool = False,
    raw: bool = False,
    base: Path | None = None,
    shard_gigabytes: float = 5.0,
) -> list[Path]:
    """Write a checkpoint's weights as safetensors with their config.json; returns the files with the tensors.

    An adapter is merged into its base, whose path and SHA-256 (see `adapters.files_sha256`) the files' metadata then
    names. The folder appears under its name only when it is complete.

    Args:
        checkpoint: a step-* folder of train_refalign.py.
        out: folder to write; must not exist, or be empty.
        layout: `upstream` (Wan2.1's names) or `diffusers` (WanTransformer3DModel's names and configuration).
        projectors: put the projectors beside the DiT's tensors, as `blocks.{i}.input_mlp.proj.{0,2}.weight`.
        raw: the trained weights, where the checkpoint also has their moving average.
        base: the model that the checkpoint's adapter belongs to; None: the one that its settings name.
        shard_gigabytes: largest size of a file in units of 10^9 bytes; more is split over several files with an index.

    Raises:
        ValueError: if the checkpoint is damaged or has no such parts, the base is not there, or the folder is in use.
        OSError: if the folder cannot be written.
    """
    _check_folders(checkpoint, out)
    dit = open_dit(checkpoint, raw=raw, base=base)
    weights, config = dit.weights, dit.config
    if "patch_embedding.weight" not in weights:
        raise ValueError(
            f"{checkpoint} holds only what was trained, not a whole DiT: merge it into its base model"
        )
    if projectors and not dit.projectors:
        raise ValueError(f"{checkpoint} has no projectors: export it with --no-projectors")
    if layout == "diffusers":
        try:
            config = diffusers_config(config)
        except KeyError as error:
            raise ValueError(
                f"{checkpoint}/config.json lacks {error}: use the file the training wrote"
            ) from error
        weights = {diffusers_key(name): weight for name, weight in weights.items()}
    if projectors:
        weights = weights | dit.projectors
    note = {} if dit.base is None else base_note(str(dit.base.path), files_sha256(dit.base.files))
    with atomic_folder(out) as folder:
        files = _write_shards(folder, weights, note, round(shard_gigabytes * 1e9))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return [out / file for file in files]


def export_adapter(
    checkpoint: Path, out: Path, *, layout: Layout = "upstream", raw: bool = False, base: Path | None = None
) -> list[Path]:
    """Write the adapter of a LoRA run's checkpoint alone; returns the file with the tensors.

    Arguments and errors as in `export_checkpoint`; `upstream` is peft's folder for a WanModel, `diffusers` a file for
    WanTransformer3DModel.load_lora_adapter. The base is recorded with its SHA-256 where it is at hand.
    """
    _check_folders(checkpoint, out)
    adapter = read_trained_adapter(checkpoint, raw=raw, base=base)
    write = write_diffusers_adapter if layout == "diffusers" else write_peft_adapter
    with atomic_folder(out) as folder:
        file = write(folder, adapter)
    return [out / file.name]


def _check_folders(checkpoint: Path, out: Path) -> None:
    if not is_checkpoint(checkpoint):
        raise ValueError(f"{checkpoint}: no complete training checkpoint; name a step-* folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is in use: choose another folder or empty it")


def _write_shards(
    folder: Path, weights: Mapping[str, Weight], note: Mapping[str, str], limit: int
) -> list[str]:
    """Write `weights` as one file or, beyond `limit` bytes, as several with an index."""
    plan = split_state_dict_into_shards_factory(
        dict(weights),
        get_storage_size=lambda weight: weight.size_in_bytes,
        filename_pattern=f"{_STEM}{{suffix}}.safetensors",
        max_shard_size=limit,
    )
    with tqdm(total=plan.metadata["total_size"], desc="exporting", unit="B", unit_scale=True) as bar:
        for file, names in plan.filename_to_tensors.items():
            write_safetensors(folder / file, {name: weights[name] for name in names}, note, bar.update)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{_STEM}.safetensors.index.json").write_text(text, encoding="utf-8")
    return list(plan.filename_to_tensors)
