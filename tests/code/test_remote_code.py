"""The rules of code that transformers loads from a repository: flat files, few imports, nothing left behind."""

import ast
import re
import sys
from pathlib import Path

import pytest
from places import ROOT
from rediprune.configuration_rediprune import CONFIGS
from transformers.dynamic_module_utils import check_imports, get_relative_import_files, get_relative_imports

AUTO_MAPS = [config.auto_map_of_class() for config in CONFIGS.values()]
FILES = sorted(ROOT.glob("*.py"))
NAMES = {path.stem for path in FILES}
ALLOWED = {"torch", "numpy", "transformers", *sys.stdlib_module_names}
OPTIONAL = {"av"}  # inside `try:`, so that nobody has to install it to load a model
ENTRIES = {reference.split(".")[0] for auto_map in AUTO_MAPS for reference in auto_map.values()}


def imports(path):
    """(statement, whether a `try:` with an `except ImportError` or wider is around it) for each import of a file, at any depth."""

    def walk(node, guarded):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                yield child, guarded
            yield from walk(child, guarded or isinstance(child, ast.Try) and bool(child.handlers))

    return list(walk(ast.parse(path.read_text()), False))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_the_entry_files_exist():
    assert ENTRIES <= NAMES and len(FILES) > 5


def test_only_what_every_installation_has_is_imported(path):
    for statement, guarded in imports(path):
        if isinstance(statement, ast.ImportFrom) and statement.level:
            continue
        names = (
            [statement.module] if isinstance(statement, ast.ImportFrom) else [alias.name for alias in statement.names]
        )
        for name in names:
            package = name.split(".")[0]
            assert package in ALLOWED or guarded and package in OPTIONAL, f"{path.name} imports {name}"


def test_relative_imports_name_a_file(path):
    """`from . import x` is not seen by transformers, and a folder would not be copied."""
    for statement, guarded in imports(path):
        if isinstance(statement, ast.ImportFrom) and statement.level:
            assert statement.level == 1 and statement.module, f"{path.name}:{statement.lineno}"
            assert statement.module in NAMES, f"{path.name} imports .{statement.module}, which does not exist"
            assert not guarded and all(alias.name != "*" for alias in statement.names)
    in_text = set(re.findall(r"^\s*from \.(\w+) import", path.read_text(), re.MULTILINE))
    assert set(get_relative_imports(path)) == in_text


def test_repository_files_are_imported_relatively(path):
    """An absolute import would find another repository's file of the same name, or none."""
    for statement, _ in imports(path):
        if isinstance(statement, ast.Import):
            assert not NAMES & {alias.name.split(".")[0] for alias in statement.names}
        elif not statement.level:
            assert statement.module.split(".")[0] not in NAMES


def test_transformers_accepts_the_imports(path):
    check_imports(path)


def test_names_are_flat_and_say_where_they_belong(path):
    assert path.stem in ENTRIES or room_of(path.stem) in ROOMS
    assert path.stem.isidentifier() and path.stem not in sys.stdlib_module_names
    elsewhere = {other.name for folder in ("scripts", "tests") for other in (ROOT / folder).rglob("*.py")}
    assert path.name not in elsewhere  # files are copied by base name


def test_every_file_is_reached_from_an_entry():
    """What no entry file imports does not arrive where a model is loaded."""
    reached = {f"{name}.py" for name in ENTRIES}
    for name in ENTRIES:
        reached |= {Path(file).name for file in get_relative_import_files(ROOT / f"{name}.py")}
    assert reached == {path.name for path in FILES}


def test_no_file_imports_itself_in_a_circle():
    graph = {path.stem: set(get_relative_imports(path)) for path in FILES}

    def visit(name, way):
        assert name not in way, f"circle: {' -> '.join([*way, name])}"
        for other in graph[name]:
            visit(other, [*way, name])

    for name in graph:
        visit(name, [])


# Each room may import from itself and from those that are named.
ROOMS = {
    "ops": set(),
    "hub": set(),
    "inputs": {"hub"},
    "methods": {"ops"},
    "configuration": {"ops", "methods", "hub"},
    "core": {"ops", "methods", "hub", "inputs", "configuration"},
    "vision": {"ops", "methods", "hub", "inputs", "core"},
    "processing": {"configuration", "core"},
    "modeling": {"configuration", "core", "hub", "vision"},
}


def room_of(name):
    return name.partition("_")[0]


def of_type_checking(path):
    """The lines of what is only named for transformers 4.57, and not imported."""
    blocks = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
    return {line for block in blocks for line in range(block.lineno, block.end_lineno + 1)}


def test_arrows_between_rooms_run_one_way(path):
    room, named = room_of(path.stem), of_type_checking(path)
    for statement, _ in imports(path):
        if isinstance(statement, ast.ImportFrom) and statement.level and statement.lineno not in named:
            assert room_of(statement.module) in ROOMS[room] | {room}, f"{path.name} imports .{statement.module}"


def test_the_core_finds_methods_through_the_registry_alone():
    for path in ROOT.glob("core_*.py"):
        of_methods = {name for name in get_relative_imports(path) if room_of(name) == "methods"}
        assert of_methods <= {"methods_base", "methods_registry"}, path.name


def test_tensor_files_know_nothing_of_models():
    """Files of tensor mathematics stand alone: beside one another they import torch and the standard library."""
    for path in ROOT.glob("ops_*.py"):
        for statement, _ in imports(path):
            module = statement.module if isinstance(statement, ast.ImportFrom) else statement.names[0].name
            outside = isinstance(statement, ast.Import) or not statement.level
            assert not outside or module.split(".")[0] in {"torch"} | sys.stdlib_module_names, path.name
