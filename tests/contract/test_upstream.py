"""WanModel, text encoder and autoencoder against the official ones of a checkout of Wan-Video/Wan2.1 or 2.2 in WAN_ROOT.

A copy of the checkout is imported under names of its own, beside this repository's `wan`; see `released_root`. Its model
asks for a CUDA kernel and CUDA's autocast; here it gets an attention written below and no autocast.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from refalign_ext.upstream.tree import TreeVAE, WanTree
from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel
from wan.modules.t5 import build_t5, t5_state_dict_from_transformers
from wan.modules.vae import WanVAE, vae_state_dict_from_diffusers
from wan.utils.dit_checkpoint import dit_arguments

ROOT = os.environ.get("CONTRACT_WAN_ROOT", "")  # what WAN_ROOT was: see conftest.py
TEXT_DIM = 20
TEXT_LEN = 16
DTYPES = (torch.float32, torch.float64)
# largest difference allowed, relative to the largest value of the prediction
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
KEYS = {"t2v-1.3B": 825, "t2v-14B": 1095}
# official task -> ours of the same shape
TASKS = {"t2v-1.3B": "t2v-1.3B", "t2v-14B": "t2v-14B", "t2v-A14B": "t2v-14B"}

pytestmark = [
    pytest.mark.skipif(
        not ROOT,
        reason="set WAN_ROOT to a checkout of https://github.com/Wan-Video/Wan2.1 or 2.2 to run this",
    ),
    pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore:User provided device_type", "ignore:.*autocast"
    ),
]


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, *, k_lens: Tensor | None = None, window_size: tuple[int, int] = (-1, -1)
) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over the first `k_lens` keys of every sample, all [B, L, heads, C]."""
    assert tuple(window_size) == (-1, -1)
    lengths = [k.size(1)] * len(k) if k_lens is None else k_lens.tolist()
    samples = []
    for queries, keys, values, length in zip(q, k, v, lengths, strict=True):
        scores = torch.einsum("qhc,khc->hqk", queries.to(v.dtype), keys[:length].to(v.dtype))
        weights = (scores / math.sqrt(q.size(-1))).softmax(dim=-1)
        samples.append(torch.einsum("hqk,khc->qhc", weights, values[:length]))
    return torch.stack(samples)


@pytest.fixture(scope="module")
def official(released_root: Path) -> Iterator[SimpleNamespace]:
    """The official `wan.modules.model` as `model` and `wan.configs` as `configs`."""
    tree = WanTree(released_root, "official_wan")
    model = tree.module("modules.model")
    replaced = {"flash_attention": exact_attention}
    if hasattr(model, "amp"):
        replaced["amp"] = SimpleNamespace(autocast=lambda *_, **__: contextlib.nullcontext())
    with mock.patch.multiple(model, **replaced):
        yield SimpleNamespace(model=model, configs=tree.module("configs"))


class Float64Torch:
    """`torch` for a module that asks for float32 by name and shall compute in float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def computing_in(dtype: torch.dtype, module: ModuleType) -> Iterator[None]:
    """Lets the official model, which casts to float32 in many places, compute in float64 throughout."""
    if dtype == torch.float32:
        yield
        return
    with (
        mock.patch.object(module, "torch", Float64Torch()),
        mock.patch.object(Tensor, "float", Tensor.double),
    ):
        yield


def make_pair(
    official: SimpleNamespace, head_dim: int, dtype: torch.dtype, **overrides: Any
) -> tuple[WanModel, nn.Module]:
    """Our model and the official one with the same weights, none of them left at zero or one."""
    torch.manual_seed(0)
    sizes = {"dim": 2 * head_dim, "ffn_dim": 64, "freq_dim": 32, "text_dim": TEXT_DIM, "text_len": TEXT_LEN}
    arguments = sizes | {"num_heads": 2, "num_layers": 2} | overrides
    ours, theirs = WanModel(**arguments), official.model.WanModel(**arguments)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif name == "head.head.weight":
                nn.init.xavier_uniform_(parameter)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return nn.Module.to(ours, dtype).eval(), nn.Module.to(theirs, dtype).eval()


def make_inputs(
    sizes: list[tuple[int, int, int]], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, list[Tensor], int]:
    """Latents, timesteps, prompts of different lengths, and the number of tokens of the largest sample."""
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(16, *size, generator=generator, dtype=dtype) for size in sizes]
    timesteps = torch.linspace(987.654, 3.21, len(sizes), dtype=torch.float64).float()
    lengths = [1 + (5 * index) % TEXT_LEN for index in range(len(sizes))]
    context = [torch.randn(length, TEXT_DIM, generator=generator, dtype=dtype) for length in lengths]
    return latents, timesteps, context, max(math.prod(size) // 4 for size in sizes)


def assert_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype == dtype
        assert mine.shape == theirs.shape
        largest = theirs.abs().max()
        assert largest > 0.01, "a prediction of nearly zero compares nothing"
        assert (mine - theirs).abs().max() < TOLERANCE[dtype] * largest


@pytest.mark.parametrize("theirs", TASKS)
def test_keys_shapes_and_configurations_are_equal(official: SimpleNamespace, theirs: str) -> None:
    if theirs not in official.configs.WAN_CONFIGS:
        pytest.skip(f"this release has no {theirs}")
    task = TASKS[theirs]
    # Wan2.2 adds fields: how its own command line samples, and where its experts lie.
    is_newer = "frame_num" in official.configs.WAN_CONFIGS[theirs]
    differing = {
        name: value
        for name, value in official.configs.WAN_CONFIGS[theirs].items()
        if name != "__name__" and WAN_CONFIGS[task].get(name, value if is_newer else None) != value
    }
    assert not differing
    arguments = dit_arguments(WAN_CONFIGS[task])
    with torch.device("meta"):
        ours, theirs = WanModel(**arguments), official.model.WanModel(**arguments)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert len(shapes) == KEYS[task]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [0, 11])
@pytest.mark.parametrize(
    "sizes", [[(1, 2, 2)], [(3, 10, 14)], [(3, 10, 14), (2, 6, 22)]], ids=["token", "odd", "mixed"]
)
@pytest.mark.parametrize("head_dim", [24, 32, 128])
def test_forward_is_equal(
    official: SimpleNamespace,
    head_dim: int,
    sizes: list[tuple[int, int, int]],
    padding: int,
    dtype: torch.dtype,
) -> None:
    ours, theirs = make_pair(official, head_dim, dtype)
    latents, timesteps, context, longest = make_inputs(sizes, dtype)
    with torch.no_grad():
        with computing_in(dtype, official.model):
            expected = theirs(latents, timesteps, context, longest + padding)
        actual = ours(latents, timesteps, context, longest + padding)
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize(
    "option", [{"qk_norm": False}, {"cross_attn_norm": False}, {"patch_size": (1, 1, 2)}]
)
def test_forward_is_equal_with_other_options(official: SimpleNamespace, option: dict[str, Any]) -> None:
    ours, theirs = make_pair(official, 32, torch.float32, **option)
    latents, timesteps, context, longest = make_inputs([(3, 10, 14)] * 2, torch.float32)
    with torch.no_grad():
        expected = theirs(latents, timesteps, context, 2 * longest)
        actual = ours(latents, timesteps, context, 2 * longest)
    assert_close(actual, expected, torch.float32)


def test_gradients_are_equal(official: SimpleNamespace) -> None:
    ours, theirs = make_pair(official, 32, torch.float64)
    latents, timesteps, context, longest = make_inputs([(3, 10, 14), (2, 6, 22)], torch.float64)
    for model in (ours, theirs):
        with computing_in(torch.float64, official.model):
            predictions = model(latents, timesteps, context, longest)
            sum(prediction.square().mean() for prediction in predictions).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        wanted = expected[name].grad
        # a shift of all keys alike changes no attention, so these gradients are rounding
        scale = 1.0 if name.endswith("attn.k.bias") else wanted.abs().max()
        assert (parameter.grad - wanted).abs().max() <= 1e-10 * scale, name


@pytest.fixture(scope="module")
def patched_tree(patched_root: Path) -> WanTree:
    return WanTree(patched_root, "tree_with_parts")


def test_the_autoencoder_in_its_released_size_is_ours(patched_tree: WanTree, tmp_path: Path) -> None:
    pytest.importorskip("einops", reason="the official autoencoder imports einops")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = WanVAE(vae_pth=None)
    torch.save(vae_state_dict_from_diffusers(ours.model.state_dict()), tmp_path / "vae.pth")
    statistics = {"mean": [0.0] * 16, "std": [1.0] * 16}
    theirs = patched_tree.replacement_for("WanVAE", WanVAE)(
        vae_pth=tmp_path / "vae.pth", device="cpu", config={"dim": 96, "z_dim": 16, **statistics}
    )
    assert isinstance(theirs, TreeVAE)
    # The tree's own means and standard deviations, the released ones, are part of the class.
    released = theirs.vae.scale
    ours.mean, ours.std = released[0], 1.0 / released[1]
    video = torch.rand(3, 5, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents, expected = theirs.encode([video])[0], ours.encode([video])[0]
    assert latents.shape == expected.shape == (16, 2, 2, 3)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.decode([latents])[0], ours.decode([latents])[0], rtol=0, atol=1e-5)


def test_the_text_encoder_is_ours(patched_tree: WanTree) -> None:
    sizes = {"vocab": 64, "dim": 32, "dim_attn": 32, "dim_ffn": 48, "num_heads": 4, "num_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = build_t5({**sizes, "num_buckets": 32}).eval()
    theirs = patched_tree.get("modules.t5", "T5Encoder")(
        **sizes, num_buckets=32, shared_pos=False, dropout=0.1
    ).eval()
    theirs.load_state_dict(t5_state_dict_from_transformers(ours.state_dict()), strict=True)
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 4:] = 0
    with torch.no_grad():
        expected = ours(input_ids=ids, attention_mask=mask).last_hidden_state
        found = theirs(ids, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
