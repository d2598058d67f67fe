"""A process that is ended: it unwinds, and takes those that it started with it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

WATCH_STDIN = "CONCEPT_TRAK_WATCH_STDIN"  # set for a process that is to end with its parent


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM unwinds like an interrupt, so that what was started is ended and half-made files are
    removed. So does the end of the standard input where `WATCH_STDIN` is set.
    """

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    if os.environ.get(WATCH_STDIN):
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_with_parent() -> None:
    """Wait for the end of a pipe that only the parent holds, which comes with its own, even by
    SIGKILL.
    """
    with contextlib.suppress(OSError, ValueError):
        while os.read(sys.stdin.fileno(), 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
