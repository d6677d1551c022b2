"""A tree that has drifted from the releases known: doctor and patch find it, follow it where they can, and name it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from refalign_ext.backbone import ReferenceBackbone, WanModel
from refalign_ext.upstream import contract
from refalign_ext.upstream.contract import (
    ATTACH,
    BATCHES,
    CHANGED,
    MISSING,
    PARALLEL,
    PRESENT,
    RECOMPUTING,
    VAE,
    Contract,
)
from refalign_ext.upstream.patching import apply, load_units, status
from refalign_ext.upstream.tree import WanTree
from tests.helpers import rebase_trees as drift

UNITS = load_units()
Drift = Callable[[Path], None]
# drift -> the name of what has changed, its state, words of the reason, the feature that it costs
FOUND: dict[Drift, tuple[str, str, str, str]] = {
    drift.add_a_block_argument: ("WanAttentionBlock.forward(", CHANGED, "noise_level", PARALLEL),
    drift.demand_another_input: ("WanModel.forward(x, t", CHANGED, "also demands camera", ATTACH),
    drift.gate_the_text: ("WanAttentionBlock adds", CHANGED, "goes through something else", ATTACH),
    drift.import_by_name: ("relative imports in wan/modules/model.py", CHANGED, "by name", ATTACH),
    drift.break_the_syntax: ("wan/modules/model.py", CHANGED, "is not Python", ATTACH),
    drift.move_the_blocks: ("WanAttentionBlock.forward(", CHANGED, "is in wan/modules/blocks.py", PARALLEL),
}
# drift -> units that cannot be applied, with words of the reason
STUCK: dict[Drift, dict[str, str]] = {
    drift.rename_an_argument: {
        "cpu-attention": "flash_attention has no parameter k_lens (it has q, k, v, q_lens, key_lens",
        "sequence-parallel": "attention is called with (q, k, v, key_lens, window_size)",
    },
    drift.add_a_block_argument: {
        "positional-blocks": "WanAttentionBlock.forward takes (x, e, noise_level, seq_lens",
        "sequence-parallel": "WanAttentionBlock.forward takes (x, e, noise_level, seq_lens",
        "activation-checkpointing": "the unit positional-blocks is needed too",
    },
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return drift.checkout(tmp_path / "tree", with_git=False)


def test_an_undrifted_tree_has_everything_but_what_patches_bring(root: Path) -> None:
    found = Contract(root)
    assert {f.cost for f in found.findings if f.state != PRESENT} == {PARALLEL, BATCHES, RECOMPUTING}
    apply(root, UNITS, force=True)
    assert not Contract(root).costs()


def test_this_repository_has_everything() -> None:
    assert not Contract(Path(contract.__file__).resolve().parents[2]).costs()


@pytest.mark.parametrize("drifted", FOUND, ids=lambda drifted: drifted.__name__)
def test_doctor_finds_it(root: Path, drifted: Drift) -> None:
    drifted(root)
    name, state, reason, cost = FOUND[drifted]
    found = [f for f in Contract(root).findings if f.name.startswith(name)]
    assert [(f.state, f.cost) for f in found] == [(state, cost)]
    assert reason in found[0].detail


def test_doctor_finds_what_is_gone(root: Path) -> None:
    drift.change(
        root, drift.MODEL, ("class WanAttentionBlock", "class Block"), ("WanAttentionBlock(", "Block(")
    )
    (root / "wan/modules/vae.py").unlink()
    drift.change(root, "wan/configs/__init__.py", ("SUPPORTED_SIZES", "SIZES_OF_TASKS"))
    missing = {f.name.split(":")[0].split("(")[0] for f in Contract(root).findings if f.state == MISSING}
    assert missing >= {"WanAttentionBlock", "WanAttentionBlock.forward", "WanVAE.encode", "SUPPORTED_SIZES"}


def test_doctor_finds_libraries_that_are_not_installed(root: Path) -> None:
    drift.change(
        root, "wan/modules/vae.py", ("import torch\n", "import torch\nimport rearranging_axes.layers\n")
    )
    drift.change(root, drift.ATTENTION, ("import flash_attn\n", "import flash_attn, kernel_nobody_has\n"))
    found = [f for f in Contract(root).findings if "imports" in f.name]
    assert [(f.name, f.state, f.cost) for f in found] == [
        ("rearranging_axes, which wan/modules/vae.py imports", MISSING, VAE)
    ]
    assert "pip install rearranging_axes" in found[0].detail
    with pytest.raises(
        ValueError, match="imports rearranging_axes, which is not installed here: pip install"
    ):
        WanTree(root, "without_library").module("modules.vae")


@pytest.mark.parametrize("drifted", STUCK, ids=lambda drifted: drifted.__name__)
def test_patch_names_it_and_leaves_the_tree_alone(root: Path, drifted: Drift) -> None:
    drifted(root)
    before = drift.contents(root)
    changed = {o.unit.name: o.detail for o in status(root, UNITS) if o.state == "changed"}
    assert changed.keys() == STUCK[drifted].keys()
    with pytest.raises(ValueError, match="nothing was written") as caught:
        apply(root, UNITS, force=True)
    for name, reason in STUCK[drifted].items():
        assert reason in changed[name]
        assert f"{name}: " in str(caught.value)
    assert drift.contents(root) == before


@pytest.mark.parametrize(
    "drifted",
    [None, drift.move_the_attention, drift.move_the_blocks],
    ids=["as released", "attention moved", "blocks moved"],
)
def test_patch_follows_what_has_moved(root: Path, drifted: Drift | None) -> None:
    """And the result computes what our model computes."""
    if drifted is not None:
        drifted(root)
    apply(root, UNITS, force=True)
    sizes = {"dim": 64, "ffn_dim": 48, "freq_dim": 32, "text_dim": 20, "text_len": 8, "num_heads": 2}
    torch.manual_seed(0)
    ours = WanModel(**sizes, num_layers=2).eval()
    torch.nn.init.xavier_uniform_(ours.head.head.weight)
    generator = torch.Generator().manual_seed(1)
    latents, references, context = (
        [torch.randn(*shape, generator=generator) for shape in shapes]
        for shapes in (((16, 2, 4, 6),) * 2, ((16, 1, 4, 6), (16, 2, 4, 6)), ((3, 20), (8, 20)))
    )
    arguments = (latents, torch.tensor([900.0, 3.5]), context, references)
    with torch.no_grad():
        expected = ReferenceBackbone(ours)(*arguments, tap_depth=2)
        ours_again = WanTree(root, f"drifted_{root.parent.name}").adopt_parameters(ours)
        actual = ReferenceBackbone(ours_again)(*arguments, tap_depth=2)
    for mine, wanted in zip(actual.prediction, expected.prediction, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-5)
    for mine, wanted in zip(actual.reference_tokens, expected.reference_tokens, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-5)
