"""What the workers of the tests' clusters run; they import it, so it holds no fixture."""

import os
import time
from dataclasses import dataclass

import numpy as np

from concept_trak.attribution.ray_cluster import ShardTask
from concept_trak.errors import UserError

DIM = 16


def rows_of(first, stop):
    """Rows [stop - first, DIM] float32 that depend on their number alone."""
    place = np.arange(first, stop, dtype=np.float64)[:, None] * DIM + np.arange(DIM)
    return np.sin(place).astype(np.float32)


def note(log, *words):
    """Append a line to a log that several processes write."""
    line = " ".join(map(str, words)) + "\n"
    with open(log, "ab", buffering=0) as file:
        file.write(line.encode())


def notes(log):
    """The lines of a log as words; [] if there is none."""
    if not os.path.exists(log):
        return []
    with open(log) as file:
        return [line.split() for line in file]


@dataclass(frozen=True)
class SlowWork(ShardTask):
    """As `ShardTask`, with rows that take a while and need no model; tells the log what it
    begins."""

    log: str = ""
    seconds: float = 0.2

    def make(self, store, piece):
        note(self.log, "begin", piece.name, os.getpid(), os.environ.get("RAY_NODE_ID", "?"))
        time.sleep(self.seconds)
        store.put_piece(piece, rows_of(piece.first, piece.stop))
        note(self.log, "end", piece.name, os.getpid())


@dataclass(frozen=True)
class FailingWork(SlowWork):
    """One piece fails for good, another at its first try."""

    def make(self, store, piece):
        first = not any(line[1] == piece.name for line in notes(self.log))
        if piece.shard == 0 and piece.first == 8:
            note(self.log, "begin", piece.name, os.getpid())
            raise UserError("the picture cannot be read")
        if piece.shard == 1 and piece.first == 48 and first:
            note(self.log, "begin", piece.name, os.getpid())
            raise ConnectionError("cut")
        super().make(store, piece)
