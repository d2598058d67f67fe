"""Pieces of a shard: rows that were made apart from their neighbours, whole or not there.

    train_grad-{i}.piece-{first}-{stop}.safetensors     global rows first to stop - 1 of shard i

A piece is one file that holds its rows as they are stored, their losses if the store keeps them,
the store's id and a sha256 of it all, so its name alone says what is done: several machines may
make pieces of one shard at once, and one that is made twice is the same twice. A file gets its
name only when it is complete (temp file, fsync, rename; on object storage one PUT, which is so by
itself), so nothing has to be locked.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

import numpy as np

NAME = re.compile(r"train_grad-(0|[1-9]\d*)\.piece-(0|[1-9]\d*)-([1-9]\d*)\.safetensors")


@dataclass(frozen=True, order=True)
class Chunk:
    """Global rows first to stop - 1, all of one shard."""

    shard: int
    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first

    @property
    def name(self) -> str:
        """Of its file."""
        return f"train_grad-{self.shard}.piece-{self.first}-{self.stop}.safetensors"

    @classmethod
    def of(cls, name: str) -> Chunk | None:
        """The piece of a file's name; None for other files."""
        found = NAME.fullmatch(name)
        return cls(*map(int, found.groups())) if found else None


def pack(store_id: str, rows: np.ndarray, losses: np.ndarray | None) -> bytes:
    """The content of a piece: rows [b, k] in the stored type and their losses [b] float32."""
    from safetensors.numpy import save

    tensors = {"rows": rows} | ({} if losses is None else {"losses": losses})
    return save(tensors, {"store": store_id, "sha256": _digest(tensors)})


def unpack(
    content: bytes, store_id: str, shape: tuple[int, int], stored_type: np.dtype, losses: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """(stored rows [b, k], losses [b] or None). ValueError for content that is not whole, or of
    another store, shape or type.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(content)
        head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        told = head.get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"is truncated or damaged ({' '.join(str(error).split())[:80]})") from None
    if told.get("store") != store_id:
        raise ValueError("belongs to another store")
    wanted = {"rows": shape} | ({"losses": shape[:1]} if losses else {})
    if {name: array.shape for name, array in tensors.items()} != wanted:
        raise ValueError("does not hold the rows of its name")
    if told.get("sha256") != _digest(tensors):
        raise ValueError("was changed since it was written (checksum differs)")
    if tensors["rows"].dtype != stored_type or (losses and tensors["losses"].dtype != "<f4"):
        raise ValueError("holds numbers of another type")
    return tensors["rows"], tensors.get("losses")


def _digest(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype.str} {tensors[name].shape} ".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def gaps(first: int, stop: int, done: list[Chunk]) -> list[tuple[int, int]]:
    """What of rows first to stop - 1 no piece holds: [(first, stop), ...] in order."""
    found, row = [], first
    for piece in sorted(done, key=lambda piece: piece.first):
        if piece.first > row:
            found.append((row, min(piece.first, stop)))
        row = max(row, piece.stop)
        if row >= stop:
            break
    return [*found, (row, stop)] if row < stop else found


def split(first: int, stop: int, origin: int, step: int) -> list[tuple[int, int]]:
    """Rows first to stop - 1 cut at origin + step, origin + 2 step, ..."""
    cuts = range(origin + ((first - origin) // step + 1) * step, stop, step)
    edges = [first, *cuts, stop]
    return list(zip(edges[:-1], edges[1:], strict=True))
