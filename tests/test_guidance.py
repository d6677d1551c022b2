from __future__ import annotations

import pytest
import torch

from refalign_ext.guidance import (
    BRANCHES,
    combine_branches,
    dual_guidance,
    required_branches,
)


@pytest.fixture
def predictions() -> dict[str, torch.Tensor]:
    values = torch.randn(3, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return dict(zip(BRANCHES, values, strict=True))


def test_equation_five_on_numbers() -> None:
    # 1 + 5 (3 - 1) + 7.5 (4 - 3)
    result = dual_guidance(torch.tensor(1.0), torch.tensor(3.0), torch.tensor(4.0))
    assert result.item() == 18.5


def test_defaults_are_the_papers() -> None:
    null, image, text_image = torch.eye(3, dtype=torch.float64).unbind(1)
    assert dual_guidance(null, image, text_image).tolist() == [-4.0, -2.5, 7.5]


@pytest.mark.parametrize(
    ("scales", "names"),
    [
        ((5.0, 7.5), BRANCHES),
        ((3.0, 3.0), ("null", "text_image")),
        ((1.0, 7.5), ("image", "text_image")),
        ((1.0, 1.0), ("text_image",)),
        ((5.0, 0.0), ("null", "image")),
        ((0.0, 0.0), ("null",)),
    ],
)
def test_only_required_branches_are_needed(
    predictions: dict[str, torch.Tensor], scales: tuple[float, float], names: tuple[str, ...]
) -> None:
    assert required_branches(*scales) == names
    reduced = {name: predictions[name] for name in names}
    torch.testing.assert_close(
        combine_branches(reduced, *scales), dual_guidance(*predictions.values(), *scales), atol=1e-12, rtol=0
    )


def test_a_missing_branch_is_noticed(predictions: dict[str, torch.Tensor]) -> None:
    with pytest.raises(AssertionError):
        combine_branches({"null": predictions["null"]}, 5.0, 7.5)
