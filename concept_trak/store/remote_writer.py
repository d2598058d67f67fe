"""Writes one shard of a store on object storage, where nothing can be appended to: rows go there in
pieces, and the last step puts the pieces together.

Order of events: pieces, one PUT each; then rows and losses as they are to stay; then the record
with their sha256, which is the commit; then the pieces are removed. Whoever is killed, whatever
has its name is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from ..atomic_io import disk_errors, make_folder
from ..errors import UserError
from .chunks import Chunk, gaps, pack
from .writer import encoded

if TYPE_CHECKING:
    from .layout import ArrayFile

PIECE_BYTES = 2**25  # a row at a time would be a request at a time
PIECE_SECONDS = 30.0  # a kill loses at most the appends of this long


class RemoteShardWriter:
    """A shard's rows in order, or with gaps that are filled by others.

    store: a `Store`, whose module imports this one.
    """

    def __init__(self, store: Any, shard: int) -> None:
        self.store, self.shard = store, shard
        self.next_row = store.resume_row(shard)
        self._waiting: list[list[np.ndarray]] = []  # [rows[, losses]] of each append
        self._first, self._since = self.next_row, time.monotonic()
        if store.finished(shard):
            raise UserError(
                f"{store.where}: shard {shard} is there already; set GRAD_DIR to another place, or "
                f"remove its .json there to compute it again"
            )

    def append(self, rows: np.ndarray, first_row: int, losses: np.ndarray | None) -> None:
        """See `Store.append`; rows may begin behind a gap."""
        start, stop = self.store.shard_range(self.shard)
        if not start <= first_row <= first_row + len(rows) <= stop:
            raise ValueError(f"shard {self.shard} has no {len(rows)} rows from {first_row}")
        if first_row != self.next_row:
            self.sync()
            self._first = first_row
        self._waiting.append(encoded(self.store, rows, first_row, losses))
        self.next_row = first_row + len(rows)
        size = (self.next_row - self._first) * self.store.grads.item_bytes
        if size >= PIECE_BYTES or time.monotonic() - self._since >= PIECE_SECONDS:
            self.sync()

    @property
    def waiting(self) -> list[Chunk]:
        """What was appended and is not there yet, as a piece."""
        there = self._waiting and self.next_row > self._first
        return [Chunk(self.shard, self._first, self.next_row)] if there else []

    def sync(self) -> None:
        """Write what waits as one piece."""
        for piece in self.waiting:
            parts = [np.concatenate(part) for part in zip(*self._waiting, strict=True)]
            losses = parts[1] if self.store.has_losses else None
            self.store.write_piece(piece, pack(self.store.store_id, parts[0], losses))
        self._waiting, self._first, self._since = [], self.next_row, time.monotonic()

    def finish(self) -> None:
        """See `Store.finish`."""
        self.sync()
        (start, stop), store = self.store.shard_range(self.shard), self.store
        pieces = store.pieces(self.shard)
        if missing := gaps(start, stop, pieces):
            raise ValueError(f"shard {self.shard} lacks the rows {missing}")
        make_folder(store.folder)
        scratch = {
            series: store.folder / f".{series.name}-{self.shard}.{secrets.token_hex(4)}.part"
            for series in store.series
        }
        try:
            digests = self._assemble(pieces, scratch)
            for series in reversed(store.series):
                store.remote.upload(scratch[series], f"{series.name}-{self.shard}.npy")
            store.write_record(self.shard, stop - start, digests)
            for series in store.series if store.keeps_copies else ():
                os.replace(scratch[series], store.path(self.shard, ".npy", series.name))
        finally:
            for path in scratch.values():
                path.unlink(missing_ok=True)
        store.remove_pieces(self.shard)

    def _assemble(
        self, pieces: list[Chunk], scratch: dict[ArrayFile, os.PathLike]
    ) -> dict[str, str]:
        """Put the pieces together, one file a series; returns their sha256 by the record's key."""
        (row, stop), store = self.store.shard_range(self.shard), self.store
        hashes = {series: hashlib.sha256() for series in store.series}
        with contextlib.ExitStack() as stack:
            stack.enter_context(disk_errors(store.folder))
            files = {s: stack.enter_context(open(path, "wb")) for s, path in scratch.items()}
            blocks = [np.frombuffer(s.header(store.count(self.shard)), "u1") for s in store.series]
            while True:
                for series, block in zip(store.series, blocks, strict=True):
                    content = np.ascontiguousarray(block).tobytes()
                    files[series].write(content)
                    hashes[series].update(content)
                if row == stop:
                    return {series.digest: hashes[series].hexdigest() for series in store.series}
                piece = next(p for p in pieces if p.first <= row < p.stop)
                blocks = [part[row - piece.first :] for part in store.stored_piece(piece)]
                row = piece.stop

    def close(self) -> None:
        """What is not written yet will be made again."""
        self._waiting = []
