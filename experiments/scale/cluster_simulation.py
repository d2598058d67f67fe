"""A large run, simulated: workers on nodes that fail, pieces that are made again.

The model, by events in time order. Pieces of `piece_rows` rows are taken from a queue by workers
that are free. A piece takes piece_rows x row_seconds x a factor, log-normal with median 1, of each
piece, and is committed whole at its end. Nodes of `node_workers` workers fail independently, at
exponential times of mean `node_hours`; what their workers had in flight goes to the head of the
queue `notice_seconds` later, and the node is back, empty, after `repair_seconds`. The driver fails,
too, as often as a node: everything in flight is lost, and it starts again after `repair_seconds`.
Not in the model: the store's bandwidth, and the joining of pieces to shards.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from concept_trak.store.chunks import split

HOUR = 3600.0


@dataclass(frozen=True)
class SimulatedRun:
    """What is simulated; times in seconds unless named otherwise."""

    rows: int = 10**8
    workers: int = 1000
    piece_rows: int = 1024
    row_seconds: float = 0.063
    node_workers: int = 8
    node_hours: float = 24.0 * 7
    notice_seconds: float = 15.0
    repair_seconds: float = 600.0
    spread: float = 0.1

    @property
    def ideal_seconds(self) -> float:
        """Without failures, if no worker ever waited."""
        return self.rows * self.row_seconds / self.workers


@dataclass
class Outcome:
    """makespan in seconds; recomputed: rows made that had to be made again; lost: rows that are in
    no committed piece; attempts: the most that one piece took.
    """

    makespan: float = 0.0
    node_failures: int = 0
    driver_failures: int = 0
    recomputed: int = 0
    lost: int = 0
    attempts: int = 0


@dataclass
class Simulation:
    """State of a simulation; `run` it once."""

    plan: SimulatedRun
    rng: np.random.Generator
    outcome: Outcome = field(default_factory=Outcome)

    def __post_init__(self) -> None:
        p = self.plan
        self.sizes = [b - a for a, b in split(0, p.rows, 0, p.piece_rows)]
        self.queue = deque(range(len(self.sizes)))
        self.attempts, self.committed = [0] * len(self.sizes), bytearray(len(self.sizes))
        self.at: dict[int, tuple[int, float, float]] = {}  # worker -> (piece, begun, takes)
        self.life = [0] * p.workers  # counts what a worker was torn from: stale ends are ignored
        self.free, self.down = [*range(p.workers)][::-1], set()
        self.events: list[tuple[float, int, str, tuple]] = []
        self.number, self.driver_up, self.left = 0, True, len(self.sizes)

    def run(self) -> Outcome:
        """Until every piece is committed."""
        now, nodes = 0.0, -(-self.plan.workers // self.plan.node_workers)
        for node in range(nodes):
            self._plan_failure(now, "node fails", node)
        self._plan_failure(now, "driver fails")
        self._assign(now)
        while self.left:
            now, _, kind, about = heapq.heappop(self.events)
            self.actions[kind](self, now, *about)
            self._assign(now)
        made = sum(size for size, done in zip(self.sizes, self.committed, strict=True) if done)
        self.outcome.makespan, self.outcome.lost = float(now), self.plan.rows - made
        self.outcome.attempts = max(self.attempts)
        return self.outcome

    def _at(self, time: float, kind: str, *about: int) -> None:
        self.number += 1
        heapq.heappush(self.events, (time, self.number, kind, about))

    def _plan_failure(self, now: float, kind: str, *about: int) -> None:
        self._at(now + self.rng.exponential(self.plan.node_hours * HOUR), kind, *about)

    def _assign(self, now: float) -> None:
        while self.driver_up and self.queue and self.free:
            worker, piece = self.free.pop(), self.queue.popleft()
            factor = np.exp(self.plan.spread * self.rng.standard_normal())
            takes = self.sizes[piece] * self.plan.row_seconds * factor
            self.attempts[piece] += 1
            self.at[worker] = (piece, now, takes)
            self._at(now + takes, "ends", worker, self.life[worker])

    def _ends(self, now: float, worker: int, life: int) -> None:
        if life != self.life[worker]:
            return
        piece, _, _ = self.at.pop(worker)
        self.left -= not self.committed[piece]
        self.committed[piece] = 1
        self.free.append(worker)

    def _tear(self, now: float, worker: int) -> int | None:
        """Take a worker's piece from it; what it had made of it is made again."""
        self.life[worker] += 1
        if worker not in self.at:
            return None
        piece, begun, takes = self.at.pop(worker)
        self.outcome.recomputed += int(self.sizes[piece] * (now - begun) / takes)
        return piece

    def _node_fails(self, now: float, node: int) -> None:
        p, self.outcome.node_failures = self.plan, self.outcome.node_failures + 1
        workers = range(node * p.node_workers, min((node + 1) * p.node_workers, p.workers))
        gone = {*workers}
        self.free = [worker for worker in self.free if worker not in gone]
        self.down |= gone
        for worker in workers:
            if (piece := self._tear(now, worker)) is not None:
                self._at(now + p.notice_seconds, "noticed", piece)
        self._at(now + p.repair_seconds, "node is back", node)

    def _node_is_back(self, now: float, node: int) -> None:
        p = self.plan
        workers = range(node * p.node_workers, min((node + 1) * p.node_workers, p.workers))
        self.down -= {*workers}
        self.free.extend(workers)
        self._plan_failure(now, "node fails", node)

    def _noticed(self, now: float, piece: int) -> None:
        self.queue.appendleft(piece)

    def _driver_fails(self, now: float) -> None:
        self.outcome.driver_failures += 1
        for worker in [*self.at]:
            piece = self._tear(now, worker)
            if piece is not None:
                self.queue.appendleft(piece)
            self.free.append(worker)
        self.driver_up = False
        self._at(now + self.plan.repair_seconds, "driver is back")

    def _driver_is_back(self, now: float) -> None:
        self.driver_up = True
        self._plan_failure(now, "driver fails")

    actions = {
        "ends": _ends,
        "node fails": _node_fails,
        "node is back": _node_is_back,
        "noticed": _noticed,
        "driver fails": _driver_fails,
        "driver is back": _driver_is_back,
    }


def simulate(plan: SimulatedRun, seed: int = 0) -> Outcome:
    """One run."""
    return Simulation(plan, np.random.default_rng(seed)).run()
