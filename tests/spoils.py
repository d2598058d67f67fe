"""What can be wrong with a setting or a file: texts, and functions that spoil a file."""

from __future__ import annotations

import functools
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Spoil = Callable[[Path], None]

TEXTS = (
    *("", " ", "0", "-1", "1", "3.5", "1e400", "nan", "inf", "-inf", "1e-30", "\u0663", "true"),
    *("a" * 5000, "\udcff", "caf\u00e9", "../../x", "\n", "/dev/null", "/", "1,2", "--prompt"),
    *("%s", "{}", "9" * 30, "9" * 5000, "0x10", "1_0", "|", ",", "-", "~", "$HOME", "\0", "a\tb"),
    *("cat|cat", "cat,cat", "auto", "cuda:99", "3-1", "0-99999999999"),
    *("\x1b[31mred", "\u202ecat", "a\u0301" * 40, "\U0001f408", "a/" * 3000, "cat\x00blob", "-0"),
)


def spoil_missing(path: Path) -> None:
    path.unlink()


def spoil_empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_noise(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def spoil_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 16
    path.write_bytes(content)


def spoil_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def spoil_type(path: Path) -> None:
    path.write_bytes(b"[1, 2]\n")


def spoil_zip(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(100))


def spoil_encoding(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


def spoil_longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(7))


def spoil_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def spoil_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def spoil_null_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


def spoil_numbers(path: Path) -> None:
    """Every number of a JSON file becomes one that makes no sense; of other files, a NaN."""
    if path.suffix not in (".json", ".jsonl"):
        content = path.read_bytes()
        path.write_bytes(content[:-8] + b"\xff" * 8)
        return
    text = path.read_text()
    path.write_text("".join("-7e9" if c.isdecimal() and i % 3 else c for i, c in enumerate(text)))


def spoil_nulls(path: Path) -> None:
    """Every value of a JSON object becomes null."""
    try:
        known = json.loads(path.read_text())
        path.write_text(json.dumps(dict.fromkeys(known)))
    except (ValueError, TypeError):
        path.write_bytes(b"null")


SPOIL: tuple[Spoil, ...] = (
    *(spoil_missing, spoil_empty, spoil_half, spoil_noise, spoil_bit, spoil_folder, spoil_type),
    *(spoil_zip, spoil_encoding, spoil_longer, spoil_link, spoil_numbers, spoil_nulls),
    *(spoil_pipe, spoil_null_device),
)


# ---- one value of a JSON file

ODD: tuple[Any, ...] = (
    *(None, True, -1, 2**70, 1.5, 1e308, "", "../../x", "/etc/passwd", "\0", "a" * 3000),
    *([], {}, [1], {"a": 1}, [[]] * 3, "\x1b[31m\u202e", "9" * 400),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a JSON value are, however deep; the first two of a list stand for it."""
    if isinstance(value, dict):
        pairs = list(value.items())
    else:
        pairs = list(enumerate(value))[:2] if isinstance(value, list) else []
    for key, inner in pairs:
        yield (*path, key)
        yield from places(inner, (*path, key))


def replaced(value: Any, place: tuple[Any, ...], odd: Any) -> Any:
    """The JSON value with another one at a place."""
    if not place:
        return odd
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[place[0]] = replaced(value[place[0]], place[1:], odd)
    return changed


def set_value(path: Path, place: tuple[Any, ...], odd: Any) -> None:
    """Put `odd` at a place of a JSON file, or of the first line of a .jsonl."""
    first, *rest = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    path.write_text("\n".join([json.dumps(replaced(json.loads(first), place, odd)), *rest, ""]))


def twice(path: Path, key: str) -> None:
    """Give a JSON object a key a second time, with another value."""
    path.write_text(path.read_text().replace("{", f"{{{json.dumps(key)}: 77, ", 1))


def values_of(path: Path, count: int = 12, each: int = 4) -> Iterator[tuple[str, Spoil]]:
    """(name, spoil) of up to `count` places of a JSON file, with some odd values each."""
    text = path.read_text()
    value = json.loads(text.splitlines()[0] if path.suffix == ".jsonl" else text)
    every = list(places(value))
    for i, place in enumerate(every[:: max(1, len(every) // count)][:count]):
        for j in range(each):
            odd = ODD[(5 * i + j * 4) % len(ODD)]
            name = f"{'.'.join(map(str, place))[:40]}={str(odd)[:12]!r}"
            yield name, functools.partial(set_value, place=place, odd=odd)
    if isinstance(value, dict):
        for key in list(value)[:3]:
            yield f"{key} twice", functools.partial(twice, key=key)


# ---- an array of another kind


def array_of(change: Callable[[np.ndarray], np.ndarray], path: Path) -> None:
    """Another array in an .npy of the same name."""
    np.save(path, change(np.load(path)), allow_pickle=True)


def _with(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        flat = array.copy().ravel()
        flat[-1] = value
        return flat.reshape(array.shape)

    return change


ARRAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "pickled": lambda a: a.astype(object),
    "fortran": np.asfortranarray,
    "double": lambda a: a.astype(np.float64),
    "big endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "integers": lambda a: a.astype(np.int32),
    "complex": lambda a: a.astype(np.complex64),
    "texts": lambda a: a.astype("U8"),
    "no rows": lambda a: a[:0],
    "one row less": lambda a: a[:-1],
    "no axis": lambda a: a.ravel(),
    "one axis more": lambda a: a[None],
    "reversed": lambda a: a[::-1],
    "zeros": np.zeros_like,
    "nan": _with(np.nan),
    "inf": _with(np.inf),
}


# ---- safetensors whose header says something else


def header_of(change: Callable[[dict[str, Any]], Any], path: Path) -> None:
    """Another header before the same values."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    made = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(made)) + made + content[8 + size :])


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return header[min(k for k in header if k != "__metadata__")]


def _shape(header: dict[str, Any]) -> None:
    _first(header)["shape"] = [1, *_first(header)["shape"]]


def _flat(header: dict[str, Any]) -> None:
    shape = _first(header)["shape"]
    _first(header)["shape"] = [int(np.prod(shape))]


def _negative(header: dict[str, Any]) -> None:
    _first(header)["data_offsets"] = [-8, 8]


def _huge(header: dict[str, Any]) -> None:
    _first(header)["shape"] = [2**60, 2**60]


def _dtype(header: dict[str, Any]) -> None:
    _first(header)["dtype"] = "BF16"


def _name(header: dict[str, Any]) -> dict[str, Any]:
    first = min(k for k in header if k != "__metadata__")
    return {("stranger" if k == first else k): v for k, v in header.items()}


def _none(header: dict[str, Any]) -> dict[str, Any]:
    return {"__metadata__": {"format": "pt"}}


HEADERS = {f.__name__[1:]: f for f in (_shape, _flat, _negative, _huge, _dtype, _name, _none)}


def kinds_of(path: Path) -> Iterator[tuple[str, Spoil]]:
    """(name, spoil) of all that fits a file by its ending, beside `SPOIL`."""
    if path.suffix in (".json", ".jsonl"):
        yield from values_of(path)
    if path.suffix == ".npy":
        for name, change in ARRAYS.items():
            yield name, functools.partial(array_of, change)
    if path.suffix == ".safetensors":
        for name, change in HEADERS.items():
            yield f"header {name}", functools.partial(header_of, change)
