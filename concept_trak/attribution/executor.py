"""Who computes the shards of a store: this process, several at a time, or a cluster
(`ray_tasks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import UserError

POLL_SECONDS = 0.5

Compute = Callable[[Any], None]  # of a shard's number, or whatever names a part of the work


class Executor(Protocol):
    """Gets `compute(shard)`, which makes a shard complete, and has it called for every shard.

    `compute` may be called again for what was complete already: it must do nothing then.
    """

    def run(self, compute: Compute, shards: Sequence[Any]) -> None:
        """UserError at the end, naming them, if some shards failed; the others are complete."""
        ...


class SerialExecutor:
    """One shard after the other, here."""

    def run(self, compute: Compute, shards: Sequence[int]) -> None:
        """See `Executor`; the first failure ends it."""
        for shard in shards:
            compute(shard)


@dataclass(frozen=True)
class ThreadedExecutor:
    """As many shards at a time as `slots`, each in a thread that mostly waits for a process.

    watch: called every half a second while shards are left. failed(shard, error): told at once.
    """

    slots: int
    watch: Callable[[], None]
    failed: Callable[[int, UserError], None]

    def run(self, compute: Compute, shards: Sequence[int]) -> None:
        """See `Executor`: a shard that fails takes nothing with it."""
        dead: list[int] = []

        def attempt(shard: int) -> None:
            try:
                compute(shard)
            except UserError as error:
                dead.append(shard)
                self.failed(shard, error)

        pool = ThreadPoolExecutor(self.slots)
        try:
            pending = {pool.submit(attempt, shard) for shard in shards}
            while pending:
                done, pending = wait(pending, POLL_SECONDS)
                for future in done:
                    future.result()
                self.watch()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if dead:
            again = f"run again with SHARDS={','.join(map(str, sorted(dead)))}"
            raise UserError(f"{len(dead)} of {len(shards)} shards died; {again}")
