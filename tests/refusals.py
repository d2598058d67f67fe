"""The texts of every `UserError(` in the package, read from the source without running it.

A text is followed to where its parts come from: local names, constants of a module, what a function
of the package returns, what its callers give a parameter. What only a run knows stays `{name}`.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import concept_trak
from concept_trak.attribution import mask_detection  # noqa: F401 - it has a refusal of its own kind
from concept_trak.errors import UserError

ROOT = Path(concept_trak.__file__).parent.parent
MOST = 200  # texts that one part may have
DEPTH = 14  # steps from a text to where its parts come from
# functions that return a command line, whatever they are asked
LINES = {"command", "command_line", "line"}
REFUSALS = {"UserError", *(c.__name__ for c in UserError.__subclasses__())}
Around = tuple[ast.AST, ...]  # a module, and the classes and functions in it
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, eq=False)
class Site:
    """A refusal: its file and line, the functions around it, the message."""

    path: str
    line: int
    around: Around
    message: ast.expr

    def parameters(self) -> set[str]:
        """Of the functions around it, and the fields and methods of its class."""
        names = set()
        for node in self.around:
            if isinstance(node, Function):
                args = node.args
                names |= {a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)}
            elif isinstance(node, ast.ClassDef):
                names |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
                names |= {n.name for n in node.body if isinstance(n, Function)}
        return names - {"self", "cls"}


class Source:
    """All modules of the package, parsed."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.found: dict[tuple[ast.expr, Around, int], set[str]] = {}  # what `texts` found before
        # {name: {module: values}}; what a module imports is under its name there, too
        self.constants: dict[str, dict[str, list[ast.expr]]] = {}
        self.functions: dict[str, dict[str, list[ast.AST]]] = {}
        self.imported: dict[tuple[str, str], tuple[str, str]] = {}  # (module, name): its home
        self.module_of: dict[ast.AST, str] = {}
        self.home: dict[ast.AST, ast.AST] = {}  # the module of a function
        self.calls: dict[str, list[tuple[ast.Call, tuple[ast.AST, ...]]]] = {}
        trees = (ROOT / "concept_trak", ROOT / "experiments")
        for path in (p for tree in trees for p in sorted(tree.rglob("*.py"))):
            tree = ast.parse(path.read_text("utf-8"))
            module = str(path.relative_to(ROOT))
            for node in tree.body:
                for name, value in bindings(node):
                    self.constants.setdefault(name, {}).setdefault(module, []).append(value)
            self.module_of[tree] = module
            self._walk(tree, (tree,), module)

    def known(self, table: dict[str, dict[str, list]], name: str, around: Around) -> list:
        """The entries of a name as a module sees it: its own, what it imports, else (a method) all
        there are.
        """
        module = self.module_of[around[0]]
        home, original = self.imported.get((module, name), (module, name))
        found = table.get(original, {})
        return found.get(home) or [entry for entries in found.values() for entry in entries]

    def _walk(self, node: ast.AST, around: Around, path: str) -> None:
        if isinstance(node, Function):
            self.functions.setdefault(node.name, {}).setdefault(path, []).append(node)
            self.home[node] = around[0]
        if isinstance(node, ast.ImportFrom):
            base = (ROOT / path).parents[node.level - 1] if node.level else ROOT
            home = base / (node.module or "").replace(".", "/")
            name = f"{home}.py".removeprefix(f"{ROOT}/")
            for alias in node.names:
                self.imported[path, alias.asname or alias.name] = name, alias.name
        if isinstance(node, ast.Call):
            name = called(node)
            self.calls.setdefault(name, []).append((node, around))
            if name in REFUSALS and node.args:
                self.sites.append(Site(path, node.lineno, around, node.args[0]))
        if isinstance(node, Function | ast.ClassDef):
            around = (*around, node)
        for child in ast.iter_child_nodes(node):
            self._walk(child, around, path)

    def texts(self, node: ast.expr, around: Around, depth: int = DEPTH) -> set[str]:
        """Whatever the expression may be, unknown parts as {their source}."""
        if (known := self.found.get((node, around, depth))) is None:
            found = self._texts(node, around, depth) if depth else set()
            found = {text for text in found if not re.fullmatch(r"\{[^{}]*\}", text)}
            known = set(itertools.islice(sorted(found), MOST)) or {unfollowed(node)}
            self.found[node, around, depth] = known
        return known

    def _texts(self, node: ast.expr, around: Around, depth: int) -> set[str]:
        match node:
            case ast.Constant(value=str()):
                return {node.value}
            case ast.JoinedStr():
                return self._joined(node.values, around, depth)
            case ast.FormattedValue(value=value):
                return self.texts(value, around, depth - 1)
            case ast.BinOp(op=ast.Add()):
                return self._joined([node.left, node.right], around, depth)
            case ast.IfExp():
                return self.texts(node.body, around, depth) | self.texts(node.orelse, around, depth)
            case ast.BoolOp():
                return set().union(*(self.texts(v, around, depth) for v in node.values))
            case ast.Name():
                return self._named(node.id, around, depth)
            case ast.Call():
                return self._called(node, around, depth)
        return set()

    def _joined(self, parts: list[ast.expr], around: Around, depth: int) -> set[str]:
        """Parts before the last separator are not followed: they are what is wrong."""
        ends = [i for i, p in enumerate(parts) if isinstance(p, ast.Constant) and "; " in p.value]
        begin = ends[-1] if ends else 0
        head = "".join(
            p.value if isinstance(p, ast.Constant) else "{" + ast.unparse(p.value) + "}"
            for p in parts[:begin]
        )
        tails = [self.texts(part, around, depth) for part in parts[begin:]]
        whole = itertools.islice(itertools.product(*tails), MOST)
        return {head + "".join(texts) for texts in whole}

    def _named(self, name: str, around: Around, depth: int) -> set[str]:
        for i, function in reversed([*enumerate(around)]):
            if not isinstance(function, Function):
                continue
            if local := locals_of(function).get(name):
                here = around[: i + 1]
                return set().union(*(self.texts(v, here, depth - 1) for v in local))
            args = [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]
            if name in args:
                return self._given(around[:1] + (function,), args, name, depth)
        module = self.module_of[around[0]]
        home, original = self.imported.get((module, name), (module, name))
        values = self.constants.get(original, {}).get(home, [])
        tree = next(t for t, m in self.module_of.items() if m == home) if values else None
        return set().union(*(self.texts(v, (tree,), depth - 1) for v in values))

    def _given(self, around: Around, args: list[str], name: str, depth: int) -> set[str]:
        """What the callers of a function give a parameter."""
        function = around[-1]
        place = args.index(name) - (args[0] in ("self", "cls"))
        by_keyword = [a.arg for a in function.args.kwonlyargs]
        keyword = dict(zip(by_keyword, function.args.kw_defaults, strict=True))
        found: set[str] = set()
        for node, there in self.calls.get(function.name, []):
            by_name = [k.value for k in node.keywords if k.arg == name]
            value = by_name or ([] if name in keyword else node.args[place : place + 1])
            for given in value:
                if not isinstance(given, ast.Starred):
                    found |= self.texts(given, there, depth - 1)
        positional, defaults = args[: len(args) - len(keyword)], function.args.defaults
        ends = dict(zip(reversed(positional), reversed(defaults), strict=False))
        default = (ends | keyword).get(name)
        if isinstance(default, ast.Constant | ast.Name):
            found |= self.texts(default, (around[0],), depth - 1)
        return found

    def _called(self, node: ast.Call, around: Around, depth: int) -> set[str]:
        name = called(node)
        if name in LINES:
            return {"bash scripts/SCRIPT.sh"}
        if name == "script_hint":
            return {f"bash scripts/{t}" for t in self.texts(node.args[0], around, depth - 1)}
        if name == "format" and isinstance(node.func, ast.Attribute):
            return self.texts(node.func.value, around, depth - 1)
        if name == "str" and node.args:
            return self.texts(node.args[0], around, depth - 1)
        found: set[str] = set()
        for function in self.known(self.functions, name, around):
            here = (self.home[function], function)
            for value in returns_of(function):
                found |= self.texts(value, here, depth - 1)
        return found


def unfollowed(node: ast.expr) -> str:
    """What stands for a part that only a run knows."""
    return "{" + ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node) + "}"


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


@functools.cache
def locals_of(function: ast.AST) -> dict[str, list[ast.expr]]:
    """{name: what it is set to} anywhere in a function."""
    found: dict[str, list[ast.expr]] = {}
    for name, value in itertools.chain.from_iterable(map(bindings, ast.walk(function))):
        found.setdefault(name, []).append(value)
    return found


@functools.cache
def returns_of(function: ast.AST) -> list[ast.expr]:
    """What a function returns."""
    found = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    return [value for value in found if value is not None]


def bindings(node: ast.AST) -> list[tuple[str, ast.expr]]:
    """(name, value) of an assignment; of several names at once, each with its own."""
    if isinstance(node, ast.NamedExpr):
        return [(node.target.id, node.value)]
    if isinstance(node, ast.AugAssign | ast.AnnAssign):
        name = node.target
        return [(name.id, node.value)] if isinstance(name, ast.Name) and node.value else []
    if not isinstance(node, ast.Assign):
        return []
    found = []
    for target in node.targets:
        if isinstance(target, ast.Name):
            found.append((target.id, node.value))
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = zip(target.elts, node.value.elts, strict=False)
            found += [(t.id, v) for t, v in pairs if isinstance(t, ast.Name)]
    return found
