"""Named entries that settings choose among: objectives, rankers, benchmarks.

An entry is added where it is defined; the modules that hold entries are imported when they are
first asked for. So a typo is refused without loading what it does not name.

    @OBJECTIVES.register("dsm")
    class Dsm: ...
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from .errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """{name: entry} of one variable, or of one kind of thing.

    homes: modules that hold entries; they import no torch at their top. Others may be appended.
    """

    def __init__(self, variable: str, *homes: str) -> None:
        self.variable, self.homes = variable, [*homes]
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Make `entry` known by `name`, and return it. ValueError for a name that is taken."""
        if name in self._entries:
            raise ValueError(f"{self.variable} {name!r} is registered twice")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of `add`."""
        return lambda entry: self.add(name, entry)

    def names(self) -> tuple[str, ...]:
        """Every name, in the order of registration."""
        for home in self.homes:
            importlib.import_module(home)
        return tuple(self._entries)

    def get(self, name: str) -> T:
        """The entry. UserError that lists the names for one that there is not."""
        if name not in self._entries:
            self.names()
        if name not in self._entries:
            raise UserError(unknown(self.variable, name, self.names()))
        return self._entries[name]

    @contextlib.contextmanager
    def temporary(self, name: str, entry: T) -> Iterator[T]:
        """`name` stands for `entry` inside the block, and afterwards for what it stood before."""
        before = {name: self._entries[name]} if name in self._entries else {}
        self._entries[name] = entry
        try:
            yield entry
        finally:
            del self._entries[name]
            self._entries |= before


def unknown(variable: str, value: Any, names: tuple[str, ...]) -> str:
    """The line for a value that is not among `names`: of a variable (in capitals) or a thing."""
    joint = "" if variable.startswith("--") else "="
    return (
        f"{variable}{joint or ' '}{value!r} is unknown; set {variable} to one of {', '.join(names)}"
    )


OBJECTIVES: Registry[Any] = Registry("F", "concept_trak.gradients.objectives")
RANKERS: Registry[Any] = Registry("METHODS", "concept_trak.attribution.methods")
BENCHMARKS: Registry[Any] = Registry("benchmark")
