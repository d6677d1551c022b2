"""LoRA adapters outside a checkpoint: the model that they belong to, and their files for peft and diffusers.

peft's keys are those of an adapter (see `refalign_ext.lora`) behind `base_model.model.`; diffusers has its own names of the
layers, and no alpha.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from refalign_ext.atomic_io import atomic_open, atomic_path
from refalign_ext.backbone import file_sha256
from refalign_ext.lora import ADAPTER_KEY, check_adapter, shapes_of
from refalign_ext.tasks import TASKS

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PEFT_PREFIX = "base_model.model."
_TO_DIFFUSERS = (
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.([qkv])$", r".to_\1"),
    (r"\.o$", ".to_out.0"),
    (r"\.ffn\.0$", ".ffn.net.0.proj"),
    (r"\.ffn\.2$", ".ffn.net.2"),
    (r"^text_embedding\.0$", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2$", "condition_embedder.text_embedder.linear_2"),
)


@dataclass(frozen=True)
class Adapter:
    """An adapter without its model: float tensors `<module>.lora_A.weight` and `.lora_B.weight`, and its scale.

    Attributes:
        base: the model that it was trained on, as the run's settings name it.
        base_sha256: of that model's files, see `files_sha256`; None where they are not at hand.
    """

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    base: str | None = None
    base_sha256: str | None = None


def adapter_scale_of(settings: Mapping[str, Any], source: Path) -> tuple[int, float]:
    """(rank, alpha) that a run's settings name; `source` is what the error names.

    Raises:
        ValueError: if they name none.
    """
    rank, alpha = settings.get("lora_rank"), settings.get("lora_alpha", 0)
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise ValueError(
            f"checkpoint {source} holds an adapter, and its settings have no lora_rank and lora_alpha: use another copy"
        )
    return rank, float(alpha or rank)


def base_named_by(settings: Mapping[str, Any]) -> Path | None:
    """The model that a run with these settings started from; None: random weights."""
    if settings.get("from_scratch"):
        return None
    task = TASKS.get(settings.get("task", ""))
    named = settings.get("dit_ckpt") or settings.get("ckpt_dir") or (task and task.bundled)
    return None if named is None else Path(named)


def require_base(path: Path, settings: Mapping[str, Any], base: Path | None) -> Path:
    """Where the base of the adapter in checkpoint `path` lies: `base` if given, else what its settings say.

    Raises:
        ValueError: if it is not there, with the command that helps.
    """
    remedy = f"python -m refalign_ext export {path} --base MODEL --out FOLDER"
    if base is not None and not base.exists():
        raise ValueError(f"--base {base} does not exist: name the model that {path} was trained on")
    found = base or base_named_by(settings)
    if found is None:
        raise ValueError(
            f"{path} is an adapter of random weights: name the model it belongs to with {remedy}"
        )
    if not found.exists():
        raise ValueError(
            f"{path} is an adapter of {found}, which is not here (relative paths start where the training ran): merge it "
            f"with {remedy}"
        )
    if found.resolve() == path.resolve():
        raise ValueError(f"{path} is an adapter and cannot be its own base: name another with {remedy}")
    return found


def files_sha256(files: Sequence[Path]) -> str:
    """SHA-256 of a file; of several, that of their digests in hexadecimal, in order of the names."""
    digests = [file_sha256(file) for file in sorted(files, key=lambda file: file.name)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def write_peft_adapter(folder: Path, adapter: Adapter) -> Path:
    """Write an adapter as `PeftModel.from_pretrained(wan_model, folder)` takes it; returns the file with the tensors.

    The configuration is written last: a folder that has it is complete.

    Raises:
        ValueError: if the tensors are no adapter of this rank.
        OSError: if the folder cannot be written.
    """
    from peft import LoraConfig

    layers = check_adapter(shapes_of(adapter.tensors), adapter.rank)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=sorted(layers),
        base_model_name_or_path=adapter.base,
        inference_mode=True,
    ).to_dict()
    listed = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / ADAPTER_CONFIG_FILE).unlink(missing_ok=True)
    tensors = {_PEFT_PREFIX + key: tensor for key, tensor in adapter.tensors.items()}
    _write_safetensors(folder / ADAPTER_FILE, tensors, adapter)
    with atomic_open(folder / ADAPTER_CONFIG_FILE) as file:
        file.write((json.dumps(listed, indent=2, sort_keys=True) + "\n").encode("utf-8"))
    return folder / ADAPTER_FILE


def write_diffusers_adapter(folder: Path, adapter: Adapter) -> Path:
    """Write an adapter as `WanTransformer3DModel.load_lora_adapter(folder, weight_name=...)` takes it; returns the file.

    The scale is worked into B, as those files have no alpha.

    Raises:
        ValueError: if a layer has no counterpart in diffusers.
        OSError: if the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for key, tensor in adapter.tensors.items():
        match = ADAPTER_KEY.match(key)
        layer = match["module"]
        for pattern, replacement in _TO_DIFFUSERS:
            layer = re.sub(pattern, replacement, layer)
        if layer == match["module"]:
            raise ValueError(
                f"diffusers has no counterpart of the adapter's layer {layer}: merge the adapter instead"
            )
        value = tensor * (adapter.alpha / adapter.rank) if match["factor"] == "B" else tensor
        tensors[f"transformer.{layer}.lora_{match['factor']}.weight"] = value
    return _write_safetensors(folder / DIFFUSERS_FILE, tensors, adapter)


def base_note(base: str | None, sha256: str | None) -> dict[str, str]:
    """What a safetensors file's metadata says of the model that an adapter was trained on."""
    note = {"base_model": base, "base_model_sha256": sha256}
    return {name: value for name, value in note.items() if value is not None}


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], adapter: Adapter) -> Path:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    note = {"format": "pt", **base_note(adapter.base, adapter.base_sha256)}
    try:
        with atomic_path(path) as unfinished:
            save_file(
                {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}, unfinished, note
            )
            # The library keeps files from everyone else.
            unfinished.chmod(path.parent.stat().st_mode & 0o666)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}): free some space") from error
    return path
