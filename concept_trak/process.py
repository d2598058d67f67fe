"""A process as its user meets it: what it says meanwhile, and that it takes with it what it started
when it is ended.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

VERBOSITY = {"level": 0}  # -1: results and errors alone; 1: times, and where an error came from
START = time.monotonic()


def set_verbosity(level: int) -> None:
    """Set how much is said. Progress bars are for someone who looks: not for a file or a pipe,
    where each step would be a line more.
    """
    VERBOSITY["level"] = level
    if level < 0 or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read by tqdm when it is imported


def log(text: str) -> None:
    """Tell on the standard output what is being done, unless -q was given; with -v, when."""
    if VERBOSITY["level"] > 0:
        text = f"{time.monotonic() - START:7.1f} s  {text}"
    if VERBOSITY["level"] >= 0:
        print(text, flush=True)


# what moves the cursor, sets a title, clears or reorders: all controls but tab and line feed, and
# those of the writing's direction that hide how a name goes on
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
OF_BARS = re.compile(r"\r|\n*(?:\x1b\[A)+\Z")  # what tqdm moves the cursor by


class Plain:
    r"""A stream of text whose controls are written as \x1b: labels, captions and names of files may
    hold any. A name that is no text does not end a run.
    """

    def __init__(self, stream: TextIO, bars: bool) -> None:
        self._stream, self._bars = stream, bars
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """As a stream's."""
        bar = OF_BARS.match(text) if self._bars else None
        start = bar.end() if bar else 0
        self._stream.write(text[:start] + CONTROLS.sub(_escaped, text[start:]))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def speak_plainly() -> None:
    """Let no text from outside steer the terminal: what is written from now on is `Plain`."""
    for name in ("stdout", "stderr"):
        if not isinstance(stream := getattr(sys, name), Plain):
            setattr(sys, name, Plain(stream, bars=name == "stderr"))


def _escaped(match: re.Match) -> str:
    return match[0].encode("unicode_escape").decode()


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
