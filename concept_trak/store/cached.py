"""An array on disk that is used again only if everything that went into it is the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import disk_errors, sha256_file, write_json


def cached_array(
    path: Path, identity: dict, compute: Callable[[], np.ndarray], force: bool = False
) -> np.ndarray:
    """`path` (.npy, float32) if the .json beside it says that it was made from `identity`; else
    compute it and keep it.

    The record is removed before the array changes and written after, so the two never disagree.
    UserError for a NaN, a full disk.
    """
    record = path.with_suffix(".json")
    if not force and path.exists() and record.exists():
        known = json.loads(record.read_text())
        if known.get("identity") == json.loads(json.dumps(identity)) and known.get(
            "sha256"
        ) == sha256_file(path):
            return np.load(path, allow_pickle=False)
    array = compute().astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"the gradient for {path.name} is NaN or infinite; use DTYPE=fp32")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        part = path.with_name(f"{path.stem}.part.npy")
        np.save(part, array)
        part.replace(path)
    write_json(record, {"identity": identity, "sha256": sha256_file(path)})
    return array
