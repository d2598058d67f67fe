"""Train gradients: the rows of the train split, shard by shard, into a store of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from ..errors import UserError
from ..flags import command
from ..gradients.compute import ProjectedGradients
from ..gradients.objectives import train_gradients
from ..gradients.states import FitModel, TrainBatch
from ..models.condition import Condition
from ..parsing import parse_shards
from ..process import log
from ..registry import OBJECTIVES
from ..settings import provenance
from ..store.chunks import Chunk
from ..store.dtypes import STORED_TYPES
from ..store.manifest import Layout
from ..store.store import Store
from ..store.verify import pending_shards
from .executor import Executor, SerialExecutor
from .find_store import choose_folder, find_store
from .naming import train_timesteps
from .preflight import ROW_STAGES, missing_gradients_message
from .reuse import ReusableGradients, check_displayed_images, find_reusable, write_image_digests
from .task import AttributionTask


def compute_gradients(
    task: AttributionTask, x0: torch.Tensor, cond: Condition, captions: Sequence[str]
) -> ProjectedGradients:
    """Train rows [B, k] of pictures x0 [B, C, h, w] under their captions, as the settings ask; with
    what the objective keeps beside them as their losses.
    """
    judge = task.fit_judge
    asked = judge and FitModel(judge, *judge.encode_prompts([*captions, ""]).split(len(captions)))
    shown = TrainBatch(x0, cond, task.cond_null, train_timesteps(task.settings), asked)
    return train_gradients(task.row_maker, task.settings.f, shown)


def train_grad(task: AttributionTask, executor: Executor | None = None) -> Store:
    """Fill the store of the settings (its pending shards among SHARDS), resuming at the first row
    that is not on disk. Rows that another store has of the same pictures are taken from there.

    UserError for a damaged finished shard, unless REPAIR is set, which makes it again.
    """
    s, store = task.settings, create_store(task)
    pending = pending_shards(store, parse_shards(s.shards, store.num_split), s.repair)
    known = find_reusable(store, s, task.data.digests()) if pending else ReusableGradients({})
    rows = [range(*run) for i in pending for run in store.missing(i)]
    taken = sum(map(known.count, rows))
    todo = sum(map(len, rows)) - taken
    size = store.num_rows * store.dim * STORED_TYPES[store.dtype].itemsize / 1e6
    progress = f"{todo} of {store.num_rows} rows to compute, {size:.0f} MB on disk when complete"
    log(f"{store.where}: {progress}" + (f", {taken} known from before" if taken else ""))
    with tqdm(total=todo, desc="train gradients", unit="image") as bar:
        (executor or SerialExecutor()).run(
            lambda i: compute_shard(task, store, i, known, bar), pending
        )
    return store


def create_store(task: AttributionTask) -> Store:
    """The store of the settings, made or opened again. UserError when it is of something else.

    That questions about its rows will need more than MAX_MEMORY is told.
    """
    s, weighted = task.settings, OBJECTIVES.get(task.settings.f).row_weight is not None
    dim, identity = task.projection.proj_dim, task.train_identity()
    try:
        task.preconditioner  # noqa: B018
    except UserError as error:
        print(f"warning: to answer from these rows: {error}", file=sys.stderr)
    layout = Layout(len(task.data), dim, s.num_split, s.store_dtype, losses=weighted)
    made_by = {"command": command("train-grad", s, (*ROW_STAGES, "num_split"))}
    store = Store.create(choose_folder(s, identity), layout, identity, provenance() | made_by)
    write_image_digests(store, task.data.digests())
    check_displayed_images(store, task.data.shown_hash())
    return store


def open_store(task: AttributionTask, verify: bool = True) -> Store:
    """The finished store for this model, data and settings, which from then on say the form that
    its rows have. verify: see `Store.open`.

    UserError naming what differs when a store of the same name was made from something else, or its
    rows would be shown with other pictures than before.
    """
    s, store = task.settings, _open(task, verify)
    check_displayed_images(store, task.data.shown_hash())
    if store.dtype != s.store_dtype:
        told = f"the rows are {store.dtype}, not {s.store_dtype}, and are used as they are"
        log(f"{store.where}: {told}; for others set STORE_DTYPE and another GRAD_DIR")
    task.settings = s.but(store_dtype=store.dtype, num_split=store.num_split)
    return store


def _open(task: AttributionTask, verify: bool) -> Store:
    """The store of `open_store`."""
    s, wanted = task.settings, task.train_identity()
    found = find_store(s, wanted)
    if found is None:
        raise UserError(missing_gradients_message(s))
    made_with = {"projection": task.projection.describe()}  # adopts shards of the release
    if "adopted" not in Store.read_manifest(found).identity:
        return Store.open(found, wanted, verify)
    # Of released rows nothing is recorded but the mask; the number of pictures is all that can be
    # checked beside it.
    store = Store.open(found, made_with, verify)
    if store.num_rows > len(task.data):
        raise UserError(
            f"{found} has {store.num_rows} rows but {s.data_dir} has {len(task.data)} pictures; "
            "set DATA_DIR or GRAD_DIR so that both are of one release"
        )
    return store


def compute_shard(
    task: AttributionTask, store: Store, shard: int, known: ReusableGradients, bar: tqdm
) -> None:
    """Make what a shard lacks, in order, and finish it."""
    while True:
        store.absorb(shard)
        missing = store.missing(shard)
        if not missing:
            break
        for made in batches(task, store, Chunk(shard, *missing[0]), known):
            losses = made.losses if store.has_losses else None
            store.append(shard, made.values, made.rows.start, losses)
            bar.update(0 if made.known else len(made.rows))
    store.finish(shard)


def compute_chunk(
    task: AttributionTask, store: Store, piece: Chunk, known: ReusableGradients
) -> None:
    """Make a piece, whole, and keep it."""
    made = list(batches(task, store, piece, known))
    losses = np.concatenate([part.losses for part in made]) if store.has_losses else None
    store.put_piece(piece, np.concatenate([part.values for part in made]), losses)


@dataclass(frozen=True)
class Batch:
    """values [b, k] and losses [b] of consecutive rows; known: taken from another store."""

    rows: range
    values: np.ndarray
    losses: np.ndarray
    known: bool


def batches(
    task: AttributionTask, store: Store, piece: Chunk, known: ReusableGradients
) -> Iterator[Batch]:
    """Yield the rows of a piece. Batches are those of an uninterrupted run over the shard, whatever
    of them is wanted, so the bytes are the same.
    """
    (start, stop), size = store.shard_range(piece.shard), task.settings.batch_size
    for low in range(start + (piece.first - start) // size * size, piece.stop, size):
        for is_known, run in known.runs(range(low, min(low + size, stop))):
            rows = range(max(run.start, piece.first), min(run.stop, piece.stop))
            if not rows:
                continue
            values, losses = known.read(run) if is_known else compute_batch(task, run)
            here = slice(rows.start - run.start, rows.stop - run.start)
            yield Batch(rows, values[here], losses[here], is_known)


def compute_batch(task: AttributionTask, rows: range) -> tuple[np.ndarray, np.ndarray]:
    """(values [b, k], losses [b]) of consecutive train pictures."""
    captions = [task.train.captions[i] for i in rows] if task.fit_judge else []
    made = compute_gradients(task, *task.data.batch(rows), captions)
    return made.values.cpu().numpy(), made.losses.cpu().numpy()
