"""What a task is: its defaults, its checkpoint, how its conditions are prepared, its guidance. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from refalign_ext.paths import near_miss
from refalign_ext.request import (
    MATTE_MODES,
    MAX_REFERENCES,
    SOLVERS,
    GenerationRequest,
    Reference,
    parse_role,
)

if TYPE_CHECKING:
    from easydict import EasyDict
    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """Conditioning tensors, on the sampling device.

    Attributes:
        prompt, negative_prompt: text embeddings [L, text_dim].
        references: clean latents [C, M, h, w], one latent frame per reference; M may be 0.
        model_inputs: further keyword arguments of `WanModel.forward`, one value for a sample, the same in every branch of
            the guidance.
    """

    prompt: Tensor
    negative_prompt: Tensor
    references: Tensor
    model_inputs: Mapping[str, Tensor] = field(default_factory=dict)


class ConditionEncoders(Protocol):
    """What `Task.prepare` encodes with: the methods of `R2VPipeline` by these names."""

    config: EasyDict
    device: Any

    def encode_texts(self, texts: Sequence[str]) -> list[Tensor]: ...

    def encode_videos(self, videos: Sequence[Tensor]) -> list[Tensor]: ...

    def latent_shape(self, request: GenerationRequest) -> tuple[int, int, int, int]: ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task; the table is `refalign_ext.tasks.TASKS`. A family of tasks is a subclass in a file of its own.

    Attributes:
        name: as --task takes it; the key in WAN_CONFIGS.
        base: entry of WAN_CONFIGS that this one grows from; its own name for a task of Wan's.
        download, bundled: the checkpoint's name on the Hugging Face hub, or its folder in this repository.
        sizes: sizes "width*height" that the model was made for.
        size, frame_num, sample_solver, sample_steps, sample_shift, magnify: defaults of `GenerationRequest`.
        example_prompt: the prompt where none is given; None: one has to be given.
        family: the part of its name that tasks of one kind share.
        needs: inputs that have to be given: "references" or names in `GenerationRequest.inputs`.
        takes: inputs that may be given besides.
        scales: the guidance scales that the task takes; each is an attribute with its default.
        result_suffixes: endings of the file that is written.
        any_size: whether other sizes than `sizes` are fine.
        title: of the sheets.
    """

    name: str
    base: str
    download: str | None = None
    bundled: Path | None = None
    sizes: tuple[str, ...]
    size: tuple[int, int]
    frame_num: int = 81
    sample_solver: str = "unipc"
    sample_steps: int = 50
    sample_shift: float = 5.0
    fps: int = 16
    magnify: int = 1
    example_prompt: str | None = None

    family: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()
    scales: ClassVar[tuple[str, ...]]
    result_suffixes: ClassVar[tuple[str, ...]] = (".mp4",)
    any_size: ClassVar[bool] = False
    title: ClassVar[str] = "Wan2.1"

    SETTINGS: ClassVar[tuple[str, ...]] = (
        *("size", "frame_num", "sample_solver", "sample_steps", "sample_shift", "magnify"),
    )

    def __post_init__(self) -> None:
        assert (self.download is None) != (self.bundled is None), f"{self.name}: one place for its weights"
        assert "{}*{}".format(*self.size) in self.sizes, f"{self.name}: its default size is none of its sizes"

    def request(
        self,
        prompt: str,
        references: Sequence[str | os.PathLike[str] | Image.Image] = (),
        *,
        roles: Sequence[str] | None = None,
        **given: Any,
    ) -> GenerationRequest:
        """A request with the task's defaults where nothing (or None) is given, checked as far as that needs no model.

        Args:
            prompt: what happens.
            references: pictures or their files.
            roles: one per reference, or one for all; None: all are subjects.
            given: further fields of `GenerationRequest`.

        Raises:
            ValueError: naming the setting and the remedy.
        """
        given = {name: value for name, value in given.items() if value is not None}
        self._refuse_foreign(given, references)
        if len(references) > MAX_REFERENCES:
            raise ValueError(
                f"{len(references)} references given: at most {MAX_REFERENCES} are possible, drop some"
            )
        roles = roles or ["subject"]
        if len(roles) == 1:
            roles = list(roles) * len(references)
        if len(roles) != len(references):
            raise ValueError(
                f"{len(roles)} roles for {len(references)} references: give one role each, or one for all"
            )
        pairs = tuple(
            Reference(image, parse_role(role)) for image, role in zip(references, roles, strict=True)
        )
        defaults = {name: getattr(self, name) for name in (*self.SETTINGS, *self.scales)}
        request = GenerationRequest(task=self.name, prompt=prompt, references=pairs, **{**defaults, **given})
        self.check(request)
        return request

    def _refuse_foreign(self, given: Mapping[str, Any], references: Sequence[Any]) -> None:
        inputs = [name for name, value in given.get("inputs", ()) if value is not None]
        for name in [*(["references"] if references else []), *inputs]:
            if name not in (*self.needs, *self.takes):
                raise ValueError(f"{flag_of(name)}: task {self.name} does not take it: leave it out")
        for name in given:
            if name.endswith("_guide_scale") and name not in self.scales:
                flags = " and ".join(f"--{scale}" for scale in self.scales)
                raise ValueError(f"--{name}: task {self.name} has {flags} instead")

    def check(self, request: GenerationRequest) -> None:
        """Refuses settings that no model of the task can follow.

        Raises:
            ValueError: naming the setting and the remedy.
        """
        for name in ("prompt", "negative_prompt"):
            if re.search("[\ud800-\udfff]", getattr(request, name) or ""):
                raise ValueError(
                    f"{name} holds bytes that are no UTF-8 text: set the terminal or file to UTF-8"
                )
        for name, most in (("sample_steps", 1000), ("magnify", 64), ("frame_num", None)):
            value = getattr(request, name)
            if value < 1 or (most is not None and value > most):
                raise ValueError(f"{name} is {value}: give 1 {f'to {most}' if most else 'or more'}")
        if not 0.01 <= request.sample_shift <= 100:
            raise ValueError(f"sample_shift is {request.sample_shift}: give 0.01 to 100 (5.0 is usual)")
        if request.seed >= 2**63:
            raise ValueError(f"seed is {request.seed}: give a number below 2**63")
        for name, choices in (("sample_solver", SOLVERS), ("matte", MATTE_MODES)):
            if (value := getattr(request, name)) not in choices:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
        width, height = request.size
        if not self.any_size and f"{width}*{height}" not in self.sizes:
            raise ValueError(
                f"size {width}*{height} is not one that task {self.name} makes: give {' or '.join(self.sizes)}"
            )

    def require_inputs(self, request: GenerationRequest) -> None:
        """Refuses a request of a program's user that lacks something; Python callers may leave references out.

        Raises:
            ValueError: naming the flag.
        """
        for name in self.needs:
            if not (request.references if name == "references" else dict(request.inputs).get(name)):
                raise ValueError(f"task {self.name} needs {name.replace('_', ' ')}: pass {flag_of(name)}")
        if not request.prompt.strip():
            raise ValueError(f"task {self.name} needs a prompt: pass --prompt 'what happens'")

    def checkpoint_folder(self, given: Path | None) -> Path:
        """The checkpoint folder: the one given, else the bundled one.

        Raises:
            ValueError: if there is none, with the command that downloads it.
        """
        folder = given or self.bundled
        if folder is None:
            assert self.download is not None
            local = self.download.partition("/")[2]
            raise ValueError(
                f"task {self.name} needs --ckpt_dir: get the folder with "
                f"`hf download {self.download} --local-dir {local}`"
            )
        if folder.is_file():
            raise ValueError(f"--ckpt_dir {folder} is a file: name its folder, or pass it as --dit_ckpt")
        if not folder.is_dir():
            meant = near_miss(folder) or "download it or correct --ckpt_dir"
            raise ValueError(f"checkpoint folder {folder} does not exist: {meant}")
        return folder

    def open(self, request: GenerationRequest) -> GenerationRequest:
        """The request with its files read and prepared; a bad one is found before any weights are loaded.

        Raises:
            ValueError: naming the file.
        """
        return request

    def prepare(self, request: GenerationRequest, encoders: ConditionEncoders) -> Conditions:
        """Encodes what the model is conditioned on, from an opened request."""
        import torch

        negative = request.negative_prompt
        if negative is None:
            negative = encoders.config.sample_neg_prompt
        prompt, negative_prompt = encoders.encode_texts([request.prompt, negative])
        channels, _, height, width = encoders.latent_shape(request)
        return Conditions(
            prompt, negative_prompt, torch.zeros(channels, 0, height, width, device=encoders.device)
        )

    def guidance(self, request: GenerationRequest) -> tuple[float, float]:
        """(image scale, text scale) of eq. 5; equal ones are ordinary guidance."""
        raise NotImplementedError

    def configuration(self, configs: Mapping[str, EasyDict]) -> EasyDict:
        """The task's entry of WAN_CONFIGS: the base's, with the task's own sampling defaults.

        Args:
            configs: those of this repository or of an official checkout.
        """
        config = deepcopy(configs[self.base])
        config.update({name: getattr(self, name) for name in (*self.SETTINGS, *self.scales)})
        return config


def flag_of(name: str) -> str:
    """The flag that gives an input."""
    return "--ref" if name == "references" else f"--{name}"
