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

from concept_trak.attribution import ray_cluster as clusters
from concept_trak.errors import UserError
from concept_trak.settings import ROOT, Settings
from concept_trak.store.manifest import Layout
from concept_trak.store.store import Store

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
    """A head and other nodes of one CPU each, each with a raylet of its own."""

    def __init__(self, count):
        from ray.cluster_utils import Cluster

        self.small = {"object_store_memory": 100_000_000, "include_dashboard": False}
        head = {"num_cpus": 1, "_system_config": SOON, **self.small}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.others = [self.add() for _ in range(count - 1)]

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
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_enable_worker_prestart", "RAY_worker_niceness"):
        monkeypatch.setenv(name, "0")
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
        two.kill(two.others[0])

    killer = threading.Thread(target=kill)
    killer.start()
    progress = run(tmp_path / "grads", log)
    killer.join()
    store = store_of(tmp_path / "grads")
    assert contents(store.folder) == local_bytes(tmp_path / "whole")
    again = made_twice(log)
    assert again and {*again} <= {*lost}, (again, lost)
    assert progress.done == store.num_rows


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
import test_cluster
test_cluster.run(sys.argv[2], sys.argv[3], 0.5)
"""


@pytest.mark.slow
def test_a_killed_driver_worker_and_node_together(nodes, tmp_path):
    """The driver dies in the middle; the second call finishes though it loses a worker and, of
    three nodes, one.
    """
    three, log, grads = nodes(3), tmp_path / "log", tmp_path / "grads"
    store_of(grads)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, HERE, str(grads), str(log)])
    wait_for(log, 2, "end")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(2)  # the workers of the driver end
    lost = {*in_flight(log)}
    left = sum(map(len, clusters.tasks_of(store_of(grads), range(3), 8)))
    assert 0 < left < 96
    first = len([line for line in notes(log) if line[0] == "begin"])

    def kill():
        wait_for(log, first + 2)
        piece, pid = next(iter(in_flight(log).items()))
        lost.add(piece)
        os.kill(pid, signal.SIGKILL)
        wait_for(log, first + 5)
        lost.update(in_flight(log))
        three.kill(three.others[0])

    killer = threading.Thread(target=kill)
    killer.start()
    progress = run(grads, log, 0.5)
    killer.join()
    assert contents(grads / "rows") == local_bytes(tmp_path / "whole")
    assert progress.start == 96 - left and progress.done == 96
    again = made_twice(log)
    assert again and {*again} <= lost, (again, lost)


@pytest.mark.slow
def test_errors_of_the_work_are_told_and_only_transient_ones_tried_again(nodes, tmp_path):
    from cluster_work import FailingWork

    nodes(1)
    store, log = store_of(tmp_path), tmp_path / "log"
    work = FailingWork(Settings.of({"grad_dir": str(tmp_path)}), "rows", log=str(log), seconds=0)
    pieces = clusters.tasks_of(store, range(3), 8)
    with clusters.cluster(), pytest.raises(UserError, match="1 tasks failed; run the same again"):
        clusters.run_tasks(work, store, [0, 1, 2], pieces, clusters.Progress(96, 0))
    begun = Counter(line[1] for line in notes(log) if line[0] == "begin")
    assert begun[pieces[1].name] == 1, "its own error: not tried again"
    assert begun[pieces[6].name] == 2, "a cut connection: tried again"
    assert store.pending() == [0] and store.missing(0) == [(pieces[1].first, pieces[1].stop)]


COUNTED = """
import sys
sys.path.insert(0, {here!r})
try:
    import time
    from cluster_work import note
    from concept_trak.attribution import cluster
    make = cluster.Work.make
    def counted(self, store, piece):
        note({log!r}, "begin", piece.name, __import__("os").getpid())
        time.sleep(0.5)
        make(self, store, piece)
        note({log!r}, "end", piece.name, __import__("os").getpid())
    cluster.Work.make = counted
except ImportError:
    pass
"""


@pytest.mark.slow
def test_the_command_line_on_a_cluster_of_its_own(tiny_pipeline, tiny_data, tmp_path, monkeypatch):
    """The driver is killed, its cluster goes with it, the same command goes on; the bytes are those
    of EXECUTOR=local.
    """
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    log = tmp_path / "log"
    (tmp_path / "sitecustomize.py").write_text(COUNTED.format(here=HERE, log=str(log)))
    places = [f"--sd-model-path={tiny_pipeline}", f"--data-dir={tiny_data}"]
    flags = [*places, "--num-split=2", "--proj-dim=32", "--batch-size=2"]
    command = [sys.executable, "-m", "concept_trak", "train-grad", *flags]
    local = [*command, f"--grad-dir={tmp_path / 'local'}"]
    subprocess.run(local, cwd=ROOT, check=True, timeout=300)

    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    there = [f"--grad-dir={tmp_path / 'ray'}", "--executor=ray", "--piece-rows=2"]
    where = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": paths}}
    driver = subprocess.Popen([*command, *there], **where)
    wait_for(log, 2, "end")
    mine = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(mine, timeout=120)  # Ray's agents ask now and then who is left
    assert not alive, f"left behind: {alive}"
    lost, (folder,) = in_flight(log), [path for path in (tmp_path / "ray").iterdir()]
    assert Store.read_manifest(folder).pending()

    done = subprocess.run([*command, *there], capture_output=True, text=True, timeout=400, **where)
    assert done.returncode == 0, done.stderr
    assert "shards left: 0" in done.stdout
    assert {*made_twice(log)} <= {*lost}
    ours, theirs = (contents(tmp_path / kind / folder.name) for kind in ("ray", "local"))
    ours.pop("manifest.json"), theirs.pop("manifest.json")  # tell the time they were made
    assert ours == theirs


def test_a_cluster_that_does_not_answer_is_told(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match="RAY_ADDRESS=127.0.0.1:1 cannot be joined"):
        with clusters.cluster():
            pass
