"""Text encoder and autoencoder of the official checkout that WAN_ROOT names, against ours, on random weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from refalign_ext.upstream.tree import TreeVAE, WanTree
from wan.modules.t5 import build_t5, t5_state_dict_from_transformers
from wan.modules.vae import WanVAE, vae_state_dict_from_diffusers

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("CONTRACT_WAN_ROOT"),
        reason="set WAN_ROOT to a checkout of https://github.com/Wan-Video/Wan2.1 or 2.2 to run this",
    ),
    pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore:User provided device_type", "ignore:.*autocast"
    ),
]


@pytest.fixture(scope="module")
def tree(patched_root: Path) -> WanTree:
    return WanTree(patched_root, "tree_with_parts")


def test_the_autoencoder_in_its_released_size_is_ours(tree: WanTree, tmp_path: Path) -> None:
    pytest.importorskip("einops", reason="the official autoencoder imports einops")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = WanVAE(vae_pth=None)
    torch.save(vae_state_dict_from_diffusers(ours.model.state_dict()), tmp_path / "vae.pth")
    statistics = {"mean": [0.0] * 16, "std": [1.0] * 16}
    theirs = tree.replacement_for("WanVAE", WanVAE)(
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


def test_the_text_encoder_is_ours(tree: WanTree) -> None:
    sizes = {"vocab": 64, "dim": 32, "dim_attn": 32, "dim_ffn": 48, "num_heads": 4, "num_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = build_t5({**sizes, "num_buckets": 32}).eval()
    theirs = tree.get("modules.t5", "T5Encoder")(
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
