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

# Dense bf16 TFLOP/s with float32 accumulation, without sparsity, from the vendors' data sheets and white papers. The name
# with the most words, all of which occur in the device's name, counts.
_PEAKS: dict[float, tuple[str, ...]] = {
    2250: ("B200",),
    1307.4: ("MI325X", "MI300X"),
    989: ("H200", "GH200", "H100", "H800"),
    835: ("H200 NVL", "H100 NVL"),
    756: ("H100 PCIe", "H800 PCIe"),
    364.2: ("RTX 6000 Ada",),
    362: ("L40S",),
    312: ("A100", "A800"),
    209.5: ("RTX 5090",),
    181: ("L40",),
    165.2: ("RTX 4090",),
    165: ("A30",),
    154.8: ("RTX A6000",),
    149.7: ("A40",),
    148: ("H20",),
    125: ("A10",),
    121: ("L4",),
    119.5: ("L20",),
    71: ("RTX 3090",),
}
# Parts and variants of listed devices.
_OTHER_CHIPS = ("mig", "laptop", "max-q", "4090 d", "5090 d", "3090 ti")


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
        """All parameters of one block: matrices, biases, norms, modulation."""
        biases = sum(layer.outputs for layer in self.block_linears.values())
        norms = 4 * self.dim * self.qk_norm + 2 * self.dim * self.cross_attn_norm
        return self.block_matrix_parameters + biases + norms + 6 * self.dim

    @property
    def full_precision_parameters(self) -> int:
        """Parameters that stay in float32 in bf16 training: time embedding and head."""
        dim = self.dim
        time = (self.freq_dim + 1) * dim + 7 * (dim + 1) * dim
        return time + (dim + 1) * self.patch_elements * self.out_dim + 2 * dim

    @property
    def outer_parameters(self) -> int:
        """All parameters outside the blocks: embeddings of patches and text, and those in full precision."""
        patches = (self.in_dim * self.patch_elements + 1) * self.dim
        text = (self.text_dim + self.dim + 2) * self.dim
        return patches + text + self.full_precision_parameters

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


def lora_layers(shape: ModelShape, targets: str) -> dict[str, Linear]:
    """The layers of the whole model that `targets` selects, see `refalign_ext.lora.add_lora`."""
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
        video_tokens, reference_tokens: of the sample, without padding.
        references: number of references among which the reference tokens are divided (for the alignment loss).
        alignment: None trains without.
        checkpointing: `none`, `full` (blocks run again in the backward) or `selective` (the same, but the results of
            attention and of every second matmul are kept).
        lora_rank, lora_targets: with a rank only adapters get gradients of weights.
    """
    everything = video_tokens + reference_tokens
    tokens = {"all": everything, "video": video_tokens, "text": shape.text_len}
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
    # Scores and weighted values: two matmuls of 2 * queries * keys * dim each; their backward needs four. Fused attention
    # computes the scores again.
    attention = 4 * shape.num_layers * shape.dim * (everything**2 + video_tokens * shape.text_len)
    if checkpointing == "full":
        repeated = forward + attention
    elif checkpointing == "none":
        repeated = 0
    repeated += attention // 2
    outer_forward, outer_backward = _outer_flops(shape, everything, frozen=bool(lora_rank))
    forward += attention + outer_forward
    aligned = 0 if alignment is None else _alignment_flops(shape, alignment, reference_tokens, references)
    model = forward + backward + 2 * attention + outer_backward + aligned
    return StepFlops(forward, model, model + repeated, aligned)


def _outer_flops(shape: ModelShape, tokens: int, *, frozen: bool) -> tuple[int, int]:
    """(forward, backward) of embeddings and head; the first layers need no gradient of their inputs."""
    dim, patch = shape.dim, shape.patch_elements
    first = 2 * dim * (tokens * shape.in_dim * patch + shape.text_len * shape.text_dim + shape.freq_dim)
    later = 2 * (shape.text_len * dim * dim + 7 * dim * dim)
    head = 2 * tokens * dim * patch * shape.out_dim
    return first + later + head, head if frozen else first + 2 * (later + head)


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
    name = name.lower()
    if any(other in name for other in _OTHER_CHIPS):
        return None
    words = set(name.replace("-", " ").replace("/", " ").split())
    known = [
        (len(chip.split()), 1e12 * peak)
        for peak, chips in _PEAKS.items()
        for chip in chips
        if words.issuperset(chip.lower().split())
    ]
    return max(known)[1] if known else None
