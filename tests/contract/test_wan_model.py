"""WanModel against diffusers' WanTransformer3DModel, which was measured to compute what upstream computes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import nn

from wan.configs import WAN_CONFIGS
from wan.modules import model as model_module
from wan.modules.model import WanModel, rope_apply, rope_multipliers, sinusoidal_embedding_1d

TEXT_DIM = 20
TEXT_LEN = 16
DTYPES = (torch.float32, torch.float64)
# largest difference allowed, relative to the largest value of the prediction
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def make_model(head_dim: int = 24, num_heads: int = 2, num_layers: int = 2, **overrides: Any) -> WanModel:
    """A small model with nothing left at zero or one, so that every parameter matters."""
    torch.manual_seed(0)
    sizes = {
        "dim": head_dim * num_heads,
        "ffn_dim": 64,
        "freq_dim": 32,
        "text_dim": TEXT_DIM,
        "text_len": TEXT_LEN,
    }
    model = WanModel(**(sizes | {"num_heads": num_heads, "num_layers": num_layers} | overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif name == "head.head.weight":
                nn.init.xavier_uniform_(parameter)
    return model.eval()


def make_oracle(model: WanModel, exact_tables: bool = True) -> WanTransformer3DModel:
    """diffusers' model with the same weights.

    Its tables of angles are float32, which alone moves its output by about 1e-5; `exact_tables` replaces them
    by float64 ones, computed here from the formulas.
    """
    dtype = next(model.parameters()).dtype
    oracle = WanTransformer3DModel(
        num_attention_heads=model.num_heads,
        attention_head_dim=model.dim // model.num_heads,
        text_dim=model.text_dim,
        freq_dim=model.freq_dim,
        ffn_dim=model.ffn_dim,
        num_layers=model.num_layers,
        cross_attn_norm=model.cross_attn_norm,
    )
    nn.Module.to(oracle, dtype)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    oracle.load_state_dict(convert_wan_transformer_to_diffusers(weights), strict=True)
    if exact_tables:
        angles = exact_angles(model.dim // model.num_heads).repeat_interleave(2, dim=1)
        oracle.rope.freqs_cos, oracle.rope.freqs_sin = angles.cos(), angles.sin()
        oracle.condition_embedder.timesteps_proj = ExactSinusoid(model.freq_dim)
    return oracle.eval()


def exact_angles(head_dim: int) -> torch.Tensor:
    """[1024, d / 2]: frames get d - 4 (d // 6) channels of a head, rows and columns 2 (d // 6) each."""
    sizes = (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    columns = [[10000.0 ** (-2 * i / size) for i in range(size // 2)] for size in sizes]
    frequencies = torch.tensor([*columns[0], *columns[1], *columns[2]], dtype=torch.float64)
    return torch.arange(1024, dtype=torch.float64)[:, None] * frequencies


class ExactSinusoid(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        frequencies = [10000.0 ** (-i / (dim // 2)) for i in range(dim // 2)]
        self.register_buffer("frequencies", torch.tensor(frequencies, dtype=torch.float64))

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        angles = timestep.double()[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def make_inputs(
    sizes: list[tuple[int, int, int]], dtype: torch.dtype = torch.float32, seed: int = 1
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """Latents, timesteps and prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(16, *size, generator=generator, dtype=dtype) for size in sizes]
    timesteps = torch.linspace(987.654, 3.21, len(sizes), dtype=torch.float64).float()
    lengths = [1 + (5 * i) % TEXT_LEN for i in range(len(sizes))]
    context = [torch.randn(length, TEXT_DIM, generator=generator, dtype=dtype) for length in lengths]
    return latents, timesteps, context


def tokens_in(latents: torch.Tensor) -> int:
    return latents[0].numel() // 4


def run_oracle(
    oracle: WanTransformer3DModel,
    latents: list[torch.Tensor],
    timesteps: torch.Tensor,
    context: list[torch.Tensor],
) -> torch.Tensor:
    """The oracle's prediction; its calls of `.float()` must not round a float64 model to float32."""
    padded = torch.stack([nn.functional.pad(u, (0, 0, 0, TEXT_LEN - len(u))) for u in context])
    keep = torch.Tensor.double if padded.dtype == torch.float64 else torch.Tensor.float
    with mock.patch.object(torch.Tensor, "float", keep):
        return oracle(torch.stack(latents), timesteps, padded, return_dict=False)[0]


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [24, 32, 128])
def test_forward_equals_the_oracle(head_dim: int, dtype: torch.dtype) -> None:
    model = nn.Module.to(make_model(head_dim), dtype)
    latents, timesteps, context = make_inputs([(3, 10, 14)] * 3, dtype)  # an odd grid: 3 x 5 x 7 tokens
    with torch.no_grad():
        expected = run_oracle(make_oracle(model), latents, timesteps, context)
        actual = torch.stack(model(latents, timesteps, context, tokens_in(latents[0])))
        padded = torch.stack(model(latents, timesteps, context, tokens_in(latents[0]) + 9))
    assert actual.dtype == dtype
    assert relative_difference(actual, expected) < TOLERANCE[dtype]
    assert relative_difference(padded, expected) < TOLERANCE[dtype]


def test_forward_equals_the_unchanged_oracle_up_to_its_float32_tables() -> None:
    model = make_model(32)
    latents, timesteps, context = make_inputs([(2, 6, 10)] * 2)
    with torch.no_grad():
        expected = run_oracle(make_oracle(model, exact_tables=False), latents, timesteps, context)
        actual = torch.stack(model(latents, timesteps, context, tokens_in(latents[0])))
    assert relative_difference(actual, expected) < 5e-5


@pytest.mark.parametrize("cross_attn_norm", [True, False])
def test_gradients_equal_the_oracle(cross_attn_norm: bool) -> None:
    model = nn.Module.to(make_model(cross_attn_norm=cross_attn_norm), torch.float64)
    oracle = make_oracle(model)
    latents, timesteps, context = make_inputs([(1, 6, 10), (1, 6, 10)], torch.float64)
    run_oracle(oracle, latents, timesteps, context).square().sum().backward()
    torch.stack(model(latents, timesteps, context, tokens_in(latents[0]))).square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    gradients = convert_wan_transformer_to_diffusers(gradients)
    assert gradients.keys() == dict(oracle.named_parameters()).keys()
    for name, parameter in oracle.named_parameters():
        # a bias of the keys moves all scores of a query alike: its gradient is zero up to rounding
        scale = max(parameter.grad.abs().max().item(), 1e-3)
        assert (gradients[name] - parameter.grad).abs().max().item() < 1e-10 * scale, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mixed_batch_gives_what_each_sample_gives_alone(dtype: torch.dtype) -> None:
    model = nn.Module.to(make_model(32), dtype)
    latents, timesteps, context = make_inputs([(3, 6, 10), (1, 2, 2), (2, 10, 6), (5, 4, 8)], dtype)
    with torch.no_grad():
        together = model(latents, timesteps, context, 47)
        for i, (sample, text) in enumerate(zip(latents, context, strict=True)):
            (alone,) = model([sample], timesteps[i : i + 1], [text], tokens_in(sample))
            assert together[i].shape == sample.shape
            assert relative_difference(together[i], alone) < TOLERANCE[dtype]


def test_a_mixed_batch_has_the_gradients_of_its_samples() -> None:
    model = nn.Module.to(make_model(num_layers=1), torch.float64)
    latents, timesteps, context = make_inputs([(3, 6, 10), (1, 2, 6)], torch.float64)
    sum(out.square().sum() for out in model(latents, timesteps, context, 45)).backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for i in range(2):
        (out,) = model(latents[i : i + 1], timesteps[i : i + 1], context[i : i + 1], tokens_in(latents[i]))
        out.square().sum().backward()
    for name, parameter in model.named_parameters():
        scale = max(parameter.grad.abs().max().item(), 1e-3)
        assert (together[name] - parameter.grad).abs().max().item() < 1e-10 * scale, name


def test_padding_must_be_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    latents, timesteps, context = make_inputs([(2, 6, 6)])
    seq_len = tokens_in(latents[0]) + 20
    with torch.no_grad():
        (expected,) = model(latents, timesteps, context, seq_len)
        masked = model_module.attention
        monkeypatch.setattr(
            model_module, "attention", lambda q, k, v, k_lens=None, **rest: masked(q, k, v, **rest)
        )
        (unmasked,) = model(latents, timesteps, context, seq_len)
    assert relative_difference(unmasked, expected) > 1e-3


def test_the_text_padding_is_attended_to() -> None:
    latents, timesteps, context = make_inputs([(2, 6, 6)])
    short = make_model(text_len=len(context[0]))
    long = make_model()
    long.load_state_dict(short.state_dict())
    with torch.no_grad():
        (without,) = short(latents, timesteps, context, 18)
        (padded,) = long(latents, timesteps, context, 18)
    assert relative_difference(without, padded) > 1e-3


def test_no_timestep_is_rounded_by_half_precision() -> None:
    model = nn.Module.to(make_model(), torch.bfloat16)
    captured = []
    model.time_embedding.register_forward_hook(lambda module, arguments, output: captured.append(output))
    latents, _, context = make_inputs([(1, 4, 4), (1, 4, 4)])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(latents, torch.tensor([999.0, 999.25]), context, 4)
    (embedding,) = captured
    assert embedding.dtype == torch.float32
    assert (embedding[0] - embedding[1]).abs().max() > 1e-4
    assert all(video.dtype == torch.float32 for video in out)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "weights_dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16 weights"]
)
def test_bfloat16_stays_close_to_float32(weights_dtype: torch.dtype, batch: int) -> None:
    model = make_model(32)
    latents, timesteps, context = make_inputs([(2, 6, 10)] * batch)
    with torch.no_grad():
        expected = torch.stack(model(latents, timesteps, context, 30))
        half = nn.Module.to(copy.deepcopy(model), weights_dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=weights_dtype == torch.float32):
            actual = torch.stack(half(latents, timesteps, context, 30))
    assert actual.dtype == torch.float32
    assert 1e-5 < relative_difference(actual, expected) < 5e-2


def test_training_under_autocast_reaches_every_parameter_in_float32() -> None:
    model = make_model().train()
    latents, timesteps, context = make_inputs([(2, 6, 10), (1, 4, 6)])
    with torch.autocast("cpu", torch.bfloat16):
        out = model(latents, timesteps, context, 30)
    sum(video.square().mean() for video in out).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_what_attention_returns_is_what_the_block_adds() -> None:
    model = nn.Module.to(make_model(num_layers=1), torch.float64)
    block = model.blocks[0]
    seen = {}
    for name in ("self_attn", "cross_attn", "ffn"):
        getattr(block, name).register_forward_hook(
            lambda module, arguments, output, name=name: seen.__setitem__(name, output)
        )
    x, e = torch.randn(2, 12, 48, dtype=torch.float64), torch.randn(2, 6, 48, dtype=torch.float64)
    context = torch.randn(2, TEXT_LEN, 48, dtype=torch.float64)
    grid_sizes = torch.tensor([[2, 2, 3], [1, 3, 4]])
    with torch.no_grad():
        out = block(x, e, torch.tensor([12, 12]), grid_sizes, model.freqs, context, None)
        gates = (block.modulation + e).unbind(1)
        expected = (
            x + seen["self_attn"] * gates[2][:, None] + seen["cross_attn"] + seen["ffn"] * gates[5][:, None]
        )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_a_hook_that_changes_cross_attention_changes_the_block_by_exactly_that() -> None:
    model = make_model(num_layers=1)
    latents, timesteps, context = make_inputs([(2, 4, 4)])
    with torch.no_grad():
        (before,) = model(latents, timesteps, context, 8)
        with_zeros = model.blocks[0].cross_attn.register_forward_hook(
            lambda module, arguments, output: torch.zeros_like(output)
        )
        (skipped,) = model(latents, timesteps, context, 8)
        (other_prompt,) = model(latents, timesteps, [context[0] + 1.0], 8)
        with_zeros.remove()
        (after,) = model(latents, timesteps, context, 8)
    assert relative_difference(skipped, before) > 1e-3
    assert torch.equal(skipped, other_prompt)
    assert torch.equal(after, before)


def test_the_raw_table_and_the_prepared_multipliers_turn_alike() -> None:
    grid_sizes = torch.tensor([[2, 3, 1], [1, 2, 2]])
    freqs = make_model().freqs
    x = torch.randn(2, 8, 2, 24, dtype=torch.float64)
    prepared = rope_multipliers(freqs, grid_sizes.tolist(), 8, torch.float64, x.device)
    turned = rope_apply(x, None, prepared)
    assert torch.equal(rope_apply(x, grid_sizes, freqs), turned)
    assert torch.equal(turned[1, 4:], x[1, 4:])  # padding is not turned
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("head_dim", [24, 32, 40, 64, 128])
def test_rotary_angles(head_dim: int) -> None:
    freqs = make_model(head_dim, num_layers=0).freqs
    assert freqs.dtype == torch.complex128 and freqs.shape == (1024, head_dim // 2)
    angles = exact_angles(head_dim)
    torch.testing.assert_close(freqs.real, angles.cos(), rtol=0, atol=1e-12)
    torch.testing.assert_close(freqs.imag, angles.sin(), rtol=0, atol=1e-12)


def test_sinusoid_is_computed_in_float64() -> None:
    embedding = sinusoidal_embedding_1d(256, torch.tensor([999.75]))
    assert embedding.dtype == torch.float64
    for i in (0, 1, 64, 127):
        angle = 999.75 * 10000.0 ** (-i / 128)
        assert embedding[0, i].item() == pytest.approx(math.cos(angle), abs=1e-12)
        assert embedding[0, 128 + i].item() == pytest.approx(math.sin(angle), abs=1e-12)


def test_meta_initialisation() -> None:
    with torch.device("meta"):
        model = WanModel(dim=48, ffn_dim=64, num_heads=2, num_layers=1, text_dim=TEXT_DIM, text_len=TEXT_LEN)
    reference = make_model(num_layers=1, freq_dim=256)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model.freqs, reference.freqs)
    assert not any("freqs" in key for key in model.state_dict())
    model.load_state_dict(reference.state_dict(), assign=True)
    latents, timesteps, context = make_inputs([(1, 4, 4)])
    with torch.no_grad():
        (actual,) = model(latents, timesteps, context, 4)
        (expected,) = reference(latents, timesteps, context, 4)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("task", "keys"), [("t2v-1.3B", 825), ("t2v-14B", 1095)])
def test_key_counts_of_the_published_checkpoints(task: str, keys: int) -> None:
    config = WAN_CONFIGS[task]
    with torch.device("meta"):
        model = WanModel(
            dim=config.dim, ffn_dim=config.ffn_dim, num_heads=config.num_heads, num_layers=config.num_layers
        )
    assert len(model.state_dict()) == keys


def test_configuration_survives_saving(tmp_path: Path) -> None:
    model = make_model(num_layers=1)
    model.save_pretrained(tmp_path)
    again = WanModel.from_pretrained(tmp_path)
    assert (again.text_dim, again.text_len, again.patch_size) == (TEXT_DIM, TEXT_LEN, (1, 2, 2))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_initialisation_is_upstreams() -> None:
    torch.manual_seed(0)
    model = WanModel(dim=48, ffn_dim=64, num_heads=2, num_layers=1, text_dim=TEXT_DIM, text_len=TEXT_LEN)
    assert not model.head.head.weight.any() and not model.head.head.bias.any()
    assert model.time_embedding[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.text_embedding[2].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.blocks[0].modulation.std().item() == pytest.approx(48**-0.5, rel=0.2)
    bound = math.sqrt(6 / (48 + 64))
    assert 0.9 * bound < model.blocks[0].ffn[0].weight.abs().max().item() <= bound


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_compiles_without_graph_breaks(batch: int) -> None:
    model = make_model(num_layers=1)
    multipliers = rope_multipliers(model.freqs, [(2, 2, 3)] * batch, 12, torch.float32, torch.device("cpu"))
    arguments = (torch.randn(batch, 6, 48), None, torch.tensor([[2, 2, 3]] * batch), multipliers)
    x, context = torch.randn(batch, 12, 48), torch.randn(batch, TEXT_LEN, 48)
    compiled = torch.compile(model.blocks[0], fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model.blocks[0](x, *arguments, context, None)
        torch.testing.assert_close(compiled(x, *arguments, context, None), expected, rtol=1e-5, atol=1e-5)
    compiled(x, *arguments, context, None).sum().backward()
    assert model.blocks[0].self_attn.q.weight.grad is not None


def test_gradient_checkpointing_changes_nothing() -> None:
    model = make_model().train()
    latents, timesteps, context = make_inputs([(2, 4, 6), (1, 4, 4)])
    gradients = []
    for _ in range(2):
        model.zero_grad()
        sum(out.square().sum() for out in model(latents, timesteps, context, 12)).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.enable_gradient_checkpointing()
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_further_latents_are_concatenated_on_the_channels() -> None:
    model = make_model(num_layers=1, in_dim=20)
    latents, timesteps, context = make_inputs([(1, 4, 4)])
    extra = torch.randn(4, 1, 4, 4)
    with torch.no_grad():
        (given,) = model(latents, timesteps, context, 4, y=[extra])
        (joined,) = model([torch.cat([latents[0], extra])], timesteps, context, 4)
    assert torch.equal(given, joined)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [torch.zeros(16, 1, 5, 4)]}, "patches"),
        ({"x": [torch.zeros(15, 1, 4, 4)]}, r"\[16, F, H, W\]"),
        ({"seq_len": 3}, "seq_len"),
        ({"t": torch.zeros(2)}, "equally many"),
        ({"t": torch.tensor(1.0)}, "equally many"),
        ({"context": [torch.zeros(TEXT_LEN + 1, TEXT_DIM)]}, "text embeddings"),
        ({"context": [torch.zeros(1, TEXT_DIM + 1)]}, "text embeddings"),
        ({"clip_fea": torch.zeros(1)}, "image-to-video"),
        ({"x": [torch.zeros(16, 1025, 2, 2)], "seq_len": 1025}, "rotary positions"),
    ],
)
def test_wrong_inputs_are_named(change: dict, message: str) -> None:
    latents, timesteps, context = make_inputs([(1, 4, 4)])
    arguments = {"x": latents, "t": timesteps, "context": context, "seq_len": 4} | change
    with pytest.raises(ValueError, match=message):
        make_model(num_layers=0)(**arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"model_type": "i2v"}, "not supported yet"), ({"num_heads": 5}, "even whole number")],
)
def test_wrong_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(num_layers=1, **({"num_heads": 2, "dim": 48} | settings))
