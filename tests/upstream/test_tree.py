"""Choosing the tree that the model comes from, and what of it takes whose place."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch
from easydict import EasyDict

from refalign_ext.backbone import TREE, WAN_CONFIGS, ReferenceBackbone, WanModel
from refalign_ext.tasks import register_tasks
from refalign_ext.upstream import own_wan
from refalign_ext.upstream.own_wan import check_own_wan
from refalign_ext.upstream.patching import apply, load_units
from refalign_ext.upstream.tree import TreeVAE, WanTree, refusal, selected_tree
from tests.helpers.rebase_trees import MODEL, change, checkout
from wan.configs import SIZE_CONFIGS, SUPPORTED_SIZES

SIZES = dict(dim=48, ffn_dim=48, freq_dim=32, text_dim=20, text_len=8, num_heads=2, num_layers=1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return checkout(tmp_path / "tree", with_git=False)


@pytest.fixture
def tree(root: Path) -> WanTree:
    apply(root, load_units(), force=True)
    return WanTree(root, f"tree_{root.parent.name}")


def test_which_tree_the_variable_selects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "  ", str(own_wan.OURS), f"{own_wan.OURS}/docs/.."):
        monkeypatch.setenv("WAN_ROOT", value)
        assert selected_tree() is None
    monkeypatch.delenv("WAN_ROOT")
    assert selected_tree() is None
    monkeypatch.setenv("WAN_ROOT", str(tmp_path))
    with pytest.raises(ValueError, match=r"WAN_ROOT=.*there is no wan/modules/model.py; name the folder"):
        selected_tree()


def test_a_second_tree_cannot_take_the_same_name(tree: WanTree, tmp_path: Path) -> None:
    other = checkout(tmp_path / "other", with_git=False)
    assert WanTree(tree.root, tree.package).module("configs") is tree.module("configs")
    with pytest.raises(ValueError, match="one process, one tree"):
        WanTree(other, tree.package)


def test_nothing_of_the_tree_is_run_but_what_is_asked_for(root: Path) -> None:
    """Its packages' own files import pipelines whose dependencies nobody has."""
    tree = WanTree(root, "bare_tree")
    tree.module("configs")
    loaded = {name for name in sys.modules if name.startswith("bare_tree")}
    assert loaded == {
        *("bare_tree", "bare_tree.modules", "bare_tree.configs"),
        *(f"bare_tree.configs.{name}" for name in ("shared_config", "wan_t2v_1_3B", "wan_t2v_A14B")),
    }


def test_tasks_join_the_trees_own_tables(tree: WanTree) -> None:
    ours = {name: config for name, config in WAN_CONFIGS.items() if not name.startswith("r2v-")}
    assert tree.refused(ours).keys() == {"t2v-A14B", "r2v-A14B"}
    configs, sizes, supported = tree.register(ours, SIZE_CONFIGS, SUPPORTED_SIZES)
    register_tasks(configs, sizes, supported)
    assert configs is tree.get("configs", "WAN_CONFIGS")
    assert {"r2v-tiny", "r2v-1.3B", "r2v-14B", "t2v-A14B"} <= configs.keys()
    task = configs["r2v-1.3B"]
    assert (task.sample_fps, task.sample_neg_prompt) == (24, "blurred"), "what the tree says wins"
    assert (task.text_dim, task.in_dim, task.vae.z_dim, task.size) == (4096, 16, 16, (832, 480))
    assert configs["r2v-14B"].dim == 5120, "a task that the tree lacks keeps the released shape"
    assert WAN_CONFIGS["t2v-1.3B"].sample_fps == 16, "our own tables stay as they are"
    assert set(supported["r2v-1.3B"]) == {"832*480", "480*832"}


def test_adopting_parameters_shares_the_weights(tree: WanTree) -> None:
    ours = WanModel(**SIZES).requires_grad_(False)
    adopted = tree.adopt_parameters(ours)
    theirs = dict(adopted.named_parameters())
    for name, mine in ours.named_parameters():
        assert mine.data_ptr() == theirs[name].data_ptr(), name
    assert not any(parameter.requires_grad for parameter in theirs.values())
    assert adopted.training
    assert not tree.adopt_parameters(ours.eval()).training


def test_the_command_line_says_why_a_task_of_the_tree_is_refused(root: Path) -> None:
    command = [sys.executable, own_wan.OURS / "generate.py", "--task", "r2v-A14B", "--wan_root", root]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("generate.py: error: --task r2v-A14B: refused as a pair: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("self.time_projection = nn", "self.time_head = nn", "time_projection"),
        ("self.freqs = rotation", "self.table = rotation", "WanModel.freqs has the shape None"),
    ],
)
def test_other_weights_are_named(tree: WanTree, old: str, new: str, message: str) -> None:
    change(tree.root, MODEL, (old, new))
    with pytest.raises(ValueError, match=message):
        tree.adopt_parameters(WanModel(**SIZES))


def test_what_takes_whose_place(tree: WanTree) -> None:
    assert tree.replacement_for("WanModel", WanModel) is tree.get("modules.model", "WanModel")
    adopted = tree.replacement_for("build_dit", lambda: WanModel(**SIZES))()
    assert type(adopted) is tree.get("modules.model", "WanModel")
    versions = tree.replacement_for("describe_versions", lambda: {"torch": "2"})()
    assert versions == {"torch": "2", "wan": str(tree.root)}
    encode = tree.replacement_for("T5EncoderModel", lambda **options: "ours")
    assert encode(text_len=4, config=EasyDict(dim=64)) == "ours"
    theirs = encode(text_len=4, device="cpu", config=EasyDict(dim=4096))
    assert type(theirs) is tree.get("modules.t5", "T5EncoderModel")


def test_the_trees_autoencoder_is_taken_in_its_released_size(
    tree: WanTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(torch.nn.Conv3d(3, 16, (1, 8, 8), (1, 8, 8)).state_dict(), tmp_path / "vae.pth")
    make = tree.replacement_for("WanVAE", lambda **options: "ours")
    assert make(vae_pth="x", device="cpu", config=EasyDict(dim=16, z_dim=16)) == "ours"
    vae = make(vae_pth=tmp_path / "vae.pth", device=torch.device("cpu"), config=EasyDict(dim=96, z_dim=16))
    assert isinstance(vae, TreeVAE)
    video = torch.rand(3, 5, 16, 16)
    plain = vae.encode([video])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.encode([video])[0], plain)
    assert vae.decode([plain])[0].shape == (3, 5, 16, 16)
    vae.model.to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    vae.vae.encode = lambda videos: [*videos, *vae.vae.scale]
    assert {tensor.device.type for tensor in vae.encode([video])} == {"meta"}, "all of it follows the model"
    (tree.root / "wan/modules/vae.py").unlink()
    with pytest.raises(ValueError, match="no autoencoder of Wan2.1 under a known name"):
        make(vae_pth="x", device="cpu")


def test_two_experts_and_another_autoencoder_are_refused() -> None:
    assert refusal(None, (4, 8, 8)) is None
    assert "low_noise_model" in refusal(0.875, (4, 8, 8))
    assert "stride (4, 16, 16)" in refusal(None, (4, 16, 16))


def test_a_foreign_wan_first_on_the_path_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for somebody who works inside their clone and has refalign_ext on the path: it is not even imported."""
    check_own_wan()
    monkeypatch.setattr(own_wan, "find_spec", lambda name: PathFinder.find_spec(name, [str(root)]))
    with pytest.raises(ValueError, match=f"before it on PYTHONPATH and name that tree by WAN_ROOT={root}"):
        check_own_wan()


def test_this_process_works_with_our_own_model() -> None:
    """Otherwise the tests above compare a tree with itself."""
    assert TREE is None
    with torch.device("meta"):
        assert ReferenceBackbone(WanModel(**SIZES)).model.__module__ == "wan.modules.model"
