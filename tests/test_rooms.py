"""The rooms of the package and the one way imports point: down this list; and what tests may take from where."""

import ast
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import cemq

PACKAGE = Path(cemq.__file__).parent
TESTS, DOCS = Path(__file__).parent, PACKAGE.parent / "docs"
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


# --- tests

TEST_FILES = sorted(TESTS.rglob("*.py"))
every_test_file = pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: str(path.relative_to(TESTS)))
# a process of its own takes ten seconds to import what a part of this script needs, and here it is imported already
IMPORTS_A_SCRIPT = {"test_gpu_script.py": {"gpu", "gpu_parts"}}
FROM_FILE = {"spec_from_file_location", "run_path"}
OF_DIFFUSERS = {
    "_step_index",
    "_interrupt",
}  # attributes of its samplers and pipelines, which cemq's happen to be called


def nodes_of(source: str) -> Iterator[ast.AST]:
    """Of a file, and of the code in its texts that it starts processes with."""
    for node in ast.walk(ast.parse(source)):
        yield node
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
            with suppress(SyntaxError, ValueError):  # prose
                yield from nodes_of(node.value)


def modules_of(folder: Path) -> set[str]:
    """What the files in a folder, and the folders in it, are called."""
    return {part for path in folder.rglob("*.py") for part in path.relative_to(folder).with_suffix("").parts}


def taken(source: str) -> set[str]:
    """The modules that are imported, by the first parts of their names; and whatever loads one from a file."""
    found = []
    for node in nodes_of(source):
        match node:
            case ast.Import(names=names):
                found += [name.name for name in names]
            case ast.ImportFrom(module=str(module)):
                found.append(module)
            case ast.Call(
                func=ast.Name("import_module") | ast.Attribute(attr="import_module"), args=[ast.Constant(str(name)), *_]
            ):
                found.append(name)
            case ast.Attribute(attr=name) if name in FROM_FILE:
                found.append(name)
    return {module.partition(".")[0] for module in found}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(source: str) -> tuple[set[str], set[str]]:
    """The private names that a module defines, methods and attributes of its classes among them; and its constants."""
    found, variables = set(), set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case (
                ast.FunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.Attribute(ast.Name("self" | "cls"), name, ast.Store())
            ):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                variables.add(name)
    private = set(filter(is_private, found | variables))
    return private, {name for name in variables if name.isupper()}


def hidden_uses(source: str, private: set[str], constants: set[str]) -> list[str]:
    """Private names of the package that a test imports, reads or replaces, and constants that it replaces."""
    found = []
    for node in nodes_of(source):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] == "cemq":
                found += [name.name for name in names if is_private(name.name)]
            case ast.Attribute(attr=name) if name in private:
                found.append(name)
            case ast.Call(func=ast.Attribute(attr="setattr" | "delattr" | "object" | "patch"), args=arguments):
                for argument in arguments:
                    match argument:
                        case ast.Constant(str(text)):
                            parts = text.split(".")
                            found += [name for name in parts if name in private or name in constants]
    return found


def test_what_a_file_takes_and_what_it_does_behind_the_back_is_found_wherever_it_is():
    assert taken("import a.b, c\ndef f():\n    from d.e import g") == {"a", "c", "d"}
    assert taken("importlib.import_module('a.b')\nimport_module('c')") == {"a", "c"}
    assert taken("runpy.run_path('a.py')") == {"run_path"}
    assert taken("code = 'import a'\ntext = 'you may import a car'") == {"a"}
    private, constants = own_names(
        "LIMIT = 1\n_LIMIT = 2\nclass A:\n def _b(self):\n  self._c = other._d = _e = 3\n  for _ in (): pass"
    )
    assert (private, constants) == ({"_LIMIT", "_b", "_c", "_e"}, {"LIMIT", "_LIMIT"})
    for hidden in (
        " ".join(("from cemq.a", "import _x")), "a._b()", "code = 'import cemq; cemq.a._b()'",
        "monkeypatch.setattr(a, '_b', 1)", "monkeypatch.setattr('cemq.a.A._b', 1)", "patch.object(a, 'LIMIT', 1)",
    ):  # fmt: skip
        assert hidden_uses(hidden, private, constants), hidden
    for open_ in ("from torch import _x", "a.b(LIMIT)", "torch._dynamo.reset()", "monkeypatch.setattr(a, 'b', '_b')"):
        assert not hidden_uses(open_, private - {"_b"}, constants), open_


@every_test_file
def test_tests_take_from_support_alone_and_run_the_scripts_of_docs(path):
    found = taken(path.read_text(encoding="utf-8"))
    assert not {name for name in found if name in {"conftest", *FROM_FILE} or name.startswith("test_")}
    assert found & modules_of(DOCS) == IMPORTS_A_SCRIPT.get(path.name, set())


def test_docs_take_nothing_from_tests():
    for path in DOCS.rglob("*.py"):
        assert not taken(path.read_text(encoding="utf-8")) & (modules_of(TESTS) | {"tests"} | FROM_FILE), path


@pytest.fixture(scope="module")
def names_of_the_package():
    found = [own_names(path.read_text(encoding="utf-8")) for path in FILES]
    private, constants = (set().union(*each) for each in zip(*found, strict=True))
    assert len(private) > 100 < len(constants)
    return private - OF_DIFFUSERS, constants


@every_test_file
def test_tests_go_through_what_is_public(path, names_of_the_package):
    assert hidden_uses(path.read_text(encoding="utf-8"), *names_of_the_package) == []
