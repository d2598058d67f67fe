"""Files from the hub: gone on with by byte range, verified, and only then given their name."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import TypeVar

from concept_trak.atomic_io import READ_BYTES, disk_errors, sha256_file, sync_folder, write_fully
from concept_trak.errors import UserError

from .hub import DownloadCancelled, RemoteFile, RetryPolicy, network_errors
from .progress import say

Job = TypeVar("Job")
ProgressCallback = Callable[
    [int], object
]  # is told of each n bytes that came; of -n that were thrown away
SHUTDOWN_SECONDS = 5.0  # seconds that all other downloads get to stop after the first error


def has_digest(path: Path, digest: str) -> bool:
    """Whether the file's content is the one the hub names."""
    kind, _, wanted = digest.partition(":")
    if kind == "sha256":
        return sha256_file(path) == wanted
    sha1 = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(READ_BYTES):
            sha1.update(chunk)
    return sha1.hexdigest() == wanted


def fetch(
    file: RemoteFile, part: Path, target: Path, meter: ProgressCallback, stop: threading.Event
) -> None:
    """Bring a file to `target` by way of `part`, which is gone on with if it is there."""
    with disk_errors(part), open(part, "ab", buffering=0) as out:
        # wrong bytes, maybe from a part of another version, are fetched once more from the start
        for _ in range(2):
            _fill(file, out, meter, stop)
            if has_digest(part, file.digest):
                os.fsync(out.fileno())
                os.replace(part, target)
                sync_folder(target.parent)
                return
            out.truncate(0)
            meter(-file.size)
            say(f"{file.path}: the checksum differs; fetching it anew")
    raise UserError(
        f"{file.path}: what {file.repo.endpoint} sends twice differs from the checksum it gives; "
        "set HF_ENDPOINT and https_proxy to ones that leave files as they are, then run the same "
        "again: finished files are kept"
    )


def _fill(file: RemoteFile, out: FileIO, meter: ProgressCallback, stop: threading.Event) -> None:
    """Append to `out` until it has the listed size."""
    have = most = os.fstat(out.fileno()).st_size
    patience = RetryPolicy(file.repo, file.path, stop)
    while have != file.size:
        try:
            for offset, chunk in file.content(have if have < file.size else 0):
                if stop.is_set():
                    raise DownloadCancelled
                if offset + len(chunk) > file.size:
                    out.truncate(0)
                    raise UserError(
                        f"{file.path}: {file.repo.endpoint} sends more than the {file.size} bytes "
                        "that it lists; run the same again, or set HF_ENDPOINT to another"
                    )
                with disk_errors(Path(out.name)):
                    if offset < have:
                        out.truncate(offset)
                    write_fully(out.fileno(), chunk)
                meter(offset + len(chunk) - have)
                have = offset + len(chunk)
            if have != file.size:
                raise OSError(f"{have} bytes came instead of {file.size}")
        except network_errors() as error:
            if have > most:  # only bytes that were never here before count as progress
                most, patience.failures = have, 0
            patience.endure(error)


def in_parallel(
    action: Callable[[Job, threading.Event], None], jobs: list[Job], workers: int
) -> Iterator[Job]:
    """Yield each job once `action(job, stop)` has returned. The first error stops all.

    The threads are daemons, unlike those of an executor, so that an interrupt need not wait for a
    slow connection.
    """
    todo, ended, stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                job = todo.get_nowait()
            except queue.Empty:
                return
            try:
                action(job, stop)
                ended.put((job, None))
            except BaseException as error:  # raised again below, in the caller's thread
                ended.put((job, error))

    for job in jobs:
        todo.put(job)
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    try:
        for _ in jobs:
            job, error = ended.get()
            if error is not None:
                raise error
            yield job
    finally:
        stop.set()
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
