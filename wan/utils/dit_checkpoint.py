"""Checkpoints of the diffusion transformer, in every layout in which they are published.

Upstream's single file and sharded index, RefAlign releases (prefixed keys, training-only projectors) and
folders in diffusers' layout all become one thing: tensors under upstream's keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wan.configs import WAN_CONFIGS

from .weights import (
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    SAFETENSORS_SUFFIX,
    index_shards,
    load_strict,
    read_state_dict,
)

if TYPE_CHECKING:
    from easydict import EasyDict

    from wan.modules.model import WanModel

DIT_STEM = "diffusion_pytorch_model"
_PREFIXES = ("pipe.", "dit.", "model.", "module.", "diffusion_model.", "_orig_mod.", "_fsdp_wrapped_module.")
_PROJECTOR = re.compile(r"blocks\.\d+\.input_mlp\.")
_OTHER_FAMILIES = {
    "image-to-video": ("img_emb.", "condition_embedder.image_embedder."),
    "VACE": ("vace_blocks.", "vace_patch_embedding."),
}

# upstream -> diffusers, for whole names of modules; the first table outside the blocks, the second in each
_TOP_LEVEL = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_IN_BLOCK = {
    "norm3": "norm2",  # diffusers counts the norms in the order of their use
    "norm2": "norm3",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
    **{
        f"{attention}.{layer}": f"{theirs}.{name}"
        for attention, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for layer, name in (
            *(("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")),
            *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
        )
    },
}
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
# Beside a weight of eight bits: its scale, by an older and a newer name, and what only says how it was made.
_SCALES = (".scale_weight", ".weight_scale")
_OF_QUANTISATION = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
_KEY = re.compile(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?")

# what makes two models' weights interchangeable, by the configuration's names
_ARCHITECTURE = ("dim", "ffn_dim", "num_layers", "in_dim", "out_dim", "freq_dim", "text_dim", "patch_size")
_ARGUMENTS = (*_ARCHITECTURE, "num_heads", "text_len", "window_size", "qk_norm", "cross_attn_norm", "eps")


@dataclass(frozen=True)
class DiTCheckpoint:
    """Contents of a checkpoint of the diffusion transformer.

    Attributes:
        state_dict: tensors under upstream's keys.
        projectors: RefAlign's training-only `blocks.*.input_mlp.*`; usually empty.
        config: `WanModel` arguments stated by the config.json beside the weights; None without such a file.
        files: those that hold the tensors.
    """

    state_dict: dict[str, torch.Tensor]
    projectors: dict[str, torch.Tensor]
    config: dict[str, Any] | None
    files: list[Path]


def read_dit_checkpoint(path: str | Path) -> DiTCheckpoint:
    """Read the weights of a diffusion transformer, whatever their layout.

    Args:
        path: a safetensors or PyTorch file, an index of shards, or a folder that holds either (a Wan
            checkpoint folder, a diffusers transformer folder, or a diffusers pipeline with a `transformer`
            folder).

    Returns:
        The tensors on the CPU in the files' own dtypes. The layout is recognised from the keys.

    Raises:
        ValueError: nothing readable is there, two tensors claim the same name, or config.json is no JSON
            object.
    """
    sources = _files_to_read(Path(path))
    source = sources[0]
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in (item for file in sources for item in read_state_dict(file).items()):
        name = _strip_prefixes(key)
        if name in tensors:
            raise ValueError(
                f"{source}: several tensors are named {name} once prefixes are removed; keep one model"
            )
        tensors[name] = tensor
    tensors = _unscaled(tensors)
    if any(key.startswith("condition_embedder.") for key in tensors):
        tensors = dit_state_dict_from_diffusers(tensors)
    projectors = {key: tensor for key, tensor in tensors.items() if _PROJECTOR.match(key)}
    weights = {key: tensor for key, tensor in tensors.items() if key not in projectors}
    return DiTCheckpoint(weights, projectors, _read_config(source.parent / "config.json"), _files(sources))


def dit_state_dict_from_diffusers(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename diffusers' WanTransformer3DModel keys to upstream's; names that have no counterpart are kept."""
    tables = [{theirs: ours for ours, theirs in table.items()} for table in (_TOP_LEVEL, _IN_BLOCK)]
    return {_renamed(key, *tables): tensor for key, tensor in state_dict.items()}


def diffusers_key(key: str) -> str:
    """The name that diffusers' WanTransformer3DModel gives to a tensor of upstream's; foreign names are kept."""
    return _renamed(key, _TOP_LEVEL, _IN_BLOCK)


def _renamed(key: str, top_level: Mapping[str, str], in_block: Mapping[str, str]) -> str:
    match = _KEY.fullmatch(key)
    assert match is not None
    block, module, parameter = match.groups(default="")
    return block + (in_block if block else top_level).get(module, module) + parameter


def diffusers_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of diffusers' WanTransformer3DModel for a text-to-video `WanModel` with these arguments.

    Raises:
        ValueError: diffusers has no such model.
    """
    if tuple(arguments["window_size"]) != (-1, -1) or not arguments["qk_norm"]:
        raise ValueError(
            "diffusers' WanTransformer3DModel has full attention with qk_norm only; use the upstream layout"
        )
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(arguments["patch_size"]),
        "num_attention_heads": arguments["num_heads"],
        "attention_head_dim": arguments["dim"] // arguments["num_heads"],
        "in_channels": arguments["in_dim"],
        "out_channels": arguments["out_dim"],
        **{name: arguments[name] for name in ("text_dim", "freq_dim", "ffn_dim", "num_layers")},
        "cross_attn_norm": arguments["cross_attn_norm"],
        "qk_norm": "rms_norm_across_heads",
        "eps": arguments["eps"],
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
    }


def load_dit(
    path: str | Path, cfg: EasyDict, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> WanModel:
    """Build the model that a configuration describes and load a checkpoint into it, strictly.

    Args:
        path: as in `read_dit_checkpoint`.
        cfg: an entry of `WAN_CONFIGS`.
        device: where the parameters go.
        dtype: dtype of the parameters; None keeps the file's. With a half dtype the parts that compute in
            float32 (`WanModel.float32_modules`) keep float32 parameters.

    Returns:
        The model in evaluation mode, its parameters requiring gradients.

    Raises:
        ValueError: the weights are of another architecture (the message says which known task they fit), or
            tensors are missing, unexpected or misshapen.
    """
    return build_dit(read_dit_checkpoint(path), cfg, path, device=device, dtype=dtype)


def build_dit(
    checkpoint: DiTCheckpoint,
    cfg: EasyDict,
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> WanModel:
    """What `load_dit` does with a checkpoint that is already read; `source` is what its errors name."""
    from wan.modules.model import WanModel

    _check_architecture(checkpoint, cfg, source)
    with torch.device("meta"):
        model = WanModel(**dit_arguments(cfg))
    is_half = dtype in (torch.float16, torch.bfloat16)

    def stored_dtype(key: str) -> torch.dtype | None:
        return (
            torch.float32
            if is_half and not set(WanModel.float32_modules).isdisjoint(key.split("."))
            else dtype
        )

    tensors = {
        key: tensor.to(device, stored_dtype(key) or tensor.dtype)
        for key, tensor in checkpoint.state_dict.items()
    }
    return load_strict(model, tensors, str(source), may_be_zero=("head.head.weight",)).eval()


def dit_arguments(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `WanModel` that a task's configuration holds."""
    return {name: cfg[name] for name in _ARGUMENTS}


def checkpoint_files(path: str | Path) -> list[Path]:
    """The files that `read_dit_checkpoint` would read, for naming and hashing them; empty if it would refuse."""
    try:
        sources = _files_to_read(Path(path))
        return _files(sources) if all(source.is_file() for source in sources) else []
    except (ValueError, OSError):
        return []


def _files_to_read(path: Path) -> list[Path]:
    """The file or index that a path stands for, or all shards of a model without an index."""
    if not path.is_dir():
        return [path]
    for suffix in (INDEX_SUFFIX, SAFETENSORS_SUFFIX):
        if found := sorted(path.glob(f"{DIT_STEM}*{suffix}")):
            return _one_model(path, found)
    if (path / "transformer").is_dir():
        return _files_to_read(path / "transformer")
    suffixes = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)
    return _one_model(path, sorted(file for file in path.iterdir() if file.suffix in suffixes))


def _one_model(folder: Path, files: list[Path]) -> list[Path]:
    if not files:
        raise ValueError(
            f"{folder}: no transformer ({DIT_STEM}*.safetensors) in this folder; check the path or download it"
        )
    shards = [_SHARD.fullmatch(file.name) for file in files]
    if all(shards) and len({(shard["stem"], shard["count"]) for shard in shards if shard}) == 1:
        here, count = {int(shard["number"]) for shard in shards if shard}, int(files[0].stem[-5:])
        absent = [f"{number:05d}" for number in range(1, count + 1) if number not in here]
        if absent:
            raise ValueError(
                f"{folder}: shard {', '.join(absent[:4])} of {count:05d} is missing; download it"
            )
        return files
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4]) + (" and more" if len(files) > 4 else "")
        raise ValueError(
            f"{folder}: {len(files)} files may be the transformer ({names}); name the one to read"
        )
    return files


def _files(sources: list[Path]) -> list[Path]:
    if not sources[0].name.endswith(INDEX_SUFFIX):
        return sources
    return [sources[0].parent / shard for shard in sorted(set(index_shards(sources[0]).values()))]


def _unscaled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of eight bits times their scales, as ComfyUI stores them, in bfloat16; other tensors as they are."""
    scales = {key: tensor for key, tensor in tensors.items() if key.endswith(_SCALES)}
    if not scales:
        return tensors
    left_out = (*_SCALES, *_OF_QUANTISATION)
    plain = {key: tensor for key, tensor in tensors.items() if not key.endswith(left_out)}
    for key, scale in scales.items():
        weight = f"{key.rpartition('.')[0]}.weight"
        if weight in plain and plain[weight].itemsize == 1 and plain[weight].is_floating_point():
            plain[weight] = (plain[weight].float() * scale.float()).to(torch.bfloat16)
    return plain


def _strip_prefixes(key: str) -> str:
    while prefix := next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None):
        key = key[len(prefix) :]
    # wrappers also put their marks inside the names
    return key.replace("._orig_mod.", ".").replace("._fsdp_wrapped_module.", ".")


def _read_config(path: Path) -> dict[str, Any] | None:
    """`WanModel` arguments from an upstream or a diffusers config.json."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stated = {key: value for key, value in content.items() if not key.startswith("_")}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON object; download it again") from error
    if "attention_head_dim" not in stated:
        return stated
    renamed = {"in_channels": "in_dim", "out_channels": "out_dim", "num_attention_heads": "num_heads"}
    config = {renamed.get(key, key): value for key, value in stated.items()}
    config["dim"] = config["num_heads"] * config.pop("attention_head_dim")
    config["qk_norm"] = config.get("qk_norm") is not None
    config["model_type"] = "t2v" if config.get("image_dim") is None else "i2v"
    return config


def _architecture(weights: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
    """The configuration that these weights have, or None if they are not a Wan transformer's."""
    try:
        width, channels, *patch = weights["patch_embedding.weight"].shape
        frames, rows, columns = patch
        return {
            "dim": width,
            "ffn_dim": len(weights["blocks.0.ffn.0.weight"]),
            "num_layers": len({key.split(".")[1] for key in weights if key.startswith("blocks.")}),
            "in_dim": channels,
            "out_dim": len(weights["head.head.weight"]) // (frames * rows * columns),
            "freq_dim": weights["time_embedding.0.weight"].shape[1],
            "text_dim": weights["text_embedding.0.weight"].shape[1],
            "patch_size": (frames, rows, columns),
        }
    except (LookupError, ValueError):
        return None


def _check_architecture(checkpoint: DiTCheckpoint, cfg: Mapping[str, Any], path: str | Path) -> None:
    wanted, found = _stated_architecture(cfg), _architecture(checkpoint.state_dict)
    tasks = [name for name, known in WAN_CONFIGS.items() if known is cfg] or _tasks_of(wanted)
    task = ", ".join(tasks) or "the model asked for"
    for kind, prefixes in _OTHER_FAMILIES.items():
        if any(key.startswith(prefixes) for key in checkpoint.state_dict):
            raise ValueError(
                f"{path}: {kind} weights, which are not supported yet; use text-to-video weights"
            )
    if found is None:
        raise ValueError(f"{path}: not the weights of a Wan transformer; use the file made for {task}")
    if found != wanted:
        known = ", ".join(_tasks_of(found))
        if known:
            raise ValueError(f"{path}: these weights fit {known}, not {task}; change the task or the file")
        differing = ", ".join(
            f"{name} {found[name]} instead of {value}"
            for name, value in wanted.items()
            if found[name] != value
        )
        raise ValueError(f"{path}: these weights fit no known task ({task} was asked for: {differing})")
    stated = (checkpoint.config or {}).get("num_heads", cfg["num_heads"])
    if stated != cfg["num_heads"]:
        raise ValueError(f"{path}: config.json says {stated} attention heads, {task} has {cfg['num_heads']}")


def _stated_architecture(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {name: cfg[name] for name in _ARCHITECTURE} | {"patch_size": tuple(cfg["patch_size"])}


def _tasks_of(architecture: Mapping[str, Any]) -> list[str]:
    return [task for task, cfg in WAN_CONFIGS.items() if _stated_architecture(cfg) == architecture]
