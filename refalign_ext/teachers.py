"""Frozen vision models whose patch features the reference tokens are aligned to (paper eq. 6).

Every teacher maps images [K, 3, H, W] in [-1, 1] to features [K, h*w, D] on the grid (h, w) of the diffusion
transformer. `TEACHERS` is the table of them: a new teacher is a `TeacherEntry` there. transformers is imported only when
a teacher is loaded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from refalign_ext.errors import one_line

logger = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _single(size: int | Sequence[int]) -> int:
    """A patch or image size that a configuration may give as one number or as a pair of equal ones."""
    values = {size} if isinstance(size, int) else set(size)
    if len(values) != 1:
        raise ValueError(f"teacher size {tuple(size)}: only square patches and images are supported")
    return values.pop()


class Teacher:
    """A frozen model with its preprocessing; subclasses say how large the input is and how features are read.

    Attributes:
        model: the transformers module, in eval mode, without gradients.
        dim: width D of its features.
    """

    mean: ClassVar[Sequence[float]]
    std: ClassVar[Sequence[float]]
    # Where the vision tower's tensors lie in the published files; shards without any are not even downloaded.
    prefixes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def model_class(cls) -> type[Any]:
        """The transformers class, imported here and not at the top of the module."""
        raise NotImplementedError

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.model.config.hidden_size

    def input_size(self, height: int, width: int, grid: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels to which an image of (height, width) is resized."""
        raise NotImplementedError

    def features(self, pixels: Tensor) -> Tensor:
        """Features of normalised pixels [K, 3, H, W] on the teacher's own grid, [K, h, w, D]."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features of K images on `grid`.

        Args:
            images: [K, 3, H, W] in [-1, 1]; K may be 0.
            grid: (h, w), the token grid of the diffusion transformer for these images.

        Returns:
            [K, h*w, D] float32, without gradient, on the images' device.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"teacher images must be [K, 3, H, W], got {tuple(images.shape)}")
        if min(grid) < 1:
            raise ValueError(f"teacher grid must be positive, got {tuple(grid)}")
        if images.shape[0] == 0:
            return images.new_zeros((0, grid[0] * grid[1], self.dim), dtype=torch.float32)
        parameter = next(self.model.parameters())
        size = self.input_size(images.shape[2], images.shape[3], grid)
        pixels = images.to(parameter.device, torch.float32)
        if tuple(pixels.shape[2:]) != size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (
            torch.tensor(given, device=pixels.device)[:, None, None] for given in (self.mean, self.std)
        )
        pixels = ((pixels + 1.0) / 2.0 - mean) / std
        # The teacher computes in its own dtype whatever the training step around it does.
        with torch.autocast(pixels.device.type, enabled=False):
            features = self.features(pixels.to(parameter.dtype)).float()  # [K, h', w', D]
        if tuple(features.shape[1:3]) != tuple(grid):
            features = F.interpolate(
                features.permute(0, 3, 1, 2), size=tuple(grid), mode="bilinear", align_corners=False
            ).permute(0, 2, 3, 1)
        return features.flatten(1, 2).to(images.device)


class DINOv3Teacher(Teacher):
    """DINOv3 ViT: normed patch tokens of the last layer, without the class and register tokens.

    One patch per cell of the grid: with patches of 16 pixels an image of Wan's 16 pixels per cell is taken as it is.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    @classmethod
    def model_class(cls) -> type[Any]:
        from transformers import DINOv3ViTModel

        return DINOv3ViTModel

    def input_size(self, height: int, width: int, grid: tuple[int, int]) -> tuple[int, int]:
        patch = _single(self.model.config.patch_size)
        return grid[0] * patch, grid[1] * patch

    def features(self, pixels: Tensor) -> Tensor:
        config = self.model.config
        patch = _single(config.patch_size)
        height, width = pixels.shape[2] // patch, pixels.shape[3] // patch
        tokens = self.model(pixel_values=pixels).last_hidden_state  # [K, 1 + registers + h*w, D], normed
        return tokens[:, 1 + config.num_register_tokens :].unflatten(1, (height, width))


class SigLIP2Teacher(Teacher):
    """SigLIP2 of fixed resolution: normed patch tokens before pooling.

    The image is squashed to the square that the model was trained on; resizing its features undoes that.
    """

    mean, std = SIGLIP_MEAN, SIGLIP_STD
    prefixes = ("vision_model.",)

    @classmethod
    def model_class(cls) -> type[Any]:
        from transformers import SiglipVisionModel

        return SiglipVisionModel

    def input_size(self, height: int, width: int, grid: tuple[int, int]) -> tuple[int, int]:
        side = _single(self.model.config.image_size)
        return side, side

    def features(self, pixels: Tensor) -> Tensor:
        side = pixels.shape[2] // _single(self.model.config.patch_size)
        return self.model(pixel_values=pixels).last_hidden_state.unflatten(1, (side, side))


class QwenVisionTeacher(Teacher):
    """Vision tower of Qwen2.5-VL: the merged tokens that the language model reads, in raster order.

    Only the tower's tensors are fetched and read. The image is resized to the nearest multiple of a merged token
    (28 pixels); the model sorts its tokens into windows and back by itself.
    """

    mean, std = CLIP_MEAN, CLIP_STD
    prefixes = ("visual.", "model.visual.")

    @classmethod
    def model_class(cls) -> type[Any]:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
            Qwen2_5_VisionTransformerPretrainedModel,
        )

        return Qwen2_5_VisionTransformerPretrainedModel

    @property
    def dim(self) -> int:
        return self.model.config.out_hidden_size

    def input_size(self, height: int, width: int, grid: tuple[int, int]) -> tuple[int, int]:
        cell = _single(self.model.config.patch_size) * self.model.config.spatial_merge_size
        return max(round(height / cell), 1) * cell, max(round(width / cell), 1) * cell

    def features(self, pixels: Tensor) -> Tensor:
        config = self.model.config
        patch, merge = _single(config.patch_size), config.spatial_merge_size
        frames = _single(config.temporal_patch_size)
        count, channels, height, width = pixels.shape
        rows, columns = height // (patch * merge), width // (patch * merge)
        # The tower reads a flat list of patches, the merge x merge patches of a merged token next to each other,
        # a still image repeated to fill the temporal patch.
        patches = pixels.reshape(count, channels, rows, merge, patch, columns, merge, patch)
        patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [K, rows, columns, merge, merge, C, patch, patch]
        patches = patches.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
        patches = patches.reshape(count * rows * columns * merge * merge, channels * frames * patch * patch)
        shape = torch.tensor([[1, rows * merge, columns * merge]] * count, device=pixels.device)
        output = self.model(patches, grid_thw=shape)
        # transformers 4 returns the merged tokens themselves.
        merged = output if isinstance(output, Tensor) else output.pooler_output  # [K*rows*columns, D]
        return merged.reshape(count, rows, columns, -1)


@dataclass(frozen=True)
class TeacherEntry:
    """A teacher's row in `TEACHERS`: how it is loaded, and what the memory plan has to know of it."""

    teacher: type[Teacher]
    repository: str | None  # on the Hugging Face hub; None: a local folder with features of any width
    dim: int  # feature width, which published weights must have
    parameters: int  # of the vision tower
    gated: bool = False  # whether a licence must be accepted on the model page


_DINOV3, _PRETRAINED = "facebook/dinov3-", "-pretrain-lvd1689m"
TEACHERS: dict[str, TeacherEntry] = {
    "dinov3-b": TeacherEntry(DINOv3Teacher, f"{_DINOV3}vitb16{_PRETRAINED}", 768, 85_660_416, gated=True),
    "dinov3-l": TeacherEntry(DINOv3Teacher, f"{_DINOV3}vitl16{_PRETRAINED}", 1024, 303_129_600, gated=True),
    "dinov3-h+": TeacherEntry(
        DINOv3Teacher, f"{_DINOV3}vith16plus{_PRETRAINED}", 1280, 840_592_640, gated=True
    ),
    "siglip2-so400m": TeacherEntry(SigLIP2Teacher, "google/siglip2-so400m-patch16-512", 1152, 428_772_800),
    "qwen2.5-vl-7b": TeacherEntry(QwenVisionTeacher, "Qwen/Qwen2.5-VL-7B-Instruct", 3584, 676_550_144),
    "dinov3-tiny": TeacherEntry(DINOv3Teacher, None, 128, 820_000),
    "siglip2-tiny": TeacherEntry(SigLIP2Teacher, None, 128, 1_020_800),
}


def teacher_entry(name: str) -> TeacherEntry:
    """The row of `TEACHERS`; ValueError that lists the known names otherwise."""
    if name not in TEACHERS:
        raise ValueError(f"unknown teacher {name!r}; choose one of {', '.join(TEACHERS)}")
    return TEACHERS[name]


def load_teacher(
    name: str,
    path: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Teacher:
    """Load a frozen teacher, from a local folder if one is given and from the hub (or its cache) otherwise.

    Args:
        name: key of `TEACHERS`.
        path: folder in the transformers layout (config.json and safetensors).
        device, dtype: where and in which precision the teacher computes; its features are float32 anyway.

    Raises:
        ValueError: unknown name, missing, gated or damaged files, weights of another model.
    """
    folder, files = teacher_files(name, path)
    entry = TEACHERS[name]
    teacher = entry.teacher(_load_model(entry.teacher, folder, files, dtype).to(device))
    if entry.repository is not None and teacher.dim != entry.dim:
        raise ValueError(
            f"{folder}: features are {teacher.dim} wide but teacher {name} has {entry.dim}; "
            "choose the teacher that these weights belong to or another folder"
        )
    return teacher


def teacher_files(name: str, path: str | Path | None = None) -> tuple[Path, list[Path]]:
    """The folder with a teacher's config.json and its weights' safetensors files, fetched if need be, or a ValueError."""
    entry = teacher_entry(name)
    if path is None:
        return _hub_files(name, entry)
    folder = Path(path)
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: no teacher {name} there; give a folder with config.json and *.safetensors of transformers"
        )
    return folder, files


def _hub_files(name: str, entry: TeacherEntry) -> tuple[Path, list[Path]]:
    if entry.repository is None:
        raise ValueError(
            f"teacher {name} is a local folder; pass --alignment.teacher_path FOLDER (config.json, model.safetensors)"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    def fetch(file: str) -> Path:
        return Path(hf_hub_download(entry.repository, file))

    logger.info("looking for teacher %s in the hub's cache, then at %s", name, entry.repository)
    try:
        with _quiet("huggingface_hub"):  # its client reports every retry
            folder = fetch("config.json").parent
            try:
                index = fetch("model.safetensors.index.json")
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return folder, [fetch("model.safetensors")]
            shards = json.loads(index.read_text())["weight_map"]
            # Every name starts with the empty prefix of a bare tower.
            needed = {file for key, file in shards.items() if key.startswith(entry.teacher.prefixes or ("",))}
            return folder, [fetch(file) for file in sorted(needed)]
    # Offline mode, no network, no permission and a file that is not there all end in one of these.
    except (OSError, HfHubHTTPError, EntryNotFoundError) as error:
        page = f"https://huggingface.co/{entry.repository}"
        steps = f"go online to fetch {page}"
        if entry.gated:
            steps = f"accept the licence on {page} and run `hf auth login`"
        raise ValueError(
            f"teacher {name} is not available: {steps}, or pass --alignment.teacher_path FOLDER"
        ) from error


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Only a library's errors are logged: what is wrong is said once, in one line."""
    log = logging.getLogger(library)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _read_tower(files: Sequence[Path], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The vision tower's tensors without their prefix; files of a bare tower have none and are read whole."""
    from safetensors import SafetensorError, safe_open

    bare: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                keys = list(handle.keys())
                for prefix in prefixes:
                    inside = [key for key in keys if key.startswith(prefix)]
                    found |= {key.removeprefix(prefix): handle.get_tensor(key) for key in inside}
                if not found:
                    bare |= {key: handle.get_tensor(key) for key in keys}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file}: not a readable safetensors file ({error}); download it again"
            ) from error
    return found or bare


def _load_model(
    teacher: type[Teacher], folder: Path, files: Sequence[Path], dtype: torch.dtype
) -> torch.nn.Module:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model_class = teacher.model_class()
    tensors = _read_tower(files, teacher.prefixes)
    with _quiet("transformers"):
        try:
            config = model_class.config_class.from_pretrained(folder)
            # transformers 4 wraps some towers in a class that has the prefix in its own names.
            with torch.device("meta"):
                names = list(model_class(config).state_dict())
            own = next((prefix for prefix in teacher.prefixes if names[0].startswith(prefix)), "")
            tensors = {own + key: value for key, value in tensors.items()}
            # The tensors are read above so that only the tower's part of a large model is touched; transformers
            # still renames keys between its versions and creates the buffers that no file holds.
            model, report = model_class.from_pretrained(
                None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
            )
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            reason = one_line(error, 200)
            raise ValueError(f"{folder}: cannot be loaded as {model_class.__name__} ({reason})") from error
    kinds = {
        kind: sorted(map(str, report[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")
    }
    if any(kinds.values()):
        listed = "; ".join(f"{len(keys)} {kind}, first {keys[0]}" for kind, keys in kinds.items() if keys)
        raise ValueError(f"{folder}: weights do not fit {model_class.__name__}: {listed}")
    return model
