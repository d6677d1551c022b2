"""The norm fused with the rotation against the two done one after the other by PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from wan.modules import functional
from wan.modules.functional import rms_norm, rms_norm_rotate, rope_multipliers, rope_params, rotate

HEADS, CHANNELS, EPS = 2, 8, 1e-6
GRIDS = [(1, 2, 3), (2, 1, 2)]
TOKENS = 6


@pytest.fixture
def freqs() -> torch.Tensor:
    return torch.cat([rope_params(1024, 4), rope_params(1024, 2), rope_params(1024, 2)], dim=1)


def random_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, TOKENS, HEADS * CHANNELS, generator=generator, dtype=torch.float64) * 3
    weight = torch.randn(HEADS * CHANNELS, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def test_gradients(freqs: torch.Tensor) -> None:
    x, weight = random_inputs(torch.float64)
    turns = rope_multipliers(freqs, GRIDS, TOKENS, torch.float64, x.device)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), (x, weight))
    assert torch.autograd.gradcheck(
        lambda x, weight: rms_norm_rotate(x, weight, EPS, HEADS, None, turns), (x, weight)
    )


@pytest.mark.parametrize("with_rotation", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_equals_the_library(
    freqs: torch.Tensor,
    dtype: torch.dtype,
    tolerance: float,
    with_rotation: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for use_library in (True, False):
        monkeypatch.setattr(functional, "_library_norm_is_fused", lambda x, use=use_library: use)
        x, weight = random_inputs(dtype)
        if with_rotation:
            out = rms_norm_rotate(x, weight, EPS, HEADS, torch.tensor(GRIDS), freqs)
        else:
            out = rms_norm(x, weight, EPS)
        assert out.dtype == dtype
        out.float().square().sum().backward(inputs=[x]) if with_rotation else out.float().pow(
            3
        ).sum().backward()
        results.append([out.detach(), x.grad])
    for by_library, by_us in zip(*results, strict=True):
        scale = by_library.abs().max().item()
        assert (by_us.double() - by_library.double()).abs().max().item() <= tolerance * scale


def test_definition(freqs: torch.Tensor) -> None:
    x, weight = random_inputs(torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, EPS), expected)
    torch.testing.assert_close(F.rms_norm(x, (HEADS * CHANNELS,), weight, EPS), expected)
    by_head = expected.unflatten(-1, (HEADS, CHANNELS))
    turns = rope_multipliers(freqs, GRIDS, TOKENS, torch.float64, x.device)
    turned = torch.view_as_real(
        torch.view_as_complex(by_head.unflatten(-1, (-1, 2))) * torch.view_as_complex(turns)
    )
    actual = rms_norm_rotate(x, weight, EPS, HEADS, torch.tensor(GRIDS), freqs)
    torch.testing.assert_close(actual, turned.flatten(-2))


def test_layouts_that_cannot_be_viewed_as_complex(freqs: torch.Tensor) -> None:
    turns = rope_multipliers(freqs, GRIDS[:1], TOKENS, torch.float32, torch.device("cpu"))
    x = torch.randn(1, TOKENS, HEADS, CHANNELS)
    shifted = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    expected = rotate(x, turns)
    assert torch.equal(rotate(shifted, turns), expected)
    assert torch.equal(rotate(transposed, turns), expected)
