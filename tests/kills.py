"""A verb that is killed at a chosen moment: right before its n-th change to the disk, or before
the first of a file whose name is given.

The moments are counted by an audit hook in a forked child, so that the same verb meets the same
ones again.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = {
    *("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink"),
    *("os.link", "shutil.rmtree", "shutil.move"),
}
MINUTE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


# diffusers and transformers import their parts late: what is not named here, each child imports
PRELOADED = ("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "peft", "pytest")
PRELOADED += ("transformers.models.clip.tokenization_clip", "experiments.cli", "faiss", "tqdm.auto")
PRELOADED += (
    "concept_trak.cli",
    "concept_trak.report.write",
    "concept_trak.attribution.train_grad",
)
PRELOADED += ("concept_trak.datasets.prepare", "experiments.emoji.model.train")
PRELOADED += ("experiments.emoji.classifier.train", "concept_trak.report.component_report")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([*PRELOADED])


def count_changes(below: Path, at: int | str, tell: Callable[[int], None]) -> None:
    """From now on count the changes below a folder; the process dies before number `at`, or before
    the first whose path that pattern finds.
    """
    root, seen = str(below), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or (event == "open" and not arguments[2] & WRITING):
            return
        names = [a for a in arguments[:2] if isinstance(a, str | bytes | os.PathLike)]
        paths = [path for path in map(os.fsdecode, names) if path.startswith(root)]
        if not paths:
            return
        seen += 1
        tell(seen)
        if any(re.search(at, path) for path in paths) if isinstance(at, str) else seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def child(
    argv: list[str], below: Path, at: int | str, told: Path, variables: dict[str, str]
) -> None:
    """A verb in a process of its own; what it prints goes to the file `told`."""
    from tiny_trainings import SMALLER

    from concept_trak import cli

    os.environ.update(variables)
    SMALLER.get(argv[0], lambda _: None)(below)
    out = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    counter = os.open(told.with_suffix(".count"), os.O_WRONLY | os.O_CREAT)
    count_changes(below, at, lambda n: os.pwrite(counter, n.to_bytes(4, "little"), 0) and None)
    sys.exit(cli.main(argv))


def start(
    argv: list[str], below: Path, told: Path, at: int | str = 0, variables: dict | None = None
) -> multiprocessing.process.BaseProcess:
    """A process of its own for a verb, as `child` has it; it is running."""
    process = SERVER.Process(target=child, args=(argv, below, at, told, variables or {}))
    process.start()
    return process


def run(
    argv: list[str], below: Path, at: int | str = 0, variables: dict[str, str] | None = None
) -> tuple[int, int, str]:
    """(exit code, or minus the signal; changes to the disk; what was printed) of a verb.

    Its process is forked from one that has imported everything and computed nothing: torch's
    threads do not live through a fork.
    """
    told = below.parent / "told.txt"
    process = start(argv, below, told, at, variables)
    process.join(120)
    changes = int.from_bytes(told.with_suffix(".count").read_bytes(), "little")
    return process.exitcode, changes, told.read_text(errors="replace")


def content(folder: Path) -> dict[str, str]:
    """{path: digest} of the files that have their final name; what is being written is left out.

    The minute an answer was made at, as an index tells it, is no part of the content.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and ".part" not in name and ".download" not in name:
            held = path.read_bytes()
            held = MINUTE.sub(b"", held) if path.suffix == ".html" else held
            found[name] = hashlib.sha256(held).hexdigest()
    return found


def moments(changes: int, count: int) -> list[int]:
    """Up to `count` of the numbers 1 to `changes`, evenly spread."""
    return sorted({1 + i * (changes - 1) // max(1, count - 1) for i in range(count)})
