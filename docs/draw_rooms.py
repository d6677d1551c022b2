"""Draw the rooms of the repository and the imports between them: docs/images/rooms.svg.

    python docs/draw_rooms.py            # writes the picture
    python docs/draw_rooms.py --check    # exit code 1 if the picture on disk is not the present one

Every row is a file or folder of `refalign_ext`, or one of what stands around it, in the order of the import rules: an arc
leads from a row to a row above it that it imports. Nothing is imported, only the syntax trees are read.
"""

from __future__ import annotations

import ast
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "rooms.svg"
sys.path.insert(0, str(ROOT))

from tests.repository.test_import_direction import ORDER, imported_modules, module_name  # noqa: E402

AROUND = ("generate.py", "train_refalign.py")
ROW, LEFT, NAME, TEXT, ARCS = 22, 16, 130, 640, 300
COLORS = ("#1b6ca8", "#b5482a", "#2a8c5a", "#7a4fa3", "#a8801b", "#49606b")


def rows() -> list[tuple[str, list[Path]]]:
    """(name, files) of every row, in the order of the import rules."""
    package = ROOT / "refalign_ext"
    found = [("wan/", sorted((ROOT / "wan").rglob("*.py")))]
    for name in " ".join(ORDER).split():
        if (package / name).is_dir():
            found.append((f"{name}/", sorted((package / name).rglob("*.py"))))
        elif not name.startswith("__"):
            found.append((f"{name}.py", [package / f"{name}.py"]))
    return found + [(name, [ROOT / name]) for name in AROUND]


def row_of(module: str) -> str:
    """The row that a module belongs to; empty for anything outside the picture."""
    parts = module.split(".")
    if parts[0] == "wan":
        return "wan/"
    if parts[0] != "refalign_ext" or len(parts) < 2 or parts[1].startswith("__"):
        return ""
    is_folder = (ROOT / "refalign_ext" / parts[1]).is_dir()
    return f"{parts[1]}/" if is_folder else f"{parts[1]}.py"


def summary(files: list[Path]) -> str:
    """The first line of the row's docstring: of the file, or of the folder's `__init__.py`."""
    source = next((file for file in files if file.name == "__init__.py"), files[0])
    text = (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").split("\n")[0]
    return text if len(text) <= 96 else f"{text[:95].rsplit(' ', 1)[0]} ..."


def imports(found: list[tuple[str, list[Path]]]) -> set[tuple[str, str]]:
    """(row, row that it imports), each pair once."""
    known = {module_name(file, ROOT) for _, files in found for file in files}
    known |= {name.removesuffix(".__init__") for name in known}
    arrows: set[tuple[str, str]] = set()
    for name, files in found:
        for file in files:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            modules = {module for _, module in imported_modules(tree, module_name(file, ROOT), known)}
            arrows |= {(name, target) for target in map(row_of, modules) if target and target != name}
    return arrows


def draw() -> str:
    """The picture as SVG."""
    found = rows()
    place = {name: index for index, (name, _) in enumerate(found)}
    right, height = LEFT + NAME + TEXT, ROW * len(found) + 2 * LEFT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right + ARCS}" height="{height}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{right + ARCS}" height="{height}" fill="white"/>',
    ]
    for source, target in sorted(imports(found)):
        start, end = (LEFT + ROW * place[name] + ROW // 2 for name in (source, target))
        bow = min(ARCS - 24, 18 + 9 * abs(place[source] - place[target]))
        lines.append(
            f'<path d="M{right},{start} C{right + bow},{start} {right + bow},{end} {right},{end}" fill="none" '
            f'stroke="{COLORS[place[source] % len(COLORS)]}" stroke-opacity="0.55" '
            f'stroke-width="1.5"><title>{source} imports {target}</title></path>'
        )
    for name, files in found:
        middle = LEFT + ROW * place[name] + ROW // 2 + 4
        weight = ' font-weight="bold"' if name.endswith("/") else ""
        color = COLORS[place[name] % len(COLORS)]
        lines += [
            f'<text x="{LEFT}" y="{middle}"{weight} fill="{color}">{name}</text>',
            f'<text x="{LEFT + NAME}" y="{middle}" fill="#333">{escape(summary(files))}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def main() -> int:
    picture = draw()
    if "--check" in sys.argv[1:]:
        return 0 if PICTURE.is_file() and PICTURE.read_text(encoding="utf-8") == picture else 1
    PICTURE.write_text(picture, encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
