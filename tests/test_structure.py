"""The rooms of the package: who may import whom, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "visadapt"

ROOMS = (
    ("printable",),
    ("errors",),
    ("limits",),
    ("checks", "optional", "typed", "bounded_json", "arguments"),
    ("reading",),
    ("table", "files"),
    ("tensor_file",),
    ("backbone",),
    ("methods",),
    ("runtime",),
    ("frozen", "export", "plan", "data", "shape_check"),
    ("combining", "injection", "task_file"),
    ("opening",),
    ("",),
    ("training",),
    ("experiments", "serving"),
    ("report",),
    ("cli",),
    ("__main__",),
)
"""From the ground up; ``""`` is ``visadapt/__init__.py``. A room imports rooms below it only, or its own files."""

RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}

FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@cache
def tree(name: str) -> ast.Module:
    """Return what a file of the package says."""
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imports(name: str) -> Iterator[str]:
    """Files of the package that a file imports anywhere in it: at the top, in a function, or for types only."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                target = f"{node.module}.{alias.name}"
                if target in FILES or node.module in FILES:
                    yield target if target in FILES else str(node.module)


@cache
def graph() -> dict[str, list[str]]:
    """Return the files that each file imports."""
    return {name: sorted(set(imports(name)) - {name}) for name in FILES}


def room(name: str) -> str:
    """The room of a file: the first folder or file below the package."""
    return name.removeprefix("visadapt").removeprefix(".").partition(".")[0]


def circles(edges: dict[str, list[str]]) -> list[list[str]]:
    """The strongly connected components of more than one file (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in edges[name]:
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                found.append(sorted(component))

    for name in edges:
        if name not in index:
            visit(name)
    return found


def test_every_room_has_a_rank():
    assert {room(name) for name in FILES} == set(RANK)


def test_no_import_circle():
    assert circles(graph()) == []


def test_imports_point_down():
    upward = [
        f"{name} imports {target}"
        for name, targets in graph().items()
        for target in targets
        if room(target) != room(name) and RANK[room(target)] >= RANK[room(name)]
    ]
    assert upward == []


def test_imports_stand_at_the_top():
    # a library that may be missing goes through visadapt.optional.require
    inner = {
        f"{name}:{node.lineno}"
        for name in FILES
        for function in ast.walk(tree(name))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert inner == set()


def names(package: str) -> set[str]:
    """What a package's ``__init__`` gives out."""
    body = tree(package).body
    return {a.asname or a.name for node in body if isinstance(node, ast.ImportFrom) for a in node.names}


def test_no_module_has_the_name_of_something_that_its_package_gives_out():
    packages = [name for name, path in FILES.items() if path.name == "__init__.py"]
    modules = {(name.rpartition(".")[0], name.rpartition(".")[2]) for name in FILES}
    assert {(package, name) for package in packages for name in names(package)} & modules == set()


def test_no_module_of_the_core_has_the_name_of_a_public_function():
    core = {room for rooms in ROOMS[: ROOMS.index(("",))] for room in rooms}
    modules = {name.rpartition(".")[2] for name in FILES if room(name) in core and name != "visadapt"}
    assert not modules & names("visadapt")


def test_files_are_short():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert {name: length for name, length in lines.items() if length >= 400} == {}
