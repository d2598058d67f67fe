"""An executor on a Ray cluster: one task a part of the work, placed, retried and moved by Ray Core.

A task whose worker or node dies is run again elsewhere, and so is one that ends in a
`TransientError` or a cut connection; other errors are the task's own, told at the end. Only twice
as many tasks as the cluster runs at a time are handed over, so that neither the driver nor Ray
keeps a list of millions, and nodes that come later get their share.

RAY_ADDRESS joins a running cluster; without it one is started on this machine, which takes only
who knows a token made for it, and stopped at the end.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .. import isolated
from ..errors import TransientError, UserError
from ..process import VERBOSITY, ended_by_sigterm
from .executor import POLL_SECONDS, Compute

OBJECT_STORE_BYTES = 100_000_000  # rows go to the store by themselves; Ray moves only their names
FAILURES = 20  # tasks that may fail before no more are begun
NODES_SECONDS = 300.0  # in which nodes that were lost may come back
FIRST_SECONDS = 20.0  # in which the first node that can run a task must be there
VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # of a cluster that is started: as local processes, not 15
}
JOIN_SECONDS = 5.0  # for a cluster to answer
LOOK_SECONDS = 2.0  # how old the list of nodes may be
TRANSIENT = (TransientError, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class ClusterStatus:
    """What a cluster does: its nodes, the tasks it can run at a time, those handed over and those
    that are waiting here.
    """

    nodes: int
    slots: int
    running: int
    waiting: int


def no_follow_up(task: Any) -> Sequence[Any]:
    """Of `RayExecutor.done`."""
    return ()


@dataclass(frozen=True)
class RayExecutor:
    """`compute(task)` for every task, on the cluster of `cluster`.

    num_cpus, num_gpus: that a task takes. retries: of one that died or met a transient error.
    done(task): called when a task ended well; returns further tasks. failed(task, reason): told at
    once. watch(state): called about every half a second.
    """

    num_cpus: float
    num_gpus: float
    retries: int
    watch: Callable[[ClusterStatus], None]
    failed: Callable[[Any, str], None]
    done: Callable[[Any], Sequence[Any]] = no_follow_up

    def run(self, compute: Compute, shards: Sequence[Any]) -> None:
        """See `Executor`: a task that fails takes nothing with it. `compute` is pickled."""
        import ray

        call = ray.remote(
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus,
            max_retries=self.retries,
            retry_exceptions=list(TRANSIENT),
            scheduling_strategy="SPREAD",
        )(_call)
        waiting, running, failures = deque(shards), {}, 0
        until = time.monotonic() + FIRST_SECONDS  # there must be a node that can run a task
        looked, nodes, slots = 0.0, 0, 0
        while running or waiting:
            now = time.monotonic()
            if now - looked > LOOK_SECONDS or not slots:
                looked, (nodes, slots) = now, self._nodes(ray)
            if slots:
                until = now + NODES_SECONDS
            elif now > until:
                raise UserError(self._nowhere(ray))
            while waiting and len(running) < 2 * slots:
                task = waiting.popleft()
                running[call.remote(compute, task)] = task
            for reference in _ready(ray, list(running)):
                task = running.pop(reference)
                if (reason := _reason(ray, reference)) is None:
                    waiting.extend(self.done(task))
                else:
                    failures += 1
                    self.failed(task, reason)
            self.watch(ClusterStatus(nodes, slots, len(running), len(waiting)))
            if failures >= FAILURES:
                waiting.clear()
        if failures:
            raise UserError(f"{failures} tasks failed; run the same again to make what is missing")

    def _nodes(self, ray: Any) -> tuple[int, int]:
        """(nodes that are alive, tasks that they can run at a time)."""
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        asked = {kind: n for kind, n in (("CPU", self.num_cpus), ("GPU", self.num_gpus)) if n}
        fitting = ([int(has.get(kind, 0) / n) for kind, n in asked.items()] for has in alive)
        return len(alive), sum(min(counts, default=1) for counts in fitting)

    def _nowhere(self, ray: Any) -> str:
        has = ray.cluster_resources()
        told = f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs in all"
        asked = f"NUM_CPUS={self.num_cpus:g} NUM_GPUS={self.num_gpus:g}"
        return (
            f"no node of the Ray cluster ({told}) can run a task of {asked}; lower NUM_CPUS or "
            "NUM_GPUS"
        )


def _call(compute: Compute, task: Any) -> None:
    compute(task)


def _ready(ray: Any, references: list[Any]) -> list[Any]:
    """Those that ended, well or not, once there is one; [] after half a second."""
    if not references:
        time.sleep(POLL_SECONDS)
        return []
    if not ray.wait(references, num_returns=1, timeout=POLL_SECONDS, fetch_local=False)[0]:
        return []
    return ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)[0]


def _reason(ray: Any, reference: Any) -> str | None:
    """Why a task failed; None if it did not."""
    try:
        ray.get(reference)
    except UserError as error:
        return str(getattr(error, "cause", None) or error)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        told = " ".join(str(cause if cause is not None else error).split())
        kind = type(cause if cause is not None else error).__name__
        return f"{kind}: {told[:300]}"
    return None


def refuse_without_ray() -> None:
    """UserError if Ray is not installed."""
    import importlib.util

    if importlib.util.find_spec("ray") is None:
        raise UserError("EXECUTOR=ray needs Ray; run: pip install 'concept-trak[cluster]'")


@contextlib.contextmanager
def cluster(num_cpus: float = 1.0, total: int = 0) -> Iterator[None]:
    """The cluster of RAY_ADDRESS, joined, or one of this machine's CPUs and GPUs, started.

    num_cpus: that there must be at least. total: that a started one has; 0: as many as there are,
    or `num_cpus`. UserError for an address that does not answer.
    """
    refuse_without_ray()
    address, before = os.environ.get("RAY_ADDRESS", ""), dict(os.environ)
    os.environ |= VARIABLES | before
    if not address:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token()}
        path = os.pathsep.join(isolated.python_path())
        os.environ |= token | before | {"PYTHONPATH": path}
    import ray

    quiet = {"log_to_driver": VERBOSITY["level"] > 0, "logging_level": "ERROR"}
    folder, here = tempfile.mkdtemp(prefix="concept-trak-ray-"), os.getcwd()
    try:
        os.chdir(folder)  # Ray puts the working folder on the path of every worker
        if address:
            _join(ray, address, quiet)
        else:
            _start(ray, folder, total or max(_cores(), math.ceil(num_cpus)), quiet)
        os.chdir(here)
        with ended_by_sigterm():  # Ray has set a handler of its own
            yield
    finally:
        os.chdir(here)
        ray.shutdown()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ |= before
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _token() -> str:
    """One a process: Ray reads it once, so that a second cluster's would not be known."""
    return secrets.token_hex(32)


def _join(ray: Any, address: str, quiet: dict[str, Any]) -> None:
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit() and "/" not in host:  # Ray itself tries for half a minute
            socket.create_connection((host, int(port)), JOIN_SECONDS).close()
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"RAY_ADDRESS={address} cannot be joined ({reason}); start it with: ray start --head, "
            "or to use this machine alone: unset RAY_ADDRESS"
        ) from None


def _cores() -> int:
    """That this process may use."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return own or 1


def _start(ray: Any, folder: str, total: int, quiet: dict[str, Any]) -> None:
    ray.init(
        address="local",
        num_cpus=total,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=folder,
        **quiet,
    )
