from __future__ import annotations

import pytest
import torch

from refalign_ext.sampler import denoise
from wan.sampling import check_frame_num, check_size, choose_seed, initial_noise, latent_shape
from wan.utils.solvers import SOLVERS, make_solver


@pytest.mark.parametrize("name", SOLVERS)
def test_straight_flow_reaches_the_data(name: str) -> None:
    noise = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    data = torch.full_like(noise, 0.25)
    seen = []

    def model(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.append(timestep.item())
        assert timestep.ndim == 0 and timestep.is_floating_point()
        return noise - data

    solver = make_solver(name, 6, 5.0)
    latents = denoise(model, noise, solver, progress=False)
    # UniPC's first noise level lies slightly below 1, which leaves that share of the noise in the result.
    torch.testing.assert_close(latents, data, atol=1e-5 if name != "unipc" else 2e-3, rtol=0)
    assert seen == solver.timesteps.tolist()


def test_callback_sees_every_step_and_no_gradients_are_kept() -> None:
    weight = torch.ones(1, requires_grad=True)
    steps = []
    latents = denoise(
        lambda latents, timestep: weight * latents,
        torch.ones(1, 1, 1, 1),
        make_solver("euler", 4, 1.0),
        progress=False,
        callback=lambda index, latents: steps.append((index, latents.item())),
    )
    assert [index for index, _ in steps] == [0, 1, 2, 3]
    assert steps[-1][1] == latents.item() == pytest.approx(0.75**4)
    assert not latents.requires_grad


def test_progress_bar_counts_the_steps(capfd: pytest.CaptureFixture[str]) -> None:
    denoise(lambda latents, timestep: latents, torch.ones(1, 1, 1, 1), make_solver("euler", 3, 1.0))
    assert "3/3" in capfd.readouterr().err


def test_values_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not numbers"):
        denoise(
            lambda latents, timestep: latents * float("nan"),
            torch.ones(1, 1, 1, 1),
            make_solver("euler", 2, 1.0),
            progress=False,
        )


def test_noise_depends_on_the_seed_only() -> None:
    first, again, other = (initial_noise((16, 3, 4, 4), seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float32
    # Pinned, so that a seed keeps its meaning.
    torch.testing.assert_close(
        initial_noise((4,), 0), torch.tensor([1.5410, -0.2934, -2.1788, 0.5684]), atol=1e-4, rtol=0
    )


def test_negative_seeds_are_random() -> None:
    assert choose_seed(5) == 5
    assert choose_seed(-1) != choose_seed(-1)


def test_sizes_and_frame_numbers() -> None:
    from wan.configs import WAN_CONFIGS

    config = WAN_CONFIGS["t2v-1.3B"]
    assert latent_shape((832, 480), 81, config) == (16, 21, 60, 104)
    assert latent_shape((16, 32), 1, config) == (16, 1, 4, 2)
    with pytest.raises(ValueError, match=r"830\*470 .* 16: the nearest valid size is 832\*464"):
        check_size((830, 470), config)
    with pytest.raises(ValueError, match=r"nearest valid size is 16\*480"):
        check_size((0, 480), config)
    with pytest.raises(ValueError, match="80 is not of the form 4n\\+1: the nearest valid is 77 or 81"):
        check_frame_num(80, config)
    with pytest.raises(ValueError, match="the nearest valid is 1$"):
        check_frame_num(0, config)
