"""A folder being filled from the hub. Its hidden `.download` holds what is under way and done.json,
the record of what is finished:

    {"files": {path: {"size", "digest"}}, "parts": {name: [paths]}, "moves": {name: [[from, to]]}}

Files and unpacked folders appear under their final names only when complete. A move into place is
written down first, so that a killed one is finished by the next call. Nothing that this record does
not know is ever overwritten.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from pathlib import Path

from concept_trak.atomic_io import disk_errors, write_json
from concept_trak.errors import UserError, remove_hint
from concept_trak.validated_io import read_json, safe_join

from .hub import RemoteFile
from .progress import bytes_bar, human, say
from .transfer import fetch, has_digest, in_parallel

FileJob = tuple[RemoteFile, str]  # a file on the hub, and its path below the folder
SPARE = 2**26  # bytes of disk to leave free


def has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def matches(path: Path, file: RemoteFile) -> bool:
    """Whether the file here is the one on the hub; reads all of it if the size agrees."""
    return has_size(path, file.size) and has_digest(path, file.digest)


class DownloadState:
    """Use it as a context: one process at a time fills a folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.hidden = self.root / ".download"
        self.record = {"files": {}, "parts": {}, "moves": {}}

    def at(self, path: str) -> Path:
        """A path of a listing, an archive or the record: below the folder, whatever it says."""
        return safe_join(self.root, path, "the download's file")

    def __enter__(self) -> DownloadState:
        with disk_errors(self.hidden):
            (self.hidden / "incoming").mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.hidden, os.O_RDONLY)
        try:
            self._take_lock()
            self._read_record()
        except UserError:
            os.close(self.lock)
            raise
        return self

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another download into {self.root} is running; wait for it, then run the "
                "same again"
            ) from None
        except OSError:
            pass  # a network disk without locks: then it is up to the user

    def _read_record(self) -> None:
        path = self._record_path
        mend = remove_hint(path, "run the same again, which keeps complete files")
        if not os.path.lexists(path):
            return
        known = read_json(path, mend)
        try:
            for name, kept in known["files"].items():
                self.at(name)
                if not isinstance(kept["size"], int) or not isinstance(kept["digest"], str):
                    raise TypeError(f"a size or digest of {name!r}")
            for paths in known["parts"].values():
                for name in paths:
                    self.at(name)
            for moves in known["moves"].values():
                for source, target in moves:
                    self.at(source), self.at(target)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); {mend}") from None
        self.record = known

    def __exit__(self, *_: object) -> None:
        os.close(self.lock)  # and with it the lock

    @property
    def _record_path(self) -> Path:
        return self.hidden / "done.json"

    def save(self) -> None:
        write_json(self._record_path, self.record)

    # ---- files

    def is_recorded(self, path: str) -> bool:
        """Whether the file was verified when it came, and still has its size."""
        known = self.record["files"].get(path)
        return known is not None and has_size(self.at(path), known["size"])

    def missing(self, jobs: list[FileJob]) -> list[FileJob]:
        """Those that are not here yet. A file that is here but not recorded is compared with the
        hub's checksum.

        UserError for a file of that name which is another one.
        """
        left = []
        for file, path in jobs:
            found = self.at(path)
            if self.is_recorded(path):
                continue
            if not found.exists():
                left.append((file, path))
            elif matches(found, file):
                self._note(file, path)
            elif path in self.record["files"] or self.hidden in found.parents:
                say(f"{found} is damaged; fetching it anew")  # ours, but damaged since
                found.unlink()
                left.append((file, path))
            else:
                raise UserError(
                    f"{found} is there but is not the file on the hub; move it away and run "
                    "the same again"
                )
        return left

    def bytes_left(self, jobs: list[FileJob]) -> int:
        """Bytes still to come; what an earlier call left half done counts as here."""
        return sum(file.size - self._bytes_of_part(path) for file, path in jobs)

    def fetch(self, jobs: list[FileJob], workers: int, label: str) -> None:
        """Bring every file here, recording each as it is complete."""
        total = sum(file.size for file, _ in jobs)
        with bytes_bar(label, total, total - self.bytes_left(jobs)) as bar:

            def bring(job: FileJob, stop: threading.Event) -> None:
                file, path = job
                target = self.at(path)
                with disk_errors(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                fetch(file, self._part(path), target, bar.update, stop)

            for count, (file, path) in enumerate(in_parallel(bring, jobs, workers), 1):
                self._note(file, path)
                say(f"{label}: {count} of {len(jobs)}, {file.path} ({human(file.size)})")

    def _note(self, file: RemoteFile, path: str) -> None:
        self.record["files"][path] = {"size": file.size, "digest": file.digest}
        self.save()

    def _part(self, path: str) -> Path:
        return self.hidden / "incoming" / (path.replace("/", "+") + ".part")

    def _bytes_of_part(self, path: str) -> int:
        return self._part(path).stat().st_size if self._part(path).exists() else 0

    # ---- parts: named groups of files or folders

    def has_part(self, name: str) -> bool:
        """Whether the part was finished and nothing of it was removed since."""
        paths = self.record["parts"].get(name, [])
        return bool(paths) and all(
            self.is_recorded(p) if p in self.record["files"] else self.at(p).exists() for p in paths
        )

    def finish_part(self, name: str, paths: list[str]) -> None:
        self.record["parts"][name] = sorted(paths)
        self.save()

    def place(self, name: str, moves: list[tuple[Path, str]]) -> None:
        """Move (unpacked path, final path) into place and record the part as finished."""
        for _, target in moves:
            self.refuse_foreign(name, target)
        # the archives go next: what was unpacked must be on the disk, not only in its cache
        os.sync()
        written = [[os.path.relpath(source, self.root), target] for source, target in moves]
        self.record["moves"][name] = written
        self.save()
        self.finish_moves(name)

    def finish_moves(self, name: str) -> None:
        """Go on with the moves that are written down for the part; nothing to do without."""
        if name not in self.record["moves"]:
            return
        moves = self.record["moves"][name]
        for source, target in moves:
            if self.at(source).exists():
                with disk_errors(self.at(target)):
                    os.replace(self.at(source), self.at(target))
        del self.record["moves"][name]
        self.finish_part(name, [target for _, target in moves])

    def refuse_foreign(self, name: str, path: str) -> None:
        """UserError if something has the final name already."""
        if self.at(path).exists():
            raise UserError(
                f"{self.at(path)} is there, but {name} was not finished by this command or is "
                f"not whole any more; move it away, or leave {name} out of PARTS"
            )

    def forget(self, folder: Path) -> None:
        """Remove a folder below `.download` and the records of its files."""
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        prefix = f"{os.path.relpath(folder, self.root)}/"
        files = self.record["files"].items()
        self.record["files"] = {path: known for path, known in files if not path.startswith(prefix)}
        self.save()

    # ---- disk

    def need(self, count: float, what: str) -> None:
        """UserError if the disk has not `count` bytes free."""
        free = shutil.disk_usage(self.root).free
        if count + SPARE > free:
            raise UserError(
                f"{what} needs {human(count + SPARE)} on the disk of {self.root} but "
                f"{human(free)} are free; make room, or set DATA_DIR or GRAD_ROOT to another disk"
            )
