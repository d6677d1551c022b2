"""ReferenceBackbone against a direct formulation: one sample at a time, references appended by hand, no hooks.

`direct` uses the model's submodules one by one and nothing of its forward, its blocks' forward or its attention, so it
holds for any tree that keeps Wan's names. diffusers' transformer is a second, independent witness.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refalign_ext.backbone import BackboneOutput, ReferenceBackbone

CHANNELS, TEXT_DIM, TEXT_LEN = 16, 20, 9
DTYPES = (torch.float32, torch.float64)
# largest difference allowed, relative to the largest value
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
# smallest difference, relative to the largest value, that counts as clearly different
CLEARLY = 1e-2
TAPS = ("block", "self_attn")


@pytest.fixture(scope="module")
def wan_model() -> type[nn.Module]:
    """The model class under test; everything in this file gets it from here."""
    from wan.modules.model import WanModel

    return WanModel


@pytest.fixture(scope="module")
def make_model(wan_model: type[nn.Module]) -> Any:
    """Builds small models with nothing left at zero or one, so that every parameter matters."""

    def make(head_dim: int = 24, num_heads: int = 2, num_layers: int = 2, dtype: torch.dtype = torch.float32):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = wan_model(
                dim=head_dim * num_heads,
                ffn_dim=64,
                freq_dim=32,
                text_dim=TEXT_DIM,
                text_len=TEXT_LEN,
                num_heads=num_heads,
                num_layers=num_layers,
            )
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter), alpha=0.2)
                    elif name == "head.head.weight" or name.startswith("text_embedding"):
                        nn.init.xavier_uniform_(parameter)
        return nn.Module.to(model, dtype).eval()

    return make


class Batch:
    """Random inputs; `shapes` holds one (frames, references, height, width) in latent cells per sample."""

    def __init__(
        self, shapes: list[tuple[int, int, int, int]], dtype: torch.dtype = torch.float32, seed: int = 1
    ) -> None:
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        self.latents = [draw(CHANNELS, f, h, w) for f, _, h, w in shapes]
        self.references = [draw(CHANNELS, m, h, w) for _, m, h, w in shapes]
        self.context = [draw(1 + (4 * i) % TEXT_LEN, TEXT_DIM) for i in range(len(shapes))]
        self.timestep = torch.linspace(987.654, 3.21, len(shapes), dtype=torch.float64).float()

    def inputs(self) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
        return self.latents, self.timestep, self.context, self.references

    def only(self, i: int) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
        return (
            self.latents[i : i + 1],
            self.timestep[i : i + 1],
            self.context[i : i + 1],
            self.references[i : i + 1],
        )


def rotations(head_dim: int, frames: int, rows: int, columns: int) -> Tensor:
    """[frames * rows * columns, head_dim / 2] complex: frame, row and column turn their share of the channels."""
    shares = (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    per_token = []
    for frame in range(frames):
        for row in range(rows):
            for column in range(columns):
                per_token.append(
                    [
                        position * 10000.0 ** (-2 * i / share)
                        for position, share in zip((frame, row, column), shares, strict=True)
                        for i in range(share // 2)
                    ]
                )
    angles = torch.tensor(per_token, dtype=torch.float64)
    return torch.polar(torch.ones_like(angles), angles)


def attend(module: nn.Module, x: Tensor, source: Tensor, turns: Tensor | None = None) -> Tensor:
    """Softmax attention of tokens x [L, d] to `source` [S, d], from the module's projections and norms."""
    heads = module.num_heads
    q, k = module.norm_q(module.q(x)), module.norm_k(module.k(source))
    q, k, v = (
        u.unflatten(-1, (heads, -1)).transpose(0, 1) for u in (q, k, module.v(source))
    )  # [heads, L, c]
    if turns is not None:
        q, k = (
            torch.view_as_real(torch.view_as_complex(u.double().unflatten(-1, (-1, 2))) * turns)
            .flatten(-2)
            .to(v)
            for u in (q, k)
        )
    weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
    return module.o((weights @ v).transpose(0, 1).flatten(1))


def direct(
    model: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    context: Tensor,
    references: Tensor,
    *,
    references_first: bool = False,
    references_read_text: bool = False,
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """One sample without ReferenceBackbone; the switches make it wrong on purpose.

    Returns:
        The prediction [C, F, H, W], and per tap the reference tokens [M, N, d] of every block.
    """
    dtype, patch = latents.dtype, model.patch_size
    count, frames, (rows, columns) = (
        references.shape[1],
        latents.shape[1],
        (
            latents.shape[2] // patch[1],
            latents.shape[3] // patch[2],
        ),
    )
    per_frame = rows * columns

    def embed(frame: Tensor) -> Tensor:  # [C, H, W] -> [N, d]
        weight, bias = model.patch_embedding.weight, model.patch_embedding.bias
        return F.conv3d(frame[None, :, None], weight, bias, stride=patch).flatten(2)[0].T

    video = [embed(frame) for frame in latents.unbind(1)]
    clean = [embed(frame) for frame in references.unbind(1)]
    x = torch.cat(clean + video if references_first else video + clean)  # [L, d]
    is_video = torch.ones(len(x), dtype=torch.bool)
    start = 0 if references_first else frames * per_frame
    is_video[start : start + count * per_frame] = False
    turns = rotations(model.dim // model.num_heads, frames + count, rows, columns)

    half = model.freq_dim // 2
    angles = timestep.double() * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    e = model.time_embedding(torch.cat([angles.cos(), angles.sin()])[None].to(dtype))  # [1, d]
    e0 = model.time_projection(e).unflatten(1, (6, -1))  # [1, 6, d]
    text = model.text_embedding(F.pad(context, (0, 0, 0, model.text_len - len(context))))  # [T, d]

    taps: dict[str, list[Tensor]] = {place: [] for place in TAPS}

    def take(place: str, tokens: Tensor) -> None:
        taps[place].append(tokens[~is_video].unflatten(0, (count, per_frame)))

    for block in model.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + e0).unbind(1)  # [1, d] each
        normed = block.norm1(x) * (1 + scale1) + shift1
        attended = attend(block.self_attn, normed, normed, turns)
        take("self_attn", attended)
        x = x + attended * gate1
        asking = torch.ones_like(is_video) if references_read_text else is_video
        residual = torch.zeros_like(x)
        residual[asking] = attend(block.cross_attn, block.norm3(x)[asking], text)
        x = x + residual
        x = x + block.ffn(block.norm2(x) * (1 + scale2) + shift2) * gate2
        take("block", x)

    shift, scale = (model.head.modulation + e[:, None]).unbind(1)
    patches = model.head.head(model.head.norm(x) * (1 + scale) + shift)[is_video]
    cells = patches.view(frames, rows, columns, patch[1], patch[2], CHANNELS)
    return cells.permute(5, 0, 1, 3, 2, 4).reshape(latents.shape), taps


def direct_of(
    model: nn.Module, batch: Batch, i: int = 0, **wrong: bool
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    return direct(model, batch.latents[i], batch.timestep[i], batch.context[i], batch.references[i], **wrong)


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def loss_of(output: BackboneOutput) -> Tensor:
    return sum(part.square().sum() for part in [*output.prediction, *output.reference_tokens])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters, which are then forgotten by the model."""
    taken = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return taken


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # the keys' biases move all scores of a query alike: their gradients are zero up to rounding
        scale = max(gradient.abs().max().item(), 1e-3)
        assert (actual[name] - gradient).abs().max().item() <= tolerance * scale, name


def hook_count(model: nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    tables += ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize(("head_dim", "num_heads"), [(24, 2), (32, 2), (128, 1)])
def test_prediction_and_taps_equal_the_direct_formulation(
    make_model: Any, head_dim: int, num_heads: int, count: int, dtype: torch.dtype
) -> None:
    model = make_model(head_dim, num_heads, 2, dtype)
    backbone = ReferenceBackbone(model)
    # 5 x 3 and 3 x 7 tokens: rows and columns that differ and are odd
    for shape in ((2, count, 10, 6), (3, count, 6, 14)):
        batch = Batch([shape], dtype)
        with torch.no_grad():
            expected, taps = direct_of(model, batch)
            for tap in TAPS:
                for depth in (0, 1, 2):
                    output = backbone(*batch.inputs(), tap_depth=depth, tap=tap)
                    assert difference(output.prediction[0], expected) < TOLERANCE[dtype]
                    assert len(output.reference_tokens) == depth
                    for actual, tokens in zip(output.reference_tokens, taps[tap]):
                        assert actual.shape == (1, count, shape[2] * shape[3] // 4, model.dim)
                        assert difference(actual[0], tokens) < TOLERANCE[dtype]


MIXED = {
    "same size, references differ": [(2, 2, 6, 10), (2, 0, 6, 10), (2, 3, 6, 10)],
    "lengths differ": [(3, 1, 6, 6), (1, 2, 6, 6), (2, 2, 6, 6)],
    "a short video with more references than the longest has frames": [(4, 0, 6, 6), (1, 4, 6, 6)],
    "sizes differ": [(2, 2, 6, 10), (3, 0, 10, 6), (1, 4, 2, 2), (2, 1, 6, 6)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("shapes", MIXED.values(), ids=MIXED.keys())
def test_a_mixed_batch_gives_what_each_sample_gives_alone(
    make_model: Any, shapes: list[tuple[int, int, int, int]], multiple: int, dtype: torch.dtype
) -> None:
    model = make_model(32, dtype=dtype)
    backbone = ReferenceBackbone(model)
    batch = Batch(shapes, dtype)
    with torch.no_grad():
        backbone.seq_len_multiple = multiple
        together = backbone(*batch.inputs())
        assert together.layout.seq_len % multiple == 0
        backbone.seq_len_multiple = 1
        for i, latents in enumerate(batch.latents):
            alone = backbone(*batch.only(i)).prediction[0]
            assert together.prediction[i].shape == latents.shape
            assert difference(together.prediction[i], alone) < TOLERANCE[dtype]
            assert difference(together.prediction[i], direct_of(model, batch, i)[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("shapes", list(MIXED.values())[:3], ids=list(MIXED)[:3])
def test_taps_of_a_mixed_batch(make_model: Any, shapes: list[tuple[int, int, int, int]], tap: str) -> None:
    model = make_model()
    batch = Batch(shapes)
    with torch.no_grad():
        output = ReferenceBackbone(model)(*batch.inputs(), tap_depth=2, tap=tap)
        for i, (_, count, _, _) in enumerate(shapes):
            taps = direct_of(model, batch, i)[1][tap]
            for actual, expected in zip(output.reference_tokens, taps, strict=True):
                assert torch.count_nonzero(actual[i, count:]) == 0
                if count:
                    assert difference(actual[i, :count], expected) < TOLERANCE[torch.float32]


def test_references_may_come_in_another_dtype(make_model: Any) -> None:
    backbone = ReferenceBackbone(make_model())
    latents, timestep, context, references = Batch([(1, 2, 6, 6)]).inputs()
    with torch.no_grad():
        expected = backbone(latents, timestep, context, references).prediction[0]
        actual = backbone(latents, timestep, context, [u.double() for u in references]).prediction[0]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("tap", TAPS)
def test_gradients_equal_the_direct_formulation(make_model: Any, tap: str) -> None:
    model = make_model(dtype=torch.float64)
    batch = Batch([(2, 1, 6, 6), (1, 2, 6, 6), (2, 0, 6, 6)], torch.float64)
    for i in range(3):
        prediction, taps = direct_of(model, batch, i)
        sum(part.square().sum() for part in [prediction, *taps[tap]]).backward()
    expected = gradients(model)
    loss_of(ReferenceBackbone(model)(*batch.inputs(), tap_depth=2, tap=tap)).backward()
    assert_same_gradients(gradients(model), expected, 1e-10)


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("depth", [1, 2])
def test_taps_alone_train_the_blocks_below_them(make_model: Any, depth: int, tap: str) -> None:
    model = make_model(num_layers=3)
    output = ReferenceBackbone(model)(*Batch([(2, 2, 6, 6)]).inputs(), tap_depth=depth, tap=tap)
    output.reference_tokens[-1].square().sum().backward()
    reached = {name for name, gradient in gradients(model).items() if gradient.abs().max() > 0}
    assert "patch_embedding.weight" in reached
    for i in range(3):
        assert (f"blocks.{i}.self_attn.v.weight" in reached) == (i < depth)
        # the text reaches references only through the video's tokens, one block later
        assert (f"blocks.{i}.cross_attn.v.weight" in reached) == (i < depth - 1)
        assert (f"blocks.{i}.ffn.0.weight" in reached) == (i < depth - (tap == "self_attn"))


def through_the_library(model: nn.Module, reentrant: bool = False) -> None:
    if not getattr(model, "_supports_gradient_checkpointing", False):
        pytest.skip("this model class has no enable_gradient_checkpointing()")
    if reentrant:
        model.enable_gradient_checkpointing(lambda block, *args: checkpoint(block, *args, use_reentrant=True))
    else:
        model.enable_gradient_checkpointing()


def by_wrapping_forward(model: nn.Module, reentrant: bool = False) -> None:
    """As a model without the switch is checkpointed: everything inside a block's hooks is repeated."""
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)


CHECKPOINTING = pytest.mark.parametrize("enable", [through_the_library, by_wrapping_forward])
SOME = [(2, 1, 6, 6), (1, 2, 6, 6)]


@CHECKPOINTING
@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("shapes", [SOME, [(2, 2, 6, 6)]], ids=["mixed", "single"])
def test_checkpointing_changes_neither_taps_nor_gradients(
    make_model: Any, enable: Any, tap: str, shapes: list[tuple[int, int, int, int]]
) -> None:
    model = make_model(num_layers=3)
    backbone = ReferenceBackbone(model)
    batch = Batch(shapes)
    first = backbone(*batch.inputs(), tap_depth=2, tap=tap)
    loss_of(first).backward()
    expected = gradients(model)

    enable(model)
    calls: list[int] = []
    model.blocks[0].ffn.register_forward_hook(lambda *_: calls.append(1))
    second = backbone(*batch.inputs(), tap_depth=2, tap=tap)
    for actual, wanted in zip(second.reference_tokens, first.reference_tokens, strict=True):
        assert torch.equal(actual, wanted)
    kept = [tokens.detach().clone() for tokens in second.reference_tokens]
    loss_of(second).backward()
    assert len(calls) == 2, "blocks were not repeated: checkpointing was off"
    assert_same_gradients(gradients(model), expected, 1e-6)
    assert all(torch.equal(tokens, copied) for tokens, copied in zip(second.reference_tokens, kept))


@CHECKPOINTING
def test_several_passes_before_one_backward(make_model: Any, enable: Any) -> None:
    model = make_model()
    backbone = ReferenceBackbone(model)
    batches = [Batch(SOME), Batch([(1, 3, 6, 6)], seed=2), Batch([(2, 0, 6, 10)], seed=3)]

    def losses() -> Tensor:
        return sum(loss_of(backbone(*batch.inputs(), tap_depth=2)) for batch in batches)

    losses().backward()
    expected = gradients(model)
    enable(model)
    total = losses()
    with torch.no_grad():
        backbone(*batches[1].inputs())
    total.backward()
    assert_same_gradients(gradients(model), expected, 1e-6)


@CHECKPOINTING
@pytest.mark.parametrize("tap", TAPS)
def test_taps_alone_train_under_checkpointing(make_model: Any, enable: Any, tap: str) -> None:
    model = make_model()
    backbone = ReferenceBackbone(model)
    batch = Batch(SOME)

    def train() -> dict[str, Tensor]:
        output = backbone(*batch.inputs(), tap_depth=2, tap=tap)
        sum(tokens.square().sum() for tokens in output.reference_tokens).backward()
        return gradients(model)

    expected = train()
    enable(model)
    assert_same_gradients(train(), expected, 1e-6)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@CHECKPOINTING
def test_reentrant_checkpointing_is_refused(make_model: Any, enable: Any) -> None:
    model = make_model()
    backbone = ReferenceBackbone(model)
    enable(model, reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        backbone(*Batch(SOME).inputs(), tap_depth=1)
    with torch.no_grad():
        backbone(*Batch(SOME).inputs())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_blocks_wrapped_before_references_are_attached(make_model: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make_model()
    batch = Batch(SOME)
    backbone = ReferenceBackbone(model)
    loss_of(backbone(*batch.inputs(), tap_depth=2, tap="self_attn")).backward()
    expected = gradients(model)
    backbone.detach()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    loss_of(ReferenceBackbone(model)(*batch.inputs(), tap_depth=2, tap="self_attn")).backward()
    actual = {name.replace("._checkpoint_wrapped_module", ""): u for name, u in gradients(model).items()}
    assert_same_gradients(actual, expected, 1e-6)


def test_wrong_attachments_are_clearly_different(make_model: Any) -> None:
    model = make_model(32, num_layers=3)
    batch = Batch([(2, 3, 6, 10)])
    latents, timestep, context, references = batch.inputs()
    backbone = ReferenceBackbone(model)
    with torch.no_grad():
        right = backbone(*batch.inputs()).prediction[0]

        def attached(other: Tensor) -> Tensor:
            return backbone(latents, timestep, context, [other]).prediction[0]

        wrong = {
            "swapped": attached(references[0].flip(1)),
            "left out": attached(references[0][:, :0]),
            "one left out": attached(references[0][:, :2]),
            "zeros": attached(torch.zeros_like(references[0])),
            "put first": direct_of(model, batch, references_first=True)[0],
        }
        model = backbone.detach()
        extended = torch.cat([latents[0], references[0]], 1)
        wrong["read the text"] = model([extended], t=timestep, context=context, seq_len=75)[0][:, :2]
        read = direct_of(model, batch, references_read_text=True)[0]
    assert difference(wrong["read the text"], read) < TOLERANCE[torch.float32]
    for name, prediction in wrong.items():
        assert difference(prediction, right) > CLEARLY, name


def test_a_null_reference_keeps_its_tokens(make_model: Any) -> None:
    model = make_model()
    batch = Batch([(2, 2, 6, 6)])
    batch.references[0].zero_()
    backbone = ReferenceBackbone(model)
    with torch.no_grad():
        null = backbone(*batch.inputs(), tap_depth=2)
        assert null.reference_tokens[1].shape == (1, 2, 9, model.dim)
        assert difference(null.prediction[0], direct_of(model, batch)[0]) < TOLERANCE[torch.float32]
        batch.references[0] = batch.references[0][:, :0]
        absent = backbone(*batch.inputs(), tap_depth=2)
        assert absent.reference_tokens[1].shape == (1, 0, 9, model.dim)
    assert difference(null.prediction[0], absent.prediction[0]) > CLEARLY


def test_the_prompt_reaches_references_only_through_the_video(make_model: Any) -> None:
    model = make_model(num_layers=3)
    latents, timestep, context, references = Batch([(2, 2, 6, 6)]).inputs()
    backbone = ReferenceBackbone(model)
    with torch.no_grad():
        first = backbone(latents, timestep, context, references, tap_depth=3)
        other = backbone(latents, timestep, [context[0] + 1.0], references, tap_depth=3)
    assert torch.equal(first.reference_tokens[0], other.reference_tokens[0])
    assert not torch.equal(first.reference_tokens[1], other.reference_tokens[1])
    assert difference(other.prediction[0], first.prediction[0]) > CLEARLY


class ExactSinusoid(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))

    def forward(self, timestep: Tensor) -> Tensor:
        angles = timestep.double()[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def make_witness(model: nn.Module) -> WanTransformer3DModel:
    """diffusers' model with the same weights, and with float64 tables: its own float32 ones are 1e-5 off."""
    head_dim = model.dim // model.num_heads
    witness = WanTransformer3DModel(
        num_attention_heads=model.num_heads,
        attention_head_dim=head_dim,
        text_dim=model.text_dim,
        freq_dim=model.freq_dim,
        ffn_dim=model.ffn_dim,
        num_layers=model.num_layers,
        cross_attn_norm=True,
    )
    nn.Module.to(witness, model.patch_embedding.weight.dtype)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    witness.load_state_dict(convert_wan_transformer_to_diffusers(weights), strict=True)
    shares = (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    exponents = torch.cat([torch.arange(0, share, 2, dtype=torch.float64) / share for share in shares])
    angles = torch.arange(1024.0, dtype=torch.float64)[:, None] * 10000.0**-exponents
    angles = angles.repeat_interleave(2, dim=1)
    witness.rope.freqs_cos, witness.rope.freqs_sin = angles.cos(), angles.sin()
    witness.condition_embedder.timesteps_proj = ExactSinusoid(model.freq_dim)
    return witness.eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_diffusers_agrees(make_model: Any, count: int, dtype: torch.dtype) -> None:
    """Without references as it is; with them, once its cross-attention's result is zeroed on their tokens."""
    model = make_model(32, dtype=dtype)
    frames, tokens_per_frame = 2, 15
    batch = Batch([(frames, count, 6, 10)] * 2, dtype)
    witness = make_witness(model)

    def silence(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        is_video = torch.arange(output.shape[1]) < frames * tokens_per_frame
        return output * is_video[:, None]

    if count:
        for block in witness.blocks:
            block.attn2.register_forward_hook(silence)
    extended = torch.stack([torch.cat(pair, 1) for pair in zip(batch.latents, batch.references, strict=True)])
    padded = torch.stack([F.pad(text, (0, 0, 0, TEXT_LEN - len(text))) for text in batch.context])
    # its calls of float() must not round a float64 model
    keep = Tensor.double if dtype == torch.float64 else Tensor.float
    with torch.no_grad():
        with mock.patch.object(Tensor, "float", keep):
            expected = witness(extended, batch.timestep, padded, return_dict=False)[0][:, :, :frames]
        actual = torch.stack(ReferenceBackbone(model)(*batch.inputs()).prediction)
    assert difference(actual, expected) < TOLERANCE[dtype]


def test_detach_leaves_the_model_as_it_was_found(make_model: Any) -> None:
    model = make_model()
    batch = Batch([(2, 2, 6, 6)])
    keys, hooks = list(model.state_dict()), hook_count(model)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}

    def plain() -> Tensor:
        return model(batch.latents, t=batch.timestep, context=batch.context, seq_len=18)[0]

    with torch.no_grad():
        before = plain()
        backbone = ReferenceBackbone(model)
        assert hook_count(model) > hooks
        assert list(model.state_dict()) == keys
        assert list(backbone.state_dict()) == [f"model.{key}" for key in keys]
        backbone(*batch.inputs(), tap_depth=2)
        assert torch.equal(plain(), before), "the model itself must not feel the attachment"
        assert backbone.detach() is model
        assert hook_count(model) == hooks
        assert list(model.state_dict()) == keys
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
        assert torch.equal(plain(), before)
        with pytest.raises(ValueError, match="detached: attach a new one"):
            backbone(*batch.inputs())
        again = ReferenceBackbone(model)(*batch.inputs()).prediction[0]
    assert difference(again, direct_of(model, batch)[0].detach()) < TOLERANCE[torch.float32]


def test_a_deep_copy_has_hooks_of_its_own(make_model: Any) -> None:
    backbone = ReferenceBackbone(make_model())
    copied = copy.deepcopy(backbone)
    inputs = Batch([(1, 2, 6, 6)]).inputs()
    with torch.no_grad():
        expected = backbone(*inputs, tap_depth=2)
        backbone.detach()
        actual = copied(*inputs, tap_depth=2)
    assert torch.equal(actual.prediction[0], expected.prediction[0])
    for tokens, wanted in zip(actual.reference_tokens, expected.reference_tokens, strict=True):
        assert torch.equal(tokens, wanted)


def test_two_attachments_to_one_model_do_not_meet(make_model: Any) -> None:
    model = make_model()
    first, second = ReferenceBackbone(model), ReferenceBackbone(model)
    through_the_library(model)
    batch = Batch(SOME)
    loss_of(first(*batch.inputs(), tap_depth=1)).backward()
    expected = gradients(model)
    loss_of(second(*batch.inputs(), tap_depth=1)).backward()
    assert_same_gradients(gradients(model), expected, 1e-6)


def test_a_failed_pass_leaves_nothing_behind(make_model: Any) -> None:
    model = make_model()
    batch = Batch([(2, 2, 6, 6)])
    backbone = ReferenceBackbone(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("stop here")

    with torch.no_grad():
        before = model(batch.latents, t=batch.timestep, context=batch.context, seq_len=18)[0]
        for module in (model.blocks[0].norm3, model.blocks[1].cross_attn.q, model.blocks[0].ffn, model.head):
            handle = module.register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="stop here"):
                backbone(*batch.inputs(), tap_depth=2)
            handle.remove()
            text, x = torch.randn(1, TEXT_LEN, model.dim), torch.randn(1, 40, model.dim)
            assert model.blocks[0].cross_attn(x, text, None).shape == x.shape
            after = model(batch.latents, t=batch.timestep, context=batch.context, seq_len=18)[0]
            assert torch.equal(after, before)


@CHECKPOINTING
@pytest.mark.parametrize("tap", TAPS)
def test_a_pass_outlives_neither_its_output_nor_the_backward(make_model: Any, enable: Any, tap: str) -> None:
    model = make_model()
    enable(model)
    backbone = ReferenceBackbone(model)
    seen: list[weakref.ref[Tensor]] = []
    for block in model.blocks:
        for module in (block, block.self_attn):
            module.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    output = backbone(*Batch(SOME).inputs(), tap_depth=2, tap=tap)
    loss = loss_of(output)
    del output
    del loss  # never gone backward from, as after an interrupted step
    gc.collect()
    assert seen and all(tensor() is None for tensor in seen)

    loss_of(backbone(*Batch(SOME).inputs(), tap_depth=2, tap=tap)).backward()
    gc.collect()
    assert all(tensor() is None for tensor in seen)
    text, x = torch.randn(1, TEXT_LEN, model.dim), torch.randn(1, 40, model.dim)
    with torch.no_grad():
        for block in model.blocks:
            alone = block.cross_attn(x, text, None)[0]
            assert difference(alone, attend(block.cross_attn, x[0], text[0])) < TOLERANCE[torch.float32]


def test_missing_attributes_are_listed(make_model: Any) -> None:
    with pytest.raises(ValueError, match="Linear is not a WanModel") as caught:
        ReferenceBackbone(nn.Linear(2, 2))
    for name in ("blocks", "head", "patch_embedding", "patch_size", "num_heads", "dim"):
        assert f"'{name}'" in str(caught.value)
    model = make_model()
    del model.head, model.blocks[1].modulation, model.blocks[0].cross_attn
    with pytest.raises(ValueError, match="lacks") as caught:
        ReferenceBackbone(model)
    for name in ("head", "blocks.0.cross_attn", "blocks.1.modulation"):
        assert f"'{name}'" in str(caught.value)
    assert hook_count(model) == 0


def replace(batch: Batch, **changes: Any) -> Batch:
    for name, value in changes.items():
        setattr(batch, name, value)
    return batch


ONE = [(2, 1, 6, 6)]
BAD_CALLS = {
    "sizes": (
        lambda: replace(Batch(ONE), references=[torch.zeros(16, 1, 6, 8)]),
        {},
        "of the same C, H and W",
    ),
    "channels": (lambda: replace(Batch(ONE), references=[torch.zeros(8, 1, 6, 6)]), {}, r"\[C, M, H, W\]"),
    "dimensions": (lambda: replace(Batch(ONE), references=[torch.zeros(16, 6, 6)]), {}, r"\[C, M, H, W\]"),
    "counts": (lambda: replace(Batch(ONE), references=[]), {}, "1 latents, references for 0 samples"),
    "no samples": (lambda: Batch([]), {}, "batch is empty"),
    "no frames": (lambda: Batch([(0, 1, 6, 6)]), {}, "hold no video"),
    "patch": (lambda: Batch([(2, 1, 6, 7)]), {}, "do not divide by the patch"),
    "unknown tap": (lambda: Batch(ONE), {"tap": "ffn"}, "unknown tap 'ffn': choose one of block, self_attn"),
    "too deep": (lambda: Batch(ONE), {"tap_depth": 3}, "tap depth 3 does not fit 2 blocks"),
    "negative depth": (lambda: Batch(ONE), {"tap_depth": -1}, "tap depth -1"),
    "grids": (lambda: Batch([(2, 1, 6, 6), (2, 1, 6, 10)]), {"tap_depth": 1}, "bucket by size"),
}


@pytest.mark.parametrize(("make", "options", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_mistakes_are_named_before_the_model_runs(
    make_model: Any, make: Any, options: dict, message: str
) -> None:
    model = make_model()
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        ReferenceBackbone(model)(*make().inputs(), **options)
    assert not calls


def test_a_patch_that_merges_frames_is_refused(make_model: Any) -> None:
    model = make_model()
    model.patch_size = (2, 2, 2)
    with pytest.raises(ValueError, match="temporal patch of 1"):
        ReferenceBackbone(model)(*Batch(ONE).inputs())
