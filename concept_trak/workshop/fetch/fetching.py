"""Files from the hub: resumed by byte range, verified, and only then given their name.

huggingface_hub speaks the protocol: redirects without the token, 429, ranges, a cut connection. It
neither compares checksums nor retries a 5xx, and each process begins a file anew; that is done
here, around its `http_get`.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from pathlib import Path

from ...errors import UserError
from ...files import READ_BYTES, disk_errors, sha256_file, sync_folder, write_all
from .hub import Patience, RemoteFile, Stopped, network_errors, say

GRACE = 5.0  # seconds that all other downloads get to stop after the first error


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


class PartFile:
    """What http_get writes to: tells `meter` of each byte, stops when told to, and names a disk
    that does not take them.
    """

    def __init__(self, path: Path, meter, stop: threading.Event):
        self.path, self.meter, self.stop = path, meter, stop
        with disk_errors(path):
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.seek(0, os.SEEK_END)

    def write(self, data: bytes) -> int:
        if self.stop.is_set():
            raise Stopped
        with disk_errors(self.path):
            write_all(self.fd, data)
        self.meter(len(data))
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self.fd, offset, whence)

    def tell(self) -> int:
        return self.seek(0, os.SEEK_CUR)

    def truncate(self) -> int:
        """Cut at the current position."""
        lost = os.fstat(self.fd).st_size - self.tell()
        os.ftruncate(self.fd, self.tell())
        self.meter(-lost)
        return self.tell()

    def __enter__(self) -> "PartFile":
        return self

    def __exit__(self, *_) -> None:
        os.close(self.fd)


def fetch(file: RemoteFile, part: Path, target: Path, meter, stop: threading.Event) -> None:
    """Bring a file to `target` by way of `part`, which is gone on with if it is there. `meter(n)`
    is told of each n bytes.
    """
    for _ in range(
        2
    ):  # wrong bytes, maybe from a part of another version, are fetched once more from the start
        _fill(file, part, meter, stop)
        if has_digest(part, file.digest):
            with disk_errors(target):
                fd = os.open(part, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
                os.replace(part, target)
                sync_folder(target.parent)
            return
        part.unlink()
        meter(-file.size)
        say(f"{file.path}: the checksum differs; fetching it anew")
    raise UserError(
        f"{file.path}: what {file.repo.endpoint} sends twice differs from the checksum it gives; "
        "check for a proxy in between, then run again: finished files are kept"
    )


def _fill(file: RemoteFile, part: Path, meter, stop: threading.Event) -> None:
    """Append to `part` until it has the listed size."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    repo = file.repo
    # The address on the hub, not the signed one behind its redirect: that expires while a large
    # file is under way.
    url = hf_hub_url(
        repo.repo_id,
        file.path,
        repo_type=repo.repo_type,
        revision=repo.commit,
        endpoint=repo.endpoint,
    )
    headers = build_hf_headers() | {
        "Accept-Encoding": "identity"
    }  # ranges count the bytes of the file, not of a compressed one
    patience, most = Patience(repo, file.path, stop), part.stat().st_size if part.exists() else 0
    while True:
        with PartFile(part, meter, stop) as out:
            if (have := out.tell()) > file.size:
                out.seek(0)
                out.truncate()
                have = 0
            if have == file.size:
                return
            try:
                http_get(
                    url,
                    out,
                    resume_size=have,
                    headers=headers,
                    expected_size=file.size,
                    displayed_filename=file.name,
                )
            except network_errors() as error:
                if (
                    now := out.tell()
                ) > most:  # only bytes that were never here before count as progress
                    most, patience.failures = now, 0
                if getattr(getattr(error, "response", None), "status_code", None) == 416:
                    out.seek(0)
                    out.truncate()
                patience.endure(error)


def in_parallel(action, jobs: list, workers: int):
    """Yield each job once `action(job, stop)` has returned. The first error stops all.

    The threads are daemons, unlike those of an executor, so that an interrupt need not wait for a
    slow connection.
    """
    todo, ended, stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()

    def work():
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
        deadline = time.monotonic() + GRACE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
