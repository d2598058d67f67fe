"""Appends rows to one shard of a `Store` so that a kill at any moment leaves a prefix that can be
continued.

Order of events: rows into train_grad-{i}.npy.part, fsync, count into train_grad-{i}.json; at the
end the sha256 into the .json, then the final name. Only counted rows are trusted after a restart;
what lies beyond them is cut off.
"""

import contextlib
import fcntl
import os
import time

import numpy as np

from ..errors import UserError
from ..files import disk_errors, sha256_file, sync_folder, write_all

STORED_TYPES = {"float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2"), "float32": np.dtype("<f4")}
SYNC_SECONDS = 1.0  # a kill loses at most the appends of this long


class ShardWriter:
    """The one writer of a shard, guarded by a file lock that ends with the process. Attribute:
    next_row (global index).
    """

    def __init__(self, store, shard):
        self.store, self.shard = store, shard
        self.part, self.final = store.path(shard, ".npy.part"), store.path(shard, ".npy")
        with disk_errors(self.part):
            self.fd = os.open(self.part, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._claim()
            except BaseException:
                self.close()
                raise

    def _claim(self):
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.part} is being written by another process: let it end, or give each its "
                "own shards"
            ) from None
        # Asked only under the lock: until then another process may still have been finishing this
        # very file.
        if self.final.exists():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.part)
            raise UserError(
                f"{self.final} is there already and is never overwritten: remove it to compute it "
                "again"
            )
        self.next_row, self.synced = self.store.resume_row(self.shard), time.monotonic()
        header, done = self.store.header(self.shard), self.next_row - self.store.bounds[self.shard]
        os.ftruncate(self.fd, len(header) + done * self.store.row_bytes if done else 0)
        os.lseek(self.fd, 0, os.SEEK_END)
        if not done:
            write_all(self.fd, header)

    def append(self, rows, first_row):
        """See `Store.append`."""
        if first_row != self.next_row or first_row + len(rows) > self.store.bounds[self.shard + 1]:
            raise ValueError(
                f"shard {self.shard} continues at row {self.next_row}, not with {len(rows)} rows "
                f"from {first_row}"
            )
        rows = np.asarray(rows, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.store.dim:
            raise UserError(
                f"{self.store.folder} holds rows of {self.store.dim} values, not arrays of shape "
                f"{list(rows.shape)}"
            )
        write_all(self.fd, encode_checked(rows, self.store.dtype, first_row).tobytes())
        self.next_row += len(rows)
        if time.monotonic() - self.synced >= SYNC_SECONDS:
            self.sync()

    def sync(self):
        """Rows to disk first, then their count."""
        os.fsync(self.fd)
        self.store.write_record(self.shard, self.next_row - self.store.bounds[self.shard])
        self.synced = time.monotonic()

    def finish(self):
        """See `Store.finish`."""
        start, stop = self.store.shard_range(self.shard)
        if self.next_row != stop:
            raise ValueError(f"shard {self.shard} has rows up to {self.next_row} of {stop}")
        self.sync()
        self.store.write_record(self.shard, stop - start, sha256_file(self.part))
        os.replace(self.part, self.final)
        sync_folder(self.store.folder)

    def close(self):
        """Give up the lock; rows not yet counted will be made again."""
        with contextlib.suppress(OSError):
            os.close(self.fd)


def encode_checked(rows, dtype, first_row):
    """As `encode`, with a UserError that names the first sample whose row is not finite or does not
    fit.
    """
    refuse_bad_rows(
        np.isfinite(rows),
        first_row,
        "the gradient of sample {} is NaN or infinite: check its image and the dtype",
    )
    stored = encode(rows, dtype)
    message = f"the gradient of sample {{}} is too large for {dtype}: store bfloat16 or float32, or normalise it"
    refuse_bad_rows(finite(stored, dtype), first_row, message)
    return stored


def encode(rows, dtype):
    """float32 array -> the stored type, rounding to nearest even; what overflows becomes infinite."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return rows.astype(STORED_TYPES[dtype])
    bits = np.ascontiguousarray(rows).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def decode(stored, dtype):
    """Inverse of `encode`: -> float32."""
    if dtype != "bfloat16":
        return stored.astype(np.float32, copy=False)
    return (stored.astype(np.uint32) << 16).view(np.float32)


def finite(stored, dtype):
    return (stored & 0x7F80) != 0x7F80 if dtype == "bfloat16" else np.isfinite(stored)


def refuse_bad_rows(good, first_row, message):
    if not good.all():
        raise UserError(message.format(first_row + int(np.flatnonzero(~good.all(axis=1))[0])))
