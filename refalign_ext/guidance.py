"""Classifier-free guidance over two conditions, the references and the prompt (paper, eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

NULL = "null"  # neither prompt nor references: e(0, 0)
IMAGE = "image"  # references only: e(0, I)
TEXT_IMAGE = "text_image"  # prompt and references: e(T, I)
BRANCHES = (NULL, IMAGE, TEXT_IMAGE)


def branch_inputs(
    prompt: torch.Tensor, negative_prompt: torch.Tensor, references: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Text and references that each branch is evaluated with, by its name.

    A missing reference is an all-zero latent whose tokens stay, not a shorter sequence.

    Args:
        prompt, negative_prompt: text features [L, text_dim].
        references: clean latents [C, M, h, w].
    """
    return {
        NULL: (negative_prompt, torch.zeros_like(references)),
        IMAGE: (negative_prompt, references),
        TEXT_IMAGE: (prompt, references),
    }


def dual_guidance(
    null: torch.Tensor,
    image: torch.Tensor,
    text_image: torch.Tensor,
    image_scale: float = 5.0,
    text_scale: float = 7.5,
) -> torch.Tensor:
    """Paper, eq. 5: `e(0,0) + image_scale (e(0,I) - e(0,0)) + text_scale (e(T,I) - e(0,I))`.

    Args:
        null: prediction without prompt and references (the negative prompt and all-zero reference latents).
        image: prediction with the references and the negative prompt.
        text_image: prediction with the references and the prompt.
        image_scale: how strongly the references pull; 1 follows them without amplification.
        text_scale: how strongly the prompt pulls.

    Returns:
        The guided prediction, same shape as each argument.
    """
    return null + image_scale * (image - null) + text_scale * (text_image - image)


def required_branches(image_scale: float, text_scale: float) -> tuple[str, ...]:
    """The predictions that eq. 5 does not multiply by zero, in the order of `BRANCHES`.

    Expanded, eq. 5 weighs e(0,0) by `1 - image_scale`, e(0,I) by `image_scale - text_scale` and e(T,I) by
    `text_scale`, so equal scales need no e(0,I) and an image scale of 1 needs no e(0,0).
    """
    weights = _weights(image_scale, text_scale)
    return tuple(branch for branch in BRANCHES if weights[branch] != 0)


def combine_branches(
    predictions: Mapping[str, torch.Tensor], image_scale: float, text_scale: float
) -> torch.Tensor:
    """Eq. 5 from exactly the predictions that `required_branches` names for these scales.

    Args:
        predictions: branch name to prediction; all of the same shape.
        image_scale: weight of the references.
        text_scale: weight of the prompt.
    """
    required = required_branches(image_scale, text_scale)
    assert set(predictions) == set(required)
    ordered = [predictions[branch] for branch in required]
    if len(ordered) == len(BRANCHES):
        return dual_guidance(*ordered, image_scale, text_scale)
    if len(ordered) == 1:
        return ordered[0]
    # The weights add up to 1, so two of them are ordinary guidance from the first prediction to the second.
    first, second = ordered
    return first + _weights(image_scale, text_scale)[required[1]] * (second - first)


def _weights(image_scale: float, text_scale: float) -> dict[str, float]:
    return {NULL: 1.0 - image_scale, IMAGE: image_scale - text_scale, TEXT_IMAGE: text_scale}
