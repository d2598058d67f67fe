"""What a store is: its manifest.json, and the comparison of what is wanted with what is there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import UserError, remove_hint, script_hint
from ..validated_io import read_json
from .dtypes import STORED_TYPES

FORMAT = 1
DOWNLOAD_HINT = script_hint("abc/download_train_grad.sh")
COMPUTE_HINT = script_hint("emoji/run_train_grad.sh")
RELEASE_HINT = f"set GRAD_DIR to another folder, or fetch the release (13.1 GB): {DOWNLOAD_HINT}"
COMPARED = ("num_rows", "dim", "dtype", "layout", "bounds", "identity")  # every manifest has these


@dataclass(frozen=True)
class Layout:
    """Form of a store: rows [num_rows, dim] of `dtype` over num_split shards of nearly equal size.

    dtype: float16, bfloat16 or float32. kind: "npy", or "raw" without headers as in the release.
    losses: whether each row has its loss (float32) beside it. UserError for another dtype or kind,
    and for more shards than rows.
    """

    num_rows: int
    dim: int
    num_split: int
    dtype: str
    kind: str = "npy"
    losses: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in STORED_TYPES:
            known = ", ".join(STORED_TYPES)
            raise UserError(
                f"unknown store dtype {self.dtype!r}; set STORE_DTYPE to one of {known}"
            )
        if self.kind not in ("npy", "raw"):
            raise UserError(f"unknown store layout {self.kind!r}; give kind npy or raw")
        if not 1 <= self.num_split <= self.num_rows:
            limit = f"between 1 and the number of rows, {self.num_rows}"
            raise UserError(f"{self.num_split} shards are too many or none; set NUM_SPLIT {limit}")

    def manifest(self) -> dict:
        """All of the manifest but identity and provenance; "losses" stands there only if true, so
        that stores without keep the manifest and the id they always had.
        """
        bounds = [self.num_rows * i // self.num_split for i in range(self.num_split + 1)]
        shape = {"num_rows": self.num_rows, "dim": self.dim, "dtype": self.dtype}
        shape |= {"losses": True} if self.losses else {}
        return {"format": FORMAT, **shape, "layout": self.kind, "bounds": bounds}


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder; UserError if there is none, or one that cannot be one."""
    path = folder / "manifest.json"
    if not os.path.lexists(path):
        what = "holds no gradient store (no manifest.json)"
        raise UserError(
            f"{folder} {what}; make the train gradients first, e.g. (about a minute) {COMPUTE_HINT}"
        )
    mend = remove_hint(path, "make the train gradients again, whose rows are kept")
    manifest = read_json(path, mend)
    check_equal(folder, "format", FORMAT, manifest.get("format"))
    fault = next((key for key, right in FORMS.items() if not right(manifest.get(key))), None)
    if fault is None and not _whole(manifest["bounds"], manifest["num_rows"]):
        fault = "bounds"
    if fault is not None:
        value = repr(manifest.get(fault))[:80]
        raise UserError(f"{path} cannot be read as a store manifest ({fault}: {value}); {mend}")
    return manifest


def _count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**48


def _projection(value: Any) -> bool:
    """Whether an identity names the projection of its rows as one can be named, or names none."""
    if not isinstance(value, dict):
        return value is None
    sizes = [value[key] for key in ("input_dim", "proj_dim", "blocks") if key in value]
    sizes += modules if isinstance(modules := value.get("modules", []), list) else [None]
    return isinstance(value.get("kind"), str) and all(map(_count, sizes))


FORMS: dict[str, Callable[[Any], bool]] = {  # what each value of a manifest must be
    "num_rows": _count,
    "dim": _count,
    "dtype": lambda value: isinstance(value, str) and value in STORED_TYPES,
    "layout": lambda value: value in ("npy", "raw"),
    "bounds": lambda value: isinstance(value, list) and all(type(b) is int for b in value),
    "identity": lambda value: isinstance(value, dict) and _projection(value.get("projection")),
    "provenance": lambda value: isinstance(value, dict),
    "losses": lambda value: value in (None, True, False),
}


def block_widths(manifest: dict) -> list[int]:
    """Features of each of the blocks in which the rows are preconditioned; their sum is k."""
    projection = manifest["identity"].get("projection") or {}
    widths = projection.get("modules") if projection.get("blocks", 1) > 1 else None
    return widths or [manifest["dim"]]


def _whole(bounds: list[int], num_rows: int) -> bool:
    """Whether shards of these bounds cover all rows, each of them at least one."""
    steps = all(a < b for a, b in pairwise(bounds))
    return len(bounds) > 1 and (bounds[0], bounds[-1]) == (0, num_rows) and steps


def raw_manifest(folder: Path, dim: int) -> dict:
    """The manifest (without identity) of a folder of header-less float32 shards train_grad-0.npy
    ...; UserError for gaps and for shards that are truncated or real .npy files.
    """
    names = (
        re.fullmatch(r"train_grad-(0|[1-9]\d*)\.npy", path.name) for path in folder.glob("*.npy")
    )
    numbers = sorted(int(name[1]) for name in names if name)
    if not numbers or numbers != list(range(len(numbers))):
        what = "expected train_grad-0.npy, -1.npy, ... without gaps"
        raise UserError(
            f"{folder}: {what}, found {shorten(numbers)}; fetch the others (13.1 GB in all): "
            f"{DOWNLOAD_HINT}"
        )
    bounds = [0]
    for number in numbers:
        path = folder / f"train_grad-{number}.npy"
        with open(path, "rb") as file:
            if file.read(6) == b"\x93NUMPY":
                what = "is a real .npy file, not raw float32"
                raise UserError(f"{path} {what}; {RELEASE_HINT}")
        rows, rest = divmod(path.stat().st_size, 4 * dim)
        if rest or not rows:
            what = f"is truncated or not of {dim} float32 values a row"
            raise UserError(
                f"{path} {what}; remove it and fetch it again (13.1 GB in all): {DOWNLOAD_HINT}"
            )
        bounds.append(bounds[-1] + rows)
    layout = Layout(bounds[-1], dim, len(numbers), "float32", "raw")
    return layout.manifest() | {"bounds": bounds}


def check_equal(folder: Path, name: str, wanted: Any, found: Any) -> None:
    """UserError naming the first key, however deep, in which two JSON values differ."""
    if wanted == found:
        return
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in sorted(wanted.keys() | found.keys()):
            check_equal(folder, f"{name}.{key}", wanted.get(key), found.get(key))
    made = f"{folder} was made with {name} = {found!r}, not {wanted!r}"
    raise UserError(f"{made}; use the same settings, or set GRAD_DIR to another folder")


def shorten(values: list[int]) -> str:
    """At most eight of the values, for a message."""
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "") or "none"
