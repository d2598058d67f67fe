"""What leaves the service beside answers: files, each opened in one checked way, and sentences,
which tell no folder of this machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path
from typing import Any

from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from ..settings import ROOT, Settings

MEDIA = {".csv": "text/csv", ".txt": "text/plain", ".json": "application/json"}
MEDIA |= {".html": "text/html", ".png": "image/png", ".jpg": "image/jpeg"}
# a command of this machine's shell, with its variables, as refusals end in one
COMMAND = re.compile(
    r"(?:\b[A-Z_]+=(?:'[^']*'|\S)+ )*"
    r"\b(?:bash \S*scripts/|concept-trak |git checkout |pip install |rm )"
)
PATH = re.compile(r"(?<![\w/.:])~?/(?!(?:answers|docs|pictures|thumbnails)\b)[^\s'\"(),;:]+")


class Moved(Exception):
    """A file that is not there, or no longer what its name was."""


def opened(path: Path, real: Path) -> int:
    """A descriptor of the regular file `path`, which led to `real` when that was found allowed.
    Moved if it leads elsewhere by now: through a link that was put there meanwhile, say.
    """
    found = -1
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # a loop of links, a zero byte
        found = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(found).st_mode) and path.resolve() == real:
            return found
    if found >= 0:
        os.close(found)
    raise Moved


def read(path: Path, real: Path) -> str:
    """The UTF-8 text of a file; see `opened`."""
    with open(opened(path, real), encoding="utf-8", errors="replace") as file:
        return file.read()


class Opened(FileResponse):
    """A file by its open descriptor, whatever becomes of its name."""

    def __init__(self, descriptor: int, media: str, **headers: str) -> None:
        self.descriptor, found = descriptor, os.fstat(descriptor)
        about: dict[str, Any] = {"media_type": media, "headers": headers, "stat_result": found}
        super().__init__(f"/dev/fd/{descriptor}", **about)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            os.close(self.descriptor)


def places(settings: Settings) -> dict[str, str]:
    """{a folder of this machine: what it is called}, the longest first."""
    found = {str(ROOT): "the checkout", os.getcwd(): "the working folder"}
    for name, value in settings.flat().items():
        if name.endswith(("_dir", "_path")) and value:
            forms = {value, os.path.abspath(value), os.path.realpath(value)}
            forms |= {os.path.relpath(form) for form in forms}
            found |= {form: name.upper() for form in forms if "/" in form}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def without_places(sentence: str, known: dict[str, str]) -> str:
    """The sentence without commands, and without folders and files of this machine."""
    if command := COMMAND.search(sentence):
        before = sentence[: command.start()].rstrip()
        end = max(before.rfind(";"), before.rfind("?") + 1)  # of what does not lead to the command
        sentence = before[:end] if end > 0 else before.rstrip(":")
    for place, name in known.items():
        sentence = re.sub(rf"(?<![\w/.]){re.escape(place)}(/[^\s'\"(),;:]+)?(?!\w)", name, sentence)
    return PATH.sub("a file of the service", sentence)


def printable(text: Any) -> str:
    """One line that every client can be sent: control characters and half surrogates as escapes."""
    whole = " ".join(str(text).split())
    return "".join(c if c.isprintable() or c == " " else repr(c)[1:-1] for c in whole)
