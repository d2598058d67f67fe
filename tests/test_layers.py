"""Imports go to earlier packages only, never round, and never from the library to experiments."""

import ast
import functools
import graphlib
import re
from pathlib import Path

import pytest

import concept_trak

ROOT = Path(concept_trak.__file__).parent.parent
LAYERS = concept_trak.LAYERS  # in the order of the way of the data
# which every package may use
BASE = "errors isolated registry settings atomic_io validated_io network process parsing flags"
FILES = [p for top in ("concept_trak", "experiments") for p in sorted((ROOT / top).rglob("*.py"))]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports_of(path):
    """Modules of the two trees that a file imports anywhere, inside functions too."""
    return {*imported_by(path)}


def imported_by(path):
    package = [*path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            if node.module and node.module.split(".")[0] == package[0] == "concept_trak":
                raise AssertionError(f"{path}: import {node.module} relatively")
            found = [module(base, alias.name) for alias in node.names]
        else:
            continue
        yield from (".".join(f) for f in found if f[0] in ("concept_trak", "experiments"))


def module(base, name):
    below = ROOT.joinpath(*base, name)
    return [*base, name] if below.is_dir() or below.with_suffix(".py").is_file() else base


def layer(name):
    """How far along the way of the data a module stands."""
    top, _, below = name.partition(".")
    below = below.split(".")[0]
    if top == "concept_trak" and below in LAYERS:
        return 1 + LAYERS.index(below)
    if top == "experiments":
        return 2 + len(LAYERS)
    return 0 if below in (*BASE.split(), "") else 1 + len(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_import_goes_up(path):
    here = module_of(path)
    for found in imports_of(path):
        lazily = here == "concept_trak"  # what it gives is loaded when it is asked for
        assert lazily or layer(found) <= layer(here), f"{here} imports {found}, a later one"


def test_no_import_goes_round():
    graph = {module_of(p): imports_of(p) - {module_of(p)} for p in FILES}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_the_library_knows_experiments_at_its_entry_point_alone():
    naming = re.compile(r"[\"'`](experiments\.(?!json)\w+[\w.]*)[\"'`]")
    found = {
        module_of(path): naming.findall(path.read_text())
        for path in FILES
        if path.is_relative_to(ROOT / "concept_trak")
    }
    assert {k: v for k, v in found.items() if v} == {"concept_trak.cli": ["experiments.cli"]}


def test_the_folder_list_is_the_way_of_the_data():
    library, tests = ROOT / "concept_trak", Path(__file__).parent
    assert {p.name for p in library.iterdir() if (p / "__init__.py").exists()} == set(LAYERS)
    tested = {p.name for p in tests.iterdir() if list(p.rglob("test_*.py"))}
    assert tested == {*LAYERS, "experiments"}
    for name in LAYERS:
        doc = ast.get_docstring(ast.parse((library / name / "__init__.py").read_text()))
        assert doc, f"{name}/__init__.py has no docstring"
