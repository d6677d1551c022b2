"""Patching a checkout: all places or none, twice is once, and back byte for byte."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from refalign_ext.upstream.patching import Unit, apply, diff, load_units, revert, status
from refalign_ext.upstream.record import RECORD, read_record
from refalign_ext.upstream.source import PlaceNotFound, SourceTree
from refalign_ext.upstream.tree import WanTree
from tests.helpers.rebase_trees import ATTENTION, MODEL, T5, change, checkout, commit, contents, git

UNITS = load_units()
RECORD_FILE = f"{RECORD}/applied.json"
NAMES = [unit.name for unit in UNITS]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return checkout(tmp_path / "tree")


def states(root: Path) -> dict[str, str]:
    return {outcome.unit.name: outcome.state for outcome in status(root, UNITS)}


def test_apply_and_revert_come_back_byte_for_byte(root: Path) -> None:
    before = contents(root)
    shown = diff(root, UNITS)
    assert contents(root) == before, "showing must write nothing"
    assert set(states(root).values()) == {"not applied"}
    assert apply(root, UNITS) == shown
    assert set(states(root).values()) == {"applied"}
    after = contents(root)
    assert {name for name in before if after[name] != before[name]} == {ATTENTION, MODEL, T5}
    assert apply(root, UNITS) == ""
    assert contents(root) == after, "twice is once"
    assert revert(root, UNITS)
    assert revert(root, UNITS) == ""
    assert contents(root) == before
    assert not git(root, "status", "--porcelain", "--ignored")


def test_the_shown_diff_is_one_that_git_applies(root: Path, tmp_path: Path) -> None:
    change(root, T5, ("import torch\n", "import torch\n\f\nPAGE = '\u2028'\n"))
    commit(root)
    (tmp_path / "shown.diff").write_text(diff(root, UNITS), encoding="utf-8")
    git(root, "apply", str(tmp_path / "shown.diff"))
    by_git = contents(root)
    git(root, "checkout", "--quiet", ".")
    apply(root, UNITS)
    assert {name: text for name, text in contents(root).items() if RECORD not in name} == by_git


def test_units_come_and_go_one_by_one(root: Path) -> None:
    before = contents(root)
    apply(root, UNITS, names=["cpu-attention"])
    assert states(root) == {name: "applied" if name == "cpu-attention" else "not applied" for name in NAMES}
    apply(root, UNITS, names=["import-without-cuda"])
    assert read_record(root).units == ("cpu-attention", "import-without-cuda")
    apply(root, UNITS)
    everything = contents(root)
    revert(root, UNITS, names=["float32-on-every-device"])
    assert states(root)["float32-on-every-device"] == "not applied"
    assert 'torch.amp.autocast("cuda", dtype=torch.float32)' in (root / MODEL).read_text()
    apply(root, UNITS)
    assert {**contents(root), RECORD_FILE: b""} == {**everything, RECORD_FILE: b""}
    revert(root, UNITS)
    assert contents(root) == before


def test_a_unit_that_others_need_stays(root: Path) -> None:
    apply(root, UNITS)
    before = contents(root)
    with pytest.raises(ValueError, match="positional-blocks is needed too"):
        revert(root, UNITS, names=["positional-blocks"])
    with pytest.raises(ValueError, match="no patch cuda-attention: choose from cpu-attention"):
        apply(root, UNITS, names=["cuda-attention"])
    assert contents(root) == before


def test_a_tree_with_edits_is_left_alone_unless_told(root: Path) -> None:
    change(root, T5, ("class T5EncoderModel:", "# mine\nclass T5EncoderModel:"))
    (root / "wan" / "experiment.py").write_text("")
    (root / "checkpoints").mkdir()
    (root / "checkpoints" / "weights.bin").write_text("not code")
    before = contents(root)
    with pytest.raises(
        ValueError, match=r"edits of its own in wan/experiment.py, wan/modules/t5.py: .* --force"
    ):
        apply(root, UNITS)
    assert contents(root) == before
    apply(root, UNITS, force=True)
    assert "# mine" in (root / T5).read_text()
    revert(root, UNITS)
    assert contents(root) == before


def test_a_tree_without_git_is_left_alone_unless_told(tmp_path: Path) -> None:
    root = checkout(tmp_path / "tree", with_git=False)
    with pytest.raises(ValueError, match="is no git checkout.*--force"):
        apply(root, UNITS)
    assert not (root / RECORD).exists()
    assert apply(root, UNITS, force=True)


def test_an_edit_after_patching_is_never_lost(root: Path) -> None:
    apply(root, UNITS)
    change(root, MODEL, ("class Head", "# an edit of mine\nclass Head"))
    before = contents(root)
    for act in (apply, revert):
        with pytest.raises(ValueError, match="model.py was edited after it was patched"):
            act(root, UNITS)
    assert contents(root) == before


def test_nothing_is_written_when_one_place_is_gone(root: Path) -> None:
    change(
        root,
        MODEL,
        ("for block in self.blocks:", "for layer in list(self.blocks):"),
        ("block(x,", "layer(x,"),
    )
    commit(root)
    before = contents(root)
    with pytest.raises(
        ValueError, match="nothing was written: positional-blocks: .*calls its blocks in 0 places"
    ):
        apply(root, UNITS)
    assert contents(root) == before
    assert states(root)["positional-blocks"] == "changed"
    assert states(root)["cpu-attention"] == "not applied"
    assert apply(root, UNITS, names=["cpu-attention", "import-without-cuda", "float32-on-every-device"])


def test_a_failed_write_is_undone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(root)
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(target).name == "t5.py" and "before" not in Path(target).parts:
            raise OSError("no space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        apply(root, UNITS)
    monkeypatch.undo()
    now = contents(root)
    assert {name: now[name] for name in before} == before
    assert set(states(root).values()) == {"not applied"}


def killed(action: Callable[[], object], steps: int) -> bool:
    """Runs an action in a process that dies at its write number `steps`; says whether it got so far."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    replace, left = os.replace, [steps]

    def count(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        replace(source, target)

    os.replace = count
    action()
    os._exit(0)


@pytest.mark.parametrize("act", [apply, revert])
def test_a_kill_can_be_made_good(tmp_path: Path, act: Callable[..., str]) -> None:
    """Killed while originals are copied, before the note on what will be written, and between two files."""
    start, seen = checkout(tmp_path / "start"), set()
    released = contents(start)
    few = UNITS[:3]  # they touch all three files
    if act is revert:
        apply(start, few)
    for steps in (2, 4, 6):
        root = Path(shutil.copytree(start, tmp_path / f"killed{steps}"))
        assert killed(lambda root=root: act(root, few), steps)
        seen |= {outcome.state for outcome in status(root, few)}
        again = Path(shutil.copytree(root, tmp_path / f"again{steps}"))
        apply(root, few)
        assert {outcome.state for outcome in status(root, few)} == {"applied"}
        revert(root, few)
        revert(again, few)
        assert contents(root) == contents(again) == released
    assert "unfinished" in seen


def test_restoring_the_files_with_git_is_reverting(root: Path) -> None:
    before = contents(root)
    apply(root, UNITS)
    git(root, "checkout", "--quiet", ".")
    assert set(states(root).values()) == {"not applied"}
    apply(root, UNITS, names=["cpu-attention"])
    assert read_record(root).units == ("cpu-attention",)
    git(root, "checkout", "--quiet", ".")
    assert revert(root, UNITS) == ""
    assert contents(root) == before


def test_line_ends_of_windows_are_kept(root: Path) -> None:
    for name in (ATTENTION, MODEL, T5):
        path = root / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    commit(root)
    before = contents(root)
    apply(root, UNITS)
    for name in (ATTENTION, MODEL, T5):
        text = (root / name).read_bytes()
        assert text != before[name]
        assert text.count(b"\n") == text.count(b"\r\n") == text.count(b"\r")
    revert(root, UNITS)
    assert contents(root) == before


def test_links_and_permissions_stay(root: Path, tmp_path: Path) -> None:
    (root / T5).rename(tmp_path / "t5.py")
    (root / T5).symlink_to(tmp_path / "t5.py")
    (tmp_path / "t5.py").chmod(0o440)
    apply(root, UNITS, force=True)
    assert (root / T5).is_symlink()
    assert (tmp_path / "t5.py").stat().st_mode & 0o777 == 0o440


def test_git_that_does_not_answer_is_not_a_clean_tree(root: Path) -> None:
    (root / ".git" / "index").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="git status fails"):
        apply(root, UNITS)
    assert not (root / RECORD).exists()


def test_a_damaged_record_is_reported(root: Path) -> None:
    apply(root, UNITS)
    (root / RECORD / "applied.json").write_text("{")
    with pytest.raises(ValueError, match="applied.json is damaged.*restore the tree with git"):
        status(root, UNITS)


def test_edits_that_meet_are_refused(root: Path) -> None:
    def edit(tree: SourceTree) -> bool:
        source, function = tree.function(ATTENTION, "flash_attention")
        source.replace(function.args.defaults[0], "1")
        source.replace(function.args.defaults[0], "2")
        return True

    with pytest.raises(ValueError, match="two edits meet"):
        apply(root, [Unit("clash", "", edit)])


def test_edits_keep_the_rest_as_it_is(root: Path) -> None:
    """Comments, wide characters, line ends and indentation around an edit."""
    text = "# 色调\r\nclass A:\r\n\tdef f(self, x='色', y=g(1)):\r\n\t\t'doc'\r\n\t\treturn y  # 调\r\n"
    tree = SourceTree(root, {"wan/a.py": text})
    source, function = tree.function("wan/a.py", "A.f", ("y",))
    source.replace(function.args.defaults[1], "None")
    tree.commit()
    assert tree.texts["wan/a.py"] == text.replace("g(1)", "None")


def test_a_result_that_is_no_python_is_refused(root: Path) -> None:
    tree = SourceTree(root)
    source, function = tree.function(ATTENTION, "flash_attention")
    source.insert_at_start(function, "if q is None")
    with pytest.raises(PlaceNotFound, match="is not Python"):
        tree.commit()


def test_patched_files_work_without_cuda(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The release's text encoder cannot even be imported, and its attention only asserts."""

    def refuse() -> int:
        raise AssertionError("no CUDA here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", refuse)
    released = WanTree(root, "released_tree")
    with pytest.raises(ValueError, match="modules.t5 cannot be imported here .*no CUDA here.*patch apply"):
        released.module("modules.t5")
    with pytest.raises(ValueError, match="its attention does not run on cpu.*patch apply --wan_root"):
        released.require_attention()
    apply(root, UNITS)
    patched = WanTree(root, "patched_tree")
    patched.require_attention()
    assert patched.get("modules.t5", "T5EncoderModel")(text_len=4).device == "cpu"
    module = patched.module("modules.attention")
    for function, tolerance in ((module.flash_attention, 1e-6), (module.attention, 2e-2)):
        q, k, v = torch.randn(3, 2, 5, 2, 4, generator=torch.Generator().manual_seed(0))
        lengths = torch.tensor([5, 2])
        masked = function(q, k, v, k_lens=lengths)
        scores = torch.einsum("qhc,khc->hqk", q[1], k[1, :2]) / 2
        expected = torch.einsum("hqk,khc->qhc", scores.softmax(-1), v[1, :2])
        torch.testing.assert_close(masked[1].float(), expected, rtol=0, atol=tolerance)
        k[1, 2:], v[1, 2:] = 100.0, 100.0
        assert torch.equal(function(q, k, v, k_lens=lengths), masked)


def test_flash_attention_still_answers_on_cuda(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the release computes, the patched file computes the same way: our function is not even reached."""
    apply(root, UNITS)
    module = WanTree(root, "patched_for_cuda").module("modules.attention")

    class OnCuda(torch.Tensor):
        device = torch.device("cuda")

    q = torch.randn(1, 3, 2, 4).as_subclass(OnCuda)
    monkeypatch.setattr(module, "FLASH_ATTN_2_AVAILABLE", True)
    monkeypatch.setattr(module, "_masked_attention", None)
    kernel = SimpleNamespace(flash_attn_func=lambda q, k, v, **options: q + k + v)
    monkeypatch.setattr(module, "flash_attn", kernel, raising=False)
    assert module.flash_attention(q, q, q).shape == q.shape
    assert module.attention(q, q, q, k_lens=torch.tensor([2])).shape == q.shape
