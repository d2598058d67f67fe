"""7z archives in one or several volumes (name.7z.001, .002, ...), unpacked by 7-Zip's program or by
py7zr, whichever is there.

Both compare the CRC of every file while they unpack it, so unpacking into a temporary folder is the
test of the archive, too.
"""

from __future__ import annotations

import errno
import importlib.util
import io
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from concept_trak.atomic_io import disk_errors
from concept_trak.errors import UserError, remove_hint

from .progress import bytes_bar

if TYPE_CHECKING:
    from py7zr import SevenZipFile
    from py7zr.callbacks import ExtractCallback
    from tqdm import tqdm

PROGRAMS = ("7zz", "7z", "7za")  # preferred to py7zr: they use all cores
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
FULL = 2**20  # fewer free bytes than this: the disk is full
VOLUME = re.compile(r"(?P<archive>.+\.7z)(\.(?P<number>\d{3,}))?")


def volumes(names: list[str]) -> dict[str, list[str]]:
    """{archive: its volumes in order} of the names that are archives. UserError for a gap in the
    numbers.
    """
    found: dict[str, dict[int, str]] = {}
    for name in names:
        if match := VOLUME.fullmatch(name):
            found.setdefault(match["archive"], {})[int(match["number"] or 1)] = name
    for archive, numbered in found.items():
        if missing := sorted(set(range(1, max(numbered) + 1)) - set(numbered)):
            raise UserError(
                f"{archive}.{missing[0]:03d} is not on the hub although later volumes are; "
                "run the same again later"
            )
    return {archive: [numbered[i] for i in sorted(numbered)] for archive, numbered in found.items()}


def find_tool() -> str:
    """The path of 7-Zip's program, or "py7zr". UserError naming both if there is none."""
    for name in PROGRAMS:
        if path := shutil.which(name):
            return path
    if importlib.util.find_spec("py7zr"):
        return "py7zr"
    raise UserError(
        "nothing here unpacks 7z archives; put 7z, 7za or 7zz on the PATH, or pip install py7zr"
    )


def unpacked_size(first: Path, tool: str) -> int:
    """Bytes of all files in the archive whose first volume is given."""
    with damage_named(first):
        if tool == "py7zr":
            with _opened(first) as archive:
                return sum(item.uncompressed or 0 for item in archive.list())
        return _listed_size(first, tool)


def unpack(first: Path, folder: Path, total: int, tool: str) -> None:
    """Unpack all into `folder`, with a progress bar to `total` bytes. UserError for a damaged
    archive, which is kept, or a full disk.
    """
    with damage_named(first), bytes_bar(f"unpacking {archive_name(first)}", total) as bar:
        folder.mkdir(parents=True, exist_ok=True)
        if tool == "py7zr":
            with _opened(first) as archive:
                archive.extractall(folder, callback=_callback(bar))
        else:
            try:
                _run_program([tool, "x", "-y", "-bso0", "-bsp1", f"-o{folder}", str(first)], bar)
            except RuntimeError:
                if shutil.disk_usage(folder).free < FULL:  # which the program may call E_FAIL
                    raise OSError(errno.ENOSPC, "No space left on device") from None
                raise


def archive_name(first: Path) -> str:
    return VOLUME.fullmatch(first.name)["archive"]


@contextmanager
def damage_named(first: Path) -> Iterator[None]:
    """One line for whatever the tool raises; a full disk keeps its own."""
    try:
        yield
    except UserError:
        raise
    # py7zr meets damage with anything from its own classes to TypeError, struct.error and OSError
    except Exception as error:
        if getattr(error, "errno", None) in DISK_ERRORS:
            with disk_errors(first.parent):
                raise
        kind = "" if isinstance(error, RuntimeError) else type(error).__name__
        reason = " ".join(f"{kind} {error}".split())[:200]
        raise UserError(
            f"{first} cannot be unpacked ({reason}); all its volumes are kept; if they are "
            f"damaged, {remove_hint(first.parent)}"
        ) from error


@contextmanager
def _opened(first: Path) -> Iterator[SevenZipFile]:
    """The archive, open in py7zr. The buffer fills reads that cross from one volume to the next;
    without it they come back short.
    """
    import multivolumefile
    import py7zr

    whole = first.with_name(archive_name(first))
    raw = open(first, "rb", buffering=0) if first == whole else multivolumefile.open(whole, "rb")
    with raw, io.BufferedReader(raw, 2**20) as joined, py7zr.SevenZipFile(joined, "r") as archive:
        yield archive


def _callback(bar: tqdm) -> ExtractCallback:
    """py7zr's events as steps of the bar."""
    from py7zr.callbacks import ExtractCallback

    class Steps(ExtractCallback):
        def report_update(self, decompressed_bytes: str) -> None:
            bar.update(int(decompressed_bytes))

        def _ignore(self, *_: object) -> None:
            pass

        report_start_preparation = report_postprocess = report_warning = _ignore
        report_start = report_end = _ignore

    return Steps()


def _started(command: list[str], **text: Any) -> subprocess.Popen:
    """The program, with both its outputs in one pipe."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, **pipes, **text)


def _listed_size(first: Path, tool: str) -> int:
    """The sum of the sizes that `7z l -slt` prints after its line of dashes; read as it comes, for
    a million files are long.
    """
    total, inside, last = 0, False, ""
    with _started([tool, "l", "-slt", str(first)], text=True, errors="replace") as process:
        for line in process.stdout:
            inside = inside or line.startswith("----------")
            if inside and (match := re.fullmatch(r"Size = (\d+)\n", line)):
                total += int(match[1])
            last = _reason(last, line)
    if process.returncode:
        raise RuntimeError(last or f"{tool} exits with {process.returncode}")
    return total


def _run_program(command: list[str], bar: tqdm) -> None:
    """Run 7-Zip with its per cents as the bar; RuntimeError with its own words when it fails."""
    with _started(command) as process:
        text = b""
        while chunk := process.stdout.read1(2**16):
            text = (text + chunk)[-(2**14) :]
            if percents := re.findall(rb"(\d{1,3})%", chunk):
                bar.update((bar.total or 0) * int(percents[-1]) // 100 - bar.n)
    if process.returncode:
        reason = ""
        for line in re.split(r"[\r\n\b]+", text.decode(errors="replace")):
            reason = _reason(reason, line)
        raise RuntimeError(reason or f"{command[0]} exits with {process.returncode}")
    bar.update((bar.total or 0) - bar.n)


def _reason(so_far: str, line: str) -> str:
    """The line that says best what went wrong: the first with ERROR, the one below "ERRORS:", else
    the last that is not empty.
    """
    line = line.strip()
    if so_far == "ERRORS:" and line:
        return f"ERROR: {line}"
    if not line or "ERROR" in so_far or re.fullmatch(r"(Sub items )?Errors: \d+", line):
        return so_far
    return line
