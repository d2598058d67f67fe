"""Arrays on disk that are used again only if everything that went into them is the same: one with a
record of it beside it, or several in a file whose name says it.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_io import atomic, disk_errors, make_folder, sha256_once, write_bytes, write_json
from ..errors import UserError, remove_hint
from ..validated_io import read_json, read_npy
from .dtypes import npy_header


def cached(
    path: Path,
    identity: dict,
    compute: Callable[[], np.ndarray],
    force: bool = False,
    shape: tuple[int, ...] | None = None,
) -> np.ndarray:
    """`path` (.npy, float32) if the .json beside it says that it was made from
    `identity` and holds these very values; else compute it and keep it. shape: of the array, where
    it is known.

    The record is removed before the array changes and written after, so the two never disagree.
    UserError for a NaN, a full disk.
    """
    if not force and (known := read_cached(path, identity, "<f4", shape)) is not None:
        return known
    array = np.asarray(compute(), dtype="<f4", order="C")
    if not np.isfinite(array).all():
        raise UserError(f"the gradient for {path.name} is NaN or infinite; use DTYPE=fp32")
    write_cached(path, identity, array)
    return array


def read_cached(
    path: Path, identity: dict, dtype: str, shape: tuple[int, ...] | None
) -> np.ndarray | None:
    """The array that was kept for `identity`; None if there is none, it is not whole, or not finite
    values of that type and, where that is given, shape.
    """
    try:
        record = read_json(path.with_suffix(".json"), remove_hint(path))
        if record.get("identity") != json.loads(json.dumps(identity)):
            return None
        array = read_npy(path, remove_hint(path))
        whole = record.get("sha256") == sha256_once(path)
        fits = array.dtype == dtype and shape in (None, array.shape)
        return array if whole and fits and np.isfinite(array).all() else None
    except (UserError, OSError):
        return None


def write_cached(path: Path, identity: dict, array: np.ndarray) -> None:
    """Write an array (little-endian, C order) and its record. UserError for a full disk."""
    record = path.with_suffix(".json")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
    write_npy(path, array)
    write_json(record, {"identity": identity, "sha256": sha256_once(path)})


def write_npy(path: Path, array: np.ndarray) -> None:
    """Write an array (C order) as an .npy. UserError for a full disk, which np.save does not
    tell.
    """
    with atomic(path) as file:
        file.write(npy_header(array.dtype, array.shape))
        file.write(array.data)


def read_npz(path: Path) -> dict[str, np.ndarray] | None:
    """What `write_npz` wrote; None if it is not there or not whole, to be made again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays into one file (.npz) whose name tells what they were made from. UserError for a
    full disk.
    """
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    make_folder(path.parent)
    write_bytes(path, content.getvalue())
