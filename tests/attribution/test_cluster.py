"""A cluster of several nodes on this machine whose workers, nodes and driver are killed: the store
ends in the bytes of a local run, and only what was in flight is made twice.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from concept_trak.attribution import cluster as clusters
from concept_trak.errors import TransientError, UserError
from concept_trak.settings import ROOT, Settings
from concept_trak.store.manifest import Layout
from concept_trak.store.shards import Store

ray = pytest.importorskip("ray", reason="Ray is not installed (extra cluster)")
sys.path.insert(0, str(Path(__file__).parent))
from cluster_work import DIM, SlowWork, notes, rows_of  # noqa: E402

HERE = str(Path(__file__).parent)
SOON = {  # a dead node is noticed within seconds, not within half a minute
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


class Nodes:
    """A head without CPUs and worker nodes of one CPU, each with a raylet of its own."""

    def __init__(self, count):
        from ray.cluster_utils import Cluster

        self.small = {"object_store_memory": 100_000_000, "include_dashboard": False}
        head = {"num_cpus": 0, "_system_config": SOON, **self.small}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers = [self.add() for _ in range(count)]

    def add(self):
        return self.cluster.add_node(num_cpus=1, **self.small)

    def kill(self, node):
        """SIGKILL to the raylet and, as when a machine is lost, to all that it started."""
        raylet = node.all_processes["raylet"][0].process
        lost = [raylet, *psutil.Process(raylet.pid).children(recursive=True)]
        for process in lost:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)

    def stop(self):
        session = Path(self.cluster.head_node.get_session_dir_path()).name
        ray.shutdown()
        self.cluster.shutdown()
        return session


def left_of(session):
    """Processes of a session that live on."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found += [process] if any(session in word for word in process.cmdline()) else []
    return found


@pytest.fixture
def nodes(monkeypatch):
    paths = [str(ROOT), HERE, os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_worker_prestart": "0"}.items():
        monkeypatch.setenv(name, value)
    started = []

    def start(count):
        started.append(Nodes(count))
        monkeypatch.setenv("RAY_ADDRESS", started[0].cluster.address)
        return started[0]

    yield start
    session = started[0].stop()
    _, alive = psutil.wait_procs(left_of(session), timeout=10)
    assert not alive, f"left behind: {alive}"


def store_of(grads, rows=96, shards=3):
    return Store.create(Path(grads) / "rows", Layout(rows, DIM, shards, "float16"), {}, {})


def local_bytes(folder, **shape):
    store = store_of(folder, **shape)
    for shard in range(store.num_split):
        start, stop = store.shard_range(shard)
        store.append(shard, rows_of(start, stop), start)
        store.finish(shard)
    return contents(store.folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(grads, log, seconds=0.2):
    """What `launch_tasks` does once it knows the store."""
    store = store_of(grads)
    work = SlowWork(Settings.of({"grad_dir": str(grads)}), "rows", log=str(log), seconds=seconds)
    left = store.pending()
    pieces = clusters.tasks_of(store, left, 8)
    todo = sum(map(len, pieces))
    with clusters.cluster():
        progress = clusters.Progress(store.num_rows, store.num_rows - todo)
        clusters.run_tasks(work, store, left, pieces, progress)
    return progress


def wait_for(log, count, kind="begin"):
    """The log once it has so many lines of a kind."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(found := [line for line in notes(log) if line[0] == kind]) >= count:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{log}: no {count} x {kind}")


def in_flight(log):
    """{piece: process} of what was begun and has not ended."""
    open_ = {}
    for kind, piece, pid, *_ in notes(log):
        if kind == "begin":
            open_[piece] = int(pid)
        else:
            open_.pop(piece, None)
    return open_


def made_twice(log):
    """{piece: times beyond the first} that it was begun."""
    begun = Counter(line[1] for line in notes(log) if line[0] == "begin")
    return {piece: count - 1 for piece, count in begun.items() if count > 1}


def test_a_killed_worker_and_a_killed_node_cost_what_was_in_flight(nodes, tmp_path):
    """Twelve pieces of three shards on two nodes; a worker dies, then a node."""
    two, log, lost = nodes(2), tmp_path / "log", []

    def kill():
        pid = int(wait_for(log, 3)[2][2])
        lost.extend(piece for piece, owner in in_flight(log).items() if owner == pid)
        os.kill(pid, signal.SIGKILL)
        wait_for(log, 6)
        lost.extend(in_flight(log))
        two.kill(two.workers[0])

    killer = threading.Thread(target=kill)
    killer.start()
    progress = run(tmp_path / "grads", log)
    killer.join()
    store = store_of(tmp_path / "grads")
    assert contents(store.folder) == local_bytes(tmp_path / "whole")
    again = made_twice(log)
    assert again and {*again} <= {*lost}, (again, lost)
    assert progress.done == store.num_rows
