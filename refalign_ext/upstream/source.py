"""The Python files of a Wan tree, read and edited by the names in their syntax trees. Nothing is executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


class PlaceNotFound(ValueError):
    """A place that a patch needs is gone or has changed; the message names it."""


class SourceFile:
    """One file's text and syntax tree; edits are collected and applied together, so that positions stay valid.

    Attributes:
        name: path in the tree, with forward slashes, such as "wan/modules/model.py".
        text: what the file holds.
        tree: its syntax tree.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        try:
            self.tree = ast.parse(text.removeprefix("\ufeff"))
        except SyntaxError as error:
            raise PlaceNotFound(f"{name}: line {error.lineno} is not Python: {error.msg}") from None
        # Columns of the syntax tree count bytes, so everything here does.
        self._bytes = text.encode()
        self._lines = [0]
        for line in self._bytes.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self._newline = b"\r\n" if self._bytes.partition(b"\n")[0].endswith(b"\r") else b"\n"
        self._edits: list[tuple[int, int, bytes]] = []

    def find(self, name: str) -> ast.AST | None:
        """The function, class or assignment of a dotted name, such as "WanModel.forward"; None if there is none."""
        found: ast.AST = self.tree
        for part in name.split("."):
            following = None
            for node in definitions(found):
                if part in names_of(node):
                    following = node
            if following is None:
                return None
            found = following
        return found

    def changed(self, node: ast.AST, what: str) -> PlaceNotFound:
        """The error that names a place in this file."""
        return PlaceNotFound(f"{self.name}, line {node.lineno}: {what}")

    def segment(self, node: ast.AST) -> str:
        """The text of a node."""
        start, end = self._span(node)
        return self._bytes[start:end].decode()

    def indentation(self, node: ast.AST) -> int:
        """By how many columns the line is indented that a node begins on."""
        line = self._bytes[self._lines[node.lineno - 1] :]
        return len(line) - len(line.lstrip(b" "))

    def replace(self, node: ast.AST, text: str) -> None:
        """Puts `text` in the place of an expression."""
        self._edit(*self._span(node), text)

    def insert_before(self, node: ast.stmt, text: str) -> None:
        """Puts whole lines, blank ones at the end too, before a statement and its decorators, indented like it."""
        line = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", []))])
        start = self._lines[line - 1]
        self._edit(start, start, _indented(text, node.col_offset))

    def insert_at_start(self, function: Function, text: str) -> None:
        """Puts whole lines at the start of a function's body, after its docstring."""
        body = function.body
        is_text = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        if is_text and len(body) == 1:
            self._insert_after(body[0], text)
        else:
            self.insert_before(body[1 if is_text else 0], text)

    def insert_at_end(self, function: Function, text: str) -> None:
        """Puts whole lines at the end of a function's body."""
        self._insert_after(function.body[-1], text)

    def edited(self) -> str:
        """The text with all edits; PlaceNotFound if edits overlap or the result is not Python."""
        result, end_of_last = [], 0
        for start, end, text in sorted(self._edits, key=lambda edit: edit[:2]):
            if start < end_of_last:
                raise PlaceNotFound(f"{self.name}: two edits meet at one place")
            result += [self._bytes[end_of_last:start], text]
            end_of_last = end
        new = b"".join([*result, self._bytes[end_of_last:]]).decode()
        SourceFile(self.name, new)
        return new

    def _insert_after(self, node: ast.stmt, text: str) -> None:
        start = self._lines[node.end_lineno]
        missing = "" if self._bytes[:start].endswith(b"\n") else "\n"
        self._edit(start, start, missing + _indented(text, node.col_offset))

    def _edit(self, start: int, end: int, text: str) -> None:
        """With the line ends of the file."""
        new = text.encode().replace(b"\r\n", b"\n").replace(b"\n", self._newline)
        self._edits.append((start, end, new))

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self._lines[node.lineno - 1] + node.col_offset,
            self._lines[node.end_lineno - 1] + node.end_col_offset,
        )


class SourceTree:
    """All Python files below a tree's `wan/`.

    Attributes:
        root: the folder that holds `wan/`.
        texts: the present text of every file by name, which `commit` changes.
    """

    def __init__(self, root: Path, texts: dict[str, str] | None = None) -> None:
        """Reads the files, or takes their `texts`; ValueError if there is no `wan/` or a file is not UTF-8."""
        self.root = root
        if not (root / "wan").is_dir():
            raise ValueError(f"{root}: there is no folder wan/; name the folder of a Wan checkout")
        if texts is None:
            texts = {}
            for path in sorted((root / "wan").rglob("*.py")):
                try:
                    texts[path.relative_to(root).as_posix()] = path.read_bytes().decode()
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path} is not UTF-8 ({error.reason})") from None
        self.texts = texts
        self._open: dict[str, SourceFile] = {}

    def file(self, name: str) -> SourceFile:
        """A file to read and edit, the same one until `commit`."""
        if name not in self.texts:
            raise PlaceNotFound(f"{name}: there is no such file")
        if name not in self._open:
            self._open[name] = SourceFile(name, self.texts[name])
        return self._open[name]

    def locate(self, file: str, name: str) -> tuple[SourceFile, ast.AST]:
        """A definition in a file or, if it has moved, in the one other file of the same folder that has it."""
        if file in self.texts and (found := self.file(file).find(name)) is not None:
            return self.file(file), found
        folder = file.rpartition("/")[0]
        others = [
            (source, found)
            for source in (self.file(other) for other in self.texts if other.rpartition("/")[0] == folder)
            if (found := source.find(name)) is not None
        ]
        if len(others) != 1:
            where = f"; {', '.join(source.name for source, _ in others)} have it" if others else ""
            raise PlaceNotFound(f"{file}: {name} is not there{where}")
        return others[0]

    def function(self, file: str, name: str, parameters: tuple[str, ...] = ()) -> tuple[SourceFile, Function]:
        """A function that has at least these parameters."""
        source, node = self.locate(file, name)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            raise PlaceNotFound(f"{source.name}: {name} is no function")
        have = parameters_of(node)
        lacking = [parameter for parameter in parameters if parameter not in have]
        if lacking:
            raise source.changed(
                node, f"{name} has no parameter {', '.join(lacking)} (it has {', '.join(have)})"
            )
        return source, node

    def commit(self) -> None:
        """Makes the edits of all files part of `texts`."""
        self.texts |= {name: source.edited() for name, source in self._open.items() if source._edits}
        self._open = {}


def definitions(node: ast.AST) -> Iterator[ast.stmt]:
    """What a module, class or function defines itself, conditional and guarded branches included."""
    for child in getattr(node, "body", []):
        yield child
        if isinstance(child, ast.If | ast.Try):
            yield from definitions(child)
            for branch in ("orelse", "finalbody"):
                yield from getattr(child, branch, [])
            for handler in getattr(child, "handlers", []):
                yield from definitions(handler)


def names_of(node: ast.AST) -> tuple[str, ...]:
    """The names that a statement binds: of a definition or an assignment."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return (node.name,)
    if isinstance(node, ast.Assign):
        return tuple(target.id for target in node.targets if isinstance(target, ast.Name))
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return (node.target.id,)
    return ()


def parameters_of(function: Function) -> list[str]:
    """Names of the parameters in order, without `self`."""
    arguments = function.args
    names = [item.arg for item in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name != "self"]


def defaults_of(function: Function) -> dict[str, ast.expr]:
    """The parameters that have a default, and which."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    last = positional[len(positional) - len(arguments.defaults) :]
    pairs = [*zip(last, arguments.defaults), *zip(arguments.kwonlyargs, arguments.kw_defaults)]
    return {parameter.arg: default for parameter, default in pairs if default is not None}


def calls_of(node: ast.AST, dotted_name: str) -> list[ast.Call]:
    """Every call of a dotted name, such as "self.core", below a node."""
    return [
        call for call in ast.walk(node) if isinstance(call, ast.Call) and dotted(call.func) == dotted_name
    ]


def dotted(node: ast.AST) -> str:
    """`torch.amp.autocast` for the expression that says so, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def attributes_set(function: ast.AST) -> set[str]:
    """Names of the attributes of `self` that a function assigns."""
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and dotted(node.value) == "self"
    }


def imported_packages(node: ast.AST) -> set[str]:
    """Top-level packages that an import statement names; none for relative imports and other statements."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module or ""]
    return {name.split(".")[0] for name in names}


def _indented(text: str, columns: int) -> str:
    lines = text.lstrip("\n").splitlines()
    return "".join(f"{' ' * columns if line else ''}{line}\n" for line in lines)
