"""The arm "teacher features as input" (table 2, D and E): the teacher's features of references go into the DiT.

The paper does not say how it feeds them; this is the least that can: a projection of the features is added to the
references' patch embeddings. Everything is attached from outside: a hook before the DiT's first block, weights that
train beside the DiT as the extra module `teacher_input`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refalign_ext.checkpoint.checkpointer import read_meta
from refalign_ext.checkpoint.reading import read_extra_module
from refalign_ext.config import TrainConfig, recipe, with_overrides
from refalign_ext.data.batch import EncodedSample, stack_features
from refalign_ext.encoders import Encoders, Features
from refalign_ext.training.extra_module import AttachedModule

if TYPE_CHECKING:
    from refalign_ext.training.trainer import Trainer

NAME = "teacher_input"
ReferenceContext = Callable[[Tensor, Sequence[bool]], Callable[[], AbstractContextManager]]
"""(reference images [B, M, 3, H, W], whether each guidance branch keeps them) -> the context of every pass over all
branches."""


class TeacherInput(nn.Module):
    """What the teacher's features of a reference add to its tokens: LayerNorm - Linear(D, d), without bias.

    It starts at zero, so that training starts from the model as it is, and zero features (a dropped reference) add
    nothing at any time.
    """

    def __init__(self, teacher_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(teacher_dim, elementwise_affine=False)
        self.projection = nn.Linear(teacher_dim, dim, bias=False)
        nn.init.zeros_(self.projection.weight)

    def forward(self, features: Tensor) -> Tensor:
        """[..., D] -> [..., d]."""
        return self.projection(self.norm(features))


def load_teacher_input(
    tensors: Mapping[str, Tensor], *, teacher_dim: int, dim: int, source: str
) -> TeacherInput:
    """The module with these weights; a new one without any.

    Raises:
        ValueError: if they were trained for another teacher or model.
    """
    module = TeacherInput(teacher_dim, dim)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if tensors and found != wanted:
        raise ValueError(
            f"{source}: its teacher input is {found}, these features need {wanted}: use the --alignment.teacher that it was "
            "trained with"
        )
    if tensors:
        module.load_state_dict(tensors)
    return module


class AddedTokens:
    """Adds tokens to those of the references that a DiT's first block sees, as long as a context of `given` lasts."""

    def __init__(self, model: nn.Module) -> None:
        self._tokens: Sequence[Tensor] | None = None
        model.blocks[0].register_forward_pre_hook(self._add, with_kwargs=True)

    @contextmanager
    def given(self, tokens: Sequence[Tensor]) -> Iterator[None]:
        """Tokens of all references of each sample, [M * N, d]."""
        self._tokens = tokens
        try:
            yield
        finally:
            self._tokens = None

    def _add(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        # Activation checkpointing repeats the block in the backward, when the context has ended: the tokens travel on an
        # argument that is the same object then.
        grid_sizes = kwargs["grid_sizes"] if "grid_sizes" in kwargs else args[3]
        if self._tokens is not None:
            grid_sizes.added_tokens = self, self._tokens
        owner, tokens = getattr(grid_sizes, "added_tokens", (None, ()))
        if owner is not self:
            return None
        x = args[0] if args else kwargs["x"]  # [B, seq_len, d]
        rows = []
        for sizes, row in zip(grid_sizes, tokens, strict=True):
            end = int(sizes.prod())  # references come last
            rows.append(F.pad(row, (0, 0, end - len(row), x.shape[1] - end)))
        x = x + torch.stack(rows).to(x.dtype)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "x": x})


class TeacherInputModule:
    """The row of the table of extra modules; `config.teacher_input` asks for it."""

    name = NAME

    def attach(self, config: TrainConfig, model: nn.Module, encoders: Encoders) -> AttachedModule:
        source = Path(config.dit_ckpt or encoders.folder)
        saved = {} if config.from_scratch else read_extra_module(source, NAME)
        module = load_teacher_input(
            saved, teacher_dim=encoders.teacher.dim, dim=model.dim, source=str(source)
        )
        return attach_teacher_input(module.to(encoders.device), model, encoders.device)


TEACHER_INPUT = TeacherInputModule()


def attach_teacher_input(module: TeacherInput, model: nn.Module, device: torch.device) -> AttachedModule:
    """Let a module change the passes of a DiT in training, where samples bring their features."""
    added = AddedTokens(model)

    def around_forward(
        samples: Sequence[EncodedSample], keep_references: Sequence[bool]
    ) -> AbstractContextManager:
        features, mask = stack_features(list(samples), device)  # [B, M, N, D], [B, M]
        mask = mask & torch.tensor(list(keep_references), device=device)[:, None]
        tokens = module(features * mask[..., None, None])  # [B, M, N, d]
        counts = [sample.references.shape[1] for sample in samples]
        return added.given([row[:count].flatten(0, 1) for row, count in zip(tokens, counts, strict=True)])

    return AttachedModule(module, around_forward)


def trained_reference_context(
    trainer: Trainer, encoders: Encoders, model: nn.Module
) -> ReferenceContext | None:
    """For a copy of the DiT in training, with the moving average's weights; None for runs without `teacher_input`."""
    if NAME not in trainer.trained.extra:
        return None
    return _reference_context(trainer.ema.extra_state_dict(NAME), encoders, model, trainer.config.out)


def saved_reference_context(
    source: Path, folder: Path, model: nn.Module, device: torch.device
) -> ReferenceContext | None:
    """For a DiT out of the checkpoint `source`, which names the teacher; None for one without `teacher_input`.

    Raises:
        ValueError: if the teacher is not there or is another one.
    """
    tensors = read_extra_module(source, NAME)
    if not tensors:
        return None
    named = read_meta(source)["settings"]["alignment"]
    overrides = {f"alignment.{name}": named[name] for name in ("teacher", "teacher_path")}
    config = with_overrides(recipe("tiny"), {**overrides, NAME: True, "ckpt_dir": str(folder)})
    return _reference_context(tensors, Encoders(config, device, dit=False), model, str(source))


def _reference_context(
    tensors: Mapping[str, Tensor], encoders: Encoders, model: nn.Module, source: str
) -> ReferenceContext:
    assert encoders.teacher is not None and encoders.features is not None
    features: Features = encoders.features
    module = load_teacher_input(tensors, teacher_dim=encoders.teacher.dim, dim=model.dim, source=source)
    module, added = module.to(encoders.device).requires_grad_(False), AddedTokens(model)

    def context(images: Tensor, keep_references: Sequence[bool]) -> Callable[[], AbstractContextManager]:
        tokens = module(features(images.flatten(0, 1))).unflatten(0, images.shape[:2])  # [B, M, N, d]
        rows = [row.flatten(0, 1) * keep for keep in keep_references for row in tokens]
        return lambda: added.given(rows)

    return context
