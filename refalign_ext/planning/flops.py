"""Parameters and floating-point operations of a Wan transformer with references, from its sizes alone.

A multiply-add counts as two operations. Only matmuls and attention count, as in `torch.utils.flop_counter`; norms,
rotations and activations are a fraction of a percent. Tokens are those of one sample; a batch costs the sum.

Model FLOPs are what training mathematically needs: twice the forward for the backward of a trained matmul, and nothing
that is computed again. They are what MFU counts. Hardware FLOPs add the repetitions: the score matrix that fused
attention computes again in its backward, and the blocks that activation checkpointing runs again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from refalign_ext.lora import select_layers

# Dense bf16 tensor throughput with float32 accumulation, without sparsity, from the vendors' data sheets and architecture
# white papers. The first entry of which all words occur in the device's name counts.
_PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("B200",), 2250e12),
    (("H200", "NVL"), 835e12),
    (("H200",), 989e12),
    (("GH200",), 989e12),
    (("H100", "NVL"), 835e12),
    (("H100", "PCIe"), 756e12),
    (("H100",), 989e12),
    (("H800", "PCIe"), 756e12),
    (("H800",), 989e12),
    (("H20",), 148e12),
    (("A100",), 312e12),
    (("A800",), 312e12),
    (("L40S",), 362e12),
    (("L40",), 181e12),
    (("L4",), 121e12),
    (("L20",), 119.5e12),
    (("A40",), 149.7e12),
    (("A30",), 165e12),
    (("A10",), 125e12),
    (("RTX", "6000", "Ada"), 364.2e12),
    (("RTX", "A6000"), 154.8e12),
    (("RTX", "5090"), 209.5e12),
    (("RTX", "4090"), 165.2e12),
    (("RTX", "3090"), 71e12),
    (("MI325X",), 1307.4e12),
    (("MI300X",), 1307.4e12),
)
_OTHER_CHIPS = (
    "MIG",
    "Laptop",
    "Max-Q",
    "4090 D",
    "5090 D",
    "3090 Ti",
)  # a part or a variant of a listed one


class Linear(NamedTuple):
    """One linear layer of a block: its sizes and which tokens go through it (`all`, `video` or `text`)."""

    inputs: int
    outputs: int
    tokens: str


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a WanModel that decide what it costs; see `WanModel` for their meaning."""

    dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    text_len: int
    text_dim: int
    in_dim: int
    out_dim: int
    freq_dim: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    qk_norm: bool = True
    cross_attn_norm: bool = True

    @classmethod
    def of(cls, source: Any) -> ModelShape:
        """From a WanModel or a task's entry of WAN_CONFIGS, which name their sizes alike."""
        names = (name for name in cls.__dataclass_fields__ if name != "patch_size")
        return cls(patch_size=tuple(source.patch_size), **{name: getattr(source, name) for name in names})

    @property
    def patch_elements(self) -> int:
        """Latent positions in one token."""
        return math.prod(self.patch_size)

    @property
    def block_linears(self) -> dict[str, Linear]:
        """The linear layers of one block by their names in the model, in the order in which they run.

        Reference tokens do not ask the text, so only video tokens pass the cross-attention's query and output.
        """
        dim, ffn = self.dim, self.ffn_dim
        own = {f"self_attn.{name}": Linear(dim, dim, "all") for name in "qkvo"}
        text = {
            f"cross_attn.{name}": Linear(dim, dim, "text" if name in "kv" else "video") for name in "qkvo"
        }
        return own | text | {"ffn.0": Linear(dim, ffn, "all"), "ffn.2": Linear(ffn, dim, "all")}

    @property
    def block_matrix_parameters(self) -> int:
        """Weights (without biases) of one block's linear layers: what Muon trains."""
        return sum(layer.inputs * layer.outputs for layer in self.block_linears.values())

    @property
    def block_parameters(self) -> int:
        """All parameters of one block."""
        biases = sum(layer.outputs for layer in self.block_linears.values())
        norms = 4 * self.dim * self.qk_norm + 2 * self.dim * self.cross_attn_norm
        modulation = 6 * self.dim
        return self.block_matrix_parameters + biases + norms + modulation

    @property
    def outer_parameters(self) -> int:
        """All parameters outside the blocks: embeddings of patches, text and time, and the head."""
        dim, patch = self.dim, self.patch_elements
        patches = (self.in_dim * patch + 1) * dim
        text = (self.text_dim + 1) * dim + (dim + 1) * dim
        time = (self.freq_dim + 1) * dim + (dim + 1) * dim + (dim + 1) * 6 * dim
        head = (dim + 1) * patch * self.out_dim + 2 * dim
        return patches + text + time + head

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.num_layers * self.block_parameters + self.outer_parameters


@dataclass(frozen=True)
class AlignmentShape:
    """Sizes of reference alignment: `depth` projectors d -> d/2 -> `teacher_dim`."""

    depth: int
    teacher_dim: int

    def parameters(self, dim: int) -> int:
        """Parameters of all projectors on a transformer of width `dim`."""
        return self.depth * (dim // 2) * (dim + self.teacher_dim)


@dataclass(frozen=True)
class StepFlops:
    """Operations of one sample.

    Attributes:
        forward: one pass of the transformer, as in generation.
        model: one training step (forward and backward) without repetitions, alignment included: for MFU.
        hardware: the same with everything that is computed again.
        alignment: the part of `model` that is due to projectors and the alignment loss.
    """

    forward: int
    model: int
    hardware: int
    alignment: int


class _Cost(NamedTuple):
    forward: int
    backward: int
    repeated: int = 0


def lora_layers(shape: ModelShape, targets: str) -> dict[str, Linear]:
    """The layers of the whole model that `targets` selects, see `refalign_ext.lora.add_lora`.

    Raises:
        ValueError: if a target selects nothing or is no regular expression.
    """
    layers = {
        "text_embedding.0": Linear(shape.text_dim, shape.dim, "text"),
        "text_embedding.2": Linear(shape.dim, shape.dim, "text"),
    }
    for index in range(shape.num_layers):
        layers |= {f"blocks.{index}.{name}": layer for name, layer in shape.block_linears.items()}
    return {name: layers[name] for name in select_layers(list(layers), targets)}


def lora_parameters(shape: ModelShape, rank: int, targets: str) -> int:
    """Parameters of all adapters."""
    return rank * sum(layer.inputs + layer.outputs for layer in lora_layers(shape, targets).values())


def step_flops(
    shape: ModelShape,
    video_tokens: int,
    reference_tokens: int = 0,
    *,
    references: int = 0,
    alignment: AlignmentShape | None = None,
    checkpointing: str = "none",
    lora_rank: int = 0,
    lora_targets: str = "",
) -> StepFlops:
    """Operations of one sample in one pass and in one training step.

    Args:
        shape: of the transformer.
        video_tokens, reference_tokens: of the sample, without padding.
        references: number of references among which the reference tokens are divided (for the alignment loss).
        alignment: None trains without.
        checkpointing: `none`, `full` (blocks run again in the backward) or `selective` (the same, but the results of
            attention and of every second matmul are kept).
        lora_rank, lora_targets: with a rank only adapters get gradients of weights.

    Raises:
        ValueError: for an unknown LoRA target.
    """
    tokens = {
        "all": video_tokens + reference_tokens,
        "video": video_tokens,
        "text": shape.text_len,
    }
    linears = _linear_cost(shape, tokens, lora_rank, lora_targets)
    # Scores and weighted values: two matmuls of 2 * queries * keys * dim each; their backward needs four.
    attention = 4 * shape.num_layers * shape.dim * (tokens["all"] ** 2 + tokens["video"] * shape.text_len)
    outer = _outer_cost(shape, tokens["all"], frozen=bool(lora_rank))
    forward = linears.forward + attention + outer.forward
    backward = linears.backward + 2 * attention + outer.backward
    aligned = 0 if alignment is None else _alignment_flops(shape, alignment, reference_tokens, references)
    repeated = attention // 2  # fused attention computes the scores again
    if checkpointing == "full":
        repeated += linears.forward + attention
    elif checkpointing == "selective":
        repeated += linears.repeated
    model = forward + backward + aligned
    return StepFlops(forward, model, model + repeated, aligned)


def _linear_cost(shape: ModelShape, tokens: dict[str, int], lora_rank: int, lora_targets: str) -> _Cost:
    """Linear layers of all blocks and all adapters; `repeated` is what selective checkpointing runs again."""
    forward = backward = repeated = 0
    for index, layer in enumerate(shape.block_linears.values()):
        once = 2 * shape.num_layers * tokens[layer.tokens] * layer.inputs * layer.outputs
        forward += once
        repeated += once if index % 2 == 0 else 0
        if not lora_rank:
            backward += 2 * once  # gradients of input and weight
        elif layer.tokens != "text":
            backward += once  # of the input only; the embedded text needs none
    if lora_rank:
        for layer in lora_layers(shape, lora_targets).values():
            once = 2 * tokens[layer.tokens] * lora_rank * (layer.inputs + layer.outputs)
            forward, backward, repeated = forward + once, backward + 2 * once, repeated + once // 2
    return _Cost(forward, backward, repeated)


def _outer_cost(shape: ModelShape, tokens: int, *, frozen: bool) -> _Cost:
    dim = shape.dim
    # The first layers need no gradient of their inputs.
    first = 2 * (
        tokens * shape.in_dim * shape.patch_elements * dim
        + shape.text_len * shape.text_dim * dim
        + shape.freq_dim * dim
    )
    later = 2 * (shape.text_len * dim * dim + 7 * dim * dim)
    head = 2 * tokens * dim * shape.patch_elements * shape.out_dim
    if frozen:
        return _Cost(first + later + head, head)
    return _Cost(first + later + head, first + 2 * (later + head))


def _alignment_flops(shape: ModelShape, alignment: AlignmentShape, tokens: int, references: int) -> int:
    """Projectors forward and backward, and the similarities of all ordered pairs of tokens of different references."""
    projectors = 3 * 2 * tokens * alignment.parameters(shape.dim)
    per_reference = tokens // references if references else 0
    pairs = references * (references - 1) * per_reference**2
    # Similarities, and their pull on the student; the teacher gets no gradient.
    similarities = 2 * 2 * alignment.depth * pairs * alignment.teacher_dim
    return projectors + similarities


def peak_flops(device: torch.device | str) -> float | None:
    """Dense bf16 operations per second that the data sheet of a GPU promises; None where MFU is not to be reported.

    Args:
        device: a CUDA (or ROCm) device of this machine, or a device name as the driver gives it.
    """
    if isinstance(device, torch.device):
        if device.type != "cuda" or not torch.cuda.is_available():
            return None
        name = torch.cuda.get_device_name(device)
    else:
        name = device
    if any(other.lower() in name.lower() for other in _OTHER_CHIPS):
        return None
    words = name.replace("-", " ").replace("/", " ").lower().split()
    for wanted, peak in _PEAKS:
        if all(word.lower() in words for word in wanted):
            return peak
    return None
