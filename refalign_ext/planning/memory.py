"""Bytes that one rank holds and receives, from sizes alone.

Activations are the tensors that autograd keeps, counted for `WanAttentionBlock` as it is written. With w bytes per
element of the matmuls (2 in bf16), width d, feed-forward width f, l tokens of which v are video, and t text tokens, one
block keeps per sample

    l * (12 d + 11 w d + 2 w f) + v * 3 w d + t * 3 w d

bytes: the float32 residual stream before each of the three norms; the inputs of the linear layers; queries and keys
before and after their norm; values; the results of attention and of the two gated branches; the feed-forward before and
after its activation. References skip the video's term. A batch of several samples adds 8 l d (its norms are kept as
well, because each sample has a modulation of its own). Statistics of norms and softmax are a few numbers per token.
Full checkpointing keeps the 4 l d of each block's input and one whole block; selective checkpointing adds to those inputs
the results of attention and of every second matmul (k and o of both attentions, and the feed-forward).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refalign_ext.distributed.sizes import ParallelSizes
from refalign_ext.planning.flops import AlignmentShape, Linear, ModelShape

FULL, HALF = 4, 2  # bytes of float32 and bfloat16

_WAN_VAE_PARAMETERS, _WAN_VAE_WIDTH = 126_892_531, 96


@dataclass(frozen=True)
class Load:
    """What one rank works on at once.

    Attributes:
        batch: samples in one pass.
        tokens: tokens of a whole sample, padded to a multiple of the sequence ranks.
        held: tokens of a sample on this rank.
        video: how many of the held ones are video, on the rank that has the most.
        references: how many are references, on the rank that has the most.
        width: bytes per element of matmuls, 2 in bf16.
    """

    batch: int
    tokens: int
    held: int
    video: int
    references: int
    width: int

    @classmethod
    def of(
        cls, sizes: ParallelSizes, video_tokens: int, reference_tokens: int, *, batch: int, precision: str
    ) -> Load:
        """The load of the fullest rank; video tokens come first, as in `TokenLayout`."""
        held = -(-(video_tokens + reference_tokens) // sizes.sequence)
        width = FULL if precision == "fp32" else HALF
        most = min(held, video_tokens), min(held, reference_tokens)
        return cls(batch, held * sizes.sequence, held, *most, width)


def t5_parameters(task: Any) -> int:
    """Parameters of the text encoder in a task's `t5` section."""
    t5 = task.t5
    block = 4 * t5.dim * t5.dim_attn + 3 * t5.dim * t5.dim_ffn + 2 * t5.dim + t5.num_buckets * t5.num_heads
    return t5.vocab * t5.dim + t5.num_layers * block + t5.dim


def vae_parameters(task: Any) -> int:
    """Parameters of the video autoencoder: Wan's own exactly, others scaled by the square of their width."""
    return round(_WAN_VAE_PARAMETERS * (task.vae.dim / _WAN_VAE_WIDTH) ** 2)


def block_activations(shape: ModelShape, load: Load, sizes: ParallelSizes | None = None) -> int:
    """What autograd keeps of one block without checkpointing (see the module's docstring).

    Ulysses keeps one more copy of the attention's result; a ring keeps the keys and values of all its ranks.
    """
    dim, width = shape.dim, load.width
    per_token = 12 * dim + 11 * width * dim + 2 * width * shape.ffn_dim
    per_token += FULL * (8 + shape.num_heads)  # mean and deviation of five norms, softmax
    if load.batch > 1:
        per_token += 2 * FULL * dim
    if sizes is not None:
        per_token += width * dim * (2 * (sizes.ring - 1) + (sizes.ulysses > 1))
    per_video = 3 * width * dim + FULL * (1 + shape.num_heads)
    per_text = 3 * width * dim
    return load.batch * (load.held * per_token + load.video * per_video + shape.text_len * per_text)


def activation_bytes(
    shape: ModelShape, load: Load, sizes: ParallelSizes, checkpointing: str
) -> dict[str, int]:
    """Activations of a forward pass with gradients, and the working space of its backward, by item."""
    dim, width, batch = shape.dim, load.width, load.batch
    one = block_activations(shape, load, sizes)
    inputs = shape.num_layers * batch * load.held * FULL * dim
    if checkpointing == "none":
        items = {"activations of the blocks": shape.num_layers * one}
    else:
        kept = inputs
        if checkpointing == "selective":
            results = load.held * 4 * dim + load.video * 2 * dim + shape.text_len * dim
            kept += shape.num_layers * batch * width * results
        items = {f"activations of the blocks ({checkpointing} checkpointing)": kept}
        items["activations of the block at work"] = one
    whole = FULL * dim * load.tokens if sizes.sequence > 1 else 0  # every rank embeds the whole sample
    text = shape.text_len * width * (shape.text_dim + 3 * dim)
    head = load.held * FULL * dim * (3 if batch > 1 else 2)
    # latents and prediction
    ends = load.tokens * FULL * shape.patch_elements * (shape.in_dim + shape.out_dim)
    rotary = FULL * (dim // shape.num_heads) * load.tokens
    items["activations outside the blocks"] = batch * (whole + text + head + ends) + rotary
    # Gradients of the stream, of the attention's inputs and of the feed-forward, before they are used up.
    working = load.held * (3 * FULL * dim + 4 * width * dim + 2 * width * shape.ffn_dim)
    items["working space of the backward"] = batch * working
    return items


def adapter_activations(layers: Mapping[str, Linear], load: Load, text_len: int) -> int:
    """What LoRA adds to the activations: each adapted layer keeps its input in the adapter's dtype."""
    tokens = {"all": load.held, "video": load.video, "text": text_len}
    return load.batch * load.width * sum(tokens[layer.tokens] * layer.inputs for layer in layers.values())


def optimizer_working_bytes(shape: ModelShape, optimizer: str, states: int, world: int) -> int:
    """Temporary memory of an optimizer step.

    AdamW computes the denominators of all its parameters at once, 4 bytes for each that the rank keeps (`states`). Muon
    holds the updates of all matrices whole, and orthogonalises those of one shape together: their stack in float32 and
    about three copies in bf16.
    """
    if optimizer != "muon":
        return FULL * states // world
    by_shape: dict[tuple[int, int], int] = {}
    for layer in shape.block_linears.values():
        sizes = (layer.inputs, layer.outputs)
        by_shape[sizes] = by_shape.get(sizes, 0) + shape.num_layers * layer.inputs * layer.outputs
    return FULL * sum(by_shape.values()) + (FULL + 3 * HALF) * max(by_shape.values())


def alignment_bytes(
    shape: ModelShape, alignment: AlignmentShape, load: Load, sizes: ParallelSizes, reference_tokens: int
) -> int:
    """Taps, projectors' activations and the alignment loss on the rank that holds the most reference tokens."""
    dim, teacher_dim, width = shape.dim, alignment.teacher_dim, load.width
    # Taps: on one rank they are views of what blocks keep anyway; in bf16 the first matmul makes a copy.
    taps = FULL * dim * (sizes.sequence > 1) + HALF * dim * (width == HALF)
    # The hidden layer before and after its activation (half as wide as the model), the result, and the loss's gradient.
    per_token = taps + width * dim + width * teacher_dim + FULL * teacher_dim
    teacher = 2 * FULL * teacher_dim * reference_tokens  # chosen, and normalised
    return load.batch * (alignment.depth * load.references * per_token + teacher)


def forward_bytes(shape: ModelShape, load: Load, sizes: ParallelSizes) -> int:
    """Largest working set of one block in a pass without gradients, and what lives throughout the pass."""
    dim, width = shape.dim, load.width
    attention = width * dim * (6 + 2 * sizes.ring)
    feed_forward = 2 * width * shape.ffn_dim
    per_token = 3 * FULL * dim + max(attention, feed_forward)
    whole = FULL * dim * load.tokens if sizes.sequence > 1 else 0
    text = shape.text_len * width * (shape.text_dim + 2 * dim)
    rotary = FULL * (dim // shape.num_heads) * load.tokens
    return load.batch * (load.held * per_token + whole + text) + rotary


def sequence_traffic(
    shape: ModelShape, load: Load, sizes: ParallelSizes, *, passes: int, joins: int
) -> dict[str, int]:
    """Bytes that a rank receives from the ranks that share its samples.

    Args:
        passes: how often the blocks' exchanges run: 1 forward, 2 with a backward, 3 if blocks run again in it.
        joins: how often the output is joined: 1 forward, 2 with a backward.
    """
    if sizes.sequence == 1:
        return {}
    share = load.batch * load.held * shape.dim * load.width  # one of q, k, v or the result on one rank
    items: dict[str, int] = {}
    if sizes.ulysses > 1:
        moved = 4 * share * (sizes.ulysses - 1) // sizes.ulysses
        items["Ulysses all-to-all"] = passes * shape.num_layers * moved
    if sizes.ring > 1:
        items["keys and values of the ring"] = passes * shape.num_layers * 2 * share * (sizes.ring - 1)
    output = load.batch * load.held * shape.patch_elements * shape.out_dim * FULL
    items["joining the output"] = joins * output * (sizes.sequence - 1)
    return items


def gather_traffic(shape: ModelShape, world: int, width: int, *, backward: bool) -> int:
    """Bytes of sharded weights that a rank receives in one pass, and again in its backward.

    The last block and the root stay gathered between the two.
    """
    apart = shape.full_precision_parameters if width == HALF else 0
    blocks = shape.num_layers * shape.block_parameters
    once = width * (blocks + shape.outer_parameters - apart) + FULL * apart
    again = width * (blocks - shape.block_parameters) + FULL * apart if backward else 0
    return (once + again) * (world - 1) // world


def gathered_bytes(shape: ModelShape, width: int, *, trained: bool) -> int:
    """Whole weights that FSDP holds on a rank at once, and with `trained` the gradients on their way out.

    Weights: the block at work, the next one as it arrives and as it is laid out, and the root. Gradients: one block's
    in `width` bytes and as the float32 buffer that is reduced.
    """
    apart = shape.full_precision_parameters if width == HALF else 0
    weights = width * (3 * shape.block_parameters + shape.outer_parameters - apart)
    return weights + (width + FULL) * shape.block_parameters * trained
