"""What a setting may be, and texts that name several things: numbers, sizes, devices, methods.

Everything is refused in one line before any work begins.
"""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .errors import UserError
from .registry import RANKERS, Registry, unknown

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
# Roles of weights (`components.parameter_groups`); PAPER is the published choice, with its rule.
KINDS = ("self_attention", "cross_attention")
PARTS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "out"}
ROLES = (
    "feed_forward",
    *(f"{kind}.{part}" for kind in KINDS for part in PARTS.values()),
    *("convolution", "time", "projection"),
)
PAPER = "paper"
SELECTIONS = (PAPER, "all", *KINDS, *ROLES)


@dataclass(frozen=True)
class Option:
    """What stands beside a setting's default.

    help, one line · unit · choices, the allowed values · low, high, inclusive bounds · parse, which
    raises UserError for a value that breaks the setting's inner grammar · place, whether it is a
    path that is always needed: an empty one would be the working folder.
    """

    help: str
    unit: str = ""
    choices: tuple[str, ...] | Registry[Any] = ()
    low: float | None = None
    high: float | None = None
    parse: Callable[[Any], object] | None = None
    place: bool = False

    def allowed(self) -> tuple[str, ...]:
        """The choices there are now; empty is everything."""
        return self.choices.names() if isinstance(self.choices, Registry) else self.choices

    def check(self, variable: str, value: Any) -> None:
        """UserError for a value that is not allowed; it names the variable and the remedy."""
        if isinstance(value, str):
            check_text(variable, value)
        if self.place:
            refuse_no_place(variable, value)
        if self.choices and value not in self.allowed():
            raise UserError(unknown(variable, value, self.allowed()))
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(
                f"{variable}={value} is not a number to compute with; set {variable} to a "
                "finite one"
            )
        above = self.low is None or value >= self.low
        below = self.high is None or value <= self.high
        if not (above and below):
            upper = "" if self.high is None else f" and at most {self.high}"
            told = f"{variable}={value} is out of range"
            raise UserError(f"{told}; set {variable} to at least {self.low}{upper}")
        if self.parse is not None:
            self.parse(value)


def check_text(variable: str, value: str) -> None:
    """UserError for a text that is none; see `no_character`."""
    controls = (c for c in value if "\x7f" <= c < "\xa0")  # files of old programs hold some
    if bad := no_character(value) or next(controls, ""):
        raise UserError(
            f"{variable} holds {bad!r}, which is no character of a text; remove it from {variable}"
        )


def no_character(value: str) -> str:
    """The first in it that no text has: half a pair of surrogates (as of bytes that are no UTF-8),
    or a control character; "" where there is none. For whatever a user or a file says.
    """
    wrong = (c for c in value if (c < " " and c not in "\t\n\r") or "\ud800" <= c < "\ue000")
    return next(wrong, "")


def normalized(text: str) -> str:
    """The text with composed letters (NFC): the same word is written in two ways, by systems that
    differ. What is compared is compared so; what is kept stays as it was given.
    """
    return unicodedata.normalize("NFC", text)


def refuse_no_place(variable: str, value: str) -> None:
    """UserError for an empty path."""
    if not value.strip():
        raise UserError(
            f"{variable} is empty, which is no path; give {variable} one, or leave it out for the "
            f"default: unset {variable}"
        )


def option(default: Any, help: str, unit: str = "", **about: Any) -> Any:
    """A dataclass field with its `Option`: option(50, "of the picture", "DDIM steps", low=2)."""
    return dataclasses.field(default=default, metadata={"option": Option(help, unit, **about)})


def edit_distance(one: str, other: str) -> int:
    """How many letters must be changed, added, removed or swapped with their neighbour (optimal
    string alignment).
    """
    rows = [list(range(len(other) + 1))]
    for i, a in enumerate(one, 1):
        rows.append([i])
        for j, b in enumerate(other, 1):
            least = min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + (a != b))
            if i > 1 and j > 1 and (a, one[i - 2]) == (other[j - 2], b):
                least = min(least, rows[i - 2][j - 2] + 1)
            rows[i].append(least)
    return rows[-1][-1]


def nearest(word: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The words that `word` may be a slip of the keyboard for, the nearest first: one edit in five
    letters, and one at least.
    """
    room = max(1, len(word) // 5)
    near = [(edit_distance(word, k), k) for k in known if abs(len(k) - len(word)) <= room]
    return [k for distance, k in sorted(near) if distance <= room][:most]


def parse_numbers(variable: str, text: str, count: int, what: str) -> list[int]:
    """ "3,7-9" -> [3, 7, 8, 9]; empty is all `count`. UserError if malformed or out of range."""
    chosen = []
    for low, high in number_ranges(variable, text):
        # one too many is enough to be refused below
        chosen += range(low, min(high, max(low, count)) + 1)
    if bad := [s for s in chosen if s >= count]:
        raise UserError(
            f"{variable}={text!r} names {bad[0]} but there are only {count} {what} "
            f"(0 to {count - 1}); mend {variable}"
        )
    return chosen or list(range(count))


def parse_shards(text: str, count: int) -> list[int]:
    """SHARDS as numbers; see `parse_numbers`."""
    return parse_numbers("SHARDS", text, count, "shards of NUM_SPLIT")


def number_ranges(variable: str, text: str) -> list[tuple[int, int]]:
    """ "3,7-9" -> [(3, 3), (7, 9)]. UserError for anything else."""
    ranges = []
    for part in text.split(",") if text.strip() else ():
        numbers = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part, re.ASCII)
        low, high = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (1, 0)
        if high < low:
            raise UserError(f"{variable}={text!r} is not a list of numbers; write {variable}=3,7-9")
        ranges.append((low, high))
    return ranges


def parse_memory(text: str) -> int:
    """ "6GB", "500 MB" or a number of bytes -> bytes. UserError for anything else."""
    number = text.strip().rstrip("BKMGIbkmgi ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(
            f"MAX_MEMORY={text!r} is not a size; write MAX_MEMORY=6GB or MAX_MEMORY=500MB"
        )
    return size


def refuse_credentials(address: str) -> None:
    """UserError for an address that holds a user, a password or a signature: it is told and kept
    wherever its stores are.
    """
    from .network import without_credentials  # here: few starts need an address

    if "://" in address and (plain := without_credentials(address)) != address:
        raise UserError(
            f"the address {plain} came with a user, a password or a query, which would be told and "
            "kept with it; set GRAD_DIR without, and give credentials in the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...)"
        )


def parse_gpu_ids(text: str) -> list[str]:
    """ "0 1 2" or "0,1,2" -> ["0", "1", "2"]; "cpu" stands for a process on the CPU and may be
    repeated. UserError for anything else.
    """
    ids = text.replace(",", " ").split()
    if bad := [i for i in ids if i != "cpu" and not (i.isascii() and i.isdecimal())]:
        raise UserError(
            f"GPU_IDS={text!r} names {bad[0]!r}; set GPU_IDS to numbers such as '0 1 2 3', or cpu"
        )
    ids = [i if i == "cpu" else str(int(i)) for i in ids]
    if bad := [i for i in ids if i != "cpu" and ids.count(i) > 1]:
        raise UserError(
            f"GPU_IDS={text!r} names GPU {bad[0]} twice, whose processes would share "
            "the memory; name it once in GPU_IDS"
        )
    return ids


def parse_methods(text: str) -> list[str]:
    """METHODS as names of `RANKERS`; empty stands for all. UserError for one that there is not."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = RANKERS.names() if names else ()
    if bad := [name for name in names if name not in known]:
        raise UserError(f"METHODS names {bad[0]!r}; set METHODS to some of {', '.join(known)}")
    return names


def check_selection(text: str) -> None:
    """UserError for a SELECTION that names no role of weights."""
    for part in (part.strip() for part in text.split("|")):
        if part not in SELECTIONS:
            known = ", ".join(SELECTIONS)
            raise UserError(
                f"SELECTION names {part!r}; set SELECTION to one of, or several with '|' "
                f"between, {known}"
            )
