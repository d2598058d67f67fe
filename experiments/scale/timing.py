"""Seconds and peak memory of cases that are timed in turn, each in a process of its own.

A process's peak memory is its case's own. Rounds go through the cases one after the other, and
every ratio is taken within a round: a machine that is busy for a while slows both sides.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from concept_trak.errors import UserError

WARM_UP_ROUNDS = 1

TimedFunction = Callable[[], torch.Tensor]


class TimedCall(NamedTuple):
    """One call of a case; `added_gib` is what of the peak it added to imports, model and inputs."""

    seconds: float
    result: np.ndarray
    peak_gib: float
    added_gib: float


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of one call, with what it left to the GPU."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result


def serve(connection: Connection, make: Callable[[], TimedFunction]) -> None:
    """The process of one case: says when it is ready, then answers every request until None."""
    try:
        work = make()
        resident = restart_peak_rss()
        connection.send(None)
        while connection.recv():
            seconds, result = timed(work)
            peak = peak_rss_gib()
            connection.send(TimedCall(seconds, result.cpu().numpy(), peak, peak - resident))
    except UserError as error:
        connection.send(error)


def time_in_turn(
    cases: Mapping[str, Callable[[], TimedFunction]], rounds: int
) -> dict[str, list[TimedCall]]:
    """{case: one answer a round}, the cases of a round one after the other.

    cases: {name: what makes its work, called in its process}. UserError that a process raises.
    """
    context, processes, pipes = multiprocessing.get_context("spawn"), [], {}
    try:
        for case, make in cases.items():
            pipes[case], theirs = context.Pipe()
            processes.append(context.Process(target=serve, args=(theirs, make), daemon=True))
            processes[-1].start()
            theirs.close()
        for case, pipe in pipes.items():
            receive(case, pipe)
        answers: dict[str, list[TimedCall]] = {case: [] for case in cases}
        for number in range(1 - WARM_UP_ROUNDS, rounds + 1):
            for case, pipe in pipes.items():
                pipe.send(True)
                answers[case].append(receive(case, pipe))
            seconds = (f"{case} {found[-1].seconds:.2f} s" for case, found in answers.items())
            name = f"round {number}" if number > 0 else "warm-up"
            print(f"{name}: {', '.join(seconds)}", flush=True)
        for pipe in pipes.values():
            pipe.send(None)
    finally:
        for process in processes:
            process.join(timeout=5)
            process.terminate()
    return {case: found[WARM_UP_ROUNDS:] for case, found in answers.items()}


def receive(case: str, pipe: Connection) -> Any:
    """The next message of a case's process.

    UserError if it sent one or died, as for want of memory.
    """
    try:
        message = pipe.recv()
    except EOFError:
        raise UserError(f"the process of {case} died; fewer --images need less memory") from None
    if isinstance(message, UserError):
        raise message
    return message


def ratio(
    slow: Sequence[float], fast: Sequence[float], factor: float = 1.0
) -> tuple[float, list[float]]:
    """(median, [least, greatest]) over rounds of slow / fast seconds, times `factor`."""
    values = [factor * a / b for a, b in zip(slow, fast, strict=True)]
    return statistics.median(values), [min(values), max(values)]


def restart_peak_rss() -> float:
    """Let `peak_rss_gib` count from here on, and return what is resident now, GiB.

    Off Linux it counts from the process's start.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_rss_gib()


def peak_rss_gib() -> float:
    """Peak resident memory of this process so far, or since `restart_peak_rss`, GiB.

    Not ru_maxrss where there is another way: on Linux a new process begins with its parent's.
    """
    with contextlib.suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
