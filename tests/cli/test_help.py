"""`--help` answers at once: no program needs torch to say what it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from refalign_ext.config import setting_fields

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "numpy", "av", "PIL", "diffusers", "transformers", "easydict")
# The help of every command of `python -m refalign_ext`, one after another, and what has been imported by then.
WALK = """
import json, sys
import click
from refalign_ext.cli import main

def walk(command, context):
    command.get_help(context)
    commands = command.list_commands(context) if isinstance(command, click.Group) else []
    for name in commands:
        found = command.get_command(context, name)
        walk(found, click.Context(found, info_name=name, parent=context))

walk(main, click.Context(main, info_name="refalign_ext"))
"""
SCRIPT = """
import runpy, sys
sys.argv = [{name!r}, "--help"]
try:
    runpy.run_path({name!r}, run_name="__main__")
except SystemExit as stop:
    assert not stop.code
"""
LOADED = "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"


def imports_of(program: str) -> tuple[set[str], str]:
    """The heavy packages that a program imports, and what it writes."""
    command = [sys.executable, "-c", program + LOADED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    output, _, modules = done.stdout.strip().rpartition("\n")
    return set(json.loads(modules)).intersection(HEAVY), output


@pytest.mark.parametrize("program", ["import refalign_ext", WALK], ids=["package", "commands"])
def test_no_torch_is_imported(program: str) -> None:
    assert imports_of(program)[0] == set()


@pytest.mark.parametrize("name", ["train_refalign.py", "generate.py"])
def test_scripts_show_their_help_without_torch(name: str) -> None:
    heavy, output = imports_of(SCRIPT.format(name=name))
    assert heavy == set() and "--task" in output


def test_every_setting_is_a_flag_of_training() -> None:
    _, output = imports_of(SCRIPT.format(name="train_refalign.py"))
    shown = {line.split()[0].removeprefix("--") for line in output.splitlines() if line.startswith("  --")}
    others = {"device", "resume", "threads", "dry-run", "world_size", "wan_root"}
    assert shown == {*setting_fields(), *others}


@pytest.mark.parametrize(
    "order",
    [
        "import refalign_ext; from wan.configs import WAN_CONFIGS",
        "from wan.configs import WAN_CONFIGS; import refalign_ext",
    ],
)
def test_the_tasks_join_wan_configs_in_either_order(order: str) -> None:
    imports_of(f"{order}; assert WAN_CONFIGS['r2v-14B'].num_layers == 40 and 'r2v-tiny' in WAN_CONFIGS")
