"""The floor plan: imports go to earlier rooms only, never round; the rooms are those told."""

import ast
import graphlib
from pathlib import Path

import pytest

import concept_trak

PACKAGE = Path(concept_trak.__file__).parent
ROOMS = concept_trak.ROOMS  # in the order of the way of the data
FOUNDATION = (
    "errors",
    "isolated",
    "registry",
    "settings",
    "files",
    "reading",
    "network",
    "system",
    "parsing",
    "flags",
)  # which every room may use
DOOR = ("cli", "__main__")  # which may use every room


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Modules of the package that a file imports anywhere, those inside functions included."""
    name, package = module_of(path), [] if path.parent == PACKAGE else module_of(path).split(".")
    if path.name != "__init__.py":
        package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            base = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                below = PACKAGE.joinpath(*base, alias.name)
                is_module = below.is_dir() or below.with_suffix(".py").is_file()
                yield ".".join([*base, alias.name] if is_module else base)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            for found in names:
                assert found.split(".")[0] != "concept_trak", f"{name}: import it relatively"


FILES = sorted(PACKAGE.rglob("*.py"))


def floor(module):
    """How far along the way of the data a module stands."""
    room = module.split(".")[0]
    if room in ROOMS:
        return 1 + ROOMS.index(room)
    return 0 if room in (*FOUNDATION, "") else 1 + len(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_import_goes_up(path):
    here = module_of(path)
    for found in imports_of(path):
        assert floor(found) <= floor(here), f"{here} imports {found}, which comes later"


def test_no_import_goes_round():
    graph = {module_of(p): set(imports_of(p)) - {module_of(p)} for p in FILES}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle
    place = {module: i for i, module in enumerate(order)}
    assert all(place[found] < place[module] for module in graph for found in graph[module])


def test_the_folder_list_is_the_way_of_the_data():
    folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert folders == set(ROOMS)
    assert len(list(PACKAGE.glob("*.py"))) <= 13
    tests = {p.name for p in Path(__file__).parent.iterdir() if list(p.rglob("test_*.py"))}
    assert tests == set(ROOMS)


def test_a_room_says_what_it_is_for():
    for room in ROOMS:
        doc = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
        assert doc, f"{room}/__init__.py has no docstring"
