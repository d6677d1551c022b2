"""The attachment of RefAlign to a Wan model, and the only file here that imports `wan` (or the tree of WAN_ROOT).

A RefAlign model is the official WanModel, fed latents with the references appended on the frame axis, whose reference
tokens skip text cross-attention and whose last M output frames are dropped. Appending and dropping happen outside the
model; the text skip and the feature taps are ordinary forward hooks, so the model's code and its checkpoint keys stay
as they are and `detach` leaves the model as it was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refalign_ext.config import TAPS
from refalign_ext.layout import TokenLayout
from refalign_ext.tasks import register_tasks
from refalign_ext.upstream.own_wan import check_own_wan
from refalign_ext.upstream.tree import selected_tree

check_own_wan()
from wan.configs import (  # of this repository, which has all that follows
    SIZE_CONFIGS,
    SUPPORTED_SIZES,
    WAN_CONFIGS,
)
from wan.modules.t5 import T5EncoderModel, t5_state_dict_from_transformers
from wan.modules.vae import WanVAE, vae_state_dict_from_diffusers
from wan.sampling import (
    choose_seed,
    denoise,
    encode_prompts,
    initial_noise,
    latent_shape,
    require_files,
    required_files,
)
from wan.utils.dit_checkpoint import (
    DiTCheckpoint,
    build_dit,
    checkpoint_files,
    diffusers_config,
    diffusers_key,
    dit_arguments,
    load_dit,
    read_dit_checkpoint,
)
from wan.utils.runtime import (
    PeakMemory,
    describe_versions,
    placed,
    release_cached_memory,
    resolve_device,
    resolve_dtype,
)
from wan.utils.solvers import make_solver
from wan.utils.weights import file_sha256

TREE = selected_tree()
"""The official checkout that WAN_ROOT names; None: `wan` is this repository's."""

REFUSED_TASKS: dict[str, str] = {}
"""Reference-to-video tasks that the tree's own models suggest and that there are not, each with the reason."""

if TREE is not None:
    REFUSED_TASKS = TREE.refused(WAN_CONFIGS)
    WAN_CONFIGS, SIZE_CONFIGS, SUPPORTED_SIZES = TREE.register(WAN_CONFIGS, SIZE_CONFIGS, SUPPORTED_SIZES)
    register_tasks(WAN_CONFIGS, SIZE_CONFIGS, SUPPORTED_SIZES)
    T5EncoderModel = TREE.replacement_for("T5EncoderModel", T5EncoderModel)
    WanVAE = TREE.replacement_for("WanVAE", WanVAE)
    build_dit = TREE.replacement_for("build_dit", build_dit)
    load_dit = TREE.replacement_for("load_dit", load_dit)
    describe_versions = TREE.replacement_for("describe_versions", describe_versions)

_MODEL_ATTRIBUTES = ("blocks", "head", "patch_embedding", "patch_size", "num_heads", "dim")
_BLOCK_ATTRIBUTES = ("self_attn", "cross_attn", "ffn", "modulation")


def __getattr__(name: str) -> Any:
    """`WanModel` is imported when it is first used: diffusers, which holds its base class, takes seconds."""
    if name != "WanModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from wan.modules.model import WanModel

    globals()[name] = WanModel if TREE is None else TREE.replacement_for(name, WanModel)
    return globals()[name]


@dataclass(frozen=True)
class BackboneOutput:
    """What one pass gives.

    Attributes:
        prediction: velocity of the video frames, one [C, F, H, W] per sample.
        reference_tokens: features of the reference tokens, one [B, M, N, dim] per tapped block, zeros where a sample
            has fewer than M references. Under sequence parallelism those that this rank holds, one [S, dim] per block.
        layout: where the tokens lay.
        reference_spans: None, or per sample the (first, count) of the held tokens among its M*N.
    """

    prediction: list[Tensor]
    reference_tokens: list[Tensor]
    layout: TokenLayout
    reference_spans: tuple[tuple[int, int], ...] | None = None


@dataclass(eq=False)
class _Pass:
    """What the hooks need during one pass, and again when activation checkpointing repeats a block of it."""

    owner: ReferenceBackbone
    layout: TokenLayout
    held: range  # the tokens that blocks see here
    queries: int  # how many of them, from the first, ask the text
    video_mask: Tensor | None  # [B, queries, 1], True on video; None if all queries are video
    tap_depth: int
    tap: str
    with_gradients: bool
    taps: dict[int, Tensor] = field(default_factory=dict)


class ReferenceBackbone(nn.Module):
    """Any WanModel (ours, upstream's) with references.

    Args:
        model: the model; it becomes the submodule `model` and its parameters and keys are untouched.

    Raises:
        ValueError: if the model lacks an attribute that the attachment relies on (all missing ones are listed).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        missing = [name for name in _MODEL_ATTRIBUTES if not hasattr(model, name)]
        for index, block in enumerate(getattr(model, "blocks", [])):
            missing += [f"blocks.{index}.{name}" for name in _BLOCK_ATTRIBUTES if not hasattr(block, name)]
        if missing:
            raise ValueError(
                f"{type(model).__name__} is not a WanModel that references attach to: it lacks {missing}"
            )
        self.model = model
        self.seq_len_multiple = 1
        # Blocks see part `sequence_rank` of `sequence_size` equal parts of the tokens; who cuts and joins them sets all three.
        self.sequence_rank, self.sequence_size = 0, 1
        self._pass: _Pass | None = None  # while the model runs
        self._active: _Pass | None = None  # from a block's self-attention to the end of its cross-attention
        # A partial of a method, not a closure: a deep copy of this module then has hooks of its own.
        self._handles = []
        for index, block in enumerate(model.blocks):
            self._handles += [
                block.self_attn.register_forward_pre_hook(self._find_pass, with_kwargs=True),
                block.cross_attn.register_forward_pre_hook(self._narrow_queries, with_kwargs=True),
                block.cross_attn.register_forward_hook(self._skip_text),
                block.self_attn.register_forward_hook(partial(self._take, index, "self_attn")),
                block.register_forward_hook(partial(self._take, index, "block")),
            ]

    def detach(self) -> nn.Module:
        """Remove every hook and return the model as it was found."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self.model

    def forward(
        self,
        latents: Sequence[Tensor],
        timestep: Tensor,
        context: Sequence[Tensor],
        references: Sequence[Tensor],
        *,
        tap_depth: int = 0,
        tap: str = "block",
        model_inputs: Mapping[str, Any] | None = None,
    ) -> BackboneOutput:
        """One pass of the model over video and references.

        Args:
            latents: noisy video latents, one [C, F, H, W] per sample, on the device that computes; sizes may differ.
            timestep: [B] in [0, 1000], floating; never rounded.
            context: text features, one [L, text_dim] per sample.
            references: clean reference latents, one [C, M, H, W] per sample; M may differ and may be 0. A null
                reference (a dropped one, eq. 5) is zeros: its tokens stay.
            tap_depth: how many blocks, from the first, to take reference tokens from.
            tap: `"block"` (block output, as in the release) or `"self_attn"` (self-attention output, the paper's wording).
            model_inputs: further keyword arguments of the model (`y`, `clip_fea`), as it takes them.

        Raises:
            ValueError: for inputs that do not fit together, a tap_depth beyond the model, an unknown tap, taps from
                samples of different sizes, or reentrant activation checkpointing.
        """
        if not self._handles:
            raise ValueError("this ReferenceBackbone was detached: attach a new one to the model")
        if tap not in TAPS:
            raise ValueError(f"unknown tap {tap!r}: choose one of {', '.join(TAPS)}")
        if not 0 <= tap_depth <= len(self.model.blocks):
            raise ValueError(f"tap depth {tap_depth} does not fit {len(self.model.blocks)} blocks")
        layout = TokenLayout.of(latents, references, tuple(self.model.patch_size), self.seq_len_multiple)
        if tap_depth:
            layout.require_one_grid()
        extended = [
            torch.cat([video, refs.to(video)], 1) for video, refs in zip(latents, references, strict=True)
        ]
        # The text encoder's bfloat16 would not fit a float32 model that leaves rounding to autocast.
        wide = torch.promote_types(self.model.patch_embedding.weight.dtype, torch.float32)
        texts = [text.to(wide) for text in context]
        current = self._begin(layout, tap_depth, tap, latents[0].device)
        self._pass = current
        try:
            with self._precision(latents[0].device):
                outputs = self.model(
                    extended, t=timestep, context=texts, seq_len=layout.seq_len, **(model_inputs or {})
                )
            taps = [current.taps[index] for index in range(tap_depth)]
        finally:
            self._pass, self._active = None, None
            current.taps.clear()
        prediction = [
            output[:, : video.shape[1]] for output, video in zip(outputs, latents, strict=True)
        ]  # each [C, F + M, H, W] -> [C, F, H, W]
        if self.sequence_size == 1:
            return BackboneOutput(prediction, [layout.gather_references(tokens) for tokens in taps], layout)
        held = current.held
        tapped = [layout.cut_references(tokens, held) for tokens in taps]
        return BackboneOutput(prediction, tapped, layout, layout.reference_spans(held))

    def _precision(self, device: torch.device) -> AbstractContextManager:
        """Autocast around a half model that relies on it, as upstream's pipelines put it; ours handles its own dtypes."""
        dtype = self.model.patch_embedding.weight.dtype
        is_half = dtype in (torch.float16, torch.bfloat16)
        if not is_half or hasattr(self.model, "float32_modules") or torch.is_autocast_enabled(device.type):
            return nullcontext()
        return torch.autocast(device.type, dtype)

    def _begin(self, layout: TokenLayout, tap_depth: int, tap: str, device: torch.device) -> _Pass:
        held = layout.tokens_of_rank(self.sequence_rank, self.sequence_size)
        # Queries end at the longest video. One is kept where a rank holds none, because not all kernels take none.
        queries = max(1, min(layout.most_video_tokens - held.start, len(held)))
        mask = None
        if not layout.is_uniform or held.start + queries > layout.most_video_tokens:
            # Shorter samples' references before that end, and a query kept for its own sake, are silenced by this.
            mask = layout.video_token_mask(device)[:, held.start : held.start + queries, None]
        return _Pass(self, layout, held, queries, mask, tap_depth, tap, torch.is_grad_enabled())

    def _find_pass(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Recover the current pass, also where activation checkpointing repeats a block.

        A block is repeated during the backward, when other passes may have come in between. All that is
        repeated is the block's arguments, so the pass travels on one that reaches self-attention as it is: `grid_sizes`.
        """
        grid_sizes = kwargs["grid_sizes"] if "grid_sizes" in kwargs else args[2]
        if self._pass is None:
            found = getattr(grid_sizes, "reference_pass", None)
            self._active = found if found is not None and found.owner is self else None
            return
        if self._pass.with_gradients and not torch.is_grad_enabled():
            # Reentrant checkpointing: taps would carry no gradient, and the repetition gets copies of the arguments.
            raise ValueError(
                "a block runs without gradients in a pass with gradients: use non-reentrant activation checkpointing "
                "(use_reentrant=False)"
            )
        self._active = grid_sizes.reference_pass = self._pass

    def _narrow_queries(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict] | None:
        """Restrict cross-attention queries to video tokens: what references would get is dropped anyway."""
        if self._active is None:
            return None
        end = self._active.queries
        if args:
            return (args[0][:, :end], *args[1:]), kwargs
        return args, {**kwargs, "x": kwargs["x"][:, :end]}

    def _skip_text(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Reference tokens get no residual from the text: [B, queries, d] -> [B, held, d] with zeros on references."""
        current, self._active = self._active, None
        if current is None:
            return None
        if current.video_mask is not None:
            output = output.masked_fill(~current.video_mask, 0.0)
        return F.pad(output, (0, 0, 0, len(current.held) - output.shape[1]))

    def _take(self, index: int, place: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        # Only while the model runs: what checkpointing repeats must change nothing.
        current = self._pass
        if current is not None and index < current.tap_depth and place == current.tap:
            current.taps[index] = output
