"""`concept-trak bench-cluster`: what a cluster costs over a local run, and a large run simulated.

Rows of the embedded model are made in turn by `EXECUTOR=local` processes, each filling shards of
its own, and by as many workers of a Ray cluster on this machine, in pieces that are put together.
Model and pictures are loaded, and the cluster is up, before the clock starts; what that took is
told by itself. The overhead is that of a round, and its median over rounds.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from concept_trak.attribution.ray_cluster import ShardTask
from concept_trak.errors import UserError
from concept_trak.flags import settings_of
from concept_trak.registry import OBJECTIVES
from concept_trak.settings import Settings, as_dict, provenance
from concept_trak.store.chunks import Chunk
from concept_trak.store.manifest import Layout
from concept_trak.store.store import Store

from .cluster_simulation import HOUR, SimulatedRun, simulate

NODE_HOURS = (24.0, 24.0 * 7, 24.0 * 30)  # the middle one is that of the JSON


def bench(arguments: argparse.Namespace) -> None:
    """Print two tables, then one JSON object as the last line. UserError for numbers too small."""
    rows, repeats, seeds = arguments.bench_rows, arguments.repeats, arguments.seeds
    if min(rows - 1, repeats, seeds) < 1:
        raise UserError("--bench-rows must be at least 2, --repeats and --seeds at least 1")
    settings = settings_of(arguments).on("cpu").but(device="cpu", num_train=0)
    with tempfile.TemporaryDirectory() as folder:
        measured = compare(settings, Path(folder), rows, repeats)
    print(table(measured))
    plan = SimulatedRun(row_seconds=measured["row_seconds"])
    simulated = {hours: of_rate(replace(plan, node_hours=hours), seeds) for hours in NODE_HOURS}
    print(simulated_table(plan, simulated))
    middle = simulated[NODE_HOURS[1]]
    result = {
        "overhead": measured["workers"]["1"]["overhead"],
        "recomputed_rows": statistics.median(o["recomputed"] for o in middle),
        "lost_rows": max(o["lost"] for outcomes in simulated.values() for o in outcomes),
    }
    about = {"rows": rows, "measured": measured, "plan": vars(plan), "simulated": simulated}
    about |= {"settings": as_dict(settings), "provenance": provenance()}
    print(json.dumps(result | about))


# ---- measured


def compare(settings: Settings, folder: Path, rows: int, repeats: int) -> dict:
    """{"workers": {"1": ..., "2": ...}, "row_seconds": of a local row}; rows per second."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy processes of two threads wait
    found = {str(count): _rounds(settings, folder, rows, repeats, count) for count in (1, 2)}
    fastest = statistics.median(found["1"]["local"])
    return {"workers": found, "row_seconds": 1 / fastest, "cores": os.cpu_count()}


def _rounds(settings: Settings, folder: Path, rows: int, repeats: int, count: int) -> dict:
    from concept_trak.attribution.ray_tasks import cluster

    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context) as pool:
        together = [pool.submit(_load, settings, rows, count) for _ in range(count)]
        for future in together:
            future.result()
        loaded = time.perf_counter() - start
        start = time.perf_counter()
        with cluster(total=count):
            ray = functools.partial(_on_ray, settings, rows, count)
            ray(folder / f"warm-{count}")
            up = time.perf_counter() - start
            local = functools.partial(_locally, pool, settings, rows)
            times: dict[str, list[float]] = {"local": [], "ray": []}
            for number in range(repeats):
                for name, run in (("local", local), ("ray", ray)):
                    took = run(folder / f"{name}-{count}-{number}")
                    times[name].append(rows / took)
    ratios = [ray / local for ray, local in zip(times["ray"], times["local"], strict=True)]
    overheads = [1 - ratio for ratio in ratios]
    return times | {
        "overhead": statistics.median(overheads),
        "overhead_spread": [min(overheads), max(overheads)],
        "load_seconds": loaded,
        "cluster_and_load_seconds": up,
    }


def _store(settings: Settings, folder: Path, rows: int) -> str:
    """A store of the first rows, from the identity of the model; its name below `folder`."""
    task = _task(settings)
    losses = OBJECTIVES.get(settings.f).row_weight is not None
    layout = Layout(rows, task.projection.proj_dim, 2, settings.store_dtype, losses=losses)
    return Store.create(folder / "rows", layout, task.origin(), {}).folder.name


@functools.lru_cache(maxsize=1)
def _task(settings: Settings):  # noqa: ANN202 - a Corpus, whose module loads torch
    from concept_trak.attribution.task import AttributionTask

    task = AttributionTask(settings.but(grad_dir="nowhere"), "cpu")
    task.data.apart = True
    return task


def _load(settings: Settings, rows: int, count: int) -> None:
    """In a process of its own: load, and make a batch; wait for the others, or one takes all."""
    task = _task(settings)
    from concept_trak.attribution.train_grad import compute_batch

    compute_batch(task, range(min(rows, settings.batch_size)))
    time.sleep(1.0 if count > 1 else 0.0)


def _fill(settings: Settings, folder: Path, shard: int) -> None:
    """What a process of EXECUTOR=local does with a shard."""
    from tqdm import tqdm

    from concept_trak.attribution.reuse import ReusableGradients
    from concept_trak.attribution.train_grad import compute_shard

    store = Store.read_manifest(folder / "rows")
    compute_shard(_task(settings), store, shard, ReusableGradients({}), tqdm(disable=True))


def _locally(pool: ProcessPoolExecutor, settings: Settings, rows: int, folder: Path) -> float:
    """Seconds of as many local processes as the pool has, each a shard at a time."""
    pool.submit(_store, settings, folder, rows).result()
    start = time.perf_counter()
    for future in [pool.submit(_fill, settings, folder, shard) for shard in (0, 1)]:
        future.result()
    return time.perf_counter() - start


def _on_ray(settings: Settings, rows: int, count: int, folder: Path) -> float:
    """Seconds of the tasks of both shards on the cluster."""
    from concept_trak.attribution import ray_cluster as cluster

    name = _store(settings, folder, rows)
    store = Store.read_manifest(folder / name)
    here = settings.but(grad_dir=str(folder))
    step = min(cluster.chunk_rows(settings), max(settings.batch_size, rows // 8))
    pieces = cluster.tasks_of(store, (0, 1), step)
    start = time.perf_counter()
    progress = cluster.Progress(rows, 0)
    cluster.run_tasks(BenchWork(here, name, loaded=settings), store, [0, 1], pieces, progress)
    return time.perf_counter() - start


@dataclass(frozen=True)
class BenchWork(ShardTask):
    """As `ShardTask`, with a model that serves the stores of all rounds.

    loaded: the settings it is loaded under.
    """

    loaded: Settings = Settings()

    def make(self, store: Store, piece: Chunk) -> None:
        """See `ShardTask`."""
        from concept_trak.attribution.reuse import ReusableGradients
        from concept_trak.attribution.train_grad import compute_chunk

        compute_chunk(_task(self.loaded), store, piece, ReusableGradients({}))


# ---- simulated


def of_rate(plan: SimulatedRun, seeds: int) -> list[dict]:
    """Outcomes of a plan, one a seed."""
    return [vars(simulate(plan, seed)) for seed in range(seeds)]


def table(measured: dict) -> str:
    """Rows per second of each number of workers: medians, and the range over rounds."""
    head = f"{'':10} {'local rows/s':>24} {'Ray rows/s':>24} {'overhead':>24}"
    lines = [head + "   loading, cluster and loading (s)"]
    for count, found in measured["workers"].items():
        shown = [_range(found[name], "7.2f") for name in ("local", "ray")]
        low, high = found["overhead_spread"]
        shown.append(f"{found['overhead']:7.1%} ({low:.1%} to {high:.1%})")
        up = f"{found['load_seconds']:.0f}, {found['cluster_and_load_seconds']:.0f}"
        lines.append(f"{count} workers  " + " ".join(f"{cell:>24}" for cell in shown) + f"   {up}")
    return "\n".join(lines) + "\n"


def simulated_table(plan: SimulatedRun, simulated: dict[float, list[dict]]) -> str:
    """A line a rate of failure: medians, and the range over seeds."""
    of = f"{plan.rows:,} rows on {plan.workers:,} workers, {plan.node_workers} a node"
    each = f"{plan.row_seconds:.3f} s a row, pieces of {plan.piece_rows}"
    lines = [f"simulated: {of}, {each}; {plan.ideal_seconds / HOUR:.3f} h if nothing ever waited"]
    lines.append(
        f"{'a node fails once in':22} {'makespan (h)':>24} {'node failures':>20} "
        f"{'rows made twice':>28} {'rows lost':>10} {'tries of a piece':>17}"
    )
    for hours, outcomes in simulated.items():
        cells = {name: [outcome[name] for outcome in outcomes] for name in outcomes[0]}
        spans = [seconds / HOUR for seconds in cells["makespan"]]
        lines.append(
            f"{hours / 24:>4.0f} days{'':13} {_range(spans, '.3f'):>24} "
            f"{_range(cells['node_failures'], '.0f'):>20} "
            f"{_range(cells['recomputed'], ',.0f'):>28} "
            f"{max(cells['lost']):>10} {max(cells['attempts']):>17}"
        )
    return "\n".join(lines) + "\n"


def _range(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
