"""Appends rows to one shard of a store so that a kill at any moment leaves a prefix that can be
continued.

Order of events: rows into train_grad-{i}.npy.part, fsync, count into train_grad-{i}.json; at the
end the sha256 into the .json, then the final name. Only counted rows are trusted after a restart;
what lies beyond them is cut off. Losses are written, synced and counted with their rows, and get
their final name before the rows do: a shard whose rows are final is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

import numpy as np

from ..atomic_io import disk_errors, sha256_file, sync_folder, write_fully
from ..errors import TransientError, UserError, remove_hint
from .dtypes import encode_checked, refuse_bad_rows
from .layout import ArrayFile, StoreLayout

SYNC_SECONDS = 1.0  # a kill loses at most the appends of this long


def encoded(
    store: StoreLayout, rows: np.ndarray, first_row: int, losses: np.ndarray | None
) -> list[np.ndarray]:
    """[rows [b, dim] in the stored type] and, in a store with losses, theirs [b] float32.

    UserError for rows of another length, and naming the sample of a value that is not finite or
    does not fit. ValueError for losses too many, too few or none.
    """
    rows = np.asarray(rows, dtype=np.float32)
    if rows.ndim != 2 or rows.shape[1] != store.dim:
        given = f"rows of shape {list(rows.shape)} do not fit {store.folder}"
        raise UserError(f"{given}; give rows [b, {store.dim}]")
    stored = [encode_checked(rows, store.dtype, first_row)]
    if (losses is not None) != store.has_losses:
        keeps = "keeps a loss with each row" if losses is None else "keeps no losses"
        raise ValueError(f"{store.folder} {keeps}")
    if losses is None:
        return stored
    losses = np.asarray(losses, dtype="<f4")
    if losses.shape != (len(rows),):
        raise ValueError(f"{len(rows)} rows have {len(rows)} losses, not {list(losses.shape)}")
    message = "the loss of sample {} is NaN or infinite; mend its picture, or set DTYPE=fp32"
    refuse_bad_rows(np.isfinite(losses), first_row, message)
    return [*stored, losses]


class ShardWriter:
    """The one writer of a shard, guarded by a lock on its .part that ends with the process.
    Attribute: next_row (global index).
    """

    def __init__(self, store: StoreLayout, shard: int) -> None:
        self.store, self.shard = store, shard
        self.fds: list[int] = []  # of the rows' .part, whose lock is held, and of the losses'
        self.start, self.stop = store.shard_range(shard)
        part = store.path(shard, ".npy.part")
        with disk_errors(part):
            try:
                self._claim()
                self.next_row, self.synced = store.resume_row(shard), time.monotonic()
                for fd, series in zip(self.fds, store.series, strict=True):
                    self._cut(fd, series)
            except BaseException:
                self.close()
                raise

    def _claim(self) -> None:
        """Open and lock the .part of the rows, then open the losses' one."""
        rows, *others = self.store.series
        self._open(rows)
        part, final = self._path(rows, ".npy.part"), self._path(rows, ".npy")
        try:
            fcntl.flock(self.fds[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "let it end, or give each its own SHARDS"
            raise TransientError(f"{part} is being written by another process; {remedy}") from None
        # Asked only under the lock: until then another process may still have been finishing this
        # very file.
        if final.exists():
            part.unlink(missing_ok=True)
            remedy = remove_hint(final)
            raise UserError(f"{final} is there already and is never overwritten; {remedy}")
        for series in others:
            with contextlib.suppress(FileNotFoundError):  # a kill came before the rows' final name
                os.replace(self._path(series, ".npy"), self._path(series, ".npy.part"))
            self._open(series)

    def _path(self, series: ArrayFile, ending: str) -> Path:
        return self.store.path(self.shard, ending, series.name)

    def _open(self, series: ArrayFile) -> None:
        path = self._path(series, ".npy.part")
        self.fds.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644))

    def _cut(self, fd: int, series: ArrayFile) -> None:
        """Leave what is counted in the file, or begin it."""
        header, done = series.header(self.stop - self.start), self.next_row - self.start
        os.ftruncate(fd, len(header) + done * series.item_bytes if done else 0)
        os.lseek(fd, 0, os.SEEK_END)
        if not done:
            write_fully(fd, header)

    def append(self, rows: np.ndarray, first_row: int, losses: np.ndarray | None) -> None:
        """See `Store.append`."""
        if first_row != self.next_row or first_row + len(rows) > self.stop:
            given = f"not with {len(rows)} rows from {first_row}"
            raise ValueError(f"shard {self.shard} continues at row {self.next_row}, {given}")
        stored = encoded(self.store, rows, first_row, losses)
        for fd, values in zip(self.fds, stored, strict=True):
            write_fully(fd, values.tobytes())
        self.next_row += len(rows)
        if time.monotonic() - self.synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Rows and losses to disk first, then their count."""
        for fd in self.fds:
            os.fsync(fd)
        self.store.write_record(self.shard, self.next_row - self.start)
        self.synced = time.monotonic()

    def finish(self) -> None:
        """See `Store.finish`."""
        if self.next_row != self.stop:
            raise ValueError(f"shard {self.shard} has rows up to {self.next_row} of {self.stop}")
        self.sync()
        parts = {series: self._path(series, ".npy.part") for series in self.store.series}
        digests = {series.digest: sha256_file(part) for series, part in parts.items()}
        self.store.write_record(self.shard, self.stop - self.start, digests)
        for series in reversed(parts):  # the rows last
            os.replace(parts[series], self._path(series, ".npy"))
            sync_folder(self.store.folder)

    def close(self) -> None:
        """Give up the lock; rows not yet counted will be made again."""
        for fd in reversed(self.fds):
            with contextlib.suppress(OSError):
                os.close(fd)
        self.fds = []
