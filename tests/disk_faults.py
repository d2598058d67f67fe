"""A disk that refuses the n-th change below a folder, in this process: full, read-only, broken."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from kills import CHANGES, WRITING

ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT)


class Disk:
    """Counts the changes below `root` while it is on, and refuses number `at`."""

    def __init__(self) -> None:
        self.root, self.at, self.error, self.seen, self.on = "", 0, 0, 0, False
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if not self.on or event not in CHANGES:
            return
        if event == "open" and not arguments[2] & WRITING:
            return
        names = [a for a in arguments[:2] if isinstance(a, str | bytes | os.PathLike)]
        below = [n for n in map(os.fsdecode, names) if n.startswith(self.root)]
        if below:
            self.seen += 1
            if self.seen == self.at:
                raise OSError(self.error, os.strerror(self.error), below[0])

    @contextlib.contextmanager
    def refusing(self, root: Path, at: int, error: int) -> Iterator[None]:
        """at = 0: only count."""
        self.root, self.at, self.error, self.seen, self.on = str(root), at, error, 0, True
        try:
            yield
        finally:
            self.on = False
