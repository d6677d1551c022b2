"""What the CPU tests establish, on a CUDA device: `make test ARGS="-m gpu"`."""

from __future__ import annotations

import pytest
import torch

from refalign_ext.backbone import ReferenceBackbone, WanModel, placed
from refalign_ext.losses import reference_alignment_loss
from wan.modules.attention import attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")
GRIDS = [(3, 6, 4), (2, 4, 4)]  # latent frames, rows and columns: two samples of different sizes
COUNTS = [2, 1]


def small_model() -> WanModel:
    torch.manual_seed(0)
    model = WanModel(dim=64, ffn_dim=128, num_heads=2, num_layers=2, text_dim=32, text_len=16, freq_dim=32)
    torch.nn.init.xavier_uniform_(model.head.head.weight)
    return model.eval().requires_grad_(False)


def predict(model: WanModel, device: torch.device) -> list[torch.Tensor]:
    """A mixed batch with references, the same whatever the device."""
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(16, *grid, generator=generator).to(device) for grid in GRIDS]
    references = [
        torch.randn(16, count, *grid[1:], generator=generator).to(device)
        for count, grid in zip(COUNTS, GRIDS, strict=True)
    ]
    context = [torch.randn(length, 32, generator=generator).to(device) for length in (5, 9)]
    timestep = torch.tensor([901.5, 33.25], device=device)
    with placed(model, device, offload=True):
        output = ReferenceBackbone(model)(latents, timestep, context, references)
    return [tensor.cpu() for tensor in output.prediction]


def test_a_pass_with_references_equals_the_cpu() -> None:
    model = small_model()
    for on_gpu, on_cpu in zip(predict(model, DEVICE), predict(model, torch.device("cpu")), strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kernel_masks_padding(dtype: torch.dtype) -> None:
    """Whichever of FlashAttention 3, 2 and SDPA answers here: keys beyond `k_lens` have no influence."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 12, 2, 32, generator=generator) for _ in range(3))
    expected = attention(q.double(), k.double(), v.double(), k_lens=[12, 7])
    k[1, 7:], v[1, 7:] = 100.0, 100.0
    found = attention(*(tensor.to(DEVICE, dtype) for tensor in (q, k, v)), k_lens=[12, 7])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def test_alignment_loss_and_gradient_equal_the_cpu() -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, 3, 20, 16, generator=generator) for _ in range(2))
    results = []
    for device in (torch.device("cpu"), DEVICE):
        leaf = student.detach().clone().to(device).requires_grad_()
        loss = reference_alignment_loss(leaf, teacher.to(device))
        loss.total.backward()
        results.append((loss.total.detach().cpu(), loss.negative.detach().cpu(), leaf.grad.cpu()))
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-6)
