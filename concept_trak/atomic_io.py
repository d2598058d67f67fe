"""Files that appear under their final name only when complete, and one clear error for a disk that
does not take them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError

READ_BYTES = 2**24
PART = ".part"  # ending of what is being written
SETTLED = 2.0  # seconds after which a further change of a file is sure to change its times, too


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_once(path: Path) -> str:
    """As `sha256_file`, but a file that has not changed since is read once in a process."""
    found = os.stat(path)
    if abs(time.time() - found.st_ctime) < SETTLED:
        return sha256_file(path)
    return _sha256_of(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.lru_cache(maxsize=2**14)
def _sha256_of(path: Path, *_stamp: int) -> str:
    return sha256_file(path)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """An open file that gets the name `path` when the block ends: complete, and on the disk.

    If the block raises, `path` stays as it was. Several processes may write one path at once: the
    last one wins, whole. What a killed one left is removed by the next. UserError for a disk that
    does not take it.
    """
    with disk_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder of that name is there")
        _remove_orphans(path)
        part, fd = _open_temp(path, lambda part: os.open(part, os.O_RDWR | os.O_CREAT, 0o644))
        try:
            with open(fd, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(part, path)  # under the lock, so that nobody takes it for an orphan
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise


def _open_temp(path: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """(a new name beside `path`, what `make` opened of that name, locked)."""
    while True:
        part = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}{PART}")
        try:
            fd = make(part)
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
            continue
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:  # else another writer took it for an orphan before it was locked
            return part, fd
        os.close(fd)


def _remove_orphans(path: Path) -> None:
    """Remove what killed writers left beside `path`: files and folders that nobody has locked."""
    for part in path.parent.glob(f".{glob.escape(path.name[:200])}.????????{PART}"):
        with contextlib.suppress(OSError):
            fd = os.open(part, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            finally:
                os.close(fd)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` when the block ends.

    If the block raises, or is killed, `folder` stays as it was. Several processes may do so at
    once: the last one wins, whole. UserError for a disk that does not take it.
    """
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file of that name is there")
        _remove_orphans(folder)
        part, fd = _open_temp(folder, lambda part: (part.mkdir(), os.open(part, os.O_RDONLY))[1])
        try:
            yield part
            sync_folder(part)
            with locked(folder.parent):
                replace_folder(part, folder)
            sync_folder(folder.parent)
        finally:
            os.close(fd)
            shutil.rmtree(part, ignore_errors=True)


def replace_folder(new: Path, place: Path) -> None:
    """Give the folder `new` the name `place`; what was there gets the name of `new`.

    One step where the system can exchange two names, so that `place` is never without a folder.
    """
    if not place.exists():
        os.rename(new, place)
    elif not _exchanged(new, place):
        aside = new.with_name(f"{new.name}.old")
        os.rename(place, aside)
        os.rename(new, place)
        os.rename(aside, new)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the system exchanged two names (renameat2 of Linux, renamex_np of macOS)."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    a, b = os.fsencode(one), os.fsencode(other)
    if hasattr(library, "renameat2"):
        here = -100  # AT_FDCWD; 2 is RENAME_EXCHANGE, as it is RENAME_SWAP below
        return library.renameat2(here, a, here, b, 2) == 0
    return hasattr(library, "renamex_np") and library.renamex_np(a, b, 2) == 0


def make_folder(folder: Path) -> Path:
    """The folder, made if it is not there. UserError for a disk that does not take it."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def link(name: Path, target: Path) -> None:
    """Let `name` be a link to a folder beside it, whatever it named before; nothing happens on a
    disk without links.
    """
    made = name.with_name(f".{name.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        os.symlink(target.name, made)
        os.replace(made, name)


def write_bytes(path: Path, content: bytes) -> None:
    """See `atomic`."""
    with atomic(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """See `atomic`; keys are sorted."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def write_fully(fd: int, data: bytes) -> None:
    """All of `data`, however many calls it takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """An OSError becomes a UserError that names the path and the reason."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise UserError(
            f"cannot write {path}: {reason}; make room or set DATA_DIR, GRAD_DIR, "
            "RESULTS_DIR to another disk and run the same again: finished shards are kept"
        ) from error
