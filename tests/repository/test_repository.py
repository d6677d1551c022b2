"""What the files around the code promise: pins, declared dependencies, license, sizes, the README's two commands."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12")
REQUIREMENT_FILES = ("requirements.txt", "requirements-gpu.txt")
LARGEST_ASSET = 25 * 2**20

# Distributions whose import name differs from their own.
IMPORTED_AS = {"PIL": "pillow", "flash_attn": "flash-attn", "rembg": "rembg", "sklearn": "scikit-learn"}
# Imported only where it happens to be installed: FlashAttention 3 has no release on the package index.
NEVER_DECLARED = {"flash_attn_interface"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def applies(requirement: Requirement, python: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


def pinned(name: str, python: str) -> dict[str, Version]:
    """Distribution -> version that a requirements file installs on that Python."""
    pins: dict[str, Version] = {}
    for requirement in requirements(name):
        if applies(requirement, python):
            distribution = canonicalize_name(requirement.name)
            assert distribution not in pins, f"{name} pins {distribution} twice for Python {python}"
            (specifier,) = requirement.specifier
            pins[distribution] = Version(specifier.version)
    return pins


@pytest.mark.parametrize("name", REQUIREMENT_FILES)
def test_pins_are_exact(name: str) -> None:
    loose = [
        str(requirement)
        for requirement in requirements(name)
        if [(s.operator, s.version.endswith("*")) for s in requirement.specifier] != [("==", False)]
    ]
    assert requirements(name)
    assert not loose


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_lie_within_the_declared_bounds(python: str) -> None:
    pins = pinned("requirements.txt", python)
    declared = [*project()["dependencies"], *project()["optional-dependencies"]["dev"]]
    for requirement in filter(lambda r: applies(r, python), map(Requirement, declared)):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is declared in pyproject.toml and not pinned in requirements.txt"
        assert pins[name] in requirement.specifier


def test_oldest_torch_is_2_6() -> None:
    (torch,) = [r for r in map(Requirement, project()["dependencies"]) if r.name == "torch"]
    assert str(torch.specifier) == ">=2.6"


def test_declared_pythons() -> None:
    supported = Requirement(f"python{project()['requires-python']}").specifier
    assert [v for v in ("3.9", *PYTHONS, "3.13") if Version(v) in supported] == list(PYTHONS)


def test_every_import_is_declared() -> None:
    """A fresh machine has only what is declared, whatever the developer's environment holds by chance."""
    ours = {"wan", "refalign_ext", "generate", "train_refalign"}
    extras = project()["optional-dependencies"]
    lists = [project()["dependencies"], *(extras[name] for name in sorted(extras.keys() - {"dev"}))]
    declared = {canonicalize_name(Requirement(line).name) for lines in lists for line in lines}
    sources = [*(ROOT / "wan").rglob("*.py"), *(ROOT / "refalign_ext").rglob("*.py")]
    sources += [path for path in (ROOT / "generate.py", ROOT / "train_refalign.py") if path.exists()]
    undeclared: set[str] = set()
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in {name.split(".")[0] for name in names} - ours - NEVER_DECLARED:
                distribution = canonicalize_name(IMPORTED_AS.get(name, name))
                if name not in sys.stdlib_module_names and distribution not in declared:
                    undeclared.add(f"{path.relative_to(ROOT)}: {name}")
    assert not undeclared


def test_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.split()[:5] == ["Apache", "License", "Version", "2.0,", "January"]
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text.splitlines()) > 200
    assert project()["license"] == "Apache-2.0"


def test_assets_are_small() -> None:
    large = [
        f"{path.relative_to(ROOT)}: {path.stat().st_size / 2**20:.1f} MiB"
        for path in (ROOT / "assets").rglob("*")
        if path.is_file() and path.stat().st_size > LARGEST_ASSET
    ]
    assert not large


def test_readme_shows_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"^```.*?^```", readme, flags=re.MULTILINE | re.DOTALL))
    assert "make demo" in blocks
    assert "make test" in blocks


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_demo_runs_the_command_that_the_readme_promises() -> None:
    # Run under `make test`, the outer make's settings must not reach the inner one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "--always-make", "demo", "ARGS="]
    plan = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    for piece in (
        "-r requirements.txt",
        "generate.py --task r2v-tiny --ref assets/demo/",
        "--save_file outputs/demo/video.mp4",
        "--save_sheet outputs/demo/sheet.png",
    ):
        assert piece in plan


def test_ci_runs_the_two_commands() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    commands = script.read_text(encoding="utf-8")
    assert re.search(r"\bmake test\b", commands)
    assert re.search(r"\bmake demo\b", commands)


def test_links_and_pictures_of_the_documents_exist():
    for document in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]:
        text = document.read_text(encoding="utf-8")
        assert "@@" not in text, f"{document.name} has an unfilled place"
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if not target.startswith(("http://", "https://")):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_picture_of_the_rooms_is_the_present_one():
    command = [sys.executable, str(ROOT / "docs" / "draw_rooms.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run python docs/draw_rooms.py: {done.stderr}"
