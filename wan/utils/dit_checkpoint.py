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

from .weights import INDEX_SUFFIX, load_strict, read_state_dict

if TYPE_CHECKING:
    from easydict import EasyDict

    from wan.modules.model import WanModel

__all__ = [
    "DiTCheckpoint",
    "build_dit",
    "diffusers_config",
    "diffusers_key",
    "dit_arguments",
    "dit_state_dict_from_diffusers",
    "load_dit",
    "read_dit_checkpoint",
]

_STEM = "diffusion_pytorch_model"
_PREFIXES = ("pipe.", "dit.", "model.", "module.", "diffusion_model.", "_orig_mod.", "_fsdp_wrapped_module.")
_PROJECTOR = re.compile(r"blocks\.\d+\.input_mlp\.")

# diffusers -> upstream, for whole names of sub-modules (the inverse of diffusers' own conversion)
_TOP_LEVEL = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_IN_BLOCK = {
    "norm2": "norm3",  # diffusers counts the norms in the order of their use
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
    **{
        f"{theirs}.{layer}": f"{ours}.{name}"
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for layer, name in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}.items()
    },
    **{
        f"{theirs}.{norm}": f"{ours}.{norm}"
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for norm in ("norm_q", "norm_k")
    },
}

# what makes two models' weights interchangeable, by the configuration's names
_ARCHITECTURE = ("dim", "ffn_dim", "num_layers", "in_dim", "out_dim", "freq_dim", "text_dim", "patch_size")
_ARGUMENTS = (*_ARCHITECTURE, "num_heads", "text_len", "window_size", "qk_norm", "cross_attn_norm", "eps")


@dataclass(frozen=True)
class DiTCheckpoint:
    """Contents of a checkpoint of the diffusion transformer."""

    state_dict: dict[str, torch.Tensor]
    """Tensors under upstream's keys."""
    projectors: dict[str, torch.Tensor]
    """RefAlign's training-only `blocks.*.input_mlp.*`; usually empty."""
    config: dict[str, Any] | None
    """`WanModel` arguments stated by the config.json beside the weights; None without such a file."""
    files: list[Path]
    """The files that hold the tensors."""


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
    source = _resolve(Path(path))
    tensors = read_state_dict(source)
    stripped: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = _strip_prefixes(key)
        if name in stripped:
            raise ValueError(
                f"{source}: several tensors are named {name} once prefixes are removed; keep one model"
            )
        stripped[name] = tensor
    if any(key.startswith("condition_embedder.") for key in stripped):
        stripped = dit_state_dict_from_diffusers(stripped)
    projectors = {key: tensor for key, tensor in stripped.items() if _PROJECTOR.match(key)}
    weights = {key: tensor for key, tensor in stripped.items() if key not in projectors}
    return DiTCheckpoint(weights, projectors, _read_config(source.parent / "config.json"), _files(source))


def dit_state_dict_from_diffusers(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename diffusers' WanTransformer3DModel keys to upstream's; names that have no counterpart are kept."""
    return {_upstream_name(key): tensor for key, tensor in state_dict.items()}


def diffusers_key(key: str) -> str:
    """The name that diffusers' WanTransformer3DModel gives to a tensor of upstream's; foreign names are kept."""
    block = re.match(r"blocks\.\d+\.", key)
    start = block.group() if block else ""
    table = _IN_BLOCK if block else _TOP_LEVEL
    rest = key[len(start) :]
    if block and rest.split(".")[0] == "norm2":
        return f"{start}norm3.{rest.partition('.')[2]}"
    theirs = {ours: name for name, ours in table.items()}
    owner, _, parameter = rest.rpartition(".")
    if rest in theirs:
        return start + theirs[rest]
    return f"{start}{theirs[owner]}.{parameter}" if owner in theirs else key


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
    tensors = {
        key: tensor.to(device, _parameter_dtype(key, tensor, dtype, WanModel.float32_modules))
        for key, tensor in checkpoint.state_dict.items()
    }
    return load_strict(model, tensors, str(source)).eval()


def dit_arguments(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `WanModel` that a task's configuration holds."""
    return {name: cfg[name] for name in _ARGUMENTS}


def _resolve(path: Path) -> Path:
    """The file to read; a path that needs no choice is returned as it is."""
    if not path.is_dir():
        return path
    for pattern in (f"{_STEM}*{INDEX_SUFFIX}", f"{_STEM}*.safetensors"):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise _ambiguous(path, found)
    if (path / "transformer").is_dir():
        return _resolve(path / "transformer")
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pth", ".pt", ".bin"))
    if len(files) == 1:
        return files[0]
    if files:
        raise _ambiguous(path, files)
    raise ValueError(
        f"{path}: no transformer ({_STEM}*.safetensors) in this folder; check the path or download it"
    )


def _ambiguous(folder: Path, files: list[Path]) -> ValueError:
    names = ", ".join(file.name for file in files[:4]) + (" and more" if len(files) > 4 else "")
    return ValueError(f"{folder}: {len(files)} files may be the transformer ({names}); name the one to read")


def checkpoint_files(path: str | Path) -> list[Path]:
    """The files that `read_dit_checkpoint` would read, for naming and hashing them; empty if it would refuse."""
    try:
        source = _resolve(Path(path))
        return _files(source) if source.is_file() else []
    except (ValueError, KeyError, OSError):
        return []


def _files(source: Path) -> list[Path]:
    if not source.name.endswith(INDEX_SUFFIX):
        return [source]
    shards = json.loads(source.read_text(encoding="utf-8"))["weight_map"].values()
    return [source.parent / shard for shard in sorted(set(shards))]


def _strip_prefixes(key: str) -> str:
    while prefix := next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None):
        key = key[len(prefix) :]
    # wrappers also put their marks inside the names
    return key.replace("._orig_mod.", ".").replace("._fsdp_wrapped_module.", ".")


def _upstream_name(key: str) -> str:
    block = re.match(r"blocks\.\d+\.", key)
    start = block.group() if block else ""
    table = _IN_BLOCK if block else _TOP_LEVEL
    rest = key[len(start) :]
    if block and rest.split(".")[0] == "norm3":
        return f"{start}norm2.{rest.partition('.')[2]}"
    owner, _, parameter = rest.rpartition(".")
    if rest in table:
        return start + table[rest]
    return f"{start}{table[owner]}.{parameter}" if owner in table else key


def _read_config(path: Path) -> dict[str, Any] | None:
    """`WanModel` arguments from an upstream or a diffusers config.json."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a model's config.json holds a JSON object; download it again")
    stated = {key: value for key, value in content.items() if not key.startswith("_")}
    if "attention_head_dim" not in stated:
        return stated
    renamed = {"in_channels": "in_dim", "out_channels": "out_dim", "num_attention_heads": "num_heads"}
    config = {renamed.get(key, key): value for key, value in stated.items()}
    config["dim"] = config["num_heads"] * config.pop("attention_head_dim")
    config["qk_norm"] = config.get("qk_norm") is not None
    config["model_type"] = "t2v" if config.get("image_dim") is None else "i2v"
    return config


def _parameter_dtype(
    key: str, tensor: torch.Tensor, dtype: torch.dtype | None, float32_modules: tuple[str, ...]
) -> torch.dtype:
    if dtype is None:
        return tensor.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and not set(float32_modules).isdisjoint(key.split(".")) else dtype


def _architecture(weights: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
    """The configuration that these weights have, or None if they are not a Wan transformer's."""
    blocks = {int(match.group(1)) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))}
    names = (
        "patch_embedding.weight",
        "text_embedding.0.weight",
        "time_embedding.0.weight",
        "head.head.weight",
    )
    if not blocks or not {*names, "blocks.0.ffn.0.weight"} <= weights.keys():
        return None
    patch, text, time, head = (weights[name].shape for name in names)
    if len(patch) != 5 or any(len(shape) != 2 for shape in (text, time, head)):
        return None
    return {
        "dim": patch[0],
        "ffn_dim": weights["blocks.0.ffn.0.weight"].shape[0],
        "num_layers": max(blocks) + 1,
        "in_dim": patch[1],
        "out_dim": head[0] // (patch[2] * patch[3] * patch[4]),
        "freq_dim": time[1],
        "text_dim": text[1],
        "patch_size": tuple(patch[2:]),
    }


def _check_architecture(checkpoint: DiTCheckpoint, cfg: Mapping[str, Any], path: str | Path) -> None:
    wanted = {name: cfg[name] for name in _ARCHITECTURE} | {"patch_size": tuple(cfg["patch_size"])}
    found = _architecture(checkpoint.state_dict)
    task = next((name for name, known in WAN_CONFIGS.items() if known is cfg), None) or _tasks_of(wanted)
    task = task or "the model asked for"
    if any(
        key.startswith(("img_emb.", "condition_embedder.image_embedder.")) for key in checkpoint.state_dict
    ):
        raise ValueError(
            f"{path}: image-to-video weights, which are not supported yet; use text-to-video weights"
        )
    if found is None:
        raise ValueError(f"{path}: not the weights of a Wan transformer; use the file made for {task}")
    if found != wanted:
        known = _tasks_of(found)
        if known:
            raise ValueError(f"{path}: these weights fit {known}, not {task}; change the task or the file")
        differing = [
            f"{name} {found[name]} instead of {wanted[name]}"
            for name in wanted
            if found[name] != wanted[name]
        ]
        raise ValueError(
            f"{path}: these weights fit no known task ({task} was asked for: {', '.join(differing)})"
        )
    stated = (checkpoint.config or {}).get("num_heads", cfg["num_heads"])
    if stated != cfg["num_heads"]:
        raise ValueError(f"{path}: config.json says {stated} attention heads, {task} has {cfg['num_heads']}")


def _tasks_of(architecture: Mapping[str, Any]) -> str:
    """Names of the tasks with this architecture, for messages."""
    fitting = [
        task
        for task, cfg in WAN_CONFIGS.items()
        if all(
            tuple(cfg[name]) == architecture[name]
            if name == "patch_size"
            else cfg[name] == architecture[name]
            for name in _ARCHITECTURE
        )
    ]
    return ", ".join(fitting)
