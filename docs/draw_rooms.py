"""Draw the rooms of the repository and what each imports: docs/images/rooms.svg.

    python docs/draw_rooms.py            # writes the picture
    python docs/draw_rooms.py --check    # exit code 1 if the picture on disk is not the present one

Rows are files and folders in the order of the import rules; a dot means that the row imports the column. Imports lead
upwards only, so all dots lie below the diagonal. Nothing is imported, only the syntax trees are read.
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

GROUPS = {"model": "#1b6ca8", "the paper": "#2a8c5a", "machinery": "#b5482a", "programs": "#7a4fa3"}
CELL, LEFT, NAME, TEXT, TOP, RIGHT = 20, 16, 130, 620, 110, 60  # pixels


def rooms() -> list[tuple[str, str, list[Path]]]:
    """(group, name, files) of every row, in the order of the import rules."""
    package = ROOT / "refalign_ext"
    found = [("model", "wan/", sorted((ROOT / "wan").rglob("*.py")))]
    for name in " ".join(ORDER).split():
        if name == "cli":
            found.append(("programs", "cli/", sorted((package / name).rglob("*.py"))))
        elif (package / name).is_dir():
            group = "the paper" if name == "tasks" else "machinery"
            found.append((group, f"{name}/", sorted((package / name).rglob("*.py"))))
        elif not name.startswith("__"):
            found.append(("the paper", f"{name}.py", [package / f"{name}.py"]))
    return found + [("programs", name, [ROOT / name]) for name in ("generate.py", "train_refalign.py")]


def room_of(module: str) -> str:
    """The row that a module belongs to; empty for anything outside the picture."""
    parts = module.split(".")
    if parts[0] == "wan":
        return "wan/"
    if parts[0] != "refalign_ext" or len(parts) < 2 or parts[1].startswith("__"):
        return ""
    is_folder = (ROOT / "refalign_ext" / parts[1]).is_dir()
    return f"{parts[1]}/" if is_folder else f"{parts[1]}.py"


def summary(files: list[Path]) -> str:
    """The first line of the docstring of the file, or of the folder's `__init__.py`."""
    source = next((file for file in files if file.name == "__init__.py"), files[0])
    text = (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").split("\n")[0]
    return text if len(text) <= 104 else f"{text[:103].rsplit(' ', 1)[0]} ..."


def imports() -> set[tuple[str, str]]:
    """(room, room that it imports), each pair once."""
    found = rooms()
    known = {module_name(file, ROOT) for _, _, files in found for file in files}
    known |= {name.removesuffix(".__init__") for name in known}
    pairs: set[tuple[str, str]] = set()
    for _, name, files in found:
        for file in files:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            modules = {module for _, module in imported_modules(tree, module_name(file, ROOT), known)}
            pairs |= {(name, target) for target in map(room_of, modules) if target and target != name}
    return pairs


def draw() -> str:
    """The picture as SVG."""
    found = rooms()
    index = {name: number for number, (_, name, _) in enumerate(found)}
    color = {name: GROUPS[group] for group, name, _ in found}
    matrix, side = LEFT + NAME + TEXT, CELL * len(found)
    width, height = matrix + side + RIGHT, TOP + side + LEFT
    shapes = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, (group, paint) in enumerate(GROUPS.items()):
        x = LEFT + 110 * number
        shapes.append(f'<rect x="{x}" y="20" width="12" height="12" fill="{paint}"/>')
        shapes.append(f'<text x="{x + 18}" y="31">{group}</text>')
    shapes.append(f'<text x="{LEFT}" y="54" fill="#777">a dot: the row imports the column</text>')
    for name, number in index.items():
        y, x = TOP + CELL * number, matrix + CELL * number
        if number % 2 == 0:
            shapes.append(
                f'<rect x="{LEFT}" y="{y}" width="{matrix + side - LEFT}" height="{CELL}" fill="#f4f4f4"/>'
            )
        weight = ' font-weight="bold"' if name.endswith("/") else ""
        shapes += [
            f'<text x="{LEFT}" y="{y + 14}"{weight} fill="{color[name]}">{name}</text>',
            f'<text x="{LEFT + NAME}" y="{y + 14}" fill="#333">{escape(summary(found[number][2]))}</text>',
            f'<text transform="translate({x + 14},{TOP - 8}) rotate(-60)" fill="{color[name]}">{name}</text>',
            f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="#d8d8d8"/>',
        ]
    for row, column in sorted(imports()):
        x, y = matrix + CELL * index[column] + CELL // 2, TOP + CELL * index[row] + CELL // 2
        shapes.append(
            f'<circle cx="{x}" cy="{y}" r="5" fill="{color[column]}"><title>{row} imports {column}</title></circle>'
        )
    return "\n".join([*shapes, "</svg>", ""])


def main() -> int:
    picture = draw()
    if "--check" in sys.argv[1:]:
        return 0 if PICTURE.is_file() and PICTURE.read_text(encoding="utf-8") == picture else 1
    PICTURE.write_text(picture, encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
