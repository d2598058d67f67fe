"""Train gradients on a cluster: a task a piece of a shard, and one that finishes the shard.

The pieces that are missing are those of no file in the store (`store.chunks`), so the same command
goes on where any driver, worker or node ended, and what was in flight is all that is made twice.
Every node reads the model and the pictures, and writes the store, under the same paths: a shared
disk, or object storage for GRAD_DIR. The driver holds no model and moves no rows.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from .. import flags
from ..errors import TransientError, UserError
from ..parsing import parse_shards
from ..process import VERBOSITY, log
from ..settings import Settings, version
from ..store.chunks import Chunk, split
from ..store.store import Store
from ..store.verify import pending_shards
from .naming import store_base
from .preflight import ROW_STAGES, duration
from .ray_tasks import ClusterStatus, RayExecutor, cluster, refuse_without_ray

if TYPE_CHECKING:
    from .task import AttributionTask

SAY_SECONDS = 30.0  # between two lines of progress where there is no bar
LOCK_SECONDS = 2.0  # before a shard that another process is finishing is asked for again
PATHS = ("grad_dir", "data_dir", "sd_model_path", "lora_path", "fit_model_path", "store_cache")


@dataclass(frozen=True)
class FinishShard:
    """The task that puts a shard together, of pieces that are all there."""

    shard: int


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs: it calls it with a `Chunk` or a `FinishShard`.

    name: of the store's folder. code: version of this package.
    """

    settings: Settings
    name: str
    code: str = field(default_factory=version)

    def __call__(self, task: Chunk | FinishShard) -> None:
        """Make a piece, or finish a shard; nothing happens to one that is there already.

        UserError for a node that sees another store, model or version.
        """
        if self.code != version():
            told = f"a node has version {version()} of concept-trak, the driver {self.code}"
            raise UserError(
                f"{told}; bring both to one commit, git pull, and run there: pip install -e ."
            )
        store = _store(self.settings, self.name)
        if store.remote is not None and isinstance(task, FinishShard):
            store.remote.refresh()  # a piece may do with a listing of some seconds ago
        if store.finished(task.shard):
            return
        if isinstance(task, Chunk):
            if task not in store.pieces(task.shard):
                self.make(store, task)
            return
        try:
            _finish(self.settings, store, task.shard)
        except TransientError:  # a task of a driver that was killed may be ending just now
            time.sleep(LOCK_SECONDS)
            raise

    def make(self, store: Store, piece: Chunk) -> None:
        """Compute the rows of a piece and keep them."""
        from .reuse import ReusableGradients
        from .train_grad import compute_chunk

        compute_chunk(_task(self.settings, self.name), store, piece, ReusableGradients({}))


@functools.lru_cache(maxsize=1)
def _store(settings: Settings, name: str) -> Store:
    folder = store_base(settings) / name
    try:
        store = Store.read_manifest(folder)
    except UserError as error:
        import socket

        shared = "set GRAD_DIR to one place for all nodes, a shared disk or s3://..."
        raise UserError(f"{socket.gethostname()}: {error}; {shared}") from None
    store.keeps_copies = False
    return store


@functools.lru_cache(maxsize=1)
def _task(settings: Settings, name: str) -> AttributionTask:
    """The model and the pictures, once a worker. UserError unless the store is of this model.

    That the pictures are the store's is not asked of each worker: it would read all of them.
    """
    from ..models.device import pick_device
    from .task import AttributionTask

    attribution_task = AttributionTask(settings, pick_device(settings.device, settings.gpu_id))
    attribution_task.data.apart = True
    store = _store(settings, name)
    store.expect(attribution_task.origin() | {"num_rows": len(attribution_task.data)})
    return attribution_task


def _finish(settings: Settings, store: Store, shard: int) -> None:
    """Put the pieces together; rows of one that was damaged are made again."""
    store.absorb(shard)
    if store.missing(shard):
        from .reuse import ReusableGradients
        from .train_grad import compute_shard

        bar = tqdm(disable=True)
        return compute_shard(
            _task(settings, store.folder.name), store, shard, ReusableGradients({}), bar
        )
    store.finish(shard)


def tasks_of(store: Store, shards: Sequence[int], rows: int) -> list[Chunk]:
    """What is missing of the shards, in pieces of `rows` that begin at multiples of it."""
    return [
        Chunk(shard, *run)
        for shard in shards
        for gap in store.missing(shard)
        for run in split(*gap, store.bounds[shard], rows)
    ]


def chunk_rows(settings: Settings) -> int:
    """PIECE_ROWS, up to whole batches."""
    return -(-settings.piece_rows // settings.batch_size) * settings.batch_size


class Progress:
    """Rows of all nodes on one bar; a line now and then where nobody looks at one."""

    def __init__(self, total: int, done: int) -> None:
        self.bar = tqdm(total=total, initial=done, desc="train gradients, all nodes", unit="image")
        self.total, self.start, self.done = total, done, done
        self.began = self.said = time.monotonic()

    def add(self, rows: int) -> None:
        """Rows that were made."""
        self.done += rows
        self.bar.update(rows)

    def watch(self, state: ClusterStatus) -> None:
        """See `RayExecutor.watch`."""
        where = f"{state.nodes} nodes, {min(state.running, state.slots)} tasks at a time"
        self.bar.set_postfix_str(where, refresh=False)
        now = time.monotonic()
        if self.bar.disable and now - self.said >= SAY_SECONDS:
            self.said, made = now, self.done - self.start
            left = (self.total - self.done) * (now - self.began) / made if made else 0
            eta = f", about {duration(left)} left" if made else ""
            log(f"{self.done} of {self.total} rows, {where}{eta}")


def launch_tasks(settings: Settings) -> None:
    """Compute the unfinished shards of SHARDS on a Ray cluster; prints the store's state.

    UserError at the end if some tasks failed.
    """
    refuse_without_ray()
    settings = settings.on("cuda:0" if settings.num_gpus else "cpu")
    wanted = parse_shards(settings.shards, settings.num_split)
    print("loading the model once, to see what it needs", flush=True)
    store = Store.read_manifest(prepared(settings))
    left = pending_shards(store, wanted, settings.repair)
    pieces = tasks_of(store, left, chunk_rows(settings))
    todo, total = sum(map(len, pieces)), sum(map(store.count, wanted))
    log(f"{store.where}: {todo} of {total} rows to compute, in {len(pieces)} tasks")
    progress = Progress(total, total - todo)
    if left:
        with cluster(settings.num_cpus):
            run_tasks(ShardTask(settings, store.folder.name), store, left, pieces, progress)
    if store.remote is not None:
        store.remote.refresh()
    told = f"{store.num_rows} rows of {store.dim}, shards left: {len(store.pending())}"
    print(f"{store.where}: {told}")


def run_tasks(
    work: ShardTask, store: Store, shards: list[int], pieces: list[Chunk], progress: Progress
) -> None:
    """Have the pieces made, and each shard finished once its last piece is there. UserError at the
    end if some tasks failed.
    """
    settings = work.settings
    unmade = Counter(piece.shard for piece in pieces)

    def done(task: Chunk | FinishShard) -> list[FinishShard]:
        if isinstance(task, FinishShard):
            return []
        progress.add(len(task))
        unmade[task.shard] -= 1
        return [] if unmade[task.shard] else [FinishShard(task.shard)]

    def failed(task: Chunk | FinishShard, reason: str) -> None:
        rows = f"rows {task.first} to {task.stop - 1}: " if isinstance(task, Chunk) else ""
        tqdm.write(f"shard {task.shard}: {rows}{reason}")

    executor = RayExecutor(
        settings.num_cpus, settings.num_gpus, settings.task_retries, progress.watch, failed, done
    )
    everywhere = settings.but(**{name: _absolute(name, getattr(settings, name)) for name in PATHS})
    whole = [FinishShard(shard) for shard in shards if not unmade[shard]]
    try:
        with progress.bar:
            executor.run(replace(work, settings=everywhere), [*whole, *pieces])
    except UserError as error:
        uses = (*ROW_STAGES, "num_split", "executor", "num_cpus", "num_gpus", "piece_rows")
        line = flags.command("train-grad", settings, uses)
        raise UserError(f"{error} (finished pieces are kept): {line}") from None


def prepared(settings: Settings) -> Path:
    """The folder of the settings' store, made if it is not there, with what is known already of its
    rows; by a process that ends. UserError as `create_store`.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_prepare, settings, VERBOSITY["level"]).result()


def _prepare(settings: Settings, level: int) -> Path:
    from .reuse import find_reusable
    from .task import AttributionTask
    from .train_grad import create_store

    VERBOSITY["level"] = level
    attribution_task = AttributionTask(settings, "cpu")
    store = create_store(attribution_task)
    known = find_reusable(store, settings, attribution_task.data.digests())
    for piece in tasks_of(store, store.pending(), settings.piece_rows) if known.sources else ():
        for is_known, run in known.runs(range(piece.first, piece.stop)):
            if is_known:
                values, losses = known.read(run)
                part = Chunk(piece.shard, run.start, run.stop)
                store.put_piece(part, values, losses if store.has_losses else None)
    return store.folder


def _absolute(name: str, place: str) -> str:
    """A path that other processes understand; addresses and names of a hub stay."""
    is_path = os.path.exists(place) or name == "store_cache"  # which is made when it is needed
    return os.path.abspath(place) if place and is_path else place
