"""The two commands as their users see them: one screen, exit codes, one line for a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from refalign_ext.cli import upstream as commands
from refalign_ext.upstream import contract
from refalign_ext.upstream import doctor as doctor_module
from refalign_ext.upstream.doctor import doctor
from tests.helpers.rebase_trees import checkout, contents, gate_the_text, rename_an_argument

OURS = commands.OURS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return checkout(tmp_path / "tree")


@pytest.fixture(autouse=True)
def cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def run(command: str, *arguments: object) -> Result:
    group = getattr(commands, command)
    return CliRunner().invoke(group, [str(argument) for argument in arguments], env={"WAN_ROOT": ""})


def test_doctor_fits_on_one_screen(root: Path) -> None:
    done = run("doctor", "--wan_root", root)
    lines = done.output.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    subjects = "tree missing changed present task patches python attention devices free teachers result"
    for subject in subjects.split():
        assert any(line.startswith(subject) for line in lines), subject
    parts = "version 0.9.0, commit ", "torch ", "GiB", "dinov3-l", "SDPA", "t2v-A14B: refused as a pair"
    assert all(part in done.output for part in parts), done.output


def test_doctor_says_what_to_do_and_then_that_it_works(root: Path) -> None:
    before = run("doctor", "--wan_root", root)
    assert before.exit_code == 1
    assert f"patch apply --wan_root {root}" in " ".join(before.output.split())
    run("patch", "apply", "--wan_root", root)
    after = run("doctor", "--wan_root", root)
    assert after.exit_code == 0, after.output
    assert after.output.splitlines()[-1] == "result    references work with this tree here"


def test_doctor_goes_on_where_patches_cannot_tell(root: Path) -> None:
    run("patch", "apply", "--wan_root", root)
    gate_the_text(root)
    done = run("doctor", "--wan_root", root)
    assert done.exit_code == 1
    assert "model.py was edited after it was patched" in " ".join(done.output.split())
    assert "goes through something else first" in done.output
    assert "costs: references (generation and training)" in " ".join(done.output.split())


def test_doctor_of_files_that_are_no_python(root: Path) -> None:
    for name in ("wan/configs/wan_t2v_1_3B.py", "wan/modules/vae.py", "wan/modules/clip.py"):
        (root / name).write_text("def (")
    report = doctor(root)
    assert report.exit_code == 1
    assert report.tasks["t2v-1.3B"].endswith("line 1 is not Python: invalid syntax")
    assert {f.name: f.cost for f in report.findings if f.name.endswith(".py")} == {
        "wan/configs/wan_t2v_1_3B.py": contract.TASKS,
        "wan/modules/vae.py": contract.VAE,
    }, "and nobody needs the third"


def test_another_copy_of_this_repository_is_known(root: Path) -> None:
    (root / "wan" / "utils").mkdir()
    (root / "wan" / "utils" / "weights.py").write_text("")
    assert not doctor(root).patches
    assert "RefAlign's own tree" in str(run("patch", "apply", "--wan_root", root).exception)


def test_flash_attention_on_cuda_needs_no_patch_for_one_device(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("patch", "apply", "--wan_root", root, "--unit", "one-timestep")
    assert doctor(root).blocked
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor_module, "_kernels", lambda: ["FlashAttention 2"])
    report = doctor(root)
    assert report.exit_code == 0
    without = "without several GPUs on one video (ulysses, ring); --activation_checkpointing"
    assert " ".join(str(report).split()).endswith(without)


def test_doctor_of_this_repository() -> None:
    done = run("doctor")
    assert done.exit_code == 0, done.output
    assert "patches" not in [line.split()[0] for line in done.output.splitlines()]
    assert "missing" not in done.output
    assert "changed" not in done.output


def test_patch_commands_follow_each_other(root: Path) -> None:
    before = contents(root)
    assert "not applied  cpu-attention" in run("patch", "status", "--wan_root", root).output
    shown = run("patch", "diff", "--wan_root", root).output
    assert shown.startswith("--- a/wan/modules/attention.py\n+++ b/wan/modules/attention.py\n@@ ")
    assert contents(root) == before
    assert run("patch", "apply", "--wan_root", root).output == shown
    assert run("patch", "apply", "--wan_root", root).output == "nothing to do: the patches are applied\n"
    assert run("patch", "diff", "--wan_root", root).output == shown
    assert run("patch", "status", "--wan_root", root).output.count("applied      ") >= 7
    assert run("patch", "revert", "--wan_root", root, "--unit", "one-timestep").exit_code == 0
    assert "not applied  one-timestep" in run("patch", "status", "--wan_root", root).output
    run("patch", "revert", "--wan_root", root)
    assert run("patch", "revert", "--wan_root", root).output == "nothing to do: no such patch is applied\n"
    assert contents(root) == before


def test_patch_status_says_that_a_place_has_changed(root: Path) -> None:
    rename_an_argument(root)
    done = run("patch", "status", "--wan_root", root)
    assert done.exit_code == 1
    assert "changed      cpu-attention" in done.output
    assert "flash_attention has no parameter k_lens" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no tree named: give --wan_root FOLDER or set WAN_ROOT"),
        (("--wan_root", OURS), "is RefAlign's own tree, which needs no patches"),
        (("--wan_root", "none"), "none: there is no folder wan/"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[object, ...], message: str) -> None:
    for action in ("status", "apply", "revert", "diff"):
        done = run("patch", action, *arguments)
        assert isinstance(done.exception, ValueError)
        assert message in str(done.exception) and "\n" not in str(done.exception)
