"""`--help` answers at once: no program needs torch to say what it takes."""

from __future__ import annotations

import json
import re
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True)
    output, _, modules = done.stdout.strip().rpartition("\n")
    return set(json.loads(modules)).intersection(HEAVY), output


PACKAGES = "import refalign_ext, wan.modules, wan.configs as c; c.TASKS, c.SIZE_CONFIGS"


@pytest.mark.parametrize("program", [PACKAGES, WALK], ids=["packages", "commands"])
def test_no_torch_is_imported(program: str) -> None:
    assert imports_of(program)[0] == set()


def test_scripts_show_their_help_without_torch() -> None:
    heavy, output = imports_of(SCRIPT.format(name="generate.py"))
    assert heavy == set() and "--task" in output
    heavy, output = imports_of(SCRIPT.format(name="train_refalign.py"))
    shown = set(re.findall(r"^  (?:-h, )?--([\w.-]+)", output, flags=re.MULTILINE))
    others = {"device", "resume", "threads", "dry-run", "world_size", "wan_root", "help"}
    assert heavy == set() and shown == {*setting_fields(), *others}


def test_the_tasks_join_wan_configs_where_those_were_imported_first() -> None:
    imports_of(
        "from wan.configs import WAN_CONFIGS; import refalign_ext; assert WAN_CONFIGS['r2v-14B'].num_layers == 40"
    )
