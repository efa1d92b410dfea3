"""The rooms of the package and the one way imports point: down this list."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cemq

PACKAGE = Path(cemq.__file__).parent
ORDER = (
    "__main__", "cli", "build", "evaluation", "bench", "builtin", "bundle", "search", "runtime", "schedule", "quantize",
    "prior", "memory", "pipelines", "predict", "recipe", "metrics", "parallel", "families", "files", "extensions",
    "reclaim", "errors",
    "_register", "__init__",
)  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES, MOST_PARAMETERS = 70, 8
# a kernel takes one pointer and stride after the other, a command has a parameter for every option
LARGER = (PACKAGE / "cli.py", *(PACKAGE / "quantize" / "kernels").glob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from, wherever in it."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            modules = [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        else:
            continue
        for parts in (module.split(".") for module in modules):
            if parts[0] == "cemq":
                rooms.add(parts[1] if len(parts) > 1 and parts[1] in ORDER else "__init__")
    return rooms


def test_every_room_has_its_place():
    rooms = {room_of(path) for path in FILES}
    assert rooms == set(ORDER)
    top = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert sum(path.is_file() for path in top) <= 12
    assert sum(path.is_dir() for path in top) <= 13


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = ORDER.index(room_of(path))
    if room_of(path) != "__init__":  # which names where every public thing lives, and loads none of it
        assert [room for room in imported(path) if ORDER.index(room) < own] == []


def test_files_of_a_room_do_not_import_in_a_circle():
    modules = {".".join(("cemq", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    graph = {}
    for name, path in modules.items():
        found = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # at import time, not within functions
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cemq."):
                for alias in node.names:
                    found |= {node.module, f"{node.module}.{alias.name}"} & modules.keys()
        graph[name] = found
    done: set[str] = set()
    while ready := {name for name in graph.keys() - done if graph[name] <= done}:
        done |= ready
    assert graph.keys() == done


def test_contributing_lists_the_rooms_in_their_order():
    page = (PACKAGE.parent / "docs" / "contributing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", page, flags=re.M)
    listed = [name for row in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", row)]
    assert listed == [room for room in ORDER if not room.startswith("_")]


@pytest.mark.parametrize("path", [path for path in FILES if path not in LARGER], ids=lambda path: path.stem)
def test_functions_are_read_at_a_glance_and_called_without_a_list(path):
    assert list(too_large(ast.parse(path.read_text(encoding="utf-8")))) == []


def too_large(module: ast.Module) -> Iterator[str]:
    """Functions of more lines, docstring counted, or more parameters, ``self`` apart, than there may be."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            parameters = len(names) - (names[:1] in (["self"], ["cls"]))
            if lines > MOST_LINES or parameters > MOST_PARAMETERS:
                yield f"{node.name}: {lines} lines, {parameters} parameters"


def test_a_large_function_is_told_from_one_that_is_just_small_enough():
    body = "\n    pass" * (MOST_LINES - 1)
    names = ", ".join(f"p{number}" for number in range(MOST_PARAMETERS))
    assert list(too_large(ast.parse(f"def f(self, {names}, **more):{body}"))) == []
    assert list(too_large(ast.parse(f"def f():{body}\n    pass"))) == [f"f: {MOST_LINES + 1} lines, 0 parameters"]
    assert list(too_large(ast.parse(f"async def f({names}, *, q): pass"))) == [
        f"f: 1 lines, {MOST_PARAMETERS + 1} parameters"
    ]


def test_a_pipeline_is_typed_as_one():
    found = [str(path) for path in FILES for _ in re.finditer(r"\bpipe: Any\b", path.read_text(encoding="utf-8"))]
    assert len(found) <= 5, found
