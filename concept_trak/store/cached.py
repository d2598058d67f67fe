"""An array on disk that is used again only if everything that went into it is the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import atomic, disk_errors, sha256_file, write_json
from .encoding import npy_header


def cached_array(
    path: Path, identity: dict, compute: Callable[[], np.ndarray], force: bool = False
) -> np.ndarray:
    """`path` (.npy, float32) if the .json beside it says that it was made from `identity`; else
    compute it and keep it.

    The record is removed before the array changes and written after, so the two never disagree.
    UserError for a NaN, a full disk.
    """
    record, wanted = path.with_suffix(".json"), json.loads(json.dumps(identity))
    if not force and path.exists() and record.exists():
        known = json.loads(record.read_text())
        if known.get("identity") == wanted and known.get("sha256") == sha256_file(path):
            return np.load(path, allow_pickle=False)
    array = np.asarray(compute(), dtype="<f4", order="C")
    if not np.isfinite(array).all():
        raise UserError(f"the gradient for {path.name} is NaN or infinite; use DTYPE=fp32")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
    with atomic(path) as file:  # by hand: np.save does not say that the disk is full
        file.write(npy_header(array.dtype, array.shape))
        file.write(array.data)
    write_json(record, {"identity": wanted, "sha256": sha256_file(path)})
    return array
